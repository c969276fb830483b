// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How the driver's memory reaches the device: behind an IOMMU, and by copies (swiotlb). The last
//! one also shows interrupts by a line.

use anyhow::{Context, Result, ensure};

use crate::initramfs::Archive;
use crate::lab::Scene;
use crate::linux;
use crate::pair::TRANSFER;
use crate::vm::{Iommu, VmSpec};
use crate::wire::{NICS, Wire};

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
    let change = |machine| VmSpec { iommu: Some(iommu), append: "tp_printk".into(), ..machine };
    let wire = exchange(
        || Wire::start(scene, &system, ["", ""], change),
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
    )?;
    unmaps_nothing_at_the_end(wire)
}

/// Powers the guest off. Once the kernel shuts its devices down, one after the other, nothing may
/// be unmapped: the IOMMU may be one of those devices. The kernel tells of both on the console.
fn unmaps_nothing_at_the_end(wire: Wire) -> Result<()> {
    const SHUTDOWN: &str = ": shutdown";
    const UNMAP: &str = "unmap: IOMMU:";
    let guest = wire.guest();
    guest.ok("mount -t tracefs tracefs /sys/kernel/tracing; \
         echo 0 > /proc/sys/kernel/tracepoint_printk && \
         echo 1 > /sys/kernel/tracing/events/iommu/unmap/enable")?;
    let near = linux::interface(guest, 0)?;
    guest
        .ok(&format!("ip link set {near} down && grep -c '{UNMAP}' /sys/kernel/tracing/trace"))
        .context("the kernel tells of no unmap when an interface is set down")?;
    // The other interface is up until the end.
    guest.ok(
        "echo 8 > /proc/sys/kernel/printk && echo 1 > /proc/sys/kernel/tracepoint_printk && \
         echo 1 > /sys/module/kernel/parameters/initcall_debug",
    )?;
    let console = wire.vm.console_log().to_owned();
    wire.vm.power_off()?;
    let console = std::fs::read(&console)?;
    let console = String::from_utf8_lossy(&console);
    let from = console.find(SHUTDOWN).context("the kernel does not say what it shuts down")?;
    let unmaps = console.get(from..).unwrap_or_default().matches(UNMAP).count();
    ensure!(unmaps == 0, "{unmaps} unmaps after the first device was shut down");
    Ok(())
}

/// Every mapping is a copy. And all devices interrupt by one line, which they share: both NICs, and
/// the interrupt controller that carries the interrupts of the first one. Their handlers are
/// threads, as in a kernel for real time.
pub fn copies(scene: &Scene) -> Result<()> {
    let system = linux::chosen_system(scene)?;
    let append = "swiotlb=force pci=nomsi threadirqs".into();
    let change = |machine| VmSpec { append, one_line: true, ..machine };
    let settings = ["pic = \"pic\"", ""];
    let start = || Wire::start_with(scene, &system, settings, &[("pic", "pic", "")], change);
    let wire = exchange(start, |wire| {
        let carried = format!("vbus-pic .*vbus-{}-0", NICS[0]);
        let wait = format!("until grep -q '{carried}' /proc/interrupts; do sleep 0.05; done");
        wire.guest().start(&wait)?.ok(TRANSFER).context("the controller carries nothing")?;
        wire.exchange(EXCHANGE)?;
        let counted = format!(
            "awk '/{carried}/{{n=$2}} END{{print n}}' /proc/interrupts; \
             cat /proc/[0-9]*/comm | grep -c '^irq/.*vbus-pic'"
        );
        let told = wire.guest().ok(&counted)?;
        let counts: Vec<u64> = told.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let all = counts.len() == 2 && counts.iter().all(|count| *count > 0);
        ensure!(all, "interrupts that were carried, and threads of the controller: {counts:?}");
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
        // The driver copies small frames itself. The segments of the exchange are large, and it
        // maps them as without the kernel's copies.
        for counter in ["tx_mapped", "tx_copied"] {
            ensure!(wire.counter(0, counter)? > 0, "{counter} is 0");
        }
        Ok(())
    })?;
    wire.vm.power_off()
}

/// Bytes go both ways, the module is loaded anew, and they go again. Returns the wire.
fn exchange(
    start: impl FnOnce() -> Result<Wire>,
    check: impl FnOnce(&Wire) -> Result<()>,
) -> Result<Wire> {
    let wire = start()?;
    linux::insert(wire.guest(), "")?;
    wire.up()?;
    wire.exchange(EXCHANGE)?;
    check(&wire)?;
    linux::remove(wire.guest())?;
    linux::insert(wire.guest(), "")?;
    wire.up()?;
    wire.exchange(EXCHANGE)?;
    linux::check_kernel(wire.guest())?;
    Ok(wire)
}
