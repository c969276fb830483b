// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The class `virtio-net` in front of the drivers that each of Debian's kernels has.

use anyhow::{Context, Result, ensure};

use crate::bus::{Bus, device};
use crate::initramfs::{self, Archive};
use crate::kit::kernels::Series;
use crate::lab::Scene;
use crate::linux::{self, IP};
use crate::nic;
use crate::report::Skip;
use crate::vm::VmSpec;
use crate::wire::{FAR, NICS, Wire};

use super::virtio::{ACCESS_PLATFORM, RING_PACKED, bind_anew, none_is_broken};

/// Bytes of each exchange, and those that flow each way before something happens.
const BYTES: u64 = 4 << 20;
const BEGUN: u64 = 1 << 20;

/// The third card, in slot 2. It is behind QEMU's own virtio-net, which can hide features of the
/// device from the driver.
const HIDING: &str = "net-c";

/// The settings of the cards: packed queues, MSI-X and receive-side scaling; split queues and INTx;
/// vhost-user.
const CARDS: [(&str, &str); 3] = [
    (NICS[0], "msix = true\nrss = true\nqueue-pairs = 2"),
    (NICS[1], "packed = false\nqueue-pairs = 2"),
    (HIDING, "transport = \"vhost-user\"\nmac = \"02:00:00:00:00:63\""),
];

/// What QEMU hides from the driver of the third card: each frame then has one buffer, each
/// descriptor is in the ring, and each end asks by a flag.
const HIDDEN: &str = ",mrg_rxbuf=off,indirect_desc=off,event_idx=off";

/// The addresses of the third card, and of the second one in its network.
const ADDRESS: [&str; 2] = ["10.3.0.1", "10.3.0.2"];

/// Numbers of features.
const MRG_RXBUF: usize = 15;
const MQ: usize = 22;
const INDIRECT_DESC: usize = 28;
const EVENT_IDX: usize = 29;
const IN_ORDER: usize = 35;
const RING_RESET: usize = 40;

/// CSUM, GUEST_CSUM, HOST_TSO4, CTRL_VQ, VERSION_1: what the driver of each card accepts.
const ALL: [usize; 5] = [0, 1, 11, 17, 32];

/// What the drivers of the first two cards accept too, and that of the third does not.
const HIDDEN_BITS: [usize; 3] = [MRG_RXBUF, INDIRECT_DESC, EVENT_IDX];

/// Linux 6.1 of Debian 12.
pub fn v6_1(scene: &Scene) -> Result<()> {
    drives(scene, Series::V6_1)
}

/// Linux 6.12 of Debian 13.
pub fn v6_12(scene: &Scene) -> Result<()> {
    drives(scene, Series::V6_12)
}

/// Linux 7 of Debian 13's backports.
pub fn v7(scene: &Scene) -> Result<()> {
    drives(scene, Series::V7)
}

/// Three cards of a guest exchange data, with one queue pair and with two. Under load a driver is
/// unbound and bound, and the guest is reset. No queue breaks, and the guest's kernel has nothing
/// to complain of.
fn drives(scene: &Scene, series: Series) -> Result<()> {
    let kit = scene.lab.kit();
    let kit = kit.ok_or_else(|| Skip("the options replace the kit, which has kernels".into()))?;
    let mut archive = Archive::default();
    initramfs::add_tools(&mut archive, kit)?;
    let folder = scene.dir().join("system");
    std::fs::create_dir_all(&folder)?;
    let system = scene.lab.debian(linux::kernel_of(scene, series))?.extend(archive, &folder)?;

    let card = |(name, settings): (&str, &str)| {
        device(name, "virtio-net", &format!("backend = \"switch\"\n{settings}"))
    };
    let bus = Bus::start(scene, &CARDS.map(card).concat())?;
    let mut machine = VmSpec::new("a").device(bus.socket(NICS[0])).device(bus.socket(NICS[1]));
    machine.args.extend(bus.vhost_user(HIDING, 2, HIDDEN)?);
    (machine.cpus, machine.system) = (2, Some(system));
    let mut wire = Wire::of(machine.boot(scene)?, bus)?;
    up(&wire)?;
    accepted(&wire, series)?;
    exchange(&wire)?;

    for (slot, place) in ["", FAR].into_iter().enumerate() {
        let name = linux_name(&wire, slot)?;
        wire.guest().ok(&format!("{place}ethtool -L {name} combined 2"))?;
    }
    exchange(&wire).context("with two queue pairs")?;

    let load = wire.load()?;
    wire.flow(BEGUN)?;
    bind_anew(&wire, load)?;
    exchange(&wire).context("with the driver bound anew")?;
    linux::check_kernel(wire.guest())?;

    let _load = wire.load()?;
    wire.flow(BEGUN)?;
    wire.reset()?;
    up(&wire)?;
    exchange(&wire).context("after a reset")?;
    linux::check_kernel(wire.guest())?;
    none_is_broken(&wire)?;
    wire.vm.power_off()
}

/// The name of the interface of the card behind root port `slot`, wherever it is.
fn linux_name(wire: &Wire, slot: usize) -> Result<String> {
    let place = if slot == 1 { FAR } else { "" };
    let find = format!("{place}sh -c 'ls {}/virtio*/net'", linux::function(slot));
    Ok(wire.guest().ok(&find)?.trim().to_owned())
}

/// Gives all cards their addresses.
fn up(wire: &Wire) -> Result<()> {
    wire.up()?;
    nic::set_up(wire.guest(), &linux::interface(wire.guest(), 2)?, &format!("{}/24", ADDRESS[0]))?;
    let far = linux_name(wire, 1)?;
    let add = format!("{IP} -n far addr add {}/24 dev {far}", ADDRESS[1]);
    wire.guest().ok(&add).map(drop)
}

/// Sends between the first two cards, and between the third one and the second.
fn exchange(wire: &Wire) -> Result<()> {
    wire.exchange(BYTES)?;
    wire.exchange_between(ADDRESS, BYTES).with_context(|| format!("with {HIDDEN}"))
}

/// Checks which features the drivers have accepted.
fn accepted(wire: &Wire, series: Series) -> Result<()> {
    // In the mainline since Linux 7.0.
    let in_order = (series >= Series::V7).then_some(IN_ORDER);
    let own = [MQ, ACCESS_PLATFORM, RING_RESET].into_iter().chain(HIDDEN_BITS).chain(in_order);
    let own: Vec<usize> = own.collect();
    for slot in 0..3 {
        let bits = wire.guest().ok(&format!("cat {}/virtio*/features", linux::function(slot)))?;
        let has = |bit: &usize| bits.as_bytes().get(*bit) == Some(&b'1');
        let set: Vec<usize> = (0..64).filter(has).collect();
        eprintln!("{:?}: the driver of card {slot} has accepted {set:?}", series);
        ensure!(ALL.iter().all(has), "card {slot} has {set:?}");
        ensure!(has(&RING_PACKED) == (slot == 0), "card {slot} has {set:?}");
        if slot == 2 {
            ensure!(!HIDDEN_BITS.iter().any(has), "card {slot} has {set:?}");
        } else {
            ensure!(own.iter().all(has), "card {slot} has {set:?}, and not all of {own:?}");
        }
    }
    Ok(())
}
