// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The local APIC: it receives messages and ends them.
#![allow(unsafe_code, reason = "registers of the interrupt controller")]

use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering, fence};

use flat::pci::Message;

use crate::cpu::{self, CPUS_MAX, cpuid, out8, read_msr, write_msr};
use crate::traps::{self, COUNT, End, FIRST, SPURIOUS};

const APIC_BASE: u32 = 0x1b;
const ENABLE: u64 = 1 << 11;
const ENABLE_X2APIC: u64 = 1 << 10;
/// The xAPIC's registers.
const XAPIC: u64 = 0xfee0_0000;
/// The addresses of messages.
const MESSAGES: u32 = 0xfee0_0000;

/// Register numbers of x2APIC mode. In xAPIC mode each register takes 16 bytes.
mod reg {
    pub const ID: u32 = 0x02;
    pub const TASK_PRIORITY: u32 = 0x08;
    pub const SPURIOUS: u32 = 0x0f;
    /// The interrupt command register. The target's APIC id is in the next register (xAPIC), or in
    /// the upper half (x2APIC).
    pub const COMMAND: u32 = 0x30;
    pub const COMMAND_TO: u32 = 0x31;
    pub const LINT0: u32 = 0x35;
}

static X2APIC: AtomicBool = AtomicBool::new(false);
/// By processor.
static IDS: [AtomicU32; CPUS_MAX] = [const { AtomicU32::new(0) }; CPUS_MAX];
static NEXT: AtomicU8 = AtomicU8::new(FIRST);

fn read(register: u32) -> u32 {
    if is_x2apic() {
        return read_msr(0x800 + register) as u32;
    }
    // SAFETY: a register of the xAPIC, which exists and is mapped.
    unsafe { ((XAPIC + u64::from(register) * 16) as *const u32).read_volatile() }
}

fn write(register: u32, value: u32) {
    // SAFETY: a register of the local APIC. The write changes no memory.
    unsafe {
        if is_x2apic() {
            write_msr(0x800 + register, u64::from(value));
        } else {
            ((XAPIC + u64::from(register) * 16) as *mut u32).write_volatile(value);
        }
    }
}

/// Enables the local APIC of the first processor, and disables the old interrupt controllers.
pub fn init() {
    X2APIC.store(cpuid(1).ecx & (1 << 21) != 0, Ordering::Relaxed);
    // Mask all lines of the two 8259.
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    init_processor(0);
    for vector in FIRST..SPURIOUS {
        traps::set_end(vector, by_register());
    }
}

/// Enables the local APIC of this processor, which has number `number`.
pub fn init_processor(number: u32) {
    let x2apic = is_x2apic();
    let base = read_msr(APIC_BASE) | ENABLE;
    // SAFETY: enables the local APIC in the recorded mode. The change from xAPIC to x2APIC mode
    // needs two steps.
    unsafe {
        write_msr(APIC_BASE, base);
        if x2apic {
            write_msr(APIC_BASE, base | ENABLE_X2APIC);
        }
    }
    write(reg::LINT0, 1 << 16);
    write(reg::TASK_PRIORITY, 0);
    write(reg::SPURIOUS, 0x100 | u32::from(SPURIOUS));
    let id = read(reg::ID);
    IDS[number as usize].store(if x2apic { id } else { id >> 24 }, Ordering::Relaxed);
}

/// Sends an interrupt to another processor.
pub fn send(processor: u32, vector: u8) {
    command(id(processor), u32::from(vector));
}

/// Resets all other processors. They then wait for [`start_others`].
pub fn reset_others() {
    command(0, ALL_OTHERS | 5 << 8);
}

/// Starts all waiting processors in real mode at this address, which is that of a page below 1 MiB.
pub fn start_others(address: u32) {
    command(0, ALL_OTHERS | 6 << 8 | address >> 12);
}

/// Bits of a command. The first: all processors but this one. The second: the level, which is
/// always asserted in commands without a fixed vector.
const ALL_OTHERS: u32 = 3 << 18 | 1 << 14;

fn command(to: u32, what: u32) {
    if is_x2apic() {
        fence(Ordering::SeqCst);
        // SAFETY: as in `write`.
        unsafe { write_msr(0x800 + reg::COMMAND, u64::from(to) << 32 | u64::from(what)) };
    } else {
        write(reg::COMMAND_TO, to << 24);
        write(reg::COMMAND, what);
    }
}

/// Whether the local APIC is in x2APIC mode.
pub fn is_x2apic() -> bool {
    X2APIC.load(Ordering::Relaxed)
}

/// How an ordinary interrupt is ended.
pub fn by_register() -> End {
    if is_x2apic() { End::X2apic } else { End::Xapic }
}

/// Returns an unused vector. There are enough, because each test needs only a few.
pub fn vector() -> u8 {
    let vector = NEXT.fetch_add(1, Ordering::Relaxed);
    assert!(usize::from(vector - FIRST) < COUNT - 1, "no vector is left");
    vector
}

/// Frees the vectors from `first` on. The caller makes sure that no device sends them any more.
pub fn reuse(first: u8) {
    NEXT.store(first, Ordering::Relaxed);
}

/// The vector that [`vector`] returns next.
pub fn next_vector() -> u8 {
    NEXT.load(Ordering::Relaxed)
}

/// The APIC id of a processor.
pub fn id(processor: u32) -> u32 {
    IDS[processor as usize].load(Ordering::Relaxed)
}

/// The message that raises a vector on a processor.
pub fn message(processor: u32, vector: u8) -> Message {
    Message { address: MESSAGES | (id(processor) & 0xff) << 12, data: u32::from(vector) }
}

/// Sleeps until more than `before` interrupts have come to this processor.
pub fn wait(before: u64) {
    cpu::interrupts(false);
    while traps::taken() <= before {
        cpu::sleep();
    }
    cpu::interrupts(true);
}
