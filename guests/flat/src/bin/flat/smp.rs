//! The other processors: how they are started, and given something to do.
#![allow(unsafe_code, reason = "the first instructions of a processor are put where it finds them")]

use core::cell::UnsafeCell;
use core::hint::spin_loop;
use core::mem;
use core::ptr;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use crate::cpu::CPUS_MAX;
use crate::{apic, clock, cpu, traps};

/// Where another processor begins: memory below 1 MiB in which nothing is that is still of use.
const TRAMPOLINE: u32 = 0x8000;
/// How long the others may take to arrive, in nanoseconds.
const PATIENCE: u64 = 60_000_000_000;

/// Processors, without the first one, that have arrived.
static ARRIVED: AtomicU32 = AtomicU32::new(0);
/// Processors in all that take part.
static WANTED: AtomicU32 = AtomicU32::new(1);
/// The vector that wakes them.
static WAKE: AtomicU8 = AtomicU8::new(0);

/// What the others do, given their numbers.
type Job = &'static (dyn Fn(u32) + Sync);

struct Slot(UnsafeCell<Option<Job>>);

// SAFETY: written by the first processor alone, while no other one is busy; read by those once
// `JOBS` has gone up.
unsafe impl Sync for Slot {}

static JOB: Slot = Slot(UnsafeCell::new(None));
/// Jobs so far.
static JOBS: AtomicU32 = AtomicU32::new(0);
/// Processors that have yet to end the last one.
static BUSY: AtomicU32 = AtomicU32::new(0);

/// Starts the others, so that there are `wanted` in all; returns how many there are. Ends the guest
/// if they do not come.
pub fn start(wanted: u64) -> u32 {
    let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
    assert!((1..=CPUS_MAX as u32).contains(&wanted), "cpus={wanted} is none of 1 to {CPUS_MAX}");
    if wanted == 1 {
        return 1;
    }
    WANTED.store(wanted, Ordering::Relaxed);
    WAKE.store(apic::vector(), Ordering::Relaxed);
    let code = trampoline_code();
    // SAFETY: memory that only the loader has used, for what has been read already; in the lowest
    // MiB, which is mapped.
    unsafe { ptr::copy_nonoverlapping(code.as_ptr(), TRAMPOLINE as *mut u8, code.len()) };
    // As Intel has it: 10 ms behind the reset, and a second start, which only finds somebody if the
    // first one was missed.
    apic::reset_others();
    pause(10_000_000);
    apic::start_others(TRAMPOLINE);
    pause(200_000);
    apic::start_others(TRAMPOLINE);
    let began = clock::now();
    while ARRIVED.load(Ordering::Acquire) < wanted - 1 {
        assert!(clock::now() - began < PATIENCE, "of {wanted} processors some do not start");
        spin_loop();
    }
    wanted
}

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

/// The instructions that another processor begins with in real mode, at the start of any page below
/// 1 MiB: those that `boot.rs` has between two labels.
fn trampoline_code() -> &'static [u8] {
    let (from, end) = (&raw const trampoline, &raw const trampoline_end);
    // SAFETY: what is between the two labels, which is never written.
    unsafe { core::slice::from_raw_parts(from, end as usize - from as usize) }
}

fn pause(ns: u64) {
    let began = clock::now();
    while clock::now() - began < ns {
        spin_loop();
    }
}

/// How many processors take part.
pub fn count() -> u32 {
    WANTED.load(Ordering::Relaxed)
}

/// The life of another processor.
pub fn arrive(number: u32) -> ! {
    while number >= count() {
        // More than were asked for.
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
        // SAFETY: it was written before `JOBS` went up, and is not again until this processor is
        // not busy any more.
        if let Some(job) = unsafe { *JOB.0.get() } {
            job(number);
        }
        BUSY.fetch_sub(1, Ordering::Release);
    }
}

/// Has every other processor do `job`, with interrupts let in, and meanwhile does `here`; returns
/// when all have ended.
pub fn together<T>(job: &(dyn Fn(u32) + Sync), here: impl FnOnce() -> T) -> T {
    // SAFETY: nobody has it any more when this function returns. It does not unwind: a panic ends
    // the guest.
    let job = unsafe { mem::transmute::<&(dyn Fn(u32) + Sync), Job>(job) };
    // SAFETY: nobody is busy.
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
