// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Priorities of a guest's tasks, and the threads of `vbus-vmm`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::bus::device;
use crate::l1::L1;
use crate::l2::{L1Bus, L2, L2Spec};
use crate::nic;
use crate::report::Figures;

const LIMIT: Duration = Duration::from_secs(120);
/// Tasks of L1 that compete with the virtual CPU for its processor.
const RIVALS: u32 = 2;
/// The period of the guest's real-time task, and how often it wakes.
const PERIOD_US: u32 = 10_000;
const TIMES: u32 = 200;
const ROUNDS: usize = 3;

/// The class of the thread of virtual CPU 1, as the bus has set it, and as L1's kernel has it:
/// policy and real-time priority.
fn class(l1: &L1, bus: &L1Bus) -> Result<(String, String)> {
    let shown: Value = serde_json::from_str(&bus.run("device show cpus --json")?)?;
    let cpu = shown["device"]["cpus"].as_array().into_iter().flatten().find(|cpu| cpu["cpu"] == 1);
    let Some(thread) = cpu.and_then(|cpu| cpu["thread"].as_u64()) else {
        return Ok(Default::default());
    };
    let set = format!(
        "{} {}",
        cpu.map_or("", |cpu| cpu["class"].as_str().unwrap_or("")),
        cpu.map_or(&Value::Null, |cpu| &cpu["priority"])
    );
    // Parse after the name. The first field there is field 3.
    let has = l1.guest.ok(&format!("sed 's/.*) //' /proc/{thread}/stat | cut -d ' ' -f 38,39"))?;
    Ok((set, has.trim().to_owned()))
}

/// Waits until the thread of virtual CPU 1 has the class `set` for the bus, if that is not `None`,
/// and the priority and the policy `has` for L1's kernel.
pub(super) fn wait_class(l1: &L1, bus: &L1Bus, set: Option<&str>, has: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        let now = class(l1, bus)?;
        if set.is_none_or(|set| set == now.0) && has == now.1 {
            return Ok(());
        }
        ensure!(began.elapsed() < LIMIT, "the thread is {now:?}, not {set:?} with {has}");
    }
}

/// The median and mean lateness of a real-time task on CPU 1, in microseconds.
fn measure(l2: &L2) -> Result<(f64, f64)> {
    let command =
        format!("exec guest-agent fifo 50 taskset 2 guest-agent latency {PERIOD_US} {TIMES}");
    let figures: Value = serde_json::from_str(&l2.guest.start(&command)?.ok(LIMIT * 3)?)?;
    let figure =
        |key: &str| figures[key].as_f64().with_context(|| format!("no {key} in {figures}"));
    Ok((figure("median")?, figure("mean")?))
}

/// The threads that `vbus-vmm` reports follow the guest's tasks, as L1's kernel has it. Under load
/// in L1, a real-time task of the busy guest wakes earlier with `sched` than without. By how much
/// depends on the host's other work, so that is a figure: 2.5 to 12.
pub fn latency(l1: &L1, figures: &mut Figures) -> Result<()> {
    let settings = format!("vmm = \"{}/linux.control\"\npriority-max = 30", l1.run_dir());
    let bus = L1Bus::start(l1, &device("cpus", "sched", &settings))?;
    let spec = L2Spec { cpus: 2, ..L2Spec::new("linux") }.device("cpus", &bus.socket("cpus"));
    let l2 = spec.boot(l1)?;
    nic::prepare(&l2.guest)?;

    let task = l2.guest.start("exec guest-agent fifo 20 taskset 2 sleep 1000")?;
    let driver = l2.guest.start("exec vbus-guest sched --sleeping")?;
    wait_class(l1, &bus, Some("fifo 20"), "20 1")
        .with_context(|| format!("{:?}", driver.said()))?;
    let shown: Value = serde_json::from_str(&bus.run("device show cpus --json")?)?;
    let thread = |cpu: usize| shown["device"]["cpus"][cpu]["thread"].as_u64().context("no thread");
    let (first, second) = (thread(0)?, thread(1)?);
    task.kill()?;
    wait_class(l1, &bus, Some("none 0"), "0 0")?;
    driver.kill()?;
    driver.wait(LIMIT)?;

    // The virtual CPU and its rivals share one processor. All else runs on the other.
    let processors = l1.guest.ok("nproc")?;
    if processors.trim() == "1" {
        bail!("L1 has one processor");
    }
    l1.guest.ok(&format!(
        "for task in /proc/$(awk '/^Tgid/ {{print $2}}' /proc/{first}/status)/task/*; do taskset \
         -p 1 ${{task##*/}}; done; taskset -p 2 {second}"
    ))?;
    let rivals: Vec<_> = (0..RIVALS)
        .map(|_| l1.guest.start("exec taskset 2 guest-agent spin"))
        .collect::<Result<_>>()?;
    let busy = l2.guest.start("exec taskset 2 guest-agent spin")?;
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let without = measure(&l2)?;
        let driver = l2.guest.start("exec vbus-guest sched --sleeping")?;
        let with = measure(&l2)?;
        driver.kill()?;
        driver.wait(LIMIT)?;
        eprintln!(
            "wakes late by, in us: median {:.0} without sched, {:.0} with; mean {:.0} and {:.0}",
            without.0, with.0, without.1, with.1
        );
        rounds.push((without.0 / with.0.max(1.0), without.1 / with.1.max(1.0)));
    }
    for process in rivals.iter().chain([&busy]) {
        process.kill()?;
        process.wait(LIMIT)?;
    }
    let middle = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let median = middle(rounds.iter().map(|round| round.0).collect());
    let mean = middle(rounds.iter().map(|round| round.1).collect());
    eprintln!("latency without sched against with: median {median:.1}, mean {mean:.1}");
    figures.insert("sched_latency_ratio_median".into(), median.into());
    figures.insert("sched_latency_ratio_mean".into(), mean.into());
    l2.power_off()
}
