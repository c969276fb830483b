// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The NIC of the bus in a guest on KVM: traffic to L1 over TAP, and its cost compared with QEMU's
//! virtio-net.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::exits::Trace;
use crate::bus::device;
use crate::guest::Guest;
use crate::l1::L1;
use crate::l2::{L1Bus, L2Spec, Vmm};
use crate::nic::{self, Nic};
use crate::report::Figures;

/// The address of L1 on the wire.
pub const OUTER: &str = "10.0.0.254";
/// The address of L2.
pub const INNER: &str = "10.0.0.1";

pub const MIB: u64 = 1 << 20;

/// Bytes each way of an exchange that is not measured.
pub const EXCHANGE: u64 = 4 * MIB;

/// How long a transfer may take. Two emulated processors share the work.
pub const TRANSFER: Duration = Duration::from_secs(240);

/// The interface of L1 at the other end of the guest's NIC.
pub const TAP: &str = "vbus-tap";

/// A bus with the NIC `net`, whose other end is L1's interface [`TAP`], and `more` devices.
pub fn bus<'a>(l1: &'a L1<'a>, more: &str) -> Result<L1Bus<'a>> {
    let net = device("net", "venet", &format!("backend = \"tap\"\ntap = \"{TAP}\""));
    let bus = L1Bus::start(l1, &(net + more))?;
    address_tap(l1)?;
    Ok(bus)
}

/// Gives L1's end of the wire its address.
pub fn address_tap(l1: &L1) -> Result<()> {
    l1.guest.ok(&format!("ip addr add {OUTER}/24 dev {TAP} && ip link set {TAP} up")).map(drop)
}

/// Starts the driver of `net` in the guest.
pub fn nic(guest: &Guest) -> Result<Nic> {
    nic::prepare(guest)?;
    Nic::up(guest, "net", "vbus0", &format!("{INNER}/24"), "")
}

/// Sends bytes from the guest to L1 and back. Both ends compare the hash.
pub fn exchange(l1: &L1, guest: &Guest, bytes: u64) -> Result<()> {
    nic::transfer(guest, &l1.guest, OUTER, 5001, bytes, 1, TRANSFER)?;
    nic::transfer(&l1.guest, guest, INNER, 5002, bytes, 2, TRANSFER)
}

/// The cost of some traffic: the exits that it caused (see [`Trace`]), and the NIC's interrupts
/// that the guest has taken. Each is per MiB and per packet of the guest's network stack.
#[derive(Clone, Copy, Debug, serde::Serialize)]
struct Cost {
    exits_per_mib: f64,
    exits_per_packet: f64,
    interrupts_per_mib: f64,
    interrupts_per_packet: f64,
}

impl Cost {
    /// Counts while `bytes` go through the middle of a stream, out of the guest or into it.
    fn of(l1: &L1, guest: &Guest, interface: &str, out: bool, bytes: u64) -> Result<Self> {
        let (from, to, address) =
            if out { (guest, &l1.guest, OUTER) } else { (&l1.guest, guest, INNER) };
        let port = if out { 5003 } else { 5004 };
        let receiver = to.start(&format!("exec guest-agent receive 0.0.0.0:{port}"))?;
        nic::wait_port(to, port)?;
        let sender =
            from.start(&format!("exec guest-agent send {address}:{port} 1000000000000 3"))?;
        // The beginning does not count: some code runs only once, and QEMU translates new code.
        pass(l1, 2 * MIB)?;
        let before = (interrupts(guest)?, packets(guest, interface)?, passed(l1)?);
        let trace = Trace::start(l1)?;
        let began = passed(l1)?;
        pass(l1, bytes)?;
        let (exits, traced) = (trace.finish()?, passed(l1)? - began);
        let (after, all) =
            ((interrupts(guest)?, packets(guest, interface)?), passed(l1)? - before.2);
        for running in [sender, receiver] {
            running.kill()?;
            running.wait(TRANSFER)?;
        }
        let (mib, packets) = (all as f64 / MIB as f64, (after.1 - before.1) as f64);
        let exits_per_mib = exits as f64 / (traced as f64 / MIB as f64);
        let interrupts = (after.0 - before.0) as f64;
        // Round to thousandths.
        let rounded = |value: f64| (value * 1000.0).round() / 1000.0;
        Ok(Self {
            exits_per_mib: rounded(exits_per_mib),
            exits_per_packet: rounded(exits_per_mib * mib / packets),
            interrupts_per_mib: rounded(interrupts / mib),
            interrupts_per_packet: rounded(interrupts / packets),
        })
    }
}

/// The bytes that have passed L1's end of the wire in both directions.
fn passed(l1: &L1) -> Result<u64> {
    let counters =
        l1.guest.ok(&format!("cd /sys/class/net/{TAP}/statistics && cat rx_bytes tx_bytes"))?;
    Ok(counters.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).sum())
}

/// Waits until `bytes` more bytes have passed.
pub fn pass(l1: &L1, bytes: u64) -> Result<()> {
    let (until, limit) = (passed(l1)? + bytes, Instant::now() + TRANSFER);
    while passed(l1)? < until {
        ensure!(
            Instant::now() < limit,
            "{bytes} bytes do not pass within {} s",
            TRANSFER.as_secs()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// The NIC's interrupts so far. /proc/interrupts has them under the name of virtio-net's queues, or
/// of the device that a user-space driver drives.
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

/// Measures the exits and interrupts of the same traffic through the NIC of the bus and through
/// QEMU's virtio-net on TAP. The goal is half of virtio-net's.
pub fn against_virtio(l1: &L1, figures: &mut Figures) -> Result<()> {
    const BYTES: u64 = 16 * MIB;
    // How often an end sleeps and is woken depends on how the host's other work divides the
    // processors, and that may differ for the two guests, which run one after the other. An exit
    // for each frame or an interrupt for each frame would be more than this.
    const MOST: f64 = 4.0;
    let both = |l1: &L1, guest: &Guest, interface: &str| -> Result<[Cost; 2]> {
        Ok([
            Cost::of(l1, guest, interface, true, BYTES)?,
            Cost::of(l1, guest, interface, false, BYTES)?,
        ])
    };
    let ours = {
        let bus = bus(l1, "")?;
        let l2 = L2Spec::new("venet").device("net", &bus.socket("net")).boot(l1)?;
        let _nic = nic(&l2.guest)?;
        let costs = both(l1, &l2.guest, "vbus0")?;
        l2.power_off()?;
        costs
    };
    let theirs = {
        let netdev = format!("-netdev tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off");
        let spec = L2Spec { vmm: Vmm::Qemu, ..L2Spec::new("virtio") };
        let l2 =
            spec.args(&format!("{netdev} -device virtio-net-pci,netdev=net,romfile=")).boot(l1)?;
        address_tap(l1)?;
        l2.guest.ok(&format!("ip addr add {INNER}/24 dev eth0 && ip link set eth0 up"))?;
        let costs = both(l1, &l2.guest, "eth0")?;
        l2.power_off()?;
        costs
    };
    let all = json!({
        "vbus": {"out": ours[0], "in": ours[1]}, "virtio_net": {"out": theirs[0], "in": theirs[1]},
    });
    eprintln!("TCP: {all}");
    let check = |what: &str, value: fn(&Cost) -> f64| {
        let sum = |costs: &[Cost; 2]| costs.iter().map(value).sum::<f64>();
        let (ours, theirs) = (sum(&ours), sum(&theirs));
        if 2.0 * ours > theirs {
            eprintln!("{what}, out and in: more than half of virtio-net's, in this run");
        }
        ensure!(
            ours <= MOST * theirs,
            "{what}, out and in: {ours:.3}, more than {MOST} times the {theirs:.3} of virtio-net"
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
