// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hostile guests, and guest memory that is not shared.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::bus::device;
use crate::pair::{Pair, PairSpec, TRANSFER};
use serde_json::Value;

use crate::bus::Bus;
use crate::guest::Guest;
use crate::lab::Scene;
use crate::nic;
use crate::vm::VmSpec;

/// The rounds of a set: each disturbs a new driver.
const ROUNDS: u32 = 25;
/// The most sets.
const SETS: u32 = 8;

/// The rounds of the hostile virtio driver in each set.
const VIRTIO_ROUNDS: u32 = 300;

/// The words of the hostile guest's kernel that leave the end of its memory to the virtio driver.
const RESERVED: &str = "memmap=32M$352M iomem=relaxed";

/// The addresses of guest a's NIC and of guest b's virtio card in their own network.
const CARD: [&str; 2] = ["10.0.1.1", "10.0.1.2"];

/// A guest writes random values over the registers, doorbells, rings and buffers of its NIC, and
/// its virtio driver follows no rule. The streams of two other guests, over NICs and a virtio card,
/// go on, with the right data.
pub fn scribbler(scene: &Scene) -> Result<()> {
    // The honest guests answer the hostile one's pings, so they do not wait long for each other's
    // buffers (spec/venet.md, "Backpressure"). On a loaded machine a few of their frames may be
    // dropped, and TCP sends them again.
    let mut pair =
        Pair::start(scene, PairSpec { device: "backpressure-ms = 60000", ..PairSpec::default() })?;
    pair.bus.run(&["device", "add", "net-c", "--class", "venet", "--set", "backend=switch"])?;
    for name in ["virt-b", "virt-c"] {
        let settings = ["--set", "backend=switch", "--set", "backpressure-ms=60000"];
        let words = [&["device", "add", name, "--class", "virtio-net"][..], &settings].concat();
        pair.bus.run(&words)?;
    }
    let mut machine = VmSpec::new("c");
    machine.append = RESERVED.to_owned();
    let sockets = ["net-c", "virt-c"].map(|name| pair.bus.socket(name));
    let hostile = machine.device(&sockets[0]).device(&sockets[1]).boot(scene)?;
    nic::prepare(&hostile.guest)?;
    honest_card(&mut pair)?;
    let function = hostile
        .guest
        .ok("f=$(basename $(dirname $(readlink -f /sys/bus/virtio/devices/virtio0))) && \
         echo $f > /sys/bus/pci/drivers/virtio-pci/unbind && echo $f")?;
    let function = function.trim();
    let (mut port, mut count, mut device) = (5000, 0u64, Value::Null);
    // Random writes break a connection in most sets of rounds. A set in which they did not has
    // tested less than the test is for, so another one follows.
    for set in 0..SETS {
        let rogue = format!("exec guest-agent virtio {} {VIRTIO_ROUNDS} {function}", set + 1);
        let rogue = hostile.guest.start(&rogue)?;
        let scribble = hostile.guest.start(&rounds(set * ROUNDS))?;
        while scribble.runs() || rogue.runs() {
            port += 1;
            match port % 3 {
                0 => pair.transfer(port, 32 << 20)?,
                1 => card_transfer(pair.a(), pair.b(), CARD[1], port)?,
                _ => card_transfer(pair.b(), pair.a(), CARD[0], port)?,
            }
        }
        check_rogue(&rogue.ok(Duration::from_secs(10))?)?;
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
    for (name, is_hostile) in
        [("net-a", false), ("net-b", false), ("virt-b", false), ("virt-c", true)]
    {
        let shown: Value =
            serde_json::from_str(&pair.bus.run(&["device", "show", name, "--json"])?)?;
        let broken = shown["counters"]["broken"].as_u64();
        ensure!(broken.is_some_and(|n| (n > 0) == is_hostile), "{name}: {shown}");
    }
    // The bus still runs, and honest drivers can use the hostile guest's devices again.
    pair.transfer_back(6000, 32 << 20)?;
    nic::Nic::up(&hostile.guest, "net-c", "vbus0", "10.0.0.3/24", "")?;
    nic::ping(&hostile.guest, crate::pair::ADDRESS[0], 3)?;
    hostile.guest.ok(&format!("echo {function} > /sys/bus/pci/drivers/virtio-pci/bind"))?;
    let interface = hostile.guest.ok("ls /sys/bus/pci/drivers/virtio-pci/*/virtio*/net")?;
    nic::set_up(&hostile.guest, interface.trim(), "10.0.1.3/24")?;
    nic::ping(&hostile.guest, CARD[0], 3).map(drop)
}

/// Guest b gets a virtio card, which the kernel's own driver drives.
fn honest_card(pair: &mut Pair) -> Result<()> {
    let socket = pair.bus.socket("virt-b");
    pair.vms[1].plug("dev1", 1, &socket)?;
    let interface = "ls /sys/bus/virtio/devices/*/net";
    let found = pair.b().ok(&format!("until {interface}; do sleep 0.05; done"))?;
    nic::set_up(pair.b(), found.trim(), &format!("{}/24", CARD[1]))?;
    pair.a().ok(&format!("ip addr add {}/24 dev vbus0", CARD[0]))?;
    nic::ping(pair.a(), CARD[1], 3).map(drop)
}

/// Sends bytes from or to the virtio card, and compares the hashes.
fn card_transfer(from: &Guest, to: &Guest, address: &str, port: u16) -> Result<()> {
    nic::transfer(from, to, address, port, 16 << 20, u64::from(port), TRANSFER)
}

/// Checks that the hostile virtio driver has done what it is for: sessions began, some broke, and
/// choices of features were refused.
fn check_rogue(said: &str) -> Result<()> {
    eprintln!("the hostile virtio driver: {}", said.trim());
    let number = |name: &str| {
        let mut words = said.split_whitespace().skip_while(|word| *word != name);
        words.nth(1).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0)
    };
    let least = [("writes", 10_000), ("started", 10), ("refused", 1), ("broken", 10)];
    ensure!(
        least.iter().all(|(name, least)| number(name) >= *least),
        "the hostile virtio driver did too little: {said:?}, and it is to be {least:?}"
    );
    Ok(())
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
