// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that lie to the driver: in registers, and in the memory that it shares with them.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

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

/// The lies of `guest-agent lie`, each with the name of its device.
const LIES: [&str; 2] = ["rings", "words"];

/// Each device has a liar before it. The driver sends and receives what the lies make of it, and is
/// unloaded and loaded meanwhile. The kernel has nothing to complain of.
pub fn lie(scene: &Scene) -> Result<()> {
    let system = linux::chosen_system(scene)?;
    // The device behind the lies never writes into the guest's buffers.
    let config = LIES.map(|name| device(name, "venet", "backend = \"null\"")).concat();
    let bus = Bus::start(scene, &config)?;
    let mut machine = VmSpec::new("a");
    let mut liars = Vec::new();
    for name in LIES {
        let socket = scene.dir().join(format!("{name}.lie"));
        let mut command = Command::new(scene.lab.agent());
        command.arg("lie").arg(&socket).arg(bus.socket(name)).arg(name);
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
    for (name, (process, lines)) in LIES.iter().zip(&mut liars) {
        if lines.try_iter().all(|line| line != "lies") {
            bail!(process.complaint(&format!("{name} has not lied")));
        }
    }
    linux::check_kernel(&vm.guest)?;
    vm.power_off()
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
