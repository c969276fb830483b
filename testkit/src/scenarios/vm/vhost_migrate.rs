// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU moves a running guest whose network card the bus has, over vhost-user.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::virtio::interface;
use crate::bus::{Bus, device};
use crate::lab::Scene;
use crate::nic;
use crate::pair::TRANSFER;
use crate::vm::{Vm, VmSpec};

/// Bytes of the stream during which the guest moves, and the part of it that has arrived when the
/// move begins.
const LONG: u64 = 256 << 20;
const BEGUN: u64 = 4 << 20;

/// The addresses of the guest that moves and of its peer.
const OWN: &str = "10.0.0.1";
const PEER: &str = "10.0.0.2";

/// The guest's card on this side of the move and on the other, and the peer's.
const CARDS: [(&str, &str); 3] = [
    ("from", "mac = \"02:00:00:00:00:70\""),
    ("to", "mac = \"02:00:00:00:00:70\""),
    ("peer", "mac = \"02:00:00:00:00:71\""),
];

/// How often a guest moves: with split rings, and with packed ones.
const RINGS: [(&str, &str); 2] = [("split", ""), ("packed", ",packed=on")];

/// A guest moves from one QEMU to another while a stream passes each way. Its memory goes by what
/// the device has logged, and its rings by where they were left: each byte of the streams arrives.
pub fn moves(scene: &Scene) -> Result<()> {
    let card = |(name, settings): (&str, &str)| {
        let common = "backend = \"switch\"\ntransport = \"vhost-user\"\n";
        device(name, "virtio-net", &format!("{common}{settings}"))
    };
    let bus = Bus::start(scene, &CARDS.map(card).concat())?;
    let mut peer = VmSpec::new("peer");
    peer.args.extend(bus.vhost_user("peer", 0, "")?);
    let peer = peer.boot(scene)?;
    let name = interface(&peer.guest, 0)?;
    nic::set_up(&peer.guest, &name, &format!("{PEER}/24"))?;
    for (rings, option) in RINGS {
        one_move(scene, &bus, &peer, (rings, option))
            .with_context(|| format!("with {rings} rings"))?;
    }
    peer.power_off()
}

/// A guest boots, moves, and is gone.
fn one_move(scene: &Scene, bus: &Bus, peer: &Vm, (rings, option): (&str, &str)) -> Result<()> {
    let machine = |side: &str, more: &[&str]| -> Result<Vm> {
        let mut machine = VmSpec::new(&format!("{side}-{rings}")).args(more);
        machine.args.extend(bus.vhost_user(side, 0, option)?);
        machine.start(scene)
    };
    let mut from = machine("from", &[])?;
    from.wait_boot(1)?;
    let own = interface(&from.guest, 0)?;
    nic::set_up(&from.guest, &own, &format!("{OWN}/24"))?;
    nic::ping(&from.guest, PEER, 3)?;
    // What the streams of the same bytes end with.
    let expected = {
        let receiver = peer.guest.start("guest-agent receive 0.0.0.0:5010")?;
        nic::wait_port(&peer.guest, 5010)?;
        let sent = from.guest.start(&format!("guest-agent send {PEER}:5010 {LONG} 9"))?;
        let sent = sent.ok(TRANSFER)?;
        ensure!(receiver.ok(TRANSFER)? == sent, "the streams differ before the move");
        sent
    };

    let socket = scene.dir().join(format!("move-{rings}"));
    let uri = format!("unix:{}", socket.display());
    let mut to = machine("to", &["-incoming", &uri])?;
    let receiver = peer.guest.start("guest-agent receive 0.0.0.0:5011")?;
    nic::wait_port(&peer.guest, 5011)?;
    let inward = from.guest.start("guest-agent receive 0.0.0.0:5012")?;
    nic::wait_port(&from.guest, 5012)?;
    let _outward = from.guest.start(&format!("guest-agent send {PEER}:5011 {LONG} 9"))?;
    let sender = peer.guest.start(&format!("guest-agent send {OWN}:5012 {LONG} 9"))?;
    let name = interface(&peer.guest, 0)?;
    let count = |which: &str| format!("cat /sys/class/net/{name}/statistics/{which}_bytes");
    for which in ["rx", "tx"] {
        let counter = count(which);
        let before: u64 = peer.guest.ok(&counter)?.trim().parse()?;
        let wait = format!("until [ $({counter}) -gt {} ]; do sleep 0.01; done", before + BEGUN);
        peer.guest.ok(&wait)?;
    }

    let began = Instant::now();
    // Fast enough that the guest cannot write more than passes.
    let limits = json!({ "max-bandwidth": 0_u64, "downtime-limit": 2000 });
    from.control.execute("migrate-set-parameters", limits)?;
    from.control.execute("migrate", json!({ "uri": uri }))?;
    let limit = began + from.guest.at_most(TRANSFER);
    let told = loop {
        let state = from.control.execute("query-migrate", json!({}))?;
        match state["status"].as_str() {
            Some("completed") => break state,
            Some("failed" | "cancelled") => bail!("QEMU does not move the guest: {state}"),
            _ => ensure!(Instant::now() < limit, "the move does not end: {state}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    eprintln!("{rings}: the move took {:?}; QEMU: {}", began.elapsed(), told["ram"]);
    // The sender is done first.
    loop {
        let status = to.control.execute("query-status", json!({}))?;
        if status["running"] == Value::Bool(true) {
            break;
        }
        ensure!(Instant::now() < limit, "the guest does not run there: {status}");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop((from, inward));

    // The streams end as those before the move did.
    let received = receiver.ok(TRANSFER)?;
    ensure!(received == expected, "received {}, not {}", received.trim(), expected.trim());
    ensure!(sender.ok(TRANSFER)? == expected, "the peer could not send all");
    nic::ping(&to.guest, PEER, 3)?;
    to.power_off()
}
