// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Single instructions of the processor that Rust cannot express.
#![allow(unsafe_code, reason = "instructions of ring 0")]

use core::arch::asm;
use core::arch::x86_64::{__cpuid, _rdtsc, CpuidResult};
use core::sync::atomic::{AtomicU64, Ordering};

/// The most processors that the guest uses, including the first one.
pub const CPUS_MAX: usize = 4;

static SLEEPS: AtomicU64 = AtomicU64::new(0);

/// Reads a model-specific register. If the processor does not have the register, the guest ends.
pub fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads no memory. A fault is reported as an exception.
    unsafe {
        asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nostack, nomem))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// The program must be prepared for the effect on the processor. If the write makes the hypervisor
/// write to memory, that memory must be reserved for it.
pub unsafe fn write_msr(register: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: the caller's promise.
    unsafe { asm!("wrmsr", in("ecx") register, in("eax") low, in("edx") high, options(nostack)) };
}

/// Reads a byte from an I/O port.
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: no port read affects memory that is in use.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, nomem)) };
    value
}

/// Reads 4 bytes from an I/O port.
pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as in `in8`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, nomem)) };
    value
}

/// Writes a byte to an I/O port, after everything written to memory before.
pub fn out8(port: u16, value: u8) {
    // SAFETY: a device gets only addresses of memory that the allocator has reserved for it.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack)) };
}

/// Writes 2 bytes to an I/O port, after everything written to memory before.
pub fn out16(port: u16, value: u16) {
    // SAFETY: as in `out8`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack)) };
}

/// Writes 4 bytes to an I/O port, after everything written to memory before.
pub fn out32(port: u16, value: u32) {
    // SAFETY: as in `out8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) };
}

/// Cycles since the processor's start.
pub fn cycles() -> u64 {
    // SAFETY: every processor with long mode has the instruction.
    unsafe { _rdtsc() }
}

/// The interrupt flag of the processor.
pub const INTERRUPTS_ON: u32 = 1 << 9;

/// Enables or disables interrupts. Between a call that enables them and a call that disables them,
/// the processor takes at least one pending interrupt.
pub fn interrupts(on: bool) {
    // SAFETY: handlers run on stacks of their own, and change only counters.
    unsafe {
        if on {
            asm!("sti", "nop", options(nostack));
        } else {
            asm!("cli", options(nostack));
        }
    }
}

/// Sleeps until the processor has taken an interrupt. The caller must have disabled interrupts, and
/// they are disabled again on return. So if an interrupt comes between the caller's check and the
/// sleep, it wakes the processor.
pub fn sleep() {
    SLEEPS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: as in `interrupts`. The processor takes an interrupt at the earliest after the
    // instruction that follows STI.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// The number of calls of [`sleep`].
pub fn sleeps() -> u64 {
    SLEEPS.load(Ordering::Relaxed)
}

/// The last resort to end the guest: a triple fault, which resets the machine.
pub fn triple_fault() -> ! {
    let none = [0u64; 2];
    // SAFETY: nothing runs after this.
    unsafe { asm!("cli", "lidt [{}]", "int3", in(reg) &raw const none, options(noreturn)) }
}

/// CPUID: information about the processor.
pub fn cpuid(leaf: u32) -> CpuidResult {
    // SAFETY: every processor with long mode has the instruction. (Safe in newer versions of the
    // language's library.)
    #[allow(unused_unsafe)]
    unsafe {
        __cpuid(leaf)
    }
}
