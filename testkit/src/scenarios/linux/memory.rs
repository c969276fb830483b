// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How the driver's memory reaches the device: behind an IOMMU, and by copies (swiotlb). The last
//! one also shows interrupts by a line.

use anyhow::{Context, Result, ensure};

use super::wire::{NICS, Wire};
use crate::initramfs::Archive;
use crate::lab::Scene;
use crate::linux;
use crate::system::System;
use crate::vm::{Iommu, VmSpec};

/// Bytes of each exchange.
const EXCHANGE: u64 = 8 << 20;

/// Behind Intel's IOMMU.
pub fn intel(scene: &Scene) -> Result<()> {
    behind(scene, Iommu::Intel)
}

/// Behind virtio's IOMMU.
pub fn virtio(scene: &Scene) -> Result<()> {
    behind(scene, Iommu::Virtio)
}

fn behind(scene: &Scene, iommu: Iommu) -> Result<()> {
    let mut system = linux::chosen_system(scene)?;
    if iommu == Iommu::Virtio {
        let mut archive = Archive::default();
        system.add_modules(&mut archive, &["virtio_iommu"])?;
        let folder = scene.dir().join("system");
        std::fs::create_dir_all(&folder)?;
        system = system.extend(archive, &folder)?;
    }
    exchange(
        scene,
        &system,
        |machine| VmSpec { iommu: Some(iommu), ..machine },
        |wire| {
            for slot in 0..2 {
                let group = format!("test -e {}/iommu_group", linux::function(slot));
                wire.guest().ok(&group).context("the NIC is not behind the IOMMU")?;
            }
            // The kernel redirects the frames to the same NIC.
            wire.with_program("around", || wire.ping_near()).context("frames of XDP")?;
            ensure!(wire.counter(0, "tx_xdp")? >= 3, "no frames were redirected");
            for slot in 0..2 {
                let [frames, xdp, copied, mapped] =
                    ["tx_frames", "tx_xdp", "tx_copied", "tx_mapped"]
                        .map(|name| wire.counter(slot, name));
                // More frames may go while the counters are read, one after the other.
                let (all, copied, mapped) = (frames? + xdp?, copied?, mapped?);
                ensure!(
                    mapped == 0 && copied >= all && all > 0,
                    "NIC {slot}: of {all} frames {copied} were copied and {mapped} mapped"
                );
            }
            Ok(())
        },
    )
}

/// Every mapping is a copy. And both NICs interrupt by one line, which they share.
pub fn copies(scene: &Scene) -> Result<()> {
    let system = linux::chosen_system(scene)?;
    let change =
        |machine| VmSpec { append: "swiotlb=force pci=nomsi".into(), one_line: true, ..machine };
    exchange(scene, &system, change, |wire| {
        for slot in 0..2 {
            let kind =
                wire.guest().ok(&format!("cat {}/vbus/interrupts", linux::function(slot)))?;
            ensure!(kind.trim() == "intx 1", "NIC {slot} interrupts by {kind}");
        }
        let lines = wire.guest().ok("cat /proc/interrupts")?;
        let both = NICS.map(|name| format!("vbus-{name}-0"));
        let shared = lines.lines().any(|line| both.iter().all(|name| line.contains(name)));
        ensure!(shared, "the NICs do not share a line:\n{lines}");
        let used =
            "mount -t debugfs debugfs /sys/kernel/debug; cat /sys/kernel/debug/swiotlb/io_tlb_used";
        let used = wire.guest().ok(used)?;
        ensure!(used.trim() != "0", "nothing is copied: {used}");
        // The driver copies only where an IOMMU translates.
        ensure!(wire.counter(0, "tx_mapped")? > 0, "no frame was mapped");
        Ok(())
    })
}

/// Bytes go both ways, the module is loaded anew, and they go again.
fn exchange(
    scene: &Scene,
    system: &System,
    change: impl FnOnce(VmSpec) -> VmSpec,
    check: impl FnOnce(&Wire) -> Result<()>,
) -> Result<()> {
    let wire = Wire::start(scene, system, ["", ""], change)?;
    linux::insert(wire.guest(), "")?;
    wire.up()?;
    wire.exchange(EXCHANGE)?;
    check(&wire)?;
    linux::remove(wire.guest())?;
    linux::insert(wire.guest(), "")?;
    wire.up()?;
    wire.exchange(EXCHANGE)?;
    linux::check_kernel(wire.guest())?;
    wire.vm.power_off()
}
