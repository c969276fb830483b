// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Linux as a guest.

use std::time::Instant;

use anyhow::{Result, ensure};

use crate::l1::L1;
use crate::l2::{L2Spec, Vmm};
use crate::report::Figures;

/// A guest boots under QEMU, runs commands, and powers off.
pub fn harness(l1: &L1, _: &mut Figures) -> Result<()> {
    let spec = L2Spec { vmm: Vmm::Qemu, ..L2Spec::new("qemu") };
    let began = Instant::now();
    let l2 = spec.boot(l1)?;
    eprintln!("a guest of QEMU has booted in {:.1} s", began.elapsed().as_secs_f32());
    l2.guest.ok("dmesg | grep -i 'hypervisor detected: KVM'")?;
    l2.power_off()
}

/// Linux boots in `vbus-vmm` and powers off: with one and two CPUs, and with the interrupt
/// controllers in the kernel and outside of it.
pub fn boot(l1: &L1, _: &mut Figures) -> Result<()> {
    for (cpus, irqchip) in [(1, "full"), (2, "split")] {
        let spec = L2Spec { cpus, ..L2Spec::new("linux") }.args(&format!("--irqchip {irqchip}"));
        let began = Instant::now();
        let l2 = spec.boot(l1)?;
        eprintln!("{cpus} CPUs, {irqchip}: booted in {:.1} s", began.elapsed().as_secs_f32());
        let online = l2.guest.ok("nproc; dmesg | grep -i 'hypervisor detected'")?;
        ensure!(
            online.starts_with(&format!("{cpus}\n")) && online.contains("KVM"),
            "{cpus} CPUs on KVM, got {online}"
        );
        l2.power_off()?;
    }
    Ok(())
}
