// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Time, by the processor's cycle counter.
#![allow(unsafe_code, reason = "KVM writes its clock's parameters to memory")]

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use flat::rate::Rate;

use crate::cpu::{cycles, in8, out8, write_msr};
use crate::kvm;

/// KVM's register with the address of its clock's parameters.
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;

/// The parameters of KVM's clock.
#[repr(C, align(64))]
struct KvmTime {
    version: u32,
    pad: u32,
    cycles: u64,
    time: u64,
    multiplier: u32,
    shift: i8,
    flags: [u8; 3],
}

struct Cell<T>(UnsafeCell<T>);

// SAFETY: only one processor uses it, and no interrupt handler does.
unsafe impl<T> Sync for Cell<T> {}

static KVM_TIME: Cell<KvmTime> = Cell(UnsafeCell::new(KvmTime {
    version: 0,
    pad: 0,
    cycles: 0,
    time: 0,
    multiplier: 0,
    shift: 0,
    flags: [0; 3],
}));
static RATE: Cell<Rate> = Cell(UnsafeCell::new(Rate::NANOSECONDS));
static BEGAN: AtomicU64 = AtomicU64::new(0);

/// Measures the rate of the cycle counter.
pub fn init() {
    let rate =
        if kvm::features().is_some_and(|features| features.clock) { by_kvm() } else { by_timer() };
    // SAFETY: nothing else accesses it now.
    unsafe { *RATE.0.get() = rate };
    BEGAN.store(cycles(), Ordering::Relaxed);
}

/// Nanoseconds since [`init`].
pub fn now() -> u64 {
    rate().nanoseconds(cycles() - BEGAN.load(Ordering::Relaxed))
}

/// Millions of cycles in a second.
pub fn mhz() -> u64 {
    rate().mhz()
}

fn rate() -> Rate {
    // SAFETY: written by `init` alone.
    unsafe { *RATE.0.get() }
}

fn by_kvm() -> Rate {
    let time = KVM_TIME.0.get();
    // SAFETY: KVM owns the memory from the first write of the register to the second one.
    unsafe {
        write_msr(KVM_SYSTEM_TIME, time as u64 | 1);
        let rate = Rate::kvm(
            (&raw const (*time).multiplier).read_volatile(),
            (&raw const (*time).shift).read_volatile(),
        );
        write_msr(KVM_SYSTEM_TIME, 0);
        rate
    }
}

/// Measures by the second channel of the old timer. It runs at 1,193,182 Hz and counts 20 ms down.
fn by_timer() -> Rate {
    const NS: u64 = 20_000_000;
    const TICKS: u64 = 1_193_182 * NS / 1_000_000_000;
    const OUTPUT: u8 = 1 << 5;
    // Switch the channel's gate and the loudspeaker off. Then select mode 0: the output rises at
    // the end. If there is no timer, its port reads as all ones.
    let gate = in8(0x61) & 0xfc;
    out8(0x61, gate);
    out8(0x43, 0xb0);
    out8(0x42, (TICKS & 0xff) as u8);
    out8(0x42, (TICKS >> 8) as u8);
    out8(0x61, gate | 1);
    let before = cycles();
    while in8(0x61) & OUTPUT == 0 {}
    let after = cycles();
    out8(0x61, gate);
    Rate::measured(after - before, NS)
}
