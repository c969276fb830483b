//! The NIC of the bus in a guest on KVM: traffic to L1 by TAP, and what it costs beside QEMU's virtio-net.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Figures;
use super::exits::Trace;
use super::inner::{InnerBus, Spec, Vmm};
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

/// What some traffic has cost.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Exits of the guest that the traffic led to, see [`Trace`].
    exits: u64,
    /// Interrupts of the NIC that the guest has taken.
    interrupts: u64,
    /// Packets that the guest's network stack has sent and received.
    packets: u64,
}

impl Cost {
    /// Exchanges `bytes` each way and counts meanwhile.
    fn of(rig: &Rig, guest: &Guest, interface: &str, bytes: u64) -> Result<Self> {
        // What runs once only, and what the translators see for the first time.
        exchange(rig, guest, MIB).context("the first bytes")?;
        let before = (interrupts(guest)?, packets(guest, interface)?);
        let trace = Trace::start(rig)?;
        exchange(rig, guest, bytes)?;
        Ok(Self {
            exits: trace.finish()?,
            interrupts: interrupts(guest)? - before.0,
            packets: packets(guest, interface)? - before.1,
        })
    }

    /// Exits and interrupts per packet and per MiB of `bytes`.
    fn figures(self, bytes: u64) -> Value {
        let per = |count: u64, of: f64| (count as f64 / of * 1000.0).round() / 1000.0;
        let (packets, mib) = (self.packets as f64, bytes as f64 / MIB as f64);
        json!({
            "exits_per_packet": per(self.exits, packets), "exits_per_mib": per(self.exits, mib),
            "interrupts_per_packet": per(self.interrupts, packets), "interrupts_per_mib": per(self.interrupts, mib),
        })
    }
}

/// Interrupts of the NIC so far: by a name of the driver of virtio-net's queues, or of the device that is driven from user space.
fn interrupts(guest: &Guest) -> Result<u64> {
    let lines = guest.ok("grep -E 'virtio[0-9]+-(in|out)put|uio' /proc/interrupts")?;
    // "24:   10   20  PCI-MSI ...": a count for each CPU.
    let counts =
        lines.lines().flat_map(|line| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()));
    Ok(counts.sum())
}

fn packets(guest: &Guest, interface: &str) -> Result<u64> {
    let counters = guest.ok(&format!("cd /sys/class/net/{interface}/statistics && cat rx_packets tx_packets"))?;
    Ok(counters.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).sum())
}

/// The same traffic through the NIC of the bus and through QEMU's virtio-net on TAP: what it costs in exits and interrupts.
pub fn against_virtio(rig: &Rig, figures: &mut Figures) -> Result<()> {
    /// Each way.
    const BYTES: u64 = 8 * MIB;
    let ours = {
        let bus = bus(rig, "")?;
        let inner = Spec::new("venet").device("net", &bus.socket("net")).boot(rig)?;
        let _nic = nic(&inner.guest)?;
        let cost = Cost::of(rig, &inner.guest, "vbus0", BYTES)?;
        inner.power_off()?;
        cost
    };
    let theirs = {
        let netdev = format!("-netdev tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off");
        let spec = Spec { vmm: Vmm::Qemu, ..Spec::new("virtio") };
        let inner = spec.args(&format!("{netdev} -device virtio-net-pci,netdev=net,romfile=")).boot(rig)?;
        address_tap(rig)?;
        inner.guest.ok(&format!("ip addr add {INNER}/24 dev eth0 && ip link set eth0 up"))?;
        let cost = Cost::of(rig, &inner.guest, "eth0", BYTES)?;
        inner.power_off()?;
        cost
    };
    eprintln!("{} MiB of TCP: vbus {ours:?}, virtio-net {theirs:?}", 2 * BYTES / MIB);
    let all = json!({"vbus": ours.figures(2 * BYTES), "virtio_net": theirs.figures(2 * BYTES)});
    for what in ["exits_per_packet", "exits_per_mib", "interrupts_per_packet", "interrupts_per_mib"] {
        let of = |nic: &str| all[nic][what].as_f64().with_context(|| format!("no {what}: {all}"));
        let (ours, theirs) = (of("vbus")?, of("virtio_net")?);
        ensure!(2.0 * ours <= theirs, "{what}: {ours}, more than half of the {theirs} of virtio-net; {all}");
    }
    figures.insert("against_virtio_net".into(), all);
    Ok(())
}
