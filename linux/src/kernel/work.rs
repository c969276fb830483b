// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Work that runs later, in a thread of the kernel that may sleep.
#![allow(unsafe_code, reason = "callbacks from the shim")]

use core::ffi::c_void;
use core::fmt;
use core::ptr::NonNull;

use super::alloc::{KBox, NoMemory};
use super::ffi;

/// What the shim calls with.
struct Call<T> {
    run: fn(&T) -> Option<u32>,
    target: NonNull<T>,
}

/// What tells the shim not to run the work again.
const NEVER: u32 = u32::MAX;

/// Work that can be asked for again and again. One thread at a time runs it. It does not run while
/// the system sleeps.
///
/// Dropping it cancels it, and waits until it does not run.
pub struct Work<T> {
    raw: NonNull<c_void>,
    /// Freed after the work.
    call: NonNull<Call<T>>,
}

// SAFETY: the methods may be called from any thread; the target is shared between threads.
unsafe impl<T: Sync> Send for Work<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Work<T> {}

impl<T: Sync> Work<T> {
    /// Work that calls `run` with `target`. `run` returns the milliseconds after which it is to run
    /// again, if nobody has asked for it meanwhile. The caller may sleep.
    ///
    /// # Safety
    /// `target` stays valid, at its place, and is only shared, until the work is dropped. The work
    /// is not dropped in `run`.
    pub unsafe fn new(target: NonNull<T>, run: fn(&T) -> Option<u32>) -> Result<Self, NoMemory> {
        let call = KBox::new(Call { run, target })?.into_raw();
        // SAFETY: the call lives until the work is freed.
        let raw = unsafe { ffi::shim_work_new(trampoline::<T>, call.cast()) };
        let Some(raw) = NonNull::new(raw) else {
            // SAFETY: it came from `into_raw` above, and nobody else has it.
            drop(unsafe { KBox::from_raw(call) });
            return Err(NoMemory);
        };
        // SAFETY: addresses of boxes are not null.
        Ok(Self { raw, call: unsafe { NonNull::new_unchecked(call) } })
    }

    /// Runs it after this time, in place of the time that was set before. From any context.
    pub fn run_after(&self, milliseconds: u32) {
        // SAFETY: the work is valid as long as this.
        unsafe { ffi::shim_work_after(self.raw.as_ptr(), milliseconds) };
    }

    /// It does not run, and is not asked to run, when this returns. It sleeps. Not from the work
    /// itself.
    pub fn cancel(&self) {
        // SAFETY: the work is valid as long as this.
        unsafe { ffi::shim_work_cancel(self.raw.as_ptr()) };
    }
}

extern "C" fn trampoline<T>(data: *mut c_void) -> u32 {
    // SAFETY: the shim calls it with the call of `Work::new`, which is freed after the work. The
    // target is valid as long.
    let (run, target) = unsafe {
        let call = &*data.cast::<Call<T>>();
        (call.run, call.target.as_ref())
    };
    run(target).unwrap_or(NEVER)
}

impl<T> Drop for Work<T> {
    fn drop(&mut self) {
        // SAFETY: nobody uses the work again, and it does not run when this returns.
        unsafe { ffi::shim_work_free(self.raw.as_ptr()) };
        // SAFETY: it came from `into_raw`, and the work that used it is gone.
        drop(unsafe { KBox::from_raw(self.call.as_ptr()) });
    }
}

impl<T> fmt::Debug for Work<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Work")
    }
}
