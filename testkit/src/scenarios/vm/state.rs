// SPDX-License-Identifier: Apache-2.0 OR MIT
//! State pages between the host and a guest.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::bus::Bus;
use crate::bus::device;
use crate::lab::Scene;
use crate::nic;
use crate::snapshot;
use crate::vm::VmSpec;

/// The size of the largest page.
const LARGE: usize = 1 << 20;
const LIMIT: Duration = Duration::from_secs(120);

/// Waits until drivers have opened the device as often as this.
fn opened(bus: &Bus, times: u64) -> Result<()> {
    let began = Instant::now();
    loop {
        let opens = bus.stats()?[0]["counters"]["opens"].as_u64();
        if opens >= Some(times) {
            return Ok(());
        }
        ensure!(began.elapsed() < LIMIT, "the device was opened {opens:?} times, not {times}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Values go both ways, the newest value wins, and a page of 1 MiB works.
pub fn pages(scene: &Scene) -> Result<()> {
    let settings = format!(
        r#"pages = [{{ name = "setpoint", bytes = 64, owner = "device" }}, {{ name = "heartbeat", bytes = 64, owner = "driver" }},
            {{ name = "large", bytes = {LARGE}, owner = "device" }}]"#
    );
    let bus = Bus::start(scene, &device("values", "state", &settings.replace('\n', "")))?;
    let mut vm = VmSpec::new("a").device(bus.socket("values")).boot(scene)?;
    nic::prepare(&vm.guest)?;

    // A watcher in the guest may miss values, but never the newest one.
    bus.run(&["state", "set", "values", "setpoint", "before"])?;
    let watch = vm.guest.start("exec vbus-guest state watch setpoint")?;
    watch.wait_for("before", LIMIT)?;
    for n in 0..50 {
        bus.run(&["state", "set", "values", "setpoint", &format!("value-{n}-")])?;
    }
    watch.wait_for("value-49-", LIMIT)?;

    // The device loses its connection, as when the machine is restored from a snapshot, first with
    // a word to its driver.
    bus.run(&["device", "reincarnate", "values"])?;
    opened(&bus, 2)?;
    bus.run(&["state", "set", "values", "setpoint", "anew"])?;
    watch.wait_for("anew", LIMIT)?;
    // Then by a snapshot. QEMU resets the device, which loses its BAR and its connection, and
    // nobody tells the driver.
    snapshot::add_disk(scene, &mut vm)?;
    snapshot::save(&mut vm, "one")?;
    snapshot::load(&mut vm, "one")?;
    opened(&bus, 3)?;
    bus.run(&["state", "set", "values", "setpoint", "restored"])?;
    watch.wait_for("restored", LIMIT)?;
    watch.kill()?;
    watch.wait(LIMIT)?;

    let watch = bus.watch("values", "heartbeat")?;
    for n in 0..5 {
        vm.guest.ok(&format!("vbus-guest state set heartbeat beat-{n}-"))?;
        watch.wait_for(&format!("beat-{n}-"), LIMIT)?;
    }

    let file = scene.dir().join("large");
    let mut word = 1u64;
    let letters = std::iter::repeat_with(|| {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        b"0123456789abcdef"[usize::from((word >> 60) as u8)]
    });
    let value: Vec<u8> = letters.take(LARGE).collect();
    fs::write(&file, &value)?;
    let mut set = bus.command(&["state", "set", "values", "large", "-"]);
    let output = set.stdin(File::open(&file)?).output().context("cannot run vbus")?;
    ensure!(output.status.success(), "vbus state set: {}", String::from_utf8_lossy(&output.stderr));
    let sum = vm.guest.ok(&format!("vbus-guest state get large | head -c {LARGE} | sha256sum"))?;
    let expected = scene.lab.busybox().arg("sha256sum").arg(&file).output()?;
    let expected = String::from_utf8_lossy(&expected.stdout).into_owned();
    let hash = |line: &str| line.split(' ').next().unwrap_or("").to_owned();
    ensure!(
        hash(&sum) == hash(&expected),
        "the large page has the hash {sum} in the guest, {expected} on the host"
    );
    vm.power_off()
}
