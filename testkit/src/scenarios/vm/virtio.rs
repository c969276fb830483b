// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The class `virtio-net` in front of the driver that a distribution's kernel has.

use anyhow::{Context, Result, ensure};

use crate::bus::{Bus, device};
use crate::guest::Guest;
use crate::lab::Scene;
use crate::nic::{self, Nic};
use crate::pair::TRANSFER;
use crate::vm::VmSpec;

/// Bytes of each transfer.
const BYTES: u64 = 16 << 20;

/// The settings of the guest's two cards. The first has packed queues and MSI-X, the second split
/// queues, two pairs, receive-side scaling and INTx.
const CARDS: [(&str, &str); 2] = [
    ("virt-0", "msix = true"),
    (
        "virt-1",
        "packed = false\nrss = true\nqueue-pairs = 2\nmtu = 9000\nmac = \"02:00:00:00:00:51\"",
    ),
];

/// The numbers of features that the guest's driver accepts: those of both cards, and those that
/// only one of them has.
const ACCEPTED: [usize; 9] = [0, 1, 11, 15, 17, 28, 29, 32, 33];
const ONLY: [&[usize]; 2] = [&[34], &[22, 57, 60]];

/// The addresses of the guest with venet, one for each network.
const PEER: [&str; 2] = ["10.0.0.1", "10.0.1.1"];

/// The addresses of the guest with virtio.
const OWN: [&str; 2] = ["10.0.0.2", "10.0.1.2"];

/// A guest with the kernel's own driver exchanges pings and hashed streams with a guest that has
/// venet, on one switch. Its driver is unbound and bound, a card is unplugged and plugged, and it
/// reboots.
pub fn net(scene: &Scene) -> Result<()> {
    let switch = |name: &str, class: &str, settings: &str| {
        device(name, class, &format!("backend = \"switch\"\n{settings}"))
    };
    let cards = CARDS.map(|(name, settings)| switch(name, "virtio-net", settings)).concat();
    let bus = Bus::start(scene, &format!("{cards}{}", switch("net-b", "venet", "mtu = 9000")))?;
    let mut machine = VmSpec::new("a");
    for (name, _) in CARDS {
        machine = machine.device(bus.socket(name));
    }
    machine.cpus = 2;
    let (mut a, b) =
        (machine.start(scene)?, VmSpec::new("b").device(bus.socket("net-b")).start(scene)?);
    b.wait_boot(1)?;
    nic::prepare(&b.guest)?;
    let peer = Nic::up(&b.guest, "net-b", "vbus0", &format!("{}/24", PEER[0]), "")?;
    b.guest.ok(&format!("ip addr add {}/24 dev vbus0", PEER[1]))?;
    a.wait_boot(1)?;
    exchange(&a.guest, &b.guest)?;
    negotiated(&a.guest)?;
    for (name, _) in CARDS {
        let segments = bus.sum_of_pairs(name, |pair| {
            Some(pair["tx"]["segments"].as_u64()? + pair["rx"]["segments"].as_u64()?)
        })?;
        ensure!(segments > 0, "{name}: no segment was left to the other end");
    }

    for at in 0..2 {
        let driver = "/sys/bus/virtio/drivers/virtio_net";
        a.guest.ok(&format!("echo virtio{at} > {driver}/unbind"))?;
        a.guest.ok(&format!("echo virtio{at} > {driver}/bind"))?;
    }
    exchange(&a.guest, &b.guest)?;

    // QEMU 11.1 cannot unplug a function with MSI-X.
    a.unplug("dev1")?;
    a.plug("dev1", 1, &bus.socket(CARDS[1].0))?;
    a.guest.ok("until ls /sys/bus/virtio/devices/virtio1/net/*; do sleep 0.05; done")?;
    exchange(&a.guest, &b.guest)?;

    a.reset()?;
    a.wait_boot(2)?;
    exchange(&a.guest, &b.guest)?;
    drop(peer);
    a.power_off()?;
    b.power_off()
}

/// Checks which features and which interrupts the guest's driver uses.
fn negotiated(guest: &Guest) -> Result<()> {
    for (at, only) in ONLY.into_iter().enumerate() {
        let bits = guest.ok(&format!("cat /sys/bus/virtio/devices/virtio{at}/features"))?;
        let has = |bit: usize| bits.as_bytes().get(bit) == Some(&b'1');
        let here = ACCEPTED.iter().chain(only).all(|bit| has(*bit));
        ensure!(here && !ONLY[1 - at].iter().any(|bit| has(*bit)), "card {at} has {bits}");
    }
    let interrupts = guest.ok("cat /proc/interrupts")?;
    let of = |name: &str| interrupts.lines().find(|line| line.ends_with(name));
    ensure!(of("virtio0-input.0").is_some(), "card 0 has no vector of its own:\n{interrupts}");
    ensure!(of("virtio1").is_some(), "card 1 has no INTx:\n{interrupts}");
    Ok(())
}

/// Sets up both cards of `a` and sends through each in both directions.
fn exchange(a: &Guest, b: &Guest) -> Result<()> {
    for at in 0..2 {
        let interface = interface(a, at)?;
        a.ok(&format!(
            "ip addr replace {}/24 dev {interface} && ip link set {interface} up",
            OWN[at]
        ))?;
        nic::ping(a, PEER[at], 3)?;
        nic::transfer(a, b, PEER[at], 5000, BYTES, 1, TRANSFER)?;
        nic::transfer(b, a, OWN[at], 5001, BYTES, 2, TRANSFER)?;
    }
    Ok(())
}

/// The name of the interface of card `at`.
fn interface(guest: &Guest, at: usize) -> Result<String> {
    let names = guest.ok(&format!("ls /sys/bus/virtio/devices/virtio{at}/net"))?;
    names.split_whitespace().next().map(str::to_owned).context("the card has no interface")
}
