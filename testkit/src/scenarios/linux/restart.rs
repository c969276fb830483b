// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Another kernel starts, or the system sleeps, while frames flood the NIC. No frame comes into
//! memory that the driver has given up.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::bus::{Bus, device};
use crate::flood::{self, Flood};
use crate::guest::Guest;
use crate::initramfs::Archive;
use crate::lab::Scene;
use crate::linux;
use crate::system::kexec;
use crate::vm::{Vm, VmSpec};

/// How often each of them happens if nobody says how often.
const TIMES: u32 = 1;

/// Frames that come before something happens.
const FRAMES: u64 = 2_000;

/// The MiB of memory that the new kernel watches. The machine has [`MEMORY`].
const WATCHED: u32 = 480;

/// The seconds that it watches it.
const SECONDS: u32 = 2;

/// The machine's memory in MiB.
const MEMORY: u32 = 1024;

/// How long a kernel may take to sleep or to wake.
const SLEEP: Duration = Duration::from_secs(120);

/// The name of the NIC.
const NIC: &str = "net";

/// A guest whose NIC is flooded.
struct Flooded {
    // Rust drops these in order.
    _flood: Flood,
    vm: Vm,
    bus: Bus,
}

impl Flooded {
    fn start(scene: &Scene) -> Result<Self> {
        let stream = scene.dir().join("stream");
        let settings = format!("backend = \"stream\"\nlisten = \"{}\"", stream.display());
        let bus = Bus::start(scene, &device(NIC, "venet", &settings))?;
        let system = linux::chosen_system(scene)?;
        let folder = scene.dir().join("system");
        let mut machine = VmSpec::new("a").device(bus.socket(NIC));
        machine.memory_mib = MEMORY;
        machine.system = Some(system.extend_with_itself(Archive::default(), &folder)?);
        let vm = machine.boot(scene)?;
        let flooded = Self { _flood: Flood::start(&stream)?, vm, bus };
        flooded.receive()?;
        Ok(flooded)
    }

    fn guest(&self) -> &Guest {
        &self.vm.guest
    }

    /// Loads the module, and receives frames.
    fn receive(&self) -> Result<()> {
        linux::insert(self.guest(), "")?;
        let interface = linux::interface(self.guest(), 0)?;
        self.guest().ok(&format!("ip link set {interface} up"))?;
        flood::wait(self.guest(), &self.bus, NIC, FRAMES)
    }
}

/// kexec and reboot under a flood of frames.
pub fn kernel(scene: &Scene) -> Result<()> {
    let flooded = Flooded::start(scene)?;
    let mut boots = 1;
    for time in 1..=scene.lab.times().unwrap_or(TIMES) {
        for (what, command) in [("kexec", &*kexec("")), ("reboot", "exec reboot -f")] {
            let mut once = || -> Result<()> {
                linux::check_kernel(flooded.guest())?;
                let starts = flooded.guest().start(command)?;
                boots += 1;
                flooded.vm.wait_boot(boots).with_context(|| format!("{:?}", starts.said()))?;
                flood::silence(flooded.guest(), &flooded.bus, NIC, (WATCHED, SECONDS))?;
                flooded.receive()
            };
            once().with_context(|| format!("{what}, time {time}"))?;
        }
    }
    linux::check_kernel(flooded.guest())?;
    flooded.vm.power_off()
}

/// Devices that come and go when the system goes down: so many that one of them does at any time.
const LEAVING: usize = 4;

/// How often it goes down if nobody says how often.
const REBOOTS: u32 = 2;

/// Functions leave their driver and come back all the time, and the system goes down in the middle
/// of it: neither waits for the other without an end.
pub fn leaving(scene: &Scene) -> Result<()> {
    let names: Vec<String> = (0..LEAVING).map(|at| format!("{NIC}{at}")).collect();
    let config = names.iter().map(|name| device(name, "venet", "backend = \"null\""));
    let bus = Bus::start(scene, &config.collect::<String>())?;
    let mut machine = VmSpec::new("a");
    for name in &names {
        machine = machine.device(bus.socket(name));
    }
    machine.system = Some(linux::chosen_system(scene)?);
    let vm = machine.boot(scene)?;
    let times = scene.lab.times().unwrap_or(REBOOTS);
    for time in 1..=times {
        let once = || -> Result<()> {
            linux::insert(&vm.guest, "")?;
            for slot in 0..LEAVING {
                let address = linux::address(slot);
                vm.guest
                    .start(&format!(
                        "cd /sys/bus/pci/drivers/vbus && while echo {address} > unbind; do \
                     echo {address} > bind; echo; done"
                    ))?
                    .wait_for("\n", SLEEP)?;
            }
            linux::check_kernel(&vm.guest)?;
            vm.guest.start("exec reboot -f")?;
            vm.wait_boot(time + 1)
        };
        once().with_context(|| format!("reboot {time}"))?;
    }
    linux::insert(&vm.guest, "")?;
    (0..LEAVING).try_for_each(|slot| linux::interface(&vm.guest, slot).map(drop))?;
    linux::check_kernel(&vm.guest)?;
    vm.power_off()
}

/// The configuration space of the function (ICH9's bridge) that has the registers for power
/// management, and where it says at which ports they are, and that they are enabled.
const BRIDGE: &str = "/sys/bus/pci/devices/0000:00:1f.0/config";
const POWER: u32 = 0x40;

/// Suspends a machine to RAM, and wakes it.
///
/// A wake resets QEMU's machine, and the firmware does not set the registers of power management
/// again. The machine could not sleep a second time, or power off, so this sets them.
///
/// # Errors
/// The machine does not sleep, or does not wake.
pub(super) fn suspend(vm: &mut Vm) -> Result<()> {
    vm.control.forget_events()?;
    vm.guest.ok(&format!("dd if={BRIDGE} of=/tmp/power bs=1 skip={POWER} count=5"))?;
    let sleeps = vm.guest.start("echo mem > /sys/power/state")?;
    let limit = vm.guest.at_most(SLEEP);
    vm.control.wait_event("SUSPEND", limit, |_| true)?;
    vm.control.execute("system_wakeup", json!({}))?;
    sleeps.ok(SLEEP)?;
    vm.guest.ok(&format!("dd if=/tmp/power of={BRIDGE} bs=1 seek={POWER} conv=notrunc")).map(drop)
}

/// The system is suspended to RAM and wakes, under a flood of frames. The interface comes back by
/// itself.
pub fn sleep(scene: &Scene) -> Result<()> {
    let mut flooded = Flooded::start(scene)?;
    for time in 1..=scene.lab.times().unwrap_or(TIMES) {
        let mut once = || -> Result<()> {
            suspend(&mut flooded.vm)?;
            flood::wait(flooded.guest(), &flooded.bus, NIC, FRAMES)
        };
        once().with_context(|| format!("time {time}"))?;
    }
    linux::check_kernel(flooded.guest())?;
    flooded.vm.power_off()
}
