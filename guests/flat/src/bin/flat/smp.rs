// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The other processors: starts them and gives them jobs.
#![allow(unsafe_code, reason = "the first instructions of a processor are put where it finds them")]

use core::cell::UnsafeCell;
use core::hint::spin_loop;
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use crate::cpu::CPUS_MAX;
use crate::{apic, clock, cpu, traps};

/// The start address of another processor: unused memory below 1 MiB.
const TRAMPOLINE: u32 = 0x8000;
/// How long the others may take to start, in nanoseconds.
const TIMEOUT: u64 = 60_000_000_000;

/// The number of processors that have started, without the first one.
static ARRIVED: AtomicU32 = AtomicU32::new(0);
/// The number of processors in use.
static WANTED: AtomicU32 = AtomicU32::new(1);
/// The vector that wakes them.
static WAKE: AtomicU8 = AtomicU8::new(0);

/// The job of the others. It gets the number of the processor.
type Job = &'static (dyn Fn(u32) + Sync);

struct Slot(UnsafeCell<Option<Job>>);

// SAFETY: only the first processor writes it, while no other one is busy. The others read it after
// `JOBS` has gone up.
unsafe impl Sync for Slot {}

static JOB: Slot = Slot(UnsafeCell::new(None));
/// The number of jobs so far.
static JOBS: AtomicU32 = AtomicU32::new(0);
/// The number of processors that have not finished the last job.
static BUSY: AtomicU32 = AtomicU32::new(0);

/// Starts the others, so that `wanted` processors run. Returns their number. Ends the guest if they
/// do not start.
pub fn start(wanted: u64) -> u32 {
    let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
    assert!((1..=CPUS_MAX as u32).contains(&wanted), "cpus={wanted} must be 1 to {CPUS_MAX}");
    if wanted == 1 {
        return 1;
    }
    WANTED.store(wanted, Ordering::Relaxed);
    WAKE.store(apic::vector(), Ordering::Relaxed);
    let code = trampoline_code();
    // SAFETY: only the loader has used this memory, for data that the guest has read already. The
    // lowest MiB is mapped.
    unsafe { ptr::copy_nonoverlapping(code.as_ptr(), TRAMPOLINE as *mut u8, code.len()) };
    // Intel's sequence: wait 10 ms after the reset, and send a second start, which has an effect
    // only if a processor missed the first one.
    apic::reset_others();
    pause(10_000_000);
    apic::start_others(TRAMPOLINE);
    pause(200_000);
    apic::start_others(TRAMPOLINE);
    let began = clock::now();
    while ARRIVED.load(Ordering::Acquire) < wanted - 1 {
        assert!(clock::now() - began < TIMEOUT, "some of {wanted} processors do not start");
        spin_loop();
    }
    wanted
}

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

/// The first instructions of another processor in real mode, for the start of any page below 1 MiB.
/// `boot.rs` has them between two labels.
fn trampoline_code() -> &'static [u8] {
    let (from, end) = (&raw const trampoline, &raw const trampoline_end);
    // SAFETY: the bytes between the two labels. Nothing writes them.
    unsafe { core::slice::from_raw_parts(from, end as usize - from as usize) }
}

fn pause(ns: u64) {
    let began = clock::now();
    while clock::now() - began < ns {
        spin_loop();
    }
}

/// The number of processors in use.
pub fn count() -> u32 {
    WANTED.load(Ordering::Relaxed)
}

/// The main loop of another processor.
pub fn arrive(number: u32) -> ! {
    while number >= count() {
        // This processor is not needed.
        cpu::sleep();
    }
    traps::init(number);
    apic::init_processor(number);
    ARRIVED.fetch_add(1, Ordering::Release);
    let mut done = 0;
    loop {
        cpu::interrupts(false);
        while JOBS.load(Ordering::Acquire) == done {
            cpu::sleep();
        }
        cpu::interrupts(true);
        done += 1;
        // SAFETY: the first processor wrote it before `JOBS` went up, and does not write it again
        // while this processor is busy.
        if let Some(job) = unsafe { *JOB.0.get() } {
            job(number);
        }
        BUSY.fetch_sub(1, Ordering::Release);
    }
}

/// Runs `job` on every other processor, with interrupts enabled, and `here` on this one. Returns
/// when all have ended.
pub fn together<T>(job: &(dyn Fn(u32) + Sync), here: impl FnOnce() -> T) -> T {
    // SAFETY: no processor uses the job when this function returns. It does not unwind, because a
    // panic ends the guest.
    let job = unsafe { mem::transmute::<&(dyn Fn(u32) + Sync), Job>(job) };
    // SAFETY: no processor is busy.
    unsafe { *JOB.0.get() = Some(job) };
    BUSY.store(count() - 1, Ordering::Relaxed);
    JOBS.fetch_add(1, Ordering::Release);
    wake();
    let outcome = here();
    while BUSY.load(Ordering::Acquire) > 0 {
        spin_loop();
    }
    outcome
}

/// Interrupts every other processor.
pub fn wake() {
    (1..count()).for_each(|number| apic::send(number, WAKE.load(Ordering::Relaxed)));
}
