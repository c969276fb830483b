// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What happens to a driver and its devices while both carry traffic: they come and go, stand
//! still, sleep and wake. After each of them the NICs carry data again, and nothing is left behind.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::guest::Guest;
use crate::lab::Scene;
use crate::linux;
use crate::wire::{NICS, Wire};

/// How often each of them happens if nobody says how often: so often that a leak shows.
const TIMES: u32 = 6;

/// Bytes each way that pass before something happens.
const FLOW: u64 = 1 << 20;

/// Bytes each way of an exchange whose hashes are compared.
const EXCHANGE: u64 = 4 << 20;

/// The first rounds fill caches, so what is in use is counted after them.
const WARM: u32 = 2;

/// The pages of one receive ring, in KiB: the least that a connection would leave behind.
const RING_KIB: u64 = 2 << 10;

/// How much more kernel memory may be in use after so many rounds, in KiB. A ring that leaks in
/// each round is more. Caches grow and shrink by 3 MiB from round to round, and grow in long runs.
fn growth_max(rounds: u32) -> u64 {
    (u64::from(rounds) * RING_KIB * 3 / 4).clamp(6 << 10, 32 << 10)
}

/// Whatever happens, [`TIMES`] times or as often as the user says, but at least once more than
/// [`WARM`], under load. `event` makes it happen, and returns when the driver has its devices.
fn repeat(
    scene: &Scene,
    wire: &mut Wire,
    what: &str,
    mut event: impl FnMut(&mut Wire) -> Result<()>,
) -> Result<()> {
    let times = scene.lab.times().unwrap_or(TIMES).max(WARM + 1);
    let mut before = None;
    for time in 1..=times {
        let mut one = |wire: &mut Wire| -> Result<()> {
            let load = wire.load()?;
            wire.flow(FLOW)?;
            event(wire)?;
            load.end()?;
            wire.ping()
        };
        one(wire).with_context(|| format!("{what}, time {time}"))?;
        if time == WARM {
            before = Some(unreclaimable(wire.guest())?);
        }
    }
    wire.exchange(EXCHANGE).with_context(|| format!("after {what}"))?;
    linux::check_kernel(wire.guest()).with_context(|| format!("after {what}"))?;
    let (before, now) = (before.unwrap_or_default(), unreclaimable(wire.guest())?);
    eprintln!("{what}: {times} times; kernel memory {before} KiB before, {now} KiB after");
    ensure!(
        now <= before + growth_max(times - WARM),
        "{what}: kernel memory grew from {before} to {now} KiB"
    );
    Ok(())
}

/// The guest's kernel memory that nobody can reclaim, in KiB: slabs, and pages that no file and no
/// process has.
fn unreclaimable(guest: &Guest) -> Result<u64> {
    guest.ok("sync; echo 3 > /proc/sys/vm/drop_caches")?;
    let table = guest.ok("cat /proc/meminfo")?;
    let field = |key: &str| -> Result<u64> {
        let line = table.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
        number.with_context(|| format!("/proc/meminfo has no {key}"))
    };
    let mut used = field("MemTotal")? - field("MemFree")?;
    for known in ["Buffers", "Cached", "AnonPages", "SReclaimable"] {
        used = used.saturating_sub(field(known)?);
    }
    Ok(used)
}

/// Starts a guest whose NICs are up.
fn start(
    scene: &Scene,
    change: impl FnOnce(crate::vm::VmSpec) -> crate::vm::VmSpec,
) -> Result<Wire> {
    let system = linux::chosen_system(scene)?;
    let wire = Wire::start(scene, &system, ["", ""], change)?;
    linux::insert(wire.guest(), "")?;
    wire.up()?;
    wire.exchange(EXCHANGE)?;
    Ok(wire)
}

/// What a user of the guest does to the driver: the module is unloaded and loaded, a device is
/// unbound and bound, a CPU goes and comes.
pub fn driver(scene: &Scene) -> Result<()> {
    let mut wire = start(scene, |mut machine| {
        machine.cpus = 2;
        machine
    })?;
    repeat(scene, &mut wire, "rmmod and insmod", |wire| {
        linux::remove(wire.guest())?;
        linux::insert(wire.guest(), "")?;
        wire.up()
    })?;
    repeat(scene, &mut wire, "unbind and bind", |wire| {
        let guest = wire.guest();
        let name = linux::address(0);
        let driver = "/sys/bus/pci/drivers/vbus";
        guest.ok(&format!("echo {name} > {driver}/unbind && echo {name} > {driver}/bind"))?;
        wire.up_near(&linux::interface(guest, 0)?)
    })?;
    repeat(scene, &mut wire, "CPU off and on", |wire| {
        let guest = wire.guest();
        let cpu = "/sys/devices/system/cpu/cpu1/online";
        guest.ok(&format!("echo 0 > {cpu}"))?;
        wire.flow(FLOW)?;
        wire.guest().ok(&format!("echo 1 > {cpu}")).map(drop)
    })?;
    wire.vm.power_off()
}

/// What the host does to the machine: devices are unplugged and plugged, lose their connection, and
/// the machine stands still.
pub fn machine(scene: &Scene) -> Result<()> {
    let mut wire = start(scene, |machine| machine)?;
    repeat(scene, &mut wire, "unplug and plug", |wire| {
        wire.vm.control.forget_events()?;
        wire.vm.unplug("dev0")?;
        let socket = wire.bus.socket(NICS[0]);
        wire.vm.plug("dev0", 0, &socket)?;
        wire.up_near(&linux::interface(&wire.vm.guest, 0)?)
    })?;
    repeat(scene, &mut wire, "loss of the connection", |wire| {
        // The interface stays, and keeps its address: the driver opens the device anew.
        for name in NICS {
            wire.bus.run(&["device", "reincarnate", name])?;
        }
        wire.ping()
    })?;
    repeat(scene, &mut wire, "stop and cont", |wire| {
        wire.vm.control.execute("stop", json!({}))?;
        std::thread::sleep(Duration::from_millis(50));
        wire.vm.control.execute("cont", json!({}))?;
        wire.flow(FLOW)
    })?;
    wire.vm.power_off()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_that_leaks_in_each_round_is_found() {
        assert!(growth_max(TIMES - WARM) < u64::from(TIMES - WARM) * RING_KIB);
    }
}
