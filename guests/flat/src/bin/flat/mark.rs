// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Marks. A mark is a write to a port of vbus-vmm, which then records KVM's counters. Only the
//! measured code runs between two marks.

use core::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use crate::cpu;

static PORT: AtomicU16 = AtomicU16::new(0);
static NEXT: AtomicU32 = AtomicU32::new(1);

/// The port of marks; 0: none.
pub fn init(port: u16) {
    PORT.store(port, Ordering::Relaxed);
}

/// Sets a mark and returns its number. It costs one exit, which counts before the mark.
pub fn set() -> u32 {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let port = PORT.load(Ordering::Relaxed);
    if port != 0 {
        cpu::out32(port, number);
    }
    number
}

/// Sets a mark and calls `count`. The processor takes no interrupt between the two.
pub fn set_with<T>(count: impl FnOnce() -> T) -> (u32, T) {
    cpu::interrupts(false);
    let counted = count();
    let number = set();
    cpu::interrupts(true);
    (number, counted)
}
