// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a packet costs the guest in instructions.
//!
//! QEMU's translator counts them (`-icount`), and its command `query-replay` tells the count. A
//! waiting processor executes none, and the count is exact. A plugin of the translator would count
//! without a change of the guest's clock, but Debian has no plugin that counts, and a change of the
//! clock does not change what a packet costs. All of the guest counts: the driver, the network
//! stack, and the program that sends or receives, which is the same for all contenders.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::contender::Rig;
use super::traffic::Traffic;
use crate::pair::TRANSFER;
use crate::tap::{self, Passed};

/// The kinds of traffic whose cost is measured.
pub const KINDS: [Traffic; 4] =
    [Traffic::TcpOut, Traffic::TcpIn, Traffic::Udp64Out, Traffic::Udp64In];

/// Packets that pass before a measurement: code runs for the first time, and the streams get fast.
const WARM: u64 = 2_000;

/// Packets of a measurement.
const COUNTED: u64 = 20_000;

/// How long the traffic of one measurement may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Measures the guest's instructions for each packet of one kind of traffic over the contender
/// `at`. The rig's processor must count them.
///
/// # Errors
/// iperf3 fails, or the traffic does not flow.
pub fn measure(rig: &mut Rig, at: usize, traffic: Traffic) -> Result<f64> {
    let Rig { nics, vm, .. } = rig;
    let nic = nics.get(at).context("no such contender")?;
    // It is ended when enough has passed.
    let load = vm.guest.start(&tap::command(&nic.tap, 3_600, &traffic.words(1)))?;
    let wait = |since: Passed, packets: u64| -> Result<Passed> {
        let until = Instant::now() + LIMIT;
        loop {
            let now = nic.tap.passed()?;
            if packets_between(traffic, since, now) >= packets {
                return Ok(now);
            }
            ensure!(
                load.runs() && Instant::now() < until,
                "{} over {} does not flow: {:?}",
                traffic.name(),
                nic.interface,
                load.said()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let warm = nic.tap.passed()?;
    wait(warm, WARM)?;
    let (before, count) = (nic.tap.passed()?, vm.instructions()?);
    wait(before, COUNTED)?;
    let (after, instructions) = (nic.tap.passed()?, vm.instructions()? - count);
    load.kill()?;
    load.wait(TRANSFER)?;
    Ok(instructions as f64 / packets_between(traffic, before, after) as f64)
}

fn packets_between(traffic: Traffic, before: Passed, after: Passed) -> u64 {
    traffic.packets(after.frames - before.frames, after.bytes - before.bytes)
}
