// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The class `virtio-net` in front of the driver that a distribution's kernel has.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::bus::{Bus, device};
use crate::flood::{self, Flood};
use crate::guest::Guest;
use crate::initramfs::{self, Archive};
use crate::lab::Scene;
use crate::linux;
use crate::nic::{self, Nic};
use crate::pair::TRANSFER;
use crate::system::kexec;
use crate::vm::VmSpec;
use crate::wire::{Load, NICS, Wire};

/// Numbers of features.
pub(super) const ACCESS_PLATFORM: usize = 33;
pub(super) const RING_PACKED: usize = 34;

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

/// The third card, whose stream is flooded with frames.
const FLOODED: &str = "virt-2";

/// Frames that come to it before something happens.
const FRAMES: u64 = 500;

/// The MiB of the guest's memory: it has its own kernel and root file system in it.
const MEMORY: u32 = 640;

/// Datagrams that nobody answers, without an end, and the file that says that they are thrown.
const THROW: &str = "while :; do for to in 10.0.0.1 10.0.1.1; do \
    guest-agent datagrams throw $to:9 100; done; sleep 0.05; done";
const THROWS: &str = "/tmp/throws";

/// The MiB of it that a new kernel watches before it has a driver for the cards, and for how many
/// seconds.
const WATCHED: u32 = 256;
const SECONDS: u32 = 1;

/// The words for a kernel that shall not drive virtio over PCI, which is built into it.
const NO_DRIVER: &str = "initcall_blacklist=virtio_pci_driver_init";

/// The numbers of features that the guest's driver accepts: those of both cards, and those that
/// only one of them has.
const ACCEPTED: [usize; 9] = [0, 1, 11, 15, 17, 28, 29, 32, 33];
const ONLY: [&[usize]; 2] = [&[34], &[22, 57, 60]];

/// The addresses of the guest with venet, one for each network.
const PEER: [&str; 2] = ["10.0.0.1", "10.0.1.1"];

/// The addresses of the guest with virtio.
const OWN: [&str; 2] = ["10.0.0.2", "10.0.1.2"];

/// A guest with the kernel's own driver exchanges pings and hashed streams with a guest that has
/// venet, on one switch. A third card is flooded with frames meanwhile. In this traffic the driver
/// is unbound and bound, the function is reset, a card is unplugged and plugged, the guest reboots,
/// starts another kernel, and is reset. No frame comes into that kernel's memory.
pub fn net(scene: &Scene) -> Result<()> {
    let switch = |name: &str, class: &str, settings: &str| {
        device(name, class, &format!("backend = \"switch\"\n{settings}"))
    };
    let cards = CARDS.map(|(name, settings)| switch(name, "virtio-net", settings)).concat();
    let stream = scene.dir().join("stream");
    let settings = format!("backend = \"stream\"\nlisten = \"{}\"", stream.display());
    let flooded = device(FLOODED, "virtio-net", &settings);
    let far = switch("net-b", "venet", "mtu = 9000");
    let bus = Bus::start(scene, &format!("{cards}{flooded}{far}"))?;
    let mut machine = VmSpec::new("a").device(bus.socket(CARDS[0].0));
    machine = machine.device(bus.socket(CARDS[1].0)).device(bus.socket(FLOODED));
    (machine.cpus, machine.memory_mib) = (2, MEMORY);
    if let Some(kit) = scene.lab.kit() {
        let mut tools = Archive::default();
        initramfs::add_program(&mut tools, &kit.tools()?, "usr/local/bin", "kexec")?;
        let folder = scene.dir().join("system");
        machine.system = Some(scene.lab.system().extend_with_itself(tools, &folder)?);
    }
    let has_kexec = machine.system.is_some();
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

    let _flood = Flood::start(&stream)?;
    for at in 0..3 {
        busy(&a.guest, &bus)?;
        let driver = "/sys/bus/virtio/drivers/virtio_net";
        a.guest.ok(&format!("echo virtio{at} > {driver}/unbind"))?;
        a.guest.ok(&format!("echo virtio{at} > {driver}/bind"))?;
    }
    exchange(&a.guest, &b.guest)?;
    for at in 0..3 {
        busy(&a.guest, &bus)?;
        reset_function(&a.guest, at)?;
    }
    exchange(&a.guest, &b.guest)?;
    busy(&a.guest, &bus)?;

    // QEMU 11.1 cannot unplug a function with MSI-X.
    a.unplug("dev1")?;
    a.plug("dev1", 1, &bus.socket(CARDS[1].0))?;
    a.guest.ok("until ls /sys/bus/virtio/devices/virtio1/net/*; do sleep 0.05; done")?;
    exchange(&a.guest, &b.guest)?;

    busy(&a.guest, &bus)?;
    a.guest.start("exec reboot -f")?;
    a.wait_boot(2)?;
    exchange(&a.guest, &b.guest).context("after a reboot")?;
    busy(&a.guest, &bus)?;
    let mut boots = 2;
    if has_kexec {
        a.guest.start(&kexec(NO_DRIVER))?;
        boots += 1;
        a.wait_boot(boots).context("after kexec")?;
        ensure!(interface(&a.guest, 0).is_err(), "the new kernel was to have no driver");
        flood::silence(&a.guest, &bus, FLOODED, (WATCHED, SECONDS)).context("after kexec")?;
    } else {
        eprintln!("not tested: kexec, which the kit has and this guest has not");
    }
    a.reset()?;
    a.wait_boot(boots + 1)?;
    exchange(&a.guest, &b.guest).context("after a reset")?;
    drop(peer);
    a.power_off()?;
    b.power_off()
}

/// Frames flow: the third card is up and has got many, and the others send what nobody answers.
fn busy(guest: &Guest, bus: &Bus) -> Result<()> {
    guest.ok(&format!("ip link set {} up", interface(guest, 2)?))?;
    guest.ok(&format!("[ -e {THROWS} ] || {{ touch {THROWS}; ({THROW}) > /dev/null 2>&1 & }}"))?;
    flood::wait(guest, bus, FLOODED, FRAMES)
}

/// Resets the function of card `at` under its driver, and binds the driver anew.
fn reset_function(guest: &Guest, at: usize) -> Result<()> {
    let folder = "/sys/bus/virtio/devices";
    guest
        .ok(&format!(
            "f=$(dirname $(readlink -f {folder}/virtio{at})) && echo 1 > $f/reset && \
         cd /sys/bus/pci/drivers/virtio-pci && echo ${{f##*/}} > unbind && echo ${{f##*/}} > bind"
        ))
        .map(drop)
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
pub fn interface(guest: &Guest, at: usize) -> Result<String> {
    let names = guest.ok(&format!("ls /sys/bus/virtio/devices/virtio{at}/net"))?;
    names.split_whitespace().next().map(str::to_owned).context("the card has no interface")
}

/// Unbinds the driver of the first card, and binds it again, while `load` flows, which it ends. The
/// card has its address again afterwards.
pub(super) fn bind_anew(wire: &Wire, load: Load) -> Result<()> {
    let driver = "/sys/bus/virtio/drivers/virtio_net";
    let anew = format!(
        "v=$(basename {}/virtio*) && echo $v > {driver}/unbind && echo $v > {driver}/bind",
        linux::function(0)
    );
    wire.guest().start(&anew)?.ok(TRANSFER)?;
    load.end()?;
    wire.up_near(&linux::interface(wire.guest(), 0)?)
}

/// Checks that the driver of neither card has broken the rules, as the bus sees it.
pub(super) fn none_is_broken(wire: &Wire) -> Result<()> {
    for name in NICS {
        let shown = wire.bus.run(&["device", "show", name, "--json"])?;
        let shown: Value = serde_json::from_str(&shown)?;
        ensure!(shown["counters"]["broken"] == 0, "{name} broke: {}", shown["counters"]);
    }
    Ok(())
}
