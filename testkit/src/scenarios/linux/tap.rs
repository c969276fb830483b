// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's NIC on a TAP interface of this host.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::bus::device;
use crate::guest::Guest;
use crate::lab::Scene;
use crate::linux;
use crate::pair::TRANSFER;
use crate::tap::{self, Tap};
use crate::vm::VmSpec;

/// Datagrams of the flood: more than the ring and the TAP interface have room for.
const FLOOD: u32 = 5000;
/// So many frames wait in the TAP interface at least, when the device has no buffer left.
const WAITING: u64 = 200;

/// The guest stands still until the device has no receive buffer left. Then it receives, and sends
/// nothing. What waits in the TAP interface comes all the same: the driver wakes the device.
pub fn out_of_buffers(scene: &Scene) -> Result<()> {
    let tap = Tap::new(7);
    let config = device("net", "venet", &format!("backend = \"tap\"\ntap = \"{}\"", tap.name));
    let bus = tap::bus(scene, &config)?;
    let mut machine = VmSpec::new("a").device(bus.socket("net"));
    machine.system = Some(linux::chosen_system(scene)?);
    let mut vm = machine.boot(scene)?;
    linux::insert(&vm.guest, "")?;
    let name = linux::interface(&vm.guest, 0)?;
    tap.up(scene)?;
    // Without IPv6 the guest's system sends nothing by itself.
    vm.guest.ok(&format!("echo 1 > /proc/sys/net/ipv6/conf/{name}/disable_ipv6"))?;
    tap.up_in(&vm.guest, &name)?;
    let buffers = number(
        &vm.guest,
        &format!("ethtool -g {name} | awk '/^Current/ {{on=1}} on && /^RX:/ {{print $2}}'"),
    )?;
    let frames = format!("ethtool -S {name} | awk '/ rx0_frames:/ {{print $2}}'");

    // The host's system drops what it sends before it has noticed the carrier, and that may take it
    // seconds.
    let (first, began) = (number(&vm.guest, &frames)?, Instant::now());
    while number(&vm.guest, &frames)? == first {
        ensure!(began.elapsed() < TRANSFER, "no frame comes from the host");
        flood(&tap, 64, 1)?;
        std::thread::sleep(Duration::from_millis(50));
    }

    for bytes in [64, 1472] {
        let before = number(&vm.guest, &frames)?;
        vm.control.execute("stop", json!({}))?;
        flood(&tap, bytes, FLOOD)?;
        vm.control.execute("cont", json!({}))?;
        let (wanted, began) = (before + buffers + WAITING, Instant::now());
        loop {
            let now = number(&vm.guest, &frames)?;
            if now >= wanted {
                break;
            }
            ensure!(
                began.elapsed() < TRANSFER,
                "the device has {buffers} buffers, and of more frames of {bytes} bytes than that \
                 {} have come",
                now - before
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    linux::check_kernel(&vm.guest)?;
    vm.power_off()
}

/// Sends `count` datagrams that nobody answers: to all, and to a port that nobody has.
fn flood(tap: &Tap, bytes: usize, count: u32) -> Result<()> {
    let host: Ipv4Addr = tap.host().parse()?;
    let [a, b, c, _] = host.octets();
    let socket = UdpSocket::bind((host, 0)).context("cannot send to the guest")?;
    socket.set_broadcast(true)?;
    for _ in 0..count {
        // The interface may refuse what it has no room for.
        let _ = socket.send_to(&vec![0; bytes], (Ipv4Addr::new(a, b, c, 255), 9));
    }
    Ok(())
}

fn number(guest: &Guest, command: &str) -> Result<u64> {
    let said = guest.ok(command)?;
    said.trim().parse().with_context(|| format!("{command} says {said:?}"))
}
