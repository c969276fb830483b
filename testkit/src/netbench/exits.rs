// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a packet costs in exits and interrupts, on a real KVM. The contenders run one after the
//! other, each in a guest of its own with one CPU.

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::contender::Contender;
use crate::guest::Guest;
use crate::l1::L1;
use crate::l1_wire::{self, Cost, INNER, MIB, TAP, address_tap, bus};
use crate::l2::{L2Spec, Vmm};
use crate::linux;
use crate::nic;

/// Bytes of one measurement.
const BYTES: u64 = 16 * MIB;

/// A NIC, its driver, and the program that runs the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Setup {
    /// vbus's NIC under `vbus-vmm`, driven by the kernel module.
    Driver,
    /// The same under QEMU, which passes doorbells on as messages.
    DriverInQemu,
    /// vbus's NIC under `vbus-vmm`, driven by `vbus-guest net`.
    Program,
    /// QEMU's virtio-net.
    VirtioNet,
    /// QEMU's virtio-net, whose other end is L1's kernel.
    VhostNet,
}

impl Setup {
    const ALL: [Self; 5] =
        [Self::Driver, Self::DriverInQemu, Self::Program, Self::VirtioNet, Self::VhostNet];

    /// Its name in JSON keys.
    fn name(self) -> &'static str {
        match self {
            Self::Driver => "driver",
            Self::DriverInQemu => "driver-in-qemu",
            Self::Program => "program",
            Self::VirtioNet => "virtio",
            Self::VhostNet => "vhost",
        }
    }

    /// Measures TCP out of the guest and into it.
    ///
    /// # Errors
    /// Those of [`Costs::measure`].
    pub fn measure(self, l1: &L1) -> Result<[Cost; 2]> {
        let both = |guest: &Guest, interface: &str| -> Result<[Cost; 2]> {
            Ok([
                Cost::of(l1, guest, interface, true, BYTES)?,
                Cost::of(l1, guest, interface, false, BYTES)?,
            ])
        };
        let vmm = if matches!(self, Self::Driver | Self::Program) { Vmm::Vbus } else { Vmm::Qemu };
        let spec = L2Spec { vmm, ..L2Spec::new(self.name()) };
        let inner = format!("{INNER}/24");
        if !matches!(self, Self::VirtioNet | Self::VhostNet) {
            let bus = bus(l1, "")?;
            let l2 = spec.device("net", &bus.socket("net")).boot(l1)?;
            let costs = if self == Self::Program {
                let _nic = l1_wire::nic(&l2.guest)?;
                both(&l2.guest, "vbus0")?
            } else {
                linux::insert(&l2.guest, "")?;
                let interface = linux::only_interface(&l2.guest)?;
                nic::set_up(&l2.guest, &interface, &inner)?;
                both(&l2.guest, &interface)?
            };
            l2.power_off()?;
            return Ok(costs);
        }
        let vhost = if self == Self::VhostNet { "on" } else { "off" };
        let netdev = format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}");
        let device = "virtio-net-pci,netdev=net,romfile=";
        let l2 = spec.args(&format!("-netdev {netdev} -device {device}")).boot(l1)?;
        address_tap(l1)?;
        nic::set_up(&l2.guest, "eth0", &inner)?;
        let costs = both(&l2.guest, "eth0")?;
        l2.power_off()?;
        Ok(costs)
    }
}

/// The costs of all contenders.
#[derive(Default)]
pub struct Costs {
    rows: Vec<(Setup, [Cost; 2])>,
    /// Why a contender is missing.
    skipped: Vec<(Setup, String)>,
}

impl Costs {
    /// Measures all contenders. `driver`: whether L1's guests have the module.
    ///
    /// # Errors
    /// A guest does not start, or traffic does not flow. It is a [`Skip`](crate::report::Skip) if
    /// this user may not read the trace points of KVM.
    pub fn measure(l1: &L1, driver: bool) -> Result<Self> {
        let mut costs = Self::default();
        for setup in Setup::ALL {
            if !driver && matches!(setup, Setup::Driver | Setup::DriverInQemu) {
                continue;
            }
            if setup == Setup::VhostNet && l1.guest.run("test -c /dev/vhost-net")?.code != 0 {
                let why = "L1 has no /dev/vhost-net".to_owned();
                eprintln!("exits: {}: skipped: {why}", setup.name());
                costs.skipped.push((setup, why));
                continue;
            }
            let both = setup.measure(l1).with_context(|| setup.name())?;
            eprintln!(
                "exits per MiB of TCP: {}: {} out, {} in",
                setup.name(),
                both[0].exits_per_mib,
                both[1].exits_per_mib
            );
            costs.rows.push((setup, both));
        }
        Ok(costs)
    }

    /// The ratios of the exits of the same bytes, out and in, to virtio-net's. Below 1, the
    /// contender has fewer.
    pub fn against_virtio(&self) -> Vec<(Contender, f64)> {
        let sum = |wanted: Setup| -> Option<f64> {
            let (_, both) = self.rows.iter().find(|(setup, _)| *setup == wanted)?;
            Some(both.iter().map(|cost| cost.exits_per_mib).sum())
        };
        let ours = [(Contender::Driver, Setup::Driver), (Contender::Program, Setup::Program)];
        ours.into_iter()
            .filter_map(|(contender, setup)| {
                Some((contender, sum(setup)? / sum(Setup::VirtioNet)?))
            })
            .collect()
    }

    /// All of it, by contender and direction.
    pub fn json(&self) -> Value {
        let mut all = Map::new();
        for (setup, [out, back]) in &self.rows {
            all.insert(setup.name().into(), json!({ "tcp_out": out, "tcp_in": back }));
        }
        for (setup, why) in &self.skipped {
            all.insert(setup.name().into(), json!({ "skipped": why }));
        }
        all.into()
    }

    /// The lines of a table.
    pub fn table(&self) -> String {
        let mut text = format!(
            "TCP on KVM, one CPU\n{:10} {:4} {:>14} {:>14} {:>16}\n",
            "NIC", "way", "exits/MiB", "irqs/MiB", "exits/packet"
        );
        for (setup, both) in &self.rows {
            for (way, cost) in ["out", "in"].iter().zip(both) {
                text += &format!(
                    "{:14} {way:4} {:>14} {:>14} {:>16}\n",
                    setup.name(),
                    cost.exits_per_mib,
                    cost.interrupts_per_mib,
                    cost.exits_per_packet
                );
            }
        }
        text
    }
}
