// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A timer that runs in hard interrupt context.
#![allow(unsafe_code, reason = "callbacks from the shim")]

use core::ffi::c_void;
use core::fmt;
use core::ptr::NonNull;

use super::alloc::{KBox, NoMemory};
use super::ffi;

/// What the shim calls with.
struct Call<T> {
    run: fn(&T),
    target: NonNull<T>,
}

/// A timer that can be started again and again. It runs once for each start, on the processor that
/// has started it. Dropping it stops it, and waits until it does not run.
pub struct Timer<T> {
    raw: NonNull<c_void>,
    /// Freed after the timer.
    call: NonNull<Call<T>>,
}

// SAFETY: the methods may be called from any thread; the target is shared between threads.
unsafe impl<T: Sync> Send for Timer<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Timer<T> {}

impl<T: Sync> Timer<T> {
    /// A timer that calls `run` with `target`, in hard interrupt context. The caller may sleep.
    ///
    /// # Safety
    /// `target` stays valid, at its place, and is only shared, until the timer is dropped. The
    /// timer is not dropped in `run`.
    pub unsafe fn new(target: NonNull<T>, run: fn(&T)) -> Result<Self, NoMemory> {
        let call = KBox::new(Call { run, target })?.into_raw();
        // SAFETY: the call lives until the timer is freed.
        let raw = unsafe { ffi::shim_timer_new(trampoline::<T>, call.cast()) };
        let Some(raw) = NonNull::new(raw) else {
            // SAFETY: it came from `into_raw` above, and nobody else has it.
            drop(unsafe { KBox::from_raw(call) });
            return Err(NoMemory);
        };
        // SAFETY: addresses of boxes are not null.
        Ok(Self { raw, call: unsafe { NonNull::new_unchecked(call) } })
    }

    /// Runs it after this time, in place of the time that was set before. From any context.
    pub fn run_after(&self, nanoseconds: u64) {
        // SAFETY: the timer is valid as long as this.
        unsafe { ffi::shim_timer_after(self.raw.as_ptr(), nanoseconds) };
    }
}

extern "C" fn trampoline<T>(data: *mut c_void) {
    // SAFETY: the shim calls it with the call of `Timer::new`, which is freed after the timer. The
    // target is valid as long.
    let (run, target) = unsafe {
        let call = &*data.cast::<Call<T>>();
        (call.run, call.target.as_ref())
    };
    run(target);
}

impl<T> Drop for Timer<T> {
    fn drop(&mut self) {
        // SAFETY: nobody uses the timer again, and it does not run when this returns.
        unsafe { ffi::shim_timer_free(self.raw.as_ptr()) };
        // SAFETY: it came from `into_raw`, and the timer that used it is gone.
        drop(unsafe { KBox::from_raw(self.call.as_ptr()) });
    }
}

impl<T> fmt::Debug for Timer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Timer")
    }
}
