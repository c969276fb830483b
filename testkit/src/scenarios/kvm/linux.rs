//! Linux as a guest.

use std::time::Instant;

use anyhow::{Result, ensure};

use crate::inner::{Spec, Vmm};
use crate::report::Figures;
use crate::rig::Rig;

/// A guest boots under QEMU, runs commands, and powers off.
pub fn harness(rig: &Rig, _: &mut Figures) -> Result<()> {
    let spec = Spec { vmm: Vmm::Qemu, ..Spec::new("qemu") };
    let began = Instant::now();
    let inner = spec.boot(rig)?;
    eprintln!("a guest of QEMU has booted in {:.1} s", began.elapsed().as_secs_f32());
    inner.guest.ok("dmesg | grep -i 'hypervisor detected: KVM'")?;
    inner.power_off()
}

/// Linux boots in `vbus-vmm` with one and two CPUs, with interrupt controllers in the kernel and
/// out of it, and powers off.
pub fn boot(rig: &Rig, _: &mut Figures) -> Result<()> {
    for (cpus, irqchip) in [(1, "full"), (2, "split")] {
        let spec = Spec { cpus, ..Spec::new("linux") }.args(&format!("--irqchip {irqchip}"));
        let began = Instant::now();
        let inner = spec.boot(rig)?;
        eprintln!("{cpus} CPUs, {irqchip}: booted in {:.1} s", began.elapsed().as_secs_f32());
        let online = inner.guest.ok("nproc; dmesg | grep -i 'hypervisor detected'")?;
        ensure!(
            online.starts_with(&format!("{cpus}\n")) && online.contains("KVM"),
            "{cpus} CPUs on KVM, got {online}"
        );
        inner.power_off()?;
    }
    Ok(())
}
