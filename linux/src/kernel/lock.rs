// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Locks: one that sleeps, and one for what interrupts share.
#![allow(unsafe_code, reason = "locks guard the access to shared values")]

use core::cell::UnsafeCell;
use core::ffi::{c_ulong, c_void};
use core::fmt;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use super::alloc::NoMemory;
use super::ffi;

/// A value behind a mutex. Whoever locks it may sleep.
pub struct Mutex<T> {
    raw: NonNull<c_void>,
    value: UnsafeCell<T>,
}

// SAFETY: one thread at a time gets at the value.
unsafe impl<T: Send> Send for Mutex<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Mutex<T> {}

impl<T> Mutex<T> {
    /// A mutex around `value`. The caller may sleep.
    pub fn new(value: T) -> Result<Self, NoMemory> {
        // SAFETY: it has no conditions.
        let raw = NonNull::new(unsafe { ffi::shim_mutex_new() }).ok_or(NoMemory)?;
        Ok(Self { raw, value: UnsafeCell::new(value) })
    }

    /// Waits until no other thread has the value. It sleeps.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        // SAFETY: the mutex is valid as long as this.
        unsafe { ffi::shim_mutex_lock(self.raw.as_ptr()) };
        MutexGuard { mutex: self, thread: PhantomData }
    }
}

impl<T> Drop for Mutex<T> {
    fn drop(&mut self) {
        // SAFETY: nobody has the mutex any more.
        unsafe { ffi::shim_mutex_free(self.raw.as_ptr()) };
    }
}

impl<T> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mutex")
    }
}

/// The value of a locked mutex.
pub struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
    /// The thread that locks a mutex unlocks it.
    thread: PhantomData<*mut ()>,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the mutex is locked.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the mutex is locked, and the guard is borrowed alone.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this thread has locked it.
        unsafe { ffi::shim_mutex_unlock(self.mutex.raw.as_ptr()) };
    }
}

/// A value behind a spin lock, with interrupts off while it is locked. Whoever holds it does not
/// sleep.
pub struct SpinLock<T> {
    raw: NonNull<c_void>,
    value: UnsafeCell<T>,
}

// SAFETY: one processor at a time gets at the value.
unsafe impl<T: Send> Send for SpinLock<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SpinLock<T> {}

impl<T> SpinLock<T> {
    /// A lock around `value`. The caller may sleep.
    pub fn new(value: T) -> Result<Self, NoMemory> {
        // SAFETY: it has no conditions.
        let raw = NonNull::new(unsafe { ffi::shim_spin_new() }).ok_or(NoMemory)?;
        Ok(Self { raw, value: UnsafeCell::new(value) })
    }

    /// Waits until nobody else has the value. From any context.
    pub fn lock(&self) -> SpinGuard<'_, T> {
        // SAFETY: the lock is valid as long as this.
        let flags = unsafe { ffi::shim_spin_lock(self.raw.as_ptr()) };
        SpinGuard { lock: self, flags, processor: PhantomData }
    }
}

impl<T> Drop for SpinLock<T> {
    fn drop(&mut self) {
        // SAFETY: nobody has the lock any more.
        unsafe { ffi::shim_spin_free(self.raw.as_ptr()) };
    }
}

impl<T> fmt::Debug for SpinLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SpinLock")
    }
}

/// The value of a locked spin lock.
pub struct SpinGuard<'a, T> {
    lock: &'a SpinLock<T>,
    flags: c_ulong,
    /// The processor that locks it unlocks it.
    processor: PhantomData<*mut ()>,
}

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the lock is held.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the lock is held, and the guard is borrowed alone.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this processor holds it, and these are its flags.
        unsafe { ffi::shim_spin_unlock(self.lock.raw.as_ptr(), self.flags) };
    }
}
