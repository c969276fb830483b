// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that lie to the driver: in registers, and in the memory that it shares with them. One
//! breaks each connection.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::bus::{Bus, device};
use crate::lab::Scene;
use crate::linux;
use crate::process::Process;
use crate::vm::{Vm, VmSpec};

/// How often the driver gets the lying device if nobody says how often.
const TIMES: u32 = 3;

/// Seconds that a device lies under load each time.
const SECONDS: u32 = 5;

/// How long a liar may take to begin.
const LIMIT: Duration = Duration::from_secs(60);

/// The devices: name, class and settings, and the lie of `guest-agent lie`. The interrupt
/// controllers carry the interrupts of two NICs.
const LIARS: [(&str, &str, &str, &str); 5] = [
    ("rings", "venet", "backend = \"null\"\npic = \"pages\"", "rings"),
    ("words", "venet", "backend = \"null\"\npic = \"controller\"", "words"),
    ("breaks", "venet", "backend = \"null\"", "breaks"),
    ("pages", "pic", "", "rings"),
    ("controller", "pic", "", "words"),
];

/// The slot of the device that breaks each connection.
const BREAKS: usize = 2;

/// What the driver says when it has opened a device again.
const AGAIN: &str = "the device is open again";

/// How often it opens the device that breaks each connection, at the least, and the seconds that
/// the last time comes after the one before, at the least: the pauses after the tries before are
/// 0.5, 1, 2 and 4 seconds.
const TRIES: usize = 5;
const PAUSE: f64 = 4.0;

/// Each device has a liar before it. The driver sends and receives what the lies make of it, and is
/// unloaded and loaded meanwhile. The kernel has nothing to complain of.
pub fn lie(scene: &Scene) -> Result<()> {
    let system = linux::chosen_system(scene)?;
    // The device behind the lies never writes into the guest's buffers.
    let config = LIARS.map(|(name, class, settings, _)| device(name, class, settings)).concat();
    let bus = Bus::start(scene, &config)?;
    let mut machine = VmSpec::new("a");
    let mut liars = Vec::new();
    for (name, _, _, lie) in LIARS {
        let socket = scene.dir().join(format!("{name}.lie"));
        let mut command = Command::new(scene.lab.agent());
        command.arg("lie").arg(&socket).arg(bus.socket(name)).arg(lie);
        let log = scene.dir().join(format!("{name}.lie.log"));
        let (process, lines) = Process::start_with_lines(command, name, &log)?;
        lines.recv_timeout(LIMIT).with_context(|| format!("the liar {name} does not listen"))?;
        machine = machine.device(&socket);
        liars.push((process, lines));
    }
    machine.system = Some(system);
    let vm = machine.boot(scene)?;
    for time in 1..=scene.lab.times().unwrap_or(TIMES) {
        believe(&vm).with_context(|| format!("time {time}"))?;
    }
    for ((name, ..), (process, lines)) in LIARS.iter().zip(&mut liars) {
        if lines.try_iter().all(|line| line != "lies") {
            bail!(process.complaint(&format!("{name} has not lied")));
        }
    }
    grow_weary(&vm)?;
    linux::check_kernel(&vm.guest)?;
    vm.power_off()
}

/// A device that breaks each connection is opened again, but ever more seldom.
fn grow_weary(vm: &Vm) -> Result<()> {
    let guest = &vm.guest;
    linux::check_kernel(guest)?;
    guest.ok("dmesg -c > /dev/null")?;
    linux::insert(guest, "")?;
    let interface = linux::interface(guest, BREAKS)?;
    guest.ok(&format!("ip link set {interface} up"))?;
    let says = format!("dmesg | grep '{}: {AGAIN}'", linux::address(BREAKS));
    let waits = format!("until [ $({says} | wc -l) -ge {TRIES} ]; do sleep 0.2; done; {says}");
    let lines = guest.start(&waits)?.ok(LIMIT * 2)?;
    let times = lines.lines().take(TRIES).map(said_at).collect::<Result<Vec<_>>>()?;
    let (before, last) = (times[TRIES - 2], times[TRIES - 1]);
    // The clock of the log is not that of the driver.
    ensure!(last - before >= PAUSE * 0.9, "the driver does not wait longer: {lines}");
    linux::remove(guest)
}

/// The seconds at which a line of the kernel's log was written.
fn said_at(line: &str) -> Result<f64> {
    let time = line.trim_start_matches('[').split(']').next().unwrap_or_default();
    time.trim().parse().with_context(|| format!("no time in {line:?}"))
}

/// Loads the module, uses whatever interfaces it makes, and unloads it.
fn believe(vm: &Vm) -> Result<()> {
    let guest = &vm.guest;
    linux::insert(guest, "")?;
    // The interfaces may not come, or go at any time.
    guest
        .start(&format!(
            "for i in $(seq {SECONDS}); do \
           for path in /sys/bus/pci/drivers/vbus/*/net/*; do \
             name=$(basename $path); [ -e $path ] || continue; \
             ip link set $name up; ip addr replace 10.1.$i.1/24 dev $name; \
             ip neigh replace 10.1.$i.2 lladdr 02:00:00:00:00:01 dev $name; \
             ping -c 50 -i 0.01 -s 1400 -W 1 10.1.$i.2; ethtool -S $name; ethtool -i $name; \
           done; sleep 0.5; \
         done > /dev/null 2>&1; true"
        ))?
        .ok(LIMIT * 4)?;
    linux::check_kernel(guest)?;
    linux::remove(guest)
}
