//! Marks: a write to a port of vbus-vmm, which notes what KVM has counted until then. Between two
//! marks nothing runs but what is measured.

use core::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use crate::cpu;

static PORT: AtomicU16 = AtomicU16::new(0);
static NEXT: AtomicU32 = AtomicU32::new(1);

/// Where marks are written; 0: nowhere.
pub fn init(port: u16) {
    PORT.store(port, Ordering::Relaxed);
}

/// Sets a mark and returns its number. It costs one exit, which is counted between it and the mark
/// before.
pub fn set() -> u32 {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let port = PORT.load(Ordering::Relaxed);
    if port != 0 {
        cpu::out32(port, number);
    }
    number
}

/// Sets a mark and returns what `count` says at that same moment: no interrupt is taken between the
/// two.
pub fn set_with<T>(count: impl FnOnce() -> T) -> (u32, T) {
    cpu::interrupts(false);
    let counted = count();
    let number = set();
    cpu::interrupts(true);
    (number, counted)
}
