// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One way to take a lock.

use std::sync::{Mutex, MutexGuard};

/// Locks `mutex`, also after a thread panicked while it held the lock. The data of one task is
/// then as that task left it, and the other tasks go on.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
