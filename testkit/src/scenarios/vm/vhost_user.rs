// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The class `virtio-net` as the back end of QEMU's `-netdev vhost-user`.

use anyhow::{Result, ensure};

use super::virtio::interface;
use crate::bus::{Bus, device};
use crate::guest::Guest;
use crate::lab::Scene;
use crate::nic;
use crate::pair::TRANSFER;
use crate::vm::{Vm, VmSpec};

/// Bytes of a transfer, of the one during which the bus dies, and of the part of that which has
/// arrived by then.
const BYTES: u64 = 16 << 20;
const LONG: u64 = 192 << 20;
const BEGUN: u64 = 8 << 20;

/// The cards: two for guest a, and one for guest b. QEMU offers the driver of the second one packed
/// queues. Each has an address of its own: the bus that comes after the first one is not to choose
/// another.
const CARDS: [(&str, &str); 3] = [
    ("vhu-0", "mac = \"02:00:00:00:00:60\"\nqueue-pairs = 2"),
    ("vhu-1", "mac = \"02:00:00:00:00:61\""),
    ("vhu-2", "mac = \"02:00:00:00:00:62\""),
];

/// The addresses of a's cards, and of b in the network of each.
const OWN: [&str; 2] = ["10.0.0.1", "10.0.1.1"];
const PEER: [&str; 2] = ["10.0.0.2", "10.0.1.2"];

/// Two guests with QEMU's virtio network card, whose queues the bus has, exchange hashed streams:
/// at once, after the driver was bound anew, with two queue pairs, after a reset. Then the bus is
/// killed in the middle of a stream and starts again. QEMU connects again, and the stream goes on.
/// Nobody knows where packed queues were left, so their driver begins anew.
pub fn net(scene: &Scene) -> Result<()> {
    let card = |(name, settings): (&str, &str)| {
        let common = "backend = \"switch\"\ntransport = \"vhost-user\"\nmtu = 9000\n";
        device(name, "virtio-net", &format!("{common}{settings}"))
    };
    let config = CARDS.map(card).concat();
    let mut bus = Bus::start(scene, &config)?;
    let machine = |name: &str, cards: &[usize]| -> Result<Vm> {
        let mut machine = VmSpec::new(name);
        for (slot, &card) in cards.iter().enumerate() {
            let packed = if slot == 1 { ",packed=on" } else { "" };
            machine.args.extend(bus.vhost_user(CARDS[card].0, slot, packed)?);
        }
        machine.cpus = 2;
        machine.start(scene)
    };
    let (mut a, b) = (machine("a", &[0, 1])?, machine("b", &[2])?);
    b.wait_boot(1)?;
    a.wait_boot(1)?;
    let name = interface(&b.guest, 0)?;
    for peer in PEER {
        b.guest.ok(&format!("ip addr add {peer}/24 dev {name}"))?;
    }
    b.guest.ok(&format!("ip link set {name} up"))?;
    exchange(&a, &b, 0)?;
    exchange(&a, &b, 1)?;
    let bits = a.guest.ok("cat /sys/bus/virtio/devices/virtio1/features")?;
    // CSUM, HOST_TSO4, MRG_RXBUF, CTRL_VQ (which is QEMU's), EVENT_IDX, VERSION_1, RING_PACKED.
    let has = |bit: &usize| bits.as_bytes().get(*bit) == Some(&b'1');
    ensure!([0, 11, 15, 17, 29, 32, 34].iter().all(has), "the driver has accepted {bits}");
    for (name, _) in CARDS {
        let segments = bus.sum_of_pairs(name, |pair| pair["tx"]["segments"].as_u64())?;
        ensure!(segments > 0, "{name}: no segment was left to the bus");
    }

    bind_anew(&a.guest, 0)?;
    a.guest.ok(&format!("ethtool -L {} combined 2", interface(&a.guest, 0)?))?;
    exchange(&a, &b, 0)?;

    a.reset()?;
    a.wait_boot(2)?;
    exchange(&a, &b, 0)?;
    exchange(&a, &b, 1)?;

    let receiver = b.guest.start("guest-agent receive 0.0.0.0:5002")?;
    nic::wait_port(&b.guest, 5002)?;
    let sender = a.guest.start(&format!("guest-agent send {}:5002 {LONG} 7", PEER[0]))?;
    let counter = format!("cat /sys/class/net/{}/statistics/rx_bytes", interface(&b.guest, 0)?);
    let received = || -> Result<u64> { Ok(b.guest.ok(&counter)?.trim().parse()?) };
    let before = received()?;
    b.guest.ok(&format!("until [ $({counter}) -gt {} ]; do sleep 0.01; done", before + BEGUN))?;
    bus.process.kill()?;
    let at_death = received()? - before;
    ensure!(at_death < LONG, "the stream was over before the bus died");
    drop(bus);
    bus = Bus::start(scene, &config)?;
    let (sent, received) = (sender.ok(TRANSFER)?, receiver.ok(TRANSFER)?);
    ensure!(sent == received, "sent {}, received {}", sent.trim(), received.trim());
    exchange(&a, &b, 0)?;
    bind_anew(&a.guest, 1)?;
    exchange(&a, &b, 1)?;
    a.power_off()?;
    b.power_off()?;
    ensure!(bus.client().devices()?.iter().all(|device| !device.connected), "a front end is left");
    Ok(())
}

/// Lets the driver of card `at` begin anew.
fn bind_anew(guest: &Guest, at: usize) -> Result<()> {
    let driver = "/sys/bus/virtio/drivers/virtio_net";
    let anew = format!("echo virtio{at} > {driver}/unbind && echo virtio{at} > {driver}/bind");
    guest.ok(&anew).map(drop)
}

/// Sets up card `at` of `a` and sends through it in both directions.
fn exchange(a: &Vm, b: &Vm, at: usize) -> Result<()> {
    let (a, b) = (&a.guest, &b.guest);
    let (name, address) = (interface(a, at)?, OWN[at]);
    a.ok(&format!("ip addr replace {address}/24 dev {name} && ip link set {name} up"))?;
    nic::ping(a, PEER[at], 3)?;
    nic::transfer(a, b, PEER[at], 5000, BYTES, 1, TRANSFER)?;
    nic::transfer(b, a, OWN[at], 5001, BYTES, 2, TRANSFER)
}
