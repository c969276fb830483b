//! Linux as a guest.

use std::time::Instant;

use anyhow::Result;

use super::Figures;
use super::inner::{Spec, Vmm};
use super::rig::Rig;

/// A guest boots under QEMU, runs commands, and powers off.
pub fn harness(rig: &Rig, _: &mut Figures) -> Result<()> {
    let spec = Spec { vmm: Vmm::Qemu, ..Spec::new("qemu") };
    let began = Instant::now();
    let inner = spec.boot(rig)?;
    eprintln!("a guest of QEMU has booted in {:.1} s", began.elapsed().as_secs_f32());
    inner.guest.ok("grep -q KVMKVMKVM /proc/cpuinfo || dmesg | grep -i 'hypervisor detected: KVM'")?;
    inner.power_off()
}
