// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The NICs that are compared, side by side in one guest.

use anyhow::{Context, Result};

use crate::bus::{Bus, device};
use crate::guest::{Guest, Running};
use crate::lab::Scene;
use crate::linux;
use crate::nic;
use crate::system::System;
use crate::tap::{self, Tap};
use crate::vm::{Iommu, Processor, Vm, VmSpec};

/// A NIC with its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    /// vbus's NIC, driven by the kernel module `vbus`.
    Driver,
    /// vbus's NIC, driven by the program `vbus-guest net`.
    Program,
    /// vbus's device of class `virtio-net` over vfio-user, driven by the kernel's own driver.
    VfioUser,
    /// The same over vhost-user, behind QEMU's virtio-net.
    VhostUser,
    /// QEMU's virtio-net.
    VirtioNet,
}

impl Contender {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Driver, Self::Program, Self::VfioUser, Self::VhostUser, Self::VirtioNet];

    /// Those that the bus serves, and that are compared with QEMU's virtio-net.
    pub const OURS: [Self; 4] = [Self::Driver, Self::Program, Self::VfioUser, Self::VhostUser];

    /// Its name in JSON keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Driver => "driver",
            Self::Program => "program",
            Self::VfioUser => "vfio_user",
            Self::VhostUser => "vhost_user",
            Self::VirtioNet => "virtio",
        }
    }

    /// What it is, for a table.
    pub fn about(self) -> &'static str {
        match self {
            Self::Driver => "vbus, driver",
            Self::Program => "vbus, guest program",
            Self::VfioUser => "virtio, vfio-user",
            Self::VhostUser => "virtio, vhost-user",
            Self::VirtioNet => "virtio-net of QEMU",
        }
    }

    /// Its colour in charts.
    pub fn colour(self) -> &'static str {
        match self {
            Self::Driver => "#c02020",
            Self::Program => "#2060c0",
            Self::VfioUser => "#208040",
            Self::VhostUser => "#a06020",
            Self::VirtioNet => "#606060",
        }
    }

    /// Its device of the bus, whose other end is this interface; none if QEMU has the device.
    fn device(self, tap: &Tap, queues: u32) -> Option<String> {
        let (class, more) = match self {
            Self::Driver | Self::Program => ("venet", ""),
            // As venet, it has an interrupt of its own for each queue.
            Self::VfioUser => ("virtio-net", "msix = true"),
            Self::VhostUser => ("virtio-net", "transport = \"vhost-user\""),
            Self::VirtioNet => return None,
        };
        let tap = &tap.name;
        let common = format!("backend = \"tap\"\ntap = \"{tap}\"\nqueue-pairs = {queues}");
        Some(device(self.name(), class, &format!("{common}\n{more}")))
    }

    /// Whether QEMU reaches its function over vfio-user.
    fn is_vfio_user(self) -> bool {
        !matches!(self, Self::VhostUser | Self::VirtioNet)
    }
}

/// The guest that the contenders share.
#[derive(Clone)]
pub struct Spec<'a> {
    /// Queue pairs of each NIC, and CPUs of the guest.
    pub queues: u32,
    /// What executes its instructions.
    pub processor: Processor,
    /// What it boots, with the module; without it the driver does not take part.
    pub system: Option<&'a System>,
    /// The unit that translates the devices' addresses. The guest program and vhost-user cannot
    /// work with one, so they do not take part.
    pub iommu: Option<Iommu>,
}

impl Spec<'_> {
    fn contenders(&self) -> Vec<Contender> {
        let takes_part = |contender: &Contender| match contender {
            Contender::Driver => self.system.is_some(),
            Contender::Program | Contender::VhostUser => self.iommu.is_none(),
            Contender::VfioUser | Contender::VirtioNet => true,
        };
        Contender::ALL.into_iter().filter(takes_part).collect()
    }
}

/// A contender in the guest, its interface up.
pub struct Nic {
    /// Which one it is.
    pub contender: Contender,
    /// The other end of its wire.
    pub tap: Tap,
    /// Its interface in the guest.
    pub interface: String,
    /// Its function's folder in the guest's sysfs.
    function: String,
    /// Its driver, if that is a process.
    #[expect(dead_code, reason = "the driver runs as long as the NIC is used")]
    driver: Option<Running>,
}

/// A guest with all contenders.
pub struct Rig {
    // Rust drops these in order: the guest, then the bus.
    /// The contenders.
    pub nics: Vec<Nic>,
    /// The guest.
    pub vm: Vm,
    /// The bus that serves the contenders of vbus.
    bus: Bus,
}

impl Rig {
    /// Boots a guest with all contenders.
    ///
    /// # Errors
    /// The bus, the guest or a driver does not start. It is a [`Skip`](crate::report::Skip) if this
    /// machine has no TAP.
    pub fn start(scene: &Scene, spec: &Spec) -> Result<Self> {
        let contenders = spec.contenders();
        let taps: Vec<Tap> = (1..).map(Tap::new).take(contenders.len()).collect();
        let queues = spec.queues;
        let devices = contenders.iter().zip(&taps);
        let config: String =
            devices.filter_map(|(contender, tap)| contender.device(tap, queues)).collect();
        let bus = tap::bus(scene, &config)?;
        let mut machine = VmSpec::new("bench");
        machine.cpus = queues;
        machine.processor = spec.processor;
        machine.system = spec.system.cloned();
        machine.iommu = spec.iommu;
        // The devices of vfio-user come first: they are in the first ports.
        let (ours, theirs): (Vec<_>, Vec<_>) =
            contenders.into_iter().zip(taps).partition(|(contender, _)| contender.is_vfio_user());
        for (contender, _) in &ours {
            machine = machine.device(bus.socket(contender.name()));
        }
        for (slot, (contender, tap)) in (ours.len()..).zip(&theirs) {
            if *contender == Contender::VhostUser {
                machine.args.extend(bus.vhost_user(contender.name(), slot, "")?);
                continue;
            }
            let iommu = if spec.iommu.is_some() { ",iommu_platform=on" } else { "" };
            machine.args.extend(tap.virtio_net(queues, &format!(",bus=slot{slot}{iommu}")));
        }
        let vm = machine.boot(scene)?;
        nic::prepare(&vm.guest)?;
        if spec.system.is_some() {
            linux::insert(&vm.guest, "")?;
        }
        let mut nics = Vec::new();
        for (slot, (contender, tap)) in ours.into_iter().chain(theirs).enumerate() {
            nics.push(Nic::up(scene, &vm.guest, contender, tap, slot, queues)?);
        }
        Ok(Self { nics, vm, bus })
    }
}

impl Rig {
    /// How many doorbells the NIC's driver has rung so far, or kicks over vhost-user; none if the
    /// NIC is not the bus's.
    ///
    /// # Errors
    /// The bus does not tell.
    pub fn doorbells(&self, nic: &Nic) -> Result<Option<u64>> {
        if nic.contender == Contender::VirtioNet {
            return Ok(None);
        }
        Ok(Some(self.bus.traffic(&[nic.contender.name()])?.doorbells))
    }
}

impl Nic {
    fn up(
        scene: &Scene,
        guest: &Guest,
        contender: Contender,
        tap: Tap,
        slot: usize,
        queues: u32,
    ) -> Result<Self> {
        let function = linux::function(slot);
        let (interface, driver) = match contender {
            Contender::Driver => {
                let name = linux::interface(guest, slot)?;
                if queues > 1 {
                    guest.ok(&format!("ethtool -L {name} combined {queues}"))?;
                }
                (name, None)
            }
            Contender::Program => {
                let name = "program";
                // The program does not take a device away from the kernel's driver.
                guest.ok(&format!(
                    "cd {function} && if [ -e driver ]; then echo uio_pci_generic > \
                     driver_override && echo ${{PWD##*/}} > driver/unbind; fi"
                ))?;
                let options = format!("--queue-pairs {queues}");
                let driver = nic::driver(guest, contender.name(), name, &options)?;
                (name.to_owned(), Some(driver))
            }
            Contender::VfioUser | Contender::VhostUser | Contender::VirtioNet => {
                let name = guest.ok(&format!("ls {function}/virtio*/net"))?.trim().to_owned();
                if queues > 1 {
                    guest.ok(&format!("ethtool -L {name} combined {queues}"))?;
                }
                (name, None)
            }
        };
        tap.up(scene)?;
        tap.up_in(guest, &interface)?;
        Ok(Self { contender, tap, interface, function, driver })
    }

    /// How many interrupts the NIC has sent so far: those of its messages, or of its line.
    ///
    /// # Errors
    /// The guest does not tell.
    pub fn interrupts(&self, guest: &Guest) -> Result<u64> {
        let folder = &self.function;
        let numbers =
            guest.ok(&format!("ls {folder}/msi_irqs 2> /dev/null || cat {folder}/irq"))?;
        let table = guest.ok("cat /proc/interrupts")?;
        count(&table, &numbers.split_whitespace().collect::<Vec<_>>())
    }
}

/// The sum of these interrupts in a `/proc/interrupts`.
fn count(table: &str, numbers: &[&str]) -> Result<u64> {
    let cpus =
        table.lines().next().context("an empty /proc/interrupts")?.split_whitespace().count();
    let mut sum = 0;
    for line in table.lines().skip(1) {
        // "24:   10   20  PCI-MSI ...": a count for each CPU.
        let Some((number, counts)) = line.split_once(':') else { continue };
        if numbers.contains(&number.trim()) {
            let counts = counts.split_whitespace().take(cpus);
            sum += counts.filter_map(|count| count.parse::<u64>().ok()).sum::<u64>();
        }
    }
    Ok(sum)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn interrupts_of_a_function_are_counted_on_all_cpus() {
        let table = "     CPU0  CPU1\n\
                     24:    10    20  PCI-MSIX-0000:03:00.0  0-edge  virtio0-config\n\
                     25:     1     2  PCI-MSIX-0000:03:00.0  1-edge  virtio0-input.0\n\
                     125:    7     7  PCI-MSIX-0000:04:00.0  0-edge  12\n\
                     LOC:    9     9  Local timer interrupts\n";
        assert_eq!(count(table, &["24", "25"]).unwrap(), 33);
        assert_eq!(count(table, &[]).unwrap(), 0);
    }
}
