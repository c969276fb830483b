// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How this crate takes a lock.

use std::sync::{Mutex, MutexGuard};

/// Locks `mutex`, also after a thread has panicked with the lock held.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
