// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hypercalls of Hyper-V's interface, which KVM offers too. One of them signals an event.
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
/// A bit of a synthetic interrupt source: AutoEOI, its interrupts end automatically.
const AUTO_END: u64 = 1 << 17;
/// A bit of a synthetic interrupt source: it is masked.
const MASKED: u64 = 1 << 16;

/// The number of synthetic interrupt sources.
const SINTS: u32 = 16;

/// A guest identity: open source (bit 63), and no known operating system.
const OPEN_SOURCE: u64 = 1 << 63 | 0x7f << 56;

/// Signal an event, with its connection in a register.
const SIGNAL_EVENT_FAST: u64 = 0x5d | 1 << 16;

/// The page into which the hypervisor puts its hypercall instruction.
#[repr(C, align(4096))]
struct Page(UnsafeCell<[u8; 4096]>);

// SAFETY: only the hypervisor writes to it.
unsafe impl Sync for Page {}

static PAGE: Page = Page(UnsafeCell::new([0; 4096]));
static READY: AtomicU8 = AtomicU8::new(UNKNOWN);
const UNKNOWN: u8 = 0;
const NO: u8 = 1;
const YES: u8 = 2;

/// Whether there are hypercalls of this interface. The first call enables them.
pub fn hypercalls() -> bool {
    let ready = READY.load(Ordering::Relaxed);
    if ready != UNKNOWN {
        return ready == YES;
    }
    let yes = cpuid(1).ecx & HYPERVISOR != 0
        && cpuid(FIRST_LEAF + 1).eax == INTERFACE
        && cpuid(FIRST_LEAF + 3).eax & RIGHT_OF_HYPERCALLS != 0;
    if yes {
        // SAFETY: the hypervisor owns the page from here on. The page is in `.bss`, which is mapped
        // as executable.
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
    // The fast form has connection and flag number in RDX, not in memory. The caller cannot handle
    // an error, so the result is ignored. SAFETY: calls the hypervisor's code, which keeps all
    // registers but these.
    unsafe {
        asm!("call {page}", page = in(reg) PAGE.0.get(), in("rcx") SIGNAL_EVENT_FAST, in("rdx") connection, in("r8") 0u64,
            out("rax") _);
    }
}

/// This processor's number.
pub fn processor() -> u32 {
    read_msr(PROCESSOR) as u32
}

/// Makes synthetic interrupt source `number` raise `vector` with AutoEOI.
pub fn enable_sint(number: u32, vector: u8) {
    assert!(number < SINTS, "no such synthetic interrupt source");
    // SAFETY: the interrupt has a handler, and no page for messages or events is enabled.
    unsafe {
        write_msr(SYNIC_CONTROL, ENABLE);
        write_msr(SINT0 + number, u64::from(vector) | AUTO_END);
    }
}

/// Disables all synthetic interrupt sources. While they are enabled, KVM ends *every* interrupt of
/// their vectors, from any source.
pub fn disable_sints() {
    for number in 0..SINTS {
        // SAFETY: as in `enable_sint`.
        unsafe { write_msr(SINT0 + number, MASKED) };
    }
}
