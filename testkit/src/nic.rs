// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A venet NIC in a guest: the running driver `vbus-guest net`, and traffic over its interface.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::guest::{Guest, Running};
use crate::iperf::{Load, Received};
use crate::vm::BOOT;

/// Huge pages of 2 MiB that a guest keeps for the rings and buffers of its drivers.
const HUGE_PAGES: u32 = 40;

/// Prepares a freshly booted guest for the driver.
pub fn prepare(guest: &Guest) -> Result<()> {
    guest.ok(&format!("echo {HUGE_PAGES} > /proc/sys/vm/nr_hugepages")).map(drop)
}

/// A driver that runs, with its interface up.
pub struct Nic {
    /// `vbus-guest net`.
    pub driver: Running,
    /// The name of the interface.
    pub interface: String,
}

impl Nic {
    /// Starts the driver of the NIC `device`, waits for its interface `interface`, and sets the
    /// interface's address.
    pub fn up(
        guest: &Guest,
        device: &str,
        interface: &str,
        address: &str,
        options: &str,
    ) -> Result<Self> {
        let driver = driver(guest, device, interface, options)?;
        set_up(guest, interface, address)?;
        Ok(Self { driver, interface: interface.to_owned() })
    }
}

/// Gives an interface an address, such as `10.0.0.1/24`, and sets it up.
pub fn set_up(guest: &Guest, interface: &str, address: &str) -> Result<()> {
    set_up_in(guest, "", interface, address)
}

/// The same in a network namespace of the guest. `place` is the beginning of a command there.
pub fn set_up_in(guest: &Guest, place: &str, interface: &str, address: &str) -> Result<()> {
    let commands = format!(
        "{place}ip addr add {address} dev {interface} && {place}ip link set {interface} up"
    );
    guest.ok(&commands).map(drop)
}

/// Starts the driver of the NIC `device`, `vbus-guest net`, and waits for its interface
/// `interface`.
pub fn driver(guest: &Guest, device: &str, interface: &str, options: &str) -> Result<Running> {
    let command = format!("exec vbus-guest net {device} --name {interface} {options}");
    let driver = guest.start(&command)?;
    // The driver prints this line when the interface is there.
    driver.wait_for(", address ", BOOT)?;
    Ok(driver)
}

/// Round-trip times in milliseconds.
pub struct Ping {
    /// The shortest.
    pub min: f64,
    /// The mean.
    pub avg: f64,
    /// The middle one.
    pub median: f64,
    /// The longest.
    pub max: f64,
}

/// Pings `address` `count` times, after a few pings that do not count. A lost packet is an error.
///
/// Each packet is a ping of its own. Busybox gives the answers to several only two round trips of
/// time after the last one, which is too little on a loaded machine.
pub fn ping(guest: &Guest, address: &str, count: u32) -> Result<Ping> {
    let one = format!("ping -c 1 -W 60 {address}");
    // The first pings resolve the address and run code that QEMU has not translated yet.
    guest.start(&format!("{one}; for i in 1 2 3 4; do {one} || exit 1; done"))?.ok(BOOT * 2)?;
    let mut times = Vec::new();
    for _ in 0..count {
        let text = guest.start(&one)?.ok(BOOT)?;
        // 64 bytes from 10.0.0.2: seq=0 ttl=64 time=0.281 ms
        let time = text.split_once("time=").and_then(|(_, rest)| rest.split(' ').next());
        let time = time.and_then(|time| time.parse::<f64>().ok());
        times.push(time.with_context(|| format!("no time in the output of ping:\n{text}"))?);
    }
    times.sort_by(f64::total_cmp);
    let [min, .., max] = times[..] else { bail!("{count} pings are too few") };
    let (avg, median) = (times.iter().sum::<f64>() / f64::from(count), times[times.len() / 2]);
    Ok(Ping { min, avg, median, max })
}

/// Measures TCP from `from` to the guest `to` at `address`, in megabits per second, as the receiver
/// counts them.
pub fn iperf(from: &Guest, to: &Guest, address: &str, seconds: u32) -> Result<f64> {
    const PORT: u16 = 5201;
    let server = to.start("iperf3 --server --one-off")?;
    wait_port(to, PORT)?;
    let limit = BOOT + Duration::from_secs(u64::from(seconds));
    let load = Load { server: address, port: PORT, seconds, words: "" };
    let report = from.start(&load.command())?.ok(limit)?;
    server.ok(BOOT)?;
    Ok(Received::of(&report)?.mbps)
}

/// Sends `bytes` bytes from `from` to the guest `to` at `address`. Both ends must compute the same
/// hash.
pub fn transfer(
    from: &Guest,
    to: &Guest,
    address: &str,
    port: u16,
    bytes: u64,
    seed: u64,
    limit: Duration,
) -> Result<()> {
    let receiver = to.start(&format!("guest-agent receive 0.0.0.0:{port}"))?;
    wait_port(to, port)?;
    let sent =
        from.start(&format!("guest-agent send {address}:{port} {bytes} {seed}"))?.ok(limit)?;
    let received = receiver.ok(limit)?;
    ensure!(sent == received, "sent {}, received {}", sent.trim(), received.trim());
    ensure!(
        sent.starts_with(&format!("{bytes} ")),
        "{bytes} bytes were to be sent, not {}",
        sent.trim()
    );
    Ok(())
}

/// Waits until something listens on a TCP port of the guest.
pub fn wait_port(guest: &Guest, port: u16) -> Result<()> {
    wait_port_in(guest, "", port)
}

/// The same in a network namespace of the guest. `place` is the beginning of a command there.
pub fn wait_port_in(guest: &Guest, place: &str, port: u16) -> Result<()> {
    // State 0A is LISTEN. The port is in hexadecimal after the address.
    let table = format!("{place}cat /proc/net/tcp /proc/net/tcp6");
    let listens = format!("{table} | grep -q ':{port:04X} [0:]* 0A'");
    guest.ok(&format!("until {listens}; do sleep 0.05; done")).map(drop)
}
