//! The NIC of the bus in a guest on KVM: traffic to L1 by TAP, and what it costs beside QEMU's
//! virtio-net.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::exits::Trace;
use crate::bus::device;
use crate::guest::Guest;
use crate::inner::{InnerBus, Spec, Vmm};
use crate::nic::{self, Nic};
use crate::report::Figures;
use crate::rig::Rig;

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

/// What some traffic has cost: exits that it led to, see [`Trace`], and interrupts of the NIC that
/// the guest has taken, each per MiB and per packet of the guest's network stack.
#[derive(Clone, Copy, Debug, serde::Serialize)]
struct Cost {
    exits_per_mib: f64,
    exits_per_packet: f64,
    interrupts_per_mib: f64,
    interrupts_per_packet: f64,
}

impl Cost {
    /// Counts while `bytes` go through the middle of a stream, out of the guest or into it.
    fn of(rig: &Rig, guest: &Guest, interface: &str, out: bool, bytes: u64) -> Result<Self> {
        let (from, to, address) =
            if out { (guest, &rig.guest, OUTER) } else { (&rig.guest, guest, INNER) };
        let port = if out { 5003 } else { 5004 };
        let receiver = to.start(&format!("exec guest-agent receive 0.0.0.0:{port}"))?;
        nic::wait_port(to, port)?;
        let sender =
            from.start(&format!("exec guest-agent send {address}:{port} 1000000000000 3"))?;
        // What runs once only, and what the translators see for the first time.
        pass(rig, 2 * MIB)?;
        let before = (interrupts(guest)?, packets(guest, interface)?, passed(rig)?);
        let trace = Trace::start(rig)?;
        let began = passed(rig)?;
        pass(rig, bytes)?;
        let (exits, traced) = (trace.finish()?, passed(rig)? - began);
        let (after, all) =
            ((interrupts(guest)?, packets(guest, interface)?), passed(rig)? - before.2);
        for running in [sender, receiver] {
            running.kill()?;
            running.wait(TRANSFER)?;
        }
        let (mib, packets) = (all as f64 / MIB as f64, (after.1 - before.1) as f64);
        let exits_per_mib = exits as f64 / (traced as f64 / MIB as f64);
        let interrupts = (after.0 - before.0) as f64;
        // To thousandths: more digits mean nothing.
        let rounded = |value: f64| (value * 1000.0).round() / 1000.0;
        Ok(Self {
            exits_per_mib: rounded(exits_per_mib),
            exits_per_packet: rounded(exits_per_mib * mib / packets),
            interrupts_per_mib: rounded(interrupts / mib),
            interrupts_per_packet: rounded(interrupts / packets),
        })
    }
}

/// Bytes that have passed L1's end of the wire, both ways.
fn passed(rig: &Rig) -> Result<u64> {
    let counters =
        rig.guest.ok(&format!("cd /sys/class/net/{TAP}/statistics && cat rx_bytes tx_bytes"))?;
    Ok(counters.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).sum())
}

/// Waits until so many more have passed.
pub fn pass(rig: &Rig, bytes: u64) -> Result<()> {
    let (until, limit) = (passed(rig)? + bytes, Instant::now() + TRANSFER);
    while passed(rig)? < until {
        ensure!(
            Instant::now() < limit,
            "{bytes} bytes do not pass within {} s",
            TRANSFER.as_secs()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Interrupts of the NIC so far: by a name of the driver of virtio-net's queues, or of the device
/// that is driven from user space.
fn interrupts(guest: &Guest) -> Result<u64> {
    let lines = guest.ok("grep -E 'virtio[0-9]+-(in|out)put|uio' /proc/interrupts")?;
    // "24:   10   20  PCI-MSI ...": a count for each CPU.
    let counts = lines.lines().flat_map(|line| {
        line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok())
    });
    Ok(counts.sum())
}

fn packets(guest: &Guest, interface: &str) -> Result<u64> {
    let counters = guest
        .ok(&format!("cd /sys/class/net/{interface}/statistics && cat rx_packets tx_packets"))?;
    Ok(counters.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).sum())
}

/// The same traffic through the NIC of the bus and through QEMU's virtio-net on TAP: what it costs
/// in exits and interrupts.
pub fn against_virtio(rig: &Rig, figures: &mut Figures) -> Result<()> {
    const BYTES: u64 = 16 * MIB;
    let both = |rig: &Rig, guest: &Guest, interface: &str| -> Result<[Cost; 2]> {
        Ok([
            Cost::of(rig, guest, interface, true, BYTES)?,
            Cost::of(rig, guest, interface, false, BYTES)?,
        ])
    };
    let ours = {
        let bus = bus(rig, "")?;
        let inner = Spec::new("venet").device("net", &bus.socket("net")).boot(rig)?;
        let _nic = nic(&inner.guest)?;
        let costs = both(rig, &inner.guest, "vbus0")?;
        inner.power_off()?;
        costs
    };
    let theirs = {
        let netdev = format!("-netdev tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off");
        let spec = Spec { vmm: Vmm::Qemu, ..Spec::new("virtio") };
        let inner =
            spec.args(&format!("{netdev} -device virtio-net-pci,netdev=net,romfile=")).boot(rig)?;
        address_tap(rig)?;
        inner.guest.ok(&format!("ip addr add {INNER}/24 dev eth0 && ip link set eth0 up"))?;
        let costs = both(rig, &inner.guest, "eth0")?;
        inner.power_off()?;
        costs
    };
    let all = json!({
        "vbus": {"out": ours[0], "in": ours[1]}, "virtio_net": {"out": theirs[0], "in": theirs[1]},
    });
    eprintln!("TCP: {all}");
    let check = |what: &str, value: fn(&Cost) -> f64| {
        let sum = |costs: &[Cost; 2]| costs.iter().map(value).sum::<f64>();
        let (ours, theirs) = (sum(&ours), sum(&theirs));
        ensure!(
            2.0 * ours <= theirs,
            "{what}, out and in: {ours:.3}, more than half of the {theirs:.3} of virtio-net"
        );
        Ok(())
    };
    check("exits per MiB", |cost| cost.exits_per_mib)?;
    check("exits per packet", |cost| cost.exits_per_packet)?;
    check("interrupts per MiB", |cost| cost.interrupts_per_mib)?;
    check("interrupts per packet", |cost| cost.interrupts_per_packet)?;
    figures.insert("against_virtio_net".into(), all);
    Ok(())
}
