// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a packet costs in exits and interrupts, on a real KVM. The contenders run one after the
//! other, each in a guest of its own with one CPU.

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::contender::Contender;
use crate::l1::L1;
use crate::l1_wire::{self, Cost, INNER, MIB, TAP, address_tap, bus_of};
use crate::l2::{L1Bus, L2Spec, Vmm};
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
    /// vbus's device of class `virtio-net` under `vbus-vmm`, driven by the kernel's own driver.
    VfioUser,
    /// The same under QEMU.
    VfioUserInQemu,
    /// The same under `vbus-vmm` with `vhost = true`: L1's kernel has the queues.
    VfioUserVhost,
    /// The class `virtio-net` over vhost-user, behind QEMU's virtio-net.
    VhostUser,
    /// QEMU's virtio-net.
    VirtioNet,
    /// QEMU's virtio-net, whose other end is L1's kernel.
    VhostNet,
}

impl Setup {
    const ALL: [Self; 9] = [
        Self::Driver,
        Self::DriverInQemu,
        Self::Program,
        Self::VfioUser,
        Self::VfioUserInQemu,
        Self::VfioUserVhost,
        Self::VhostUser,
        Self::VirtioNet,
        Self::VhostNet,
    ];

    /// Its name in JSON keys.
    fn name(self) -> &'static str {
        match self {
            Self::Driver => "driver",
            Self::DriverInQemu => "driver-in-qemu",
            Self::Program => "program",
            Self::VfioUser => "vfio-user",
            Self::VfioUserInQemu => "vfio-user-in-qemu",
            Self::VfioUserVhost => "vfio-user-vhost",
            Self::VhostUser => "vhost-user",
            Self::VirtioNet => "virtio",
            Self::VhostNet => "vhost",
        }
    }

    fn vmm(self) -> Vmm {
        match self {
            Self::Driver | Self::Program | Self::VfioUser | Self::VfioUserVhost => Vmm::Vbus,
            _ => Vmm::Qemu,
        }
    }

    /// Whether L1's kernel has the queues.
    fn needs_vhost(self) -> bool {
        matches!(self, Self::VfioUserVhost | Self::VhostNet)
    }

    /// The class of its device of the bus, and its settings; none if QEMU has the device.
    fn device(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Driver | Self::DriverInQemu | Self::Program => Some(("venet", "")),
            // As venet, it has an interrupt of its own for each queue.
            Self::VfioUser | Self::VfioUserInQemu => Some(("virtio-net", "msix = true")),
            Self::VfioUserVhost => Some(("virtio-net", "msix = true\nvhost = true")),
            Self::VhostUser => Some(("virtio-net", "transport = \"vhost-user\"")),
            Self::VirtioNet | Self::VhostNet => None,
        }
    }

    /// Measures TCP out of the guest and into it.
    ///
    /// # Errors
    /// Those of [`Costs::measure`].
    pub fn measure(self, l1: &L1) -> Result<[Cost; 2]> {
        let spec = L2Spec { vmm: self.vmm(), ..L2Spec::new(self.name()) };
        let bus = match self.device() {
            Some((class, settings)) => Some(bus_of(l1, class, settings, "")?),
            None => None,
        };
        let spec = match &bus {
            Some(bus) if self == Self::VhostUser => spec.args(&vhost_user(bus)?),
            Some(bus) => spec.device("net", &bus.socket("net")),
            None => {
                let vhost = if self == Self::VhostNet { "on" } else { "off" };
                let netdev =
                    format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}");
                let device = "virtio-net-pci,netdev=net,romfile=";
                spec.args(&format!("-netdev {netdev} -device {device}"))
            }
        };
        let l2 = spec.boot(l1)?;
        if bus.is_none() {
            address_tap(l1)?;
        }
        let guest = &l2.guest;
        let mut program = None;
        let interface = match self {
            Self::Program => {
                program = Some(l1_wire::nic(guest)?);
                "vbus0".to_owned()
            }
            Self::Driver | Self::DriverInQemu => {
                linux::insert(guest, "")?;
                linux::only_interface(guest)?
            }
            _ => "eth0".to_owned(),
        };
        if program.is_none() {
            nic::set_up(guest, &interface, &format!("{INNER}/24"))?;
        }
        let costs = [
            Cost::of(l1, guest, &interface, true, BYTES)?,
            Cost::of(l1, guest, &interface, false, BYTES)?,
        ];
        if let (Self::VfioUserVhost, Some(bus)) = (self, &bus) {
            let stats: Value = serde_json::from_str(&bus.run("stats --json")?)?;
            ensure!(
                stats[0]["device"]["backend"]["vhost"] == true,
                "the bus has carried the frames and not the kernel: {}",
                bus.said().1
            );
        }
        drop(program);
        l2.power_off()?;
        Ok(costs)
    }
}

/// QEMU's words for the device `net` of vhost-user, as the bus prints them, without a root port.
fn vhost_user(bus: &L1Bus) -> Result<String> {
    let printed = bus.run("qemu-args net --spare-ports 0 --json")?;
    let words: Vec<String> = serde_json::from_str(&printed)?;
    let from = words.iter().position(|word| word == "-chardev").context("no -chardev")?;
    // L1 has no boot ROMs.
    let words =
        words[from..].iter().map(|word| word.replace("bus=vbus-port0", "bus=pcie.0,romfile="));
    Ok(words.map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" "))
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
            if setup.needs_vhost() && l1.guest.run("test -c /dev/vhost-net")?.code != 0 {
                let why = "L1 has no /dev/vhost-net".to_owned();
                eprintln!("exits: {}: skipped: {why}", setup.name());
                costs.skipped.push((setup, why));
                continue;
            }
            let both = setup.measure(l1).with_context(|| setup.name())?;
            eprintln!(
                "exits per MiB of TCP: {}: {} out, {} in; MiB/s: {} out, {} in",
                setup.name(),
                both[0].exits_per_mib,
                both[1].exits_per_mib,
                both[0].mib_per_s,
                both[1].mib_per_s
            );
            costs.rows.push((setup, both));
        }
        Ok(costs)
    }

    /// The ratio of what `value` says of two setups, out and in together.
    fn ratio(&self, ours: Setup, theirs: Setup, value: fn(&Cost) -> f64) -> Option<f64> {
        let sum = |wanted: Setup| -> Option<f64> {
            let (_, both) = self.rows.iter().find(|(setup, _)| *setup == wanted)?;
            Some(both.iter().map(value).sum())
        };
        Some(sum(ours)? / sum(theirs)?)
    }

    /// The ratios of the exits of the same bytes, out and in, to virtio-net's. Below 1, the
    /// contender has fewer.
    pub fn against_virtio(&self) -> Vec<(Contender, f64)> {
        let ours = [
            (Contender::Driver, Setup::Driver),
            (Contender::Program, Setup::Program),
            (Contender::VfioUser, Setup::VfioUser),
            (Contender::VhostUser, Setup::VhostUser),
        ];
        let ratio = |setup| self.ratio(setup, Setup::VirtioNet, |cost| cost.exits_per_mib);
        ours.into_iter().filter_map(|(contender, setup)| Some((contender, ratio(setup)?))).collect()
    }

    /// The exits and the interrupts of the same bytes, venet over virtio, both of the bus and under
    /// `vbus-vmm`.
    pub fn abi_vs_abi(&self) -> [(&'static str, Option<f64>); 2] {
        let ratio = |value| self.ratio(Setup::Driver, Setup::VfioUser, value);
        [
            ("exits_per_packet", ratio(|cost| cost.exits_per_mib)),
            ("irqs_per_packet_kvm", ratio(|cost| cost.interrupts_per_mib)),
        ]
    }

    /// L1's kernel has the queues of both: the device of the bus under `vbus-vmm`, over QEMU's.
    /// The bytes a second of TCP out and in, and the exits of the same bytes.
    pub fn vhost_vs_vhost(&self) -> [(&'static str, Option<f64>); 2] {
        let ratio = |value| self.ratio(Setup::VfioUserVhost, Setup::VhostNet, value);
        [
            ("tcp", ratio(|cost| cost.mib_per_s)),
            ("exits_per_packet", ratio(|cost| cost.exits_per_mib)),
        ]
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
            "TCP on KVM, one CPU\n{:18} {:4} {:>14} {:>14} {:>16} {:>8}\n",
            "NIC", "way", "exits/MiB", "irqs/MiB", "exits/packet", "MiB/s"
        );
        for (setup, both) in &self.rows {
            for (way, cost) in ["out", "in"].iter().zip(both) {
                text += &format!(
                    "{:18} {way:4} {:>14} {:>14} {:>16} {:>8}\n",
                    setup.name(),
                    cost.exits_per_mib,
                    cost.interrupts_per_mib,
                    cost.exits_per_packet,
                    cost.mib_per_s
                );
            }
        }
        text
    }
}
