//! Hypercalls of Hyper-V's interface, which KVM has as well: one of them signals an event.
#![allow(unsafe_code, reason = "a hypercall is code that the hypervisor writes")]

use core::arch::asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU8, Ordering};

use crate::cpu::{cpuid, read_msr, write_msr};

/// Leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
const FIRST_LEAF: u32 = 0x4000_0000;
/// "Hv#1".
const INTERFACE: u32 = 0x3123_7648;
const RIGHT_OF_HYPERCALLS: u32 = 1 << 5;

const GUEST_OS_ID: u32 = 0x4000_0000;
const HYPERCALL: u32 = 0x4000_0001;
const PROCESSOR: u32 = 0x4000_0002;
const SYNIC_CONTROL: u32 = 0x4000_0080;
const SINT0: u32 = 0x4000_0090;
const ENABLE: u64 = 1;
/// Of a synthetic interrupt source: its interrupts end by themselves.
const AUTO_END: u64 = 1 << 17;
/// Of one: it interrupts nobody.
const MASKED: u64 = 1 << 16;

/// How many synthetic interrupt sources there are.
const SINTS: u32 = 16;

/// An identity of the open kind (bit 63), of no system that has a number.
const OPEN_SOURCE: u64 = 1 << 63 | 0x7f << 56;

/// Signal an event, its connection in a register.
const SIGNAL_EVENT_FAST: u64 = 0x5d | 1 << 16;

/// The page that the hypervisor puts its instruction in.
#[repr(C, align(4096))]
struct Page(UnsafeCell<[u8; 4096]>);

// SAFETY: only the hypervisor writes to it.
unsafe impl Sync for Page {}

static PAGE: Page = Page(UnsafeCell::new([0; 4096]));
static READY: AtomicU8 = AtomicU8::new(UNKNOWN);
const UNKNOWN: u8 = 0;
const NO: u8 = 1;
const YES: u8 = 2;

/// Whether there are hypercalls of this interface; they are taken into use by the first question.
pub fn hypercalls() -> bool {
    let ready = READY.load(Ordering::Relaxed);
    if ready != UNKNOWN {
        return ready == YES;
    }
    let yes = cpuid(1).ecx & HYPERVISOR != 0
        && cpuid(FIRST_LEAF + 1).eax == INTERFACE
        && cpuid(FIRST_LEAF + 3).eax & RIGHT_OF_HYPERCALLS != 0;
    if yes {
        // SAFETY: the page is the hypervisor's from here on. It lies in `.bss`, which is mapped
        // with the right to execute.
        unsafe {
            write_msr(GUEST_OS_ID, OPEN_SOURCE);
            write_msr(HYPERCALL, PAGE.0.get() as u64 | ENABLE);
        }
    }
    READY.store(if yes { YES } else { NO }, Ordering::Relaxed);
    yes
}

/// Signals the event of a connection.
pub fn signal_event(connection: u64) {
    // The fast form: what would lie in memory, connection and flag number, is in RDX. The result:
    // nothing to do about an error.
    // SAFETY: calls the hypervisor's code, which keeps all registers but these.
    unsafe {
        asm!("call {page}", page = in(reg) PAGE.0.get(), in("rcx") SIGNAL_EVENT_FAST, in("rdx") connection, in("r8") 0u64,
            out("rax") _);
    }
}

/// This processor's number.
pub fn processor() -> u32 {
    read_msr(PROCESSOR) as u32
}

/// Has synthetic interrupt source `number` raise `vector`, whose interrupts end by themselves.
pub fn enable_sint(number: u32, vector: u8) {
    assert!(number < SINTS, "no such synthetic interrupt source");
    // SAFETY: an interrupt with a handler; no page for messages or events is enabled.
    unsafe {
        write_msr(SYNIC_CONTROL, ENABLE);
        write_msr(SINT0 + number, u64::from(vector) | AUTO_END);
    }
}

/// Takes all synthetic interrupt sources back. Until then KVM ends *every* interrupt of their
/// vectors, wherever it comes from.
pub fn disable_sints() {
    for number in 0..SINTS {
        // SAFETY: as in `enable_sint`.
        unsafe { write_msr(SINT0 + number, MASKED) };
    }
}
