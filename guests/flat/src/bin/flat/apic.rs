//! The local interrupt controller: where messages arrive, and how they are ended.
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
/// Where messages go to.
const MESSAGES: u32 = 0xfee0_0000;

/// Registers, by their number in x2APIC mode: 16 bytes each in xAPIC mode.
mod reg {
    pub const ID: u32 = 0x02;
    pub const TASK_PRIORITY: u32 = 0x08;
    pub const SPURIOUS: u32 = 0x0f;
    /// What is sent to other processors; their identity is in the register behind it, or in the
    /// upper half.
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

/// Takes that of the first processor into use, and the old interrupt controllers out of use.
pub fn init() {
    X2APIC.store(cpuid(1).ecx & (1 << 21) != 0, Ordering::Relaxed);
    // The two 8259: all their lines masked.
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    init_processor(0);
    for vector in FIRST..SPURIOUS {
        traps::set_end(vector, by_register());
    }
}

/// Takes that of this processor into use, whose number is said.
pub fn init_processor(number: u32) {
    let x2apic = is_x2apic();
    let base = read_msr(APIC_BASE) | ENABLE;
    // SAFETY: turns the controller on, in the mode that is remembered. The way from xAPIC to x2APIC
    // mode is by two steps.
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

/// Has all other processors reset themselves, and wait for [`start_others`].
pub fn reset_others() {
    command(0, ALL_OTHERS | 5 << 8);
}

/// Has all other processors that wait for it begin in real mode at this address, that of a page
/// below 1 MiB.
pub fn start_others(address: u32) {
    command(0, ALL_OTHERS | 6 << 8 | address >> 12);
}

/// Of a command: for all processors but this one. Of those that are not fixed vectors: the level is
/// asserted, as it always is.
const ALL_OTHERS: u32 = 3 << 18 | 1 << 14;

fn command(to: u32, what: u32) {
    if is_x2apic() {
        fence(Ordering::SeqCst);
        // SAFETY: no more than `write` does.
        unsafe { write_msr(0x800 + reg::COMMAND, u64::from(to) << 32 | u64::from(what)) };
    } else {
        write(reg::COMMAND_TO, to << 24);
        write(reg::COMMAND, what);
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

/// Lets the vectors that were handed out since `first` be handed out again; nothing sends them any
/// more.
pub fn reuse(first: u8) {
    NEXT.store(first, Ordering::Relaxed);
}

/// The next vector that [`vector`] hands out.
pub fn next_vector() -> u8 {
    NEXT.load(Ordering::Relaxed)
}

/// The identity of a processor's.
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
