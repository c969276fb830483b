// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hostile guests, and guest memory that is not shared.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::bus::device;
use crate::pair::{Pair, PairSpec, TRANSFER};
use serde_json::Value;

use crate::bus::Bus;
use crate::lab::Scene;
use crate::nic;
use crate::vm::VmSpec;

/// The rounds of a set: each disturbs a new driver.
const ROUNDS: u32 = 25;
/// The most sets.
const SETS: u32 = 8;

/// A guest writes random values over the registers, doorbells, rings and buffers of its NIC. The
/// streams of two other guests go on, with the right data.
pub fn scribbler(scene: &Scene) -> Result<()> {
    // The honest guests answer the hostile one's pings, so they do not wait long for each other's
    // buffers (spec/venet.md, "Backpressure"). On a loaded machine a few of their frames may be
    // dropped, and TCP sends them again.
    let pair =
        Pair::start(scene, PairSpec { device: "backpressure-ms = 60000", ..PairSpec::default() })?;
    pair.bus.run(&["device", "add", "net-c", "--class", "venet", "--set", "backend=switch"])?;
    let hostile = VmSpec::new("c").device(pair.bus.socket("net-c")).boot(scene)?;
    nic::prepare(&hostile.guest)?;
    let (mut port, mut count, mut device) = (5000, 0u64, Value::Null);
    // Random writes break a connection in most sets of rounds. A set in which they did not has
    // tested less than the test is for, so another one follows.
    for set in 0..SETS {
        let scribble = hostile.guest.start(&rounds(set * ROUNDS))?;
        while scribble.runs() {
            port += 1;
            pair.transfer(port, 32 << 20)?;
        }
        let said = scribble.ok(Duration::from_secs(10))?;
        let wrote = said.trim().strip_prefix("wrote ").and_then(|n| n.parse().ok()).unwrap_or(0);
        ensure!(wrote > 10_000, "the hostile guest wrote only {wrote} times:\n{said}");
        count += wrote;
        device = serde_json::from_str(&pair.bus.run(&["device", "show", "net-c", "--json"])?)?;
        if device["counters"]["broken"].as_u64() > Some(0) {
            break;
        }
    }
    let drops = pair.bus.traffic(&["net-a", "net-b"])?.drops;
    eprintln!(
        "{count} hostile writes beside {} transfers, with {drops} frames of the honest dropped",
        port - 5000
    );
    eprintln!("its device: {} {}", device["counters"], device["device"]["pairs"]);
    ensure!(
        device["counters"]["broken"].as_u64() > Some(0),
        "no write broke a connection, so the test tests nothing"
    );
    // The bus still runs, and an honest driver can use the hostile guest's device again.
    pair.transfer_back(6000, 32 << 20)?;
    nic::Nic::up(&hostile.guest, "net-c", "vbus0", "10.0.0.3/24", "")?;
    nic::ping(&hostile.guest, crate::pair::ADDRESS[0], 3).map(drop)
}

/// The command of a set of rounds, whose seeds come after `first`. The driver may notice the damage
/// and end, or the round ends it.
fn rounds(first: u32) -> String {
    format!(
        "n={first}; total=0; while [ $n -lt {} ]; do n=$((n+1)); \
         vbus-guest net --name vbus0 >/tmp/net.log 2>&1 & pid=$!; \
         i=0; until [ -e /sys/class/net/vbus0 ] || [ $i -gt 100 ]; do i=$((i+1)); sleep 0.05; \
         done; \
         ip addr add 10.0.0.3/24 dev vbus0; ip link set vbus0 up; ping -i 0.01 10.0.0.1 \
         >/dev/null & ping=$!; \
         what=memory; [ $((n%2)) = 0 ] && what=all; w=$(guest-agent scribble $pid 40000 $n $what) \
         && total=$((total+w)); \
         kill -9 $pid $ping; wait $pid $ping; done 2>/dev/null; echo wrote $total",
        first + ROUNDS
    )
}

/// If the guest's memory has `share=off`, the driver reports that as the cause.
pub fn share_off(scene: &Scene) -> Result<()> {
    let bus = Bus::start(scene, &device("net", "venet", "backend = \"null\""))?;
    let mut machine = VmSpec::new("a").device(bus.socket("net"));
    machine.share = false;
    let vm = machine.boot(scene)?;
    nic::prepare(&vm.guest)?;
    let output = vm.guest.run_for("vbus-guest net --name vbus0", TRANSFER)?;
    ensure!(output.code != 0, "the driver works although the memory is not shared");
    ensure!(
        output.stderr.contains("share=on"),
        "the error does not say what to do:\n{}",
        output.stderr
    );
    vm.power_off()
}
