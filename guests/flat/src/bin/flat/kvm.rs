//! What KVM offers beyond a processor.

#![allow(unsafe_code, reason = "KVM writes to a word of memory")]

use core::sync::atomic::Ordering;

use crate::cpu::{cpuid, write_msr};
use crate::traps;

const PV_EOI: u32 = 0x4b56_4d04;

/// Of KVM's features those that are used here.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// Its clock.
    pub clock: bool,
    /// Ends of interrupts by a bit in memory.
    pub pv_eoi: bool,
}

/// KVM's features, if this is a guest of it.
pub fn features() -> Option<Features> {
    const FIRST: u32 = 0x4000_0000;
    const HYPERVISOR: u32 = 1 << 31;
    if cpuid(1).ecx & HYPERVISOR == 0 {
        return None;
    }
    // It may stand behind the leaves of another hypervisor's interface.
    let signature = [*b"KVMK", *b"VMKV", *b"M\0\0\0"].map(u32::from_le_bytes);
    let base = (FIRST..FIRST + 0x1_0000).step_by(0x100).find(|leaf| {
        let leaf = cpuid(*leaf);
        [leaf.ebx, leaf.ecx, leaf.edx] == signature
    })?;
    let bits = cpuid(base + 1).eax;
    Some(Features { clock: bits & (1 << 3) != 0, pv_eoi: bits & (1 << 6) != 0 })
}

/// Has KVM tell this processor, by [`traps::pv_eoi`], when an interrupt may be ended by clearing a
/// bit, or not.
pub fn pv_eoi(on: bool) {
    let word = traps::pv_eoi();
    word.store(0, Ordering::Relaxed);
    let value = if on { &raw const *word as u64 | 1 } else { 0 };
    // SAFETY: the word is there for this.
    unsafe { write_msr(PV_EOI, value) };
}
