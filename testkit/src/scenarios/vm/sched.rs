// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest's real-time tasks, and the threads of its virtual CPUs on the host.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::setpriority_process;
use rustix::thread::{CpuSet, Pid};
use serde_json::{Value, json};

use crate::bus::Bus;
use crate::bus::device;
use crate::guest::Running;
use crate::lab::Scene;
use crate::linux;
use crate::nic;
use crate::process::Process;
use crate::report::Skip;
use crate::system::System;
use crate::vm::{Vm, VmSpec};

const LIMIT: Duration = Duration::from_secs(120);
/// The highest priority that the bus gives.
pub const HIGHEST: u32 = 30;
/// How long a real-time class lasts if the driver does not renew it. A driver that a loaded machine
/// keeps from its processor for longer loses the class for a while, and then gets it again.
pub const BOOST: Duration = Duration::from_secs(2);

/// A thread's class, as Linux numbers it, its real-time priority and its nice value.
pub type Class = (u32, u32, i32);
pub const OWN: Class = (0, 0, 0);
pub const fn fifo(priority: u32) -> Class {
    (1, priority, 0)
}

/// The settings of the device `cpus` for the machine of this name.
pub fn settings(scene: &Scene, machine: &str, boost: Duration) -> String {
    let qmp = scene.dir().join(format!("{machine}.qmp"));
    let boost = boost.as_millis();
    format!("qmp = \"{}\"\npriority-max = {HIGHEST}\nboost-ms = {boost}", qmp.display())
}

/// Whether the bus may set the classes of threads, for its device `cpus`.
pub fn is_privileged(bus: &Bus) -> Result<bool> {
    let shown: Value = serde_json::from_str(&bus.run(&["device", "show", "cpus", "--json"])?)?;
    Ok(shown["device"]["privileged"] == true)
}

/// A guest with two virtual CPUs. The bus asks QEMU for their threads.
pub struct Stage {
    /// The bus of the device `cpus`.
    pub bus: Bus,
    /// The guest.
    pub vm: Vm,
    threads: Vec<u64>,
}

impl Stage {
    fn set(scene: &Scene) -> Result<Stage> {
        Stage::set_with(scene, BOOST, None)
    }

    /// With the Linux driver in the guest, not loaded yet.
    pub fn set_with_module(scene: &Scene) -> Result<Stage> {
        Stage::set_with(scene, BOOST, Some(linux::chosen_system(scene)?))
    }

    fn set_with(scene: &Scene, boost: Duration, system: Option<System>) -> Result<Stage> {
        let bus = Bus::start(scene, &device("cpus", "sched", &settings(scene, "a", boost)))?;
        if !is_privileged(&bus)? {
            return Err(
                Skip("setting the class of QEMU's threads needs CAP_SYS_NICE".into()).into()
            );
        }
        let mut machine = VmSpec::new("a").device(bus.socket("cpus"));
        machine.cpus = 2;
        machine.system = system;
        let vm = machine.boot(scene)?;
        nic::prepare(&vm.guest)?;
        Stage::of(bus, vm)
    }

    /// With the device `cpus` of this bus, and a guest of two virtual CPUs. The device has the
    /// [`settings`] for it.
    pub fn of(bus: Bus, mut vm: Vm) -> Result<Stage> {
        let cpus = vm.control.execute("query-cpus-fast", json!({}))?;
        let threads: Vec<_> = cpus
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|cpu| cpu["thread-id"].as_u64())
            .collect();
        ensure!(threads.len() == 2, "QEMU tells of the threads {cpus}");
        Ok(Stage { bus, vm, threads })
    }

    /// The class of the thread of virtual CPU `cpu`.
    fn class(&self, cpu: usize) -> Result<Class> {
        let path = format!("/proc/{}/task/{}/stat", self.vm.process.id(), self.threads[cpu]);
        let stat = fs::read_to_string(Path::new(&path)).with_context(|| format!("no {path}"))?;
        // Behind the name; the first field there is the third of all.
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3).copied().unwrap_or("");
        Ok((field(41).parse()?, field(40).parse()?, field(19).parse()?))
    }

    /// Waits until the threads have these classes.
    pub fn wait(&self, what: &str, classes: [Class; 2]) -> Result<Duration> {
        let (began, limit) = (Instant::now(), self.vm.guest.at_most(LIMIT));
        loop {
            let now = [self.class(0)?, self.class(1)?];
            if now == classes {
                return Ok(began.elapsed());
            }
            if began.elapsed() > limit {
                let report = self.bus.run(&["device", "show", "cpus"]).unwrap_or_default();
                bail!("{what}: the threads are {now:?}, not {classes:?}\n{report}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Starts a task of the class FIFO in the guest. It sleeps on CPU `cpu`.
    pub fn task(&self, cpu: usize, priority: u32) -> Result<(Running, String)> {
        let mask = 1 << cpu;
        let command =
            format!("echo $$; exec guest-agent fifo {priority} taskset {mask:x} sleep 1000");
        let task = self.vm.guest.start(&command)?;
        task.wait_for("\n", LIMIT)?;
        let pid = task.said().0.trim().to_owned();
        // When the task runs its command, it has moved to its CPU.
        self.vm
            .guest
            .ok(&format!("until grep -q '(sleep)' /proc/{pid}/stat; do sleep 0.05; done"))?;
        Ok((task, pid))
    }
}

/// The threads follow the guest's tasks within the policy. They get their own class back, however
/// the driver, the guest or the bus ends.
pub fn follows(scene: &Scene) -> Result<()> {
    let mut stage = Stage::set(scene)?;
    let guest = stage.vm.guest.clone();
    stage.wait("at first", [OWN, OWN])?;

    // A task that the driver names follows even asleep; then on another CPU; then it ends.
    let (task, pid) = stage.task(1, 20)?;
    let driver = guest.start(&format!("exec vbus-guest sched --pid {pid}"))?;
    stage.wait("a task of priority 20 on CPU 1", [OWN, fifo(20)])?;
    std::thread::sleep(BOOST * 2);
    // Without a renewal the class would not come back.
    stage.wait("the class is kept up", [OWN, fifo(20)])?;
    let began = Instant::now();
    loop {
        let shown: Value = serde_json::from_str(&guest.ok("vbus-guest sched show --json")?)?;
        let cpu = &shown["cpus"][1];
        if cpu["class"] == "fifo" && cpu["priority"] == 20 && cpu["outcome"] == "granted" {
            break;
        }
        ensure!(began.elapsed() < LIMIT, "the guest is told {shown}");
    }
    guest.ok(&format!("taskset -p 1 {pid}"))?;
    task.kill()?;
    driver.ok(LIMIT).context("the end of the task is not the driver's")?;
    stage.wait("the task has ended", [OWN, OWN])?;

    // The most urgent sleeping task counts, up to the bus's highest priority. If the driver hangs
    // or is killed, the thread loses its class.
    let tasks = [stage.task(0, 5)?, stage.task(1, 7)?, stage.task(1, 80)?];
    let driver = guest.start("exec vbus-guest sched --sleeping")?;
    stage.wait("three tasks", [fifo(5), fifo(HIGHEST)])?;
    tasks[2].0.kill()?;
    stage.wait("the most urgent has ended", [fifo(5), fifo(7)])?;
    guest.ok("killall -STOP vbus-guest")?;
    let took = stage.wait("the driver hangs", [OWN, OWN])?;
    guest.ok("killall -CONT vbus-guest")?;
    stage.wait("the driver goes on", [fifo(5), fifo(7)])?;
    driver.kill()?;
    let code = driver.wait(LIMIT)?.code;
    ensure!(code == 128 + 9, "the driver ended with {code}");
    stage.wait("the driver was killed", [OWN, OWN])?;
    eprintln!(
        "with a driver that hangs the threads had their own class within {} ms",
        took.as_millis()
    );
    for (task, _) in &tasks {
        task.kill()?;
    }

    // Without --sleeping the driver sees a running task.
    let driver = guest.start("exec vbus-guest sched")?;
    let busy = guest.start("exec guest-agent fifo 9 taskset 2 guest-agent spin")?;
    stage.wait("a busy task on CPU 1", [OWN, fifo(9)])?;
    busy.kill()?;
    stage.wait("it has ended", [OWN, OWN])?;
    let busy = guest.start("exec guest-agent fifo 9 taskset 2 guest-agent spin")?;
    stage.wait("another one", [OWN, fifo(9)])?;

    // The device is unplugged while a thread has a class from it.
    stage.vm.unplug("dev0")?;
    stage.wait("the device is unplugged", [OWN, OWN])?;
    busy.kill()?;
    let ended = driver.wait(LIMIT)?;
    ensure!(
        ended.code == 1,
        "the driver of a device that went ended with {}: {}",
        ended.code,
        ended.stderr
    );

    // The guest is reset. Then the bus ends after SIGTERM.
    let socket = stage.bus.socket("cpus");
    stage.vm.plug("again", 1, &socket)?;
    guest.ok("until vbus-guest list | grep -q cpus; do sleep 0.05; done")?;
    stage.task(0, 6)?;
    guest.start("exec vbus-guest sched --sleeping")?;
    stage.wait("the device is back", [fifo(6), OWN])?;
    stage.vm.reset()?;
    stage.wait("the guest was reset", [OWN, OWN])?;
    stage.vm.wait_boot(2)?;
    nic::prepare(&stage.vm.guest)?;
    stage.task(0, 6)?;
    guest.start("exec vbus-guest sched --sleeping")?;
    stage.wait("the guest is back", [fifo(6), OWN])?;
    let status = stage.bus.process.terminate(LIMIT)?;
    ensure!(status.success(), "the bus ended with {status}");
    ensure!(
        [stage.class(0)?, stage.class(1)?] == [OWN, OWN],
        "the end of the bus leaves {:?}",
        stage.class(0)?
    );
    Ok(())
}

/// `kill -9` of the bus: the threads get their own class back, before the class would have expired.
pub fn bus_killed(scene: &Scene) -> Result<()> {
    let mut stage = Stage::set_with(scene, Duration::from_secs(60), None)?;
    let guest = stage.vm.guest.clone();
    let _tasks = [stage.task(0, 6)?, stage.task(1, 7)?];
    let driver = guest.start("exec vbus-guest sched --sleeping")?;
    stage.wait("two tasks", [fifo(6), fifo(7)])?;
    stage.bus.process.kill()?;
    let took = stage.wait("the bus was killed", [OWN, OWN])?;
    eprintln!(
        "once the bus was killed the threads had their own class within {} ms",
        took.as_millis()
    );
    drop(driver);
    Ok(())
}

/// Tasks of the host that compete with the virtual CPU for its processor.
const RIVALS: usize = 2;
/// The period of the guest's real-time task, and how often it wakes.
const PERIOD_US: u32 = 10_000;
const TIMES: u32 = 250;
const ROUNDS: usize = 3;

/// A virtual CPU shares its processor with tasks of the host. With `sched` a real-time task of the
/// guest wakes earlier than without. By how much depends on the host's other work, so that is a
/// figure. The median lateness has fallen by 30 to 120, and the mean by 17 to 100: Linux withholds
/// 50 ms of each second from real-time tasks, and this guest is never idle. The test asserts that
/// the virtual CPU's thread has the task's class in each measurement.
///
/// The guest also runs an ordinary busy task. QEMU's other threads run on the host's other
/// processors, because the timers of an emulated guest depend on them. Those that are no virtual
/// CPUs have the lowest nice value there.
pub fn latency(scene: &Scene) -> Result<()> {
    let stage = Stage::set(scene)?;
    let guest = stage.vm.guest.clone();
    let allowed = rustix::thread::sched_getaffinity(None)?;
    let processors: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    let [shared, others @ ..] = &processors[..] else { bail!("no processor") };
    if others.is_empty() {
        return Err(Skip("QEMU's other threads need a processor of their own".into()).into());
    }
    for entry in fs::read_dir(format!("/proc/{}/task", stage.vm.process.id()))? {
        let thread: u64 = entry?.file_name().to_string_lossy().parse()?;
        if thread == stage.threads[1] {
            pin(thread, std::slice::from_ref(shared))?;
        } else {
            pin(thread, others)?;
        }
        if !stage.threads.contains(&thread) {
            setpriority_process(Pid::from_raw(i32::try_from(thread)?), -20)?;
        }
    }
    let mut rivals = Vec::new();
    for _ in 0..RIVALS {
        let mut command = Command::new(scene.lab.agent());
        command.arg("spin");
        let rival = Process::start(command, "a rival", &scene.dir().join("rivals.log"))?;
        pin(rival.id().into(), std::slice::from_ref(shared))?;
        rivals.push(rival);
    }
    let _busy = guest.start("exec taskset 2 guest-agent spin")?;

    let measure = || -> Result<(f64, f64)> {
        let command =
            format!("exec guest-agent fifo 50 taskset 2 guest-agent latency {PERIOD_US} {TIMES}");
        let figures: Value = serde_json::from_str(&guest.start(&command)?.ok(LIMIT * 5)?)?;
        let figure =
            |key: &str| figures[key].as_f64().with_context(|| format!("no {key} in {figures}"));
        Ok((figure("median")?, figure("mean")?))
    };
    // The two take turns, so that other work on this machine slows both.
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let without = measure()?;
        let driver = guest.start("exec vbus-guest sched --sleeping")?;
        let with = std::thread::scope(|scope| {
            let measured = scope.spawn(measure);
            stage.wait("the task is measured", [OWN, fifo(HIGHEST)])?;
            measured.join().map_err(|_| anyhow!("the measurement has panicked"))?
        })?;
        driver.kill()?;
        driver.wait(LIMIT)?;
        stage.wait("the driver has gone", [OWN, OWN])?;
        let ratio = (without.0 / with.0.max(1.0), without.1 / with.1.max(1.0));
        eprintln!(
            "wakes late by, in us: median {:.0} without sched, {:.0} with ({:.1}); mean {:.0} and \
             {:.0} ({:.1})",
            without.0, with.0, ratio.0, without.1, with.1, ratio.1
        );
        ratios.push(ratio);
    }
    let middle = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let median = middle(ratios.iter().map(|ratio| ratio.0).collect());
    let mean = middle(ratios.iter().map(|ratio| ratio.1).collect());
    eprintln!("latency without sched against with: median {median:.1}, mean {mean:.1}");
    Ok(())
}

/// Restricts a thread to these processors.
fn pin(thread: u64, processors: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    processors.iter().for_each(|cpu| set.set(*cpu));
    rustix::thread::sched_setaffinity(Pid::from_raw(i32::try_from(thread)?), &set)
        .context("cannot pin a thread")
}
