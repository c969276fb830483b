//! The NIC of the bus in a guest on KVM: traffic to L1 by TAP, and what it costs beside QEMU's virtio-net.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::Figures;
use super::inner::{Inner, InnerBus, Spec, Vmm};
use super::rig::Rig;
use crate::guest::Guest;
use crate::nic::{self, Nic};
use crate::vm::device;

/// The address of L1 on the wire.
pub const OUTER: &str = "10.0.0.254";
/// The address of L2.
pub const INNER: &str = "10.0.0.1";

pub const MIB: u64 = 1 << 20;

/// Bytes each way of an exchange that only has to work.
pub const EXCHANGE: u64 = 4 * MIB;

/// How long a transfer may take: two emulated processors share the work.
pub const TRANSFER: Duration = Duration::from_secs(240);

/// The interface of L1 at the other end of the guest's NIC.
pub const TAP: &str = "vbus-tap";

/// A bus with the NIC `net`, whose other end is L1's interface [`TAP`], and `more` devices.
pub fn bus<'a>(rig: &'a Rig<'a>, more: &str) -> Result<InnerBus<'a>> {
    let net = device("net", "venet", &format!("backend = \"tap\"\ntap = \"{TAP}\""));
    let bus = InnerBus::start(rig, &(net + more))?;
    address_tap(rig)?;
    Ok(bus)
}

/// Gives L1's end of the wire its address.
pub fn address_tap(rig: &Rig) -> Result<()> {
    rig.guest.ok(&format!("ip addr add {OUTER}/24 dev {TAP} && ip link set {TAP} up")).map(drop)
}

/// Starts the driver of `net` in the guest.
pub fn nic(guest: &Guest) -> Result<Nic> {
    nic::prepare(guest)?;
    Nic::up(guest, "net", "vbus0", &format!("{INNER}/24"), "")
}

/// Sends bytes from the guest to L1 and back, checked by hash.
pub fn exchange(rig: &Rig, guest: &Guest, bytes: u64) -> Result<()> {
    nic::transfer(guest, &rig.guest, OUTER, 5001, bytes, 1, TRANSFER)?;
    nic::transfer(&rig.guest, guest, INNER, 5002, bytes, 2, TRANSFER)
}

/// What some traffic has cost, or the counters at one moment.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Exits of the guest but those by which L1 took an interrupt of its own.
    exits: u64,
    /// Interrupts of the NIC that the guest has taken.
    interrupts: u64,
    /// Packets that the guest's network stack has sent and received.
    packets: u64,
}

impl Cost {
    fn now(rig: &Rig, guest: &Guest, interface: &str) -> Result<Self> {
        let packets = guest.ok(&format!(
            "cat /sys/class/net/{interface}/statistics/rx_packets /sys/class/net/{interface}/statistics/tx_packets"
        ))?;
        let interrupts = guest.ok("grep -E 'virtio[0-9]+-(in|out)put|uio' /proc/interrupts")?;
        let interrupts = interrupts.lines().flat_map(|line| {
            // "24:   10   20  PCI-MSI ...": a count for each CPU.
            line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok())
        });
        Ok(Self {
            exits: rig.kvm_stat("exits")?.saturating_sub(rig.kvm_stat("irq_exits")?),
            interrupts: interrupts.sum(),
            packets: packets.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).sum(),
        })
    }

    fn since(self, before: Self) -> Self {
        Self {
            exits: self.exits - before.exits,
            interrupts: self.interrupts - before.interrupts,
            packets: self.packets - before.packets,
        }
    }
}

/// The same traffic through the NIC of the bus and through QEMU's virtio-net on TAP: what it costs in exits and interrupts.
pub fn against_virtio(rig: &Rig, figures: &mut Figures) -> Result<()> {
    const BYTES: u64 = 8 * MIB;
    let ours = venet(rig, Vmm::Vbus, BYTES)?;
    let under_qemu = venet(rig, Vmm::Qemu, BYTES)?;
    let theirs = {
        let netdev = format!("-netdev tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off");
        let spec = Spec { vmm: Vmm::Qemu, ..Spec::new("theirs") };
        let inner = spec.args(&format!("{netdev} -device virtio-net-pci,netdev=net,romfile=")).boot(rig)?;
        address_tap(rig)?;
        inner.guest.ok(&format!("ip addr add {INNER}/24 dev eth0 && ip link set eth0 up"))?;
        let cost = measure(rig, &inner, "eth0", BYTES)?;
        inner.power_off()?;
        cost
    };
    let mib = 2.0 * BYTES as f64 / MIB as f64;
    let per = |cost: Cost| {
        let packets = cost.packets as f64;
        json!({
            "exits_per_packet": cost.exits as f64 / packets, "exits_per_mib": cost.exits as f64 / mib,
            "interrupts_per_packet": cost.interrupts as f64 / packets,
            "interrupts_per_mib": cost.interrupts as f64 / mib, "packets": cost.packets,
        })
    };
    eprintln!("{mib} MiB of TCP: vbus {ours:?}, vbus under QEMU {under_qemu:?}, virtio-net {theirs:?}");
    let all = json!({"vbus": per(ours), "vbus_under_qemu": per(under_qemu), "virtio_net": per(theirs)});
    figures.insert("against_virtio_net".into(), all);
    for (what, ours, theirs) in
        [("exits", ours.exits, theirs.exits), ("interrupts", ours.interrupts, theirs.interrupts)]
    {
        ensure!(2 * ours <= theirs, "{ours} {what}, more than half of the {theirs} of virtio-net");
    }
    Ok(())
}

/// What the traffic costs through the NIC of the bus.
fn venet(rig: &Rig, vmm: Vmm, bytes: u64) -> Result<Cost> {
    let bus = bus(rig, "")?;
    let inner = Spec { vmm, ..Spec::new("venet") }.device("net", &bus.socket("net")).boot(rig)?;
    let _nic = nic(&inner.guest)?;
    let cost = measure(rig, &inner, "vbus0", bytes)?;
    inner.power_off()?;
    Ok(cost)
}

fn measure(rig: &Rig, inner: &Inner, interface: &str, bytes: u64) -> Result<Cost> {
    // What runs once only, and what the translators see for the first time.
    exchange(rig, &inner.guest, MIB).context("the first bytes")?;
    let before = Cost::now(rig, &inner.guest, interface)?;
    exchange(rig, &inner.guest, bytes)?;
    Ok(Cost::now(rig, &inner.guest, interface)?.since(before))
}
