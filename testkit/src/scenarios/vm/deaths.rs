// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One side is killed in the middle of traffic, and the others go on.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::json;

use crate::bus::Bus;
use crate::bus::device;
use crate::guest::Running;
use crate::lab::Scene;
use crate::nic::{self, Nic};
use crate::pair::{ADDRESS, Pair, PairSpec, TRANSFER};
use crate::vm::VmSpec;

const MIB: u64 = 1 << 20;

/// An endless stream from a to b.
fn endless(pair: &Pair) -> Result<(Running, Running)> {
    let receiver = pair.b().start("guest-agent receive 0.0.0.0:5000")?;
    pair.b().ok("until grep -q ':1388 [0:]* 0A' /proc/net/tcp; do sleep 0.05; done")?;
    let sender =
        pair.a().start(&format!("guest-agent send {}:5000 1000000000000 3", ADDRESS[1]))?;
    // The stream runs: 8 MiB have arrived.
    pair.b()
        .ok("until [ $(cat /sys/class/net/vbus0/statistics/rx_bytes) -gt 8388608 ]; do sleep \
        0.05; done")?;
    Ok((sender, receiver))
}

/// `kill -9` of a guest: the bus cleans up and serves the next guest, and the other guest goes on.
pub fn guest(scene: &Scene) -> Result<()> {
    let mut pair = Pair::start(scene, PairSpec::default())?;
    endless(&pair)?;
    pair.vms[1].process.kill()?;
    pair.nics.truncate(1);
    drop(pair.vms.pop());
    let next = VmSpec::new("b").device(pair.bus.socket("net-b")).boot(scene)?;
    nic::prepare(&next.guest)?;
    pair.vms.push(next);
    let nic = pair.driver(1, "")?;
    pair.nics.push(nic);
    pair.transfer(5001, 32 * MIB)?;
    pair.transfer_back(5002, 32 * MIB)
}

/// `kill -9` of the driver process: the device is free again, and a new driver takes it.
pub fn driver(scene: &Scene) -> Result<()> {
    let mut pair = Pair::start(scene, PairSpec::default())?;
    for round in 0..3 {
        let (sender, receiver) = endless(&pair)?;
        let nic = pair.nics.remove(0);
        nic.driver.kill()?;
        let code = nic.driver.wait(TRANSFER)?.code;
        ensure!(code == 128 + 9, "round {round}: the driver ended with {code}");
        sender.kill()?;
        receiver.kill()?;
        let nic = pair.driver(0, "")?;
        pair.nics.insert(0, nic);
        pair.transfer(6000 + round, 8 * MIB)?;
    }
    Ok(())
}

/// `kill -9` of the bus: both guests survive, and the devices come back after unplug and plug.
pub fn bus(scene: &Scene) -> Result<()> {
    let mut pair = Pair::start(scene, PairSpec::default())?;
    endless(&pair)?;
    // QEMU 11.1 aborts if one of its requests is in work when the server dies. A guest that stands
    // still makes none. Its rings are in the middle of the traffic all the same.
    for vm in &mut pair.vms {
        vm.control.execute("stop", json!({}))?;
    }
    pair.bus.process.kill()?;
    for vm in &mut pair.vms {
        vm.control.execute("cont", json!({}))?;
    }
    for vm in &mut pair.vms {
        // The first access to a dead device takes QEMU 5 s; then the guest answers again.
        vm.guest.run_for("true", Duration::from_secs(60))?;
        vm.control.forget_events()?;
        vm.unplug("dev0")?;
        vm.guest.ok(
            "until [ -z \"$(vbus-guest list 2>/dev/null | grep net-)\" ]; do sleep 0.05; done",
        )?;
    }
    for nic in pair.nics.drain(..) {
        let ended = nic.driver.wait(TRANSFER)?;
        ensure!(ended.code != 101, "the driver panicked: {}", ended.stderr);
    }
    let config =
        ["net-a", "net-b"].map(|name| device(name, "venet", "backend = \"switch\"")).concat();
    pair.bus = Bus::start(scene, &config)?;
    for (vm, name) in pair.vms.iter_mut().zip(["net-a", "net-b"]) {
        vm.plug("again", 1, &pair.bus.socket(name))?;
        vm.guest.ok("until vbus-guest list | grep -q net-; do sleep 0.05; done")?;
    }
    for at in 0..2 {
        let nic = pair.driver(at, "")?;
        pair.nics.push(nic);
    }
    pair.transfer(5001, 32 * MIB)
}

/// A guest resets itself in the middle of traffic; its device works again in the fresh kernel.
pub fn reboot(scene: &Scene) -> Result<()> {
    let mut pair = Pair::start(scene, PairSpec::default())?;
    endless(&pair)?;
    pair.vms[0].reset()?;
    pair.nics.remove(0);
    pair.vms[0].wait_boot(2)?;
    nic::prepare(&pair.vms[0].guest)?;
    let nic = pair.driver(0, "")?;
    pair.nics.insert(0, nic);
    pair.transfer(5001, 32 * MIB)?;
    pair.vms[0].control.execute("query-status", json!({})).map(drop)
}

/// A driver opens and closes the device a hundred times. The bus then has as many open files and as
/// much memory as before.
pub fn reopen(scene: &Scene) -> Result<()> {
    const TIMES: u32 = 100;
    const GROWTH_KIB: u64 = 4096;
    let bus = Bus::start(scene, &device("net", "venet", "backend = \"null\""))?;
    let vm = VmSpec::new("a").device(bus.socket("net")).boot(scene)?;
    nic::prepare(&vm.guest)?;
    let (mut files, mut memory) = (0, 0);
    for time in 0..TIMES {
        let nic = Nic::up(&vm.guest, "net", "vbus0", "10.0.0.1/24", "")?;
        nic.driver.kill()?;
        nic.driver.wait(TRANSFER)?;
        vm.guest.ok("until [ ! -e /sys/class/net/vbus0 ]; do sleep 0.01; done")?;
        // The first rounds fill caches.
        if time == 9 {
            (files, memory) = (bus.open_files()?, bus.resident_kib()?);
        }
    }
    let began = Instant::now();
    while bus.open_files()? > files {
        if began.elapsed() > Duration::from_secs(60) {
            bail!("{} open files after {TIMES} times, {files} after 10", bus.open_files()?);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let now = bus.resident_kib()?;
    eprintln!("opened {TIMES} times; {files} files; {memory} KiB after 10, {now} KiB at the end");
    ensure!(now <= memory + GROWTH_KIB, "the bus grew from {memory} to {now} KiB");
    let huge = vm.guest.ok("grep HugePages_ /proc/meminfo")?;
    let pages = |key: &str| {
        huge.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u32>().ok())
    };
    ensure!(
        pages("HugePages_Free:") == pages("HugePages_Total:"),
        "huge pages were left behind:\n{huge}"
    );
    vm.power_off()
}
