// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The class `virtio-net` behind an IOMMU, in front of the driver that a distribution's kernel has.
//! The driver maps each buffer before the device may use it (ACCESS_PLATFORM), and unmaps it
//! afterwards.

use anyhow::{Context, Result, ensure};

use crate::initramfs::{self, Archive};
use crate::lab::Scene;
use crate::linux::{self, IP};
use crate::pair::TRANSFER;
use crate::report::Skip;
use crate::system::System;
use crate::vm::{Iommu, VmSpec};
use crate::wire::{NICS, Wire};

use super::virtio::{ACCESS_PLATFORM, RING_PACKED, bind_anew, none_is_broken};

/// Bytes of each exchange. Each buffer costs two round trips between QEMU and the bus, and each of
/// these waits for a processor on a loaded machine.
const EXCHANGE: u64 = 1 << 18;

/// Bytes that flow each way before something happens.
const BEGUN: u64 = 1 << 16;

/// The settings of the two cards. The first has packed queues and MSI-X, the second split queues
/// and INTx.
const CARDS: [&str; 2] = ["msix = true", "packed = false"];

/// The least mappings that must come, and go, for the pings of a test.
const MAPPINGS: u64 = 6;

/// Behind Intel's IOMMU.
pub fn intel(scene: &Scene) -> Result<()> {
    behind(scene, Iommu::Intel)
}

/// Behind virtio's IOMMU.
pub fn virtio(scene: &Scene) -> Result<()> {
    behind(scene, Iommu::Virtio)
}

/// Two cards of a guest exchange data. Under load an interface is set down and up, its driver is
/// unbound and bound, and the guest is reset: all mappings of a card go and others come. No queue
/// breaks, and the guest's kernel has nothing to complain of.
fn behind(scene: &Scene, iommu: Iommu) -> Result<()> {
    let system = system(scene, iommu)?;
    let change = |machine| VmSpec {
        iommu: Some(iommu),
        cpus: 2,
        // A buffer is unmapped as soon as it is used, and not with many others at some time.
        append: "iommu.strict=1".into(),
        ..machine
    };
    let wire = Wire::start_class(scene, &system, "virtio-net", CARDS, change)?;
    wire.up()?;
    for (slot, name) in NICS.into_iter().enumerate() {
        translated(&wire, slot).context(name)?;
    }
    mappings_come_and_go(&wire)?;
    wire.exchange(EXCHANGE)?;

    let load = wire.load()?;
    wire.flow(BEGUN)?;
    let near = linux::interface(wire.guest(), 0)?;
    wire.guest().start(&format!("{IP} link set {near} down"))?.ok(TRANSFER)?;
    wire.guest().start(&format!("{IP} link set {near} up"))?.ok(TRANSFER)?;
    wire.flow(BEGUN).context("after the interface was down")?;
    bind_anew(&wire, load)?;
    wire.exchange(EXCHANGE).context("with the driver bound anew")?;
    linux::check_kernel(wire.guest())?;

    let _load = wire.load()?;
    wire.flow(BEGUN)?;
    let mut wire = wire;
    wire.reset()?;
    wire.up()?;
    wire.exchange(EXCHANGE).context("after a reset")?;
    linux::check_kernel(wire.guest())?;
    none_is_broken(&wire)?;
    wire.vm.power_off()
}

/// The lab's kernel, with the tools of a user, and with the driver of the IOMMU.
fn system(scene: &Scene, iommu: Iommu) -> Result<System> {
    let why = "the options replace the kit, which has the guest's tools";
    let kit = scene.lab.kit().ok_or_else(|| Skip(why.into()))?;
    let base = scene.lab.system();
    let mut archive = Archive::default();
    initramfs::add_tools(&mut archive, kit)?;
    if iommu == Iommu::Virtio {
        base.add_modules(&mut archive, &["virtio_iommu"])?;
    }
    let folder = scene.dir().join("system");
    std::fs::create_dir_all(&folder)?;
    base.extend(archive, &folder)
}

/// Checks that the IOMMU translates what the card behind root port `slot` does, and that the card
/// has the format of queues that it is to have.
fn translated(wire: &Wire, slot: usize) -> Result<()> {
    let function = linux::function(slot);
    wire.guest().ok(&format!("test -e {function}/iommu_group")).context("it has no IOMMU")?;
    let kind = wire.guest().ok(&format!("cat {function}/iommu_group/type"))?;
    ensure!(kind.trim() == "DMA", "its addresses are {kind:?}, and not translated");
    let bits = wire.guest().ok(&format!("cat {function}/virtio*/features"))?;
    let has = |bit: usize| bits.as_bytes().get(bit) == Some(&b'1');
    ensure!(
        has(ACCESS_PLATFORM) && has(RING_PACKED) == (slot == 0),
        "the driver has accepted {bits}"
    );
    Ok(())
}

/// Checks that each frame has a mapping of its own, which goes when the frame has gone.
fn mappings_come_and_go(wire: &Wire) -> Result<()> {
    let guest = wire.guest();
    let trace = "/sys/kernel/tracing";
    guest.ok(&format!(
        "mount -t tracefs tracefs {trace}; for event in map unmap; do \
         echo 1 > {trace}/events/iommu/$event/enable || exit 1; done"
    ))?;
    wire.ping_near()?;
    for event in ["map", "unmap"] {
        let count = guest.ok(&format!(
            "echo 0 > {trace}/events/iommu/{event}/enable && grep -c ' {event}: ' {trace}/trace"
        ))?;
        let count: u64 = count.trim().parse().with_context(|| format!("{event}: {count:?}"))?;
        ensure!(count >= MAPPINGS, "the kernel tells of {count} {event} events");
    }
    Ok(())
}
