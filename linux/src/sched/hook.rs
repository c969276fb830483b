// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The hook in the scheduler: while it exists, each switch of each CPU comes here.
#![allow(unsafe_code, reason = "callbacks from the shim, and memory of one CPU each")]

use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use vbus_driver::Error;
use vbus_driver::sched::{Cpus, Limits};

use super::ffi::{self, Task};
use super::slot::Slot;
use crate::hal::KernelHal;
use crate::kernel::{Errno, KBox, KVec, cpu};

/// The CPUs of an open device post what they run, until this is dropped.
pub struct Hook {
    raw: NonNull<c_void>,
    posting: NonNull<Posting>,
}

// SAFETY: its only method is its drop, which any thread may run.
unsafe impl Send for Hook {}

/// What the callbacks get.
struct Posting {
    limits: Limits,
    /// Milliseconds from one renewal to the next.
    period: u32,
    cpus: KVec<PerCpu>,
    /// The shim's hook.
    raw: AtomicPtr<c_void>,
    /// Whether renewals go on: the CPU that makes it true starts them.
    renews: AtomicBool,
}

/// The state of one CPU, in lines of its own.
#[repr(align(128))]
struct PerCpu {
    slot: UnsafeCell<Slot>,
    /// Whether its class is to be renewed. The CPU writes it, and the renewal reads it.
    renewed: AtomicBool,
}

// SAFETY: a CPU uses its own slot alone, with interrupts off.
unsafe impl Sync for PerCpu {}
// SAFETY: a slot may be moved to another thread while no CPU uses it.
unsafe impl Send for PerCpu {}

impl Hook {
    /// Registers the pages of all CPUs that the device has, and begins.
    ///
    /// # Errors
    /// Those of the device; there is no memory; or the kernel has no tracepoint for it.
    pub fn new(device: &mut Cpus<KernelHal>) -> Result<Self, Error> {
        let limits = *device.limits();
        let possible = cpu::numbers();
        let mut cpus = KVec::new();
        for cpu in 0..limits.cpus.min(possible) {
            let slot = UnsafeCell::new(Slot::new(device.cpu(cpu)?));
            cpus.push(PerCpu { slot, renewed: AtomicBool::new(false) })?;
        }
        let period = (limits.boost_ms / 3).max(1);
        let (raw, renews) = (AtomicPtr::new(ptr::null_mut()), AtomicBool::new(false));
        let posting = KBox::new(Posting { limits, period, cpus, raw, renews })?.into_raw();
        // SAFETY: the posting lives until the hook is freed.
        let Some(raw) = NonNull::new(unsafe { ffi::shim_sched_new(posting.cast()) }) else {
            // SAFETY: it came from `into_raw` above, and nobody else has it.
            drop(unsafe { KBox::from_raw(posting) });
            return Err(Error::NoMemory);
        };
        // SAFETY: addresses of boxes are not null.
        let hook = Self { raw, posting: unsafe { NonNull::new_unchecked(posting) } };
        // SAFETY: the posting is valid, and is only shared from here on.
        unsafe { &*posting }.raw.store(raw.as_ptr(), Ordering::Relaxed);
        // SAFETY: the hook is valid. The registration publishes what was stored before.
        let started = Errno::check(unsafe { ffi::shim_sched_start(raw.as_ptr()) });
        started.map(|_| hook).map_err(|_| Error::Unsupported("a kernel without sched_switch"))
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        // SAFETY: nobody uses it again, and no callback runs when this returns.
        unsafe { ffi::shim_sched_free(self.raw.as_ptr()) };
        // SAFETY: it came from `into_raw`, and the callbacks that used it have ended.
        drop(unsafe { KBox::from_raw(self.posting.as_ptr()) });
    }
}

impl Posting {
    /// Does something with the slot of a CPU, which says whether its class is to be renewed.
    ///
    /// # Safety
    /// The caller runs on CPU `cpu` with interrupts off.
    unsafe fn on_cpu(&self, cpu: u32, work: impl FnOnce(&mut Slot) -> bool) {
        let Some(own) = usize::try_from(cpu).ok().and_then(|cpu| self.cpus.get(cpu)) else {
            return;
        };
        // SAFETY: only this CPU uses it, and nothing else runs here until interrupts are on.
        let renewed = work(unsafe { &mut *own.slot.get() });
        if renewed == own.renewed.load(Ordering::Relaxed) {
            return;
        }
        // Pairs with the loads in `renew`: either it sees this, or this sees that it has ended.
        own.renewed.store(renewed, Ordering::SeqCst);
        if renewed && !self.renews.swap(true, Ordering::SeqCst) {
            // SAFETY: the hook is valid while callbacks run.
            unsafe { ffi::shim_sched_renew_soon(self.raw.load(Ordering::Relaxed)) };
        }
    }

    /// Has each CPU renew its class that needs it. Returns the milliseconds until the next time.
    fn renew(&self) -> Option<u32> {
        let any = || self.cpus.iter().any(|cpu| cpu.renewed.load(Ordering::SeqCst));
        for (cpu, own) in (0..).zip(self.cpus.iter()) {
            if own.renewed.load(Ordering::SeqCst) {
                // SAFETY: the hook is valid while callbacks run.
                unsafe { ffi::shim_sched_renew_on(self.raw.load(Ordering::Relaxed), cpu) };
            }
        }
        if any() {
            return Some(self.period);
        }
        self.renews.store(false, Ordering::SeqCst);
        // A CPU that came between the two has started nothing.
        (any() && !self.renews.swap(true, Ordering::SeqCst)).then_some(self.period)
    }
}

fn keeps() -> bool {
    // SAFETY: it has no conditions.
    unsafe { ffi::shim_sched_sleeping() }
}

/// Nanoseconds of this CPU's clock.
fn clock() -> u64 {
    // SAFETY: it has no conditions.
    unsafe { ffi::shim_sched_clock() }
}

fn find(pid: u32) -> Option<Task> {
    let mut task = Task::default();
    // SAFETY: there is room for a task.
    unsafe { ffi::shim_sched_task(pid, &raw mut task) }.then_some(task)
}

/// What the shim calls with.
///
/// # Safety
/// `data` is that of a hook which is not freed.
unsafe fn posting<'a>(data: *mut c_void) -> &'a Posting {
    // SAFETY: by the caller's promise. It is only shared.
    unsafe { &*data.cast::<Posting>() }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_sched_switch(data: *mut c_void, cpu: u32, from: *const Task, to: *const Task) {
    // SAFETY: the shim passes two tasks, and calls on this CPU with interrupts off.
    unsafe {
        let (posting, from, to) = (posting(data), &*from, &*to);
        posting.on_cpu(cpu, |slot| slot.switch(&posting.limits, keeps(), &clock, from, to));
    }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_sched_renew(data: *mut c_void) -> u32 {
    // SAFETY: as the shim says.
    unsafe { posting(data) }.renew().unwrap_or(u32::MAX)
}

#[unsafe(no_mangle)]
extern "C" fn vbus_sched_renew_on(data: *mut c_void, cpu: u32) {
    // SAFETY: the shim calls on this CPU with interrupts off.
    unsafe {
        let posting = posting(data);
        posting.on_cpu(cpu, |slot| slot.renew(&posting.limits, keeps(), cpu, &clock, find));
    }
}
