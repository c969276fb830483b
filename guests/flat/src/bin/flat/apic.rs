//! The local interrupt controller: where messages arrive, and how they are ended.
#![allow(unsafe_code, reason = "registers of the interrupt controller")]

use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use flat::pci::Message;

use crate::cpu::{self, cpuid, out8, read_msr, write_msr};
use crate::traps::{self, COUNT, End, FIRST, SPURIOUS};

const APIC_BASE: u32 = 0x1b;
const ENABLE: u64 = 1 << 11;
const ENABLE_X2APIC: u64 = 1 << 10;
/// The xAPIC's registers.
const XAPIC: u64 = 0xfee0_0000;
/// Where messages go to.
const MESSAGES: u32 = 0xfee0_0000;

/// Registers, by their number in x2APIC mode: 16 bytes each in xAPIC mode.
mod reg {
    pub const ID: u32 = 0x02;
    pub const TASK_PRIORITY: u32 = 0x08;
    pub const SPURIOUS: u32 = 0x0f;
    pub const LINT0: u32 = 0x35;
}

static X2APIC: AtomicBool = AtomicBool::new(false);
static ID: AtomicU32 = AtomicU32::new(0);
static NEXT: AtomicU8 = AtomicU8::new(FIRST);

fn read(register: u32) -> u32 {
    if is_x2apic() {
        return read_msr(0x800 + register) as u32;
    }
    // SAFETY: a register of the xAPIC, which is there and mapped.
    unsafe { ((XAPIC + u64::from(register) * 16) as *const u32).read_volatile() }
}

fn write(register: u32, value: u32) {
    // SAFETY: a register of the interrupt controller: it changes no memory.
    unsafe {
        if is_x2apic() {
            write_msr(0x800 + register, u64::from(value));
        } else {
            ((XAPIC + u64::from(register) * 16) as *mut u32).write_volatile(value);
        }
    }
}

/// Takes it into use, and the old interrupt controllers out of use.
pub fn init() {
    let x2apic = cpuid(1).ecx & (1 << 21) != 0;
    let base = read_msr(APIC_BASE) | ENABLE;
    // SAFETY: turns the controller on; the mode is remembered. The way from xAPIC to x2APIC mode is by two steps.
    unsafe {
        write_msr(APIC_BASE, base);
        if x2apic {
            write_msr(APIC_BASE, base | ENABLE_X2APIC);
        }
    }
    X2APIC.store(x2apic, Ordering::Relaxed);
    // The two 8259: all their lines masked.
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    write(reg::LINT0, 1 << 16);
    write(reg::TASK_PRIORITY, 0);
    write(reg::SPURIOUS, 0x100 | u32::from(SPURIOUS));
    let id = read(reg::ID);
    ID.store(if x2apic { id } else { id >> 24 }, Ordering::Relaxed);
    for vector in FIRST..SPURIOUS {
        traps::set_end(vector, by_register());
    }
}

/// Whether it is in x2APIC mode.
pub fn is_x2apic() -> bool {
    X2APIC.load(Ordering::Relaxed)
}

/// How an interrupt is ended that nothing special is done for.
pub fn by_register() -> End {
    if is_x2apic() { End::X2apic } else { End::Xapic }
}

/// A vector that nobody uses yet. There are enough: each test begins with a few.
pub fn vector() -> u8 {
    let vector = NEXT.fetch_add(1, Ordering::Relaxed);
    assert!(usize::from(vector - FIRST) < COUNT - 1, "no vector is left");
    vector
}

/// Lets the vectors that were handed out since `first` be handed out again; nothing sends them any more.
pub fn reuse(first: u8) {
    NEXT.store(first, Ordering::Relaxed);
}

/// The next vector that [`vector`] hands out.
pub fn next_vector() -> u8 {
    NEXT.load(Ordering::Relaxed)
}

/// The message that raises a vector on this processor.
pub fn message(vector: u8) -> Message {
    Message { address: MESSAGES | (ID.load(Ordering::Relaxed) & 0xff) << 12, data: u32::from(vector) }
}

/// Sleeps until more than `before` interrupts have come.
pub fn wait(before: u64) {
    cpu::interrupts(false);
    while traps::taken() <= before {
        cpu::sleep();
    }
    cpu::interrupts(true);
}
