//! Single instructions of the processor that the language has no words for.
#![allow(unsafe_code, reason = "instructions of ring 0")]

use core::arch::asm;
use core::arch::x86_64::{__cpuid, _rdtsc, CpuidResult};
use core::sync::atomic::{AtomicU64, Ordering};

/// The most processors that take part, the first one included.
pub const CPUS_MAX: usize = 4;

static SLEEPS: AtomicU64 = AtomicU64::new(0);

/// Reads a model-specific register. One that the processor does not have ends the guest.
pub fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads no memory; a fault is reported as what it is.
    unsafe {
        asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nostack, nomem))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// What it does to the processor must be what this program expects of it; what it has it write must
/// be its own memory.
pub unsafe fn write_msr(register: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: the caller's promise.
    unsafe { asm!("wrmsr", in("ecx") register, in("eax") low, in("edx") high, options(nostack)) };
}

/// Reads a byte from an I/O port.
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: no device's port has an effect on memory that is in use.
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
    // SAFETY: a device that is told where memory is gets it from the allocator.
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

/// Cycles since the processor began.
pub fn cycles() -> u64 {
    // SAFETY: every processor with long mode has it.
    unsafe { _rdtsc() }
}

/// The flag of a processor that lets interrupts in.
pub const INTERRUPTS_ON: u32 = 1 << 9;

/// Lets interrupts in, or not. Between two calls that let them in and keep them out, at least one
/// that is pending is taken.
pub fn interrupts(on: bool) {
    // SAFETY: handlers run on stacks of their own and change counters only.
    unsafe {
        if on {
            asm!("sti", "nop", options(nostack));
        } else {
            asm!("cli", options(nostack));
        }
    }
}

/// Sleeps until an interrupt has been taken. To be called with interrupts kept out, which they are
/// again afterwards: what the caller looked at before cannot change between the look and the sleep
/// without waking it.
pub fn sleep() {
    SLEEPS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: as in `interrupts`. An interrupt is taken after the instruction behind STI at the
    // earliest.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// How often [`sleep`] was called.
pub fn sleeps() -> u64 {
    SLEEPS.load(Ordering::Relaxed)
}

/// The end, if nothing else has ended it: a triple fault, which resets the machine.
pub fn triple_fault() -> ! {
    let none = [0u64; 2];
    // SAFETY: nothing runs after this.
    unsafe { asm!("cli", "lidt [{}]", "int3", in(reg) &raw const none, options(noreturn)) }
}

/// What the processor says of itself.
pub fn cpuid(leaf: u32) -> CpuidResult {
    // SAFETY: every processor with long mode has the instruction. (Safe in newer versions of the
    // language's library.)
    #[allow(unused_unsafe)]
    unsafe {
        __cpuid(leaf)
    }
}
