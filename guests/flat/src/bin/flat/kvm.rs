// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Features of KVM that a processor does not have.

#![allow(unsafe_code, reason = "KVM writes to a word of memory")]

use core::sync::atomic::Ordering;

use crate::cpu::{cpuid, write_msr};
use crate::traps;

const PV_EOI: u32 = 0x4b56_4d04;

/// The KVM features that this guest uses.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// Its clock.
    pub clock: bool,
    /// PV EOI: ends of interrupts by a bit in memory.
    pub pv_eoi: bool,
}

/// KVM's features; `None` if this is not a guest of KVM.
pub fn features() -> Option<Features> {
    const FIRST: u32 = 0x4000_0000;
    const HYPERVISOR: u32 = 1 << 31;
    if cpuid(1).ecx & HYPERVISOR == 0 {
        return None;
    }
    // KVM's leaves may follow those of another hypervisor's interface.
    let signature = [*b"KVMK", *b"VMKV", *b"M\0\0\0"].map(u32::from_le_bytes);
    let base = (FIRST..FIRST + 0x1_0000).step_by(0x100).find(|leaf| {
        let leaf = cpuid(*leaf);
        [leaf.ebx, leaf.ecx, leaf.edx] == signature
    })?;
    let bits = cpuid(base + 1).eax;
    Some(Features { clock: bits & (1 << 3) != 0, pv_eoi: bits & (1 << 6) != 0 })
}

/// Switches PV EOI on or off for this processor: KVM sets a bit in [`traps::pv_eoi`] when the
/// processor may end an interrupt by clearing the bit.
pub fn pv_eoi(on: bool) {
    let word = traps::pv_eoi();
    word.store(0, Ordering::Relaxed);
    let value = if on { &raw const *word as u64 | 1 } else { 0 };
    // SAFETY: nothing else uses the word.
    unsafe { write_msr(PV_EOI, value) };
}
