// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The wire between L1 and a guest on its KVM: a NIC of the guest, a TAP interface of L1, and what
//! traffic over them costs.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::bus::device;
use crate::exits::Trace;
use crate::guest::Guest;
use crate::l1::L1;
use crate::l2::L1Bus;
use crate::nic::{self, Nic};

/// The address of L1 on the wire.
pub const OUTER: &str = "10.0.0.254";
/// The address of L2.
pub const INNER: &str = "10.0.0.1";

/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;

/// Bytes each way of an exchange that is not measured.
pub const EXCHANGE: u64 = 4 * MIB;

/// How long a transfer may take. Two emulated processors share the work.
pub const TRANSFER: Duration = Duration::from_secs(240);

/// The interface of L1 at the other end of the guest's NIC.
pub const TAP: &str = "vbus-tap";

/// A bus with the NIC `net`, whose other end is L1's interface [`TAP`], and `more` devices.
pub fn bus<'a>(l1: &'a L1<'a>, more: &str) -> Result<L1Bus<'a>> {
    bus_of(l1, "venet", "", more)
}

/// The same with a NIC of another class, and with more settings of it.
pub fn bus_of<'a>(l1: &'a L1<'a>, class: &str, settings: &str, more: &str) -> Result<L1Bus<'a>> {
    let settings = format!("backend = \"tap\"\ntap = \"{TAP}\"\n{settings}");
    let net = device("net", class, &settings);
    let bus = L1Bus::start(l1, &(net + more))?;
    address_tap(l1)?;
    Ok(bus)
}

/// Gives L1's end of the wire its address.
pub fn address_tap(l1: &L1) -> Result<()> {
    nic::set_up(&l1.guest, TAP, &format!("{OUTER}/24"))
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
/// that the guest has taken. Each is per MiB and per packet of the guest's network stack. The
/// machine may have an emulated processor: its time says nothing alone.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Cost {
    /// Exits per MiB.
    pub exits_per_mib: f64,
    /// Exits per packet.
    pub exits_per_packet: f64,
    /// Interrupts per MiB.
    pub interrupts_per_mib: f64,
    /// Interrupts per packet.
    pub interrupts_per_packet: f64,
    /// MiB a second.
    pub mib_per_s: f64,
}

impl Cost {
    /// Counts while `bytes` go through the middle of a stream, out of the guest or into it.
    ///
    /// # Errors
    /// The traffic does not flow. It is a [`Skip`](crate::report::Skip) if this user may not read
    /// the trace points of KVM.
    pub fn of(l1: &L1, guest: &Guest, interface: &str, out: bool, bytes: u64) -> Result<Self> {
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
        let (began, clock) = (passed(l1)?, Instant::now());
        pass(l1, bytes)?;
        let (seconds, timed) = (clock.elapsed().as_secs_f64(), passed(l1)? - began);
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
            mib_per_s: rounded(timed as f64 / MIB as f64 / seconds),
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

/// The NIC's interrupts so far: no other function of the guest sends messages, or is driven by a
/// user-space driver.
fn interrupts(guest: &Guest) -> Result<u64> {
    let lines = guest.ok("grep -E 'PCI-MSI|uio' /proc/interrupts")?;
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
