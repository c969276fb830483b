// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether somebody waits for the next thread that wakes. This protocol is lock-free.
//! `tests/it/alarm_model.rs` compiles this file with the atomics of a model checker.

use super::sync::{AtomicBool, Ordering, full_fence};

/// The waiter sets the flag and then looks whether a thread is awake. A thread stores that it is
/// awake and then rings. So the waiter sees the thread, or the thread sees the flag.
pub struct AlarmFlag(AtomicBool);

impl AlarmFlag {
    /// Not set.
    pub fn new() -> AlarmFlag {
        AlarmFlag(AtomicBool::new(false))
    }

    /// For a thread that has stored that it is awake. Returns true if the caller must tell the
    /// waiter.
    pub fn ring(&self) -> bool {
        // Pairs with the fence in `set`.
        full_fence();
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::Relaxed)
    }

    /// For the waiter, before it looks whether a thread is awake.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
        // Pairs with the fence in `ring`.
        full_fence();
    }

    /// Nobody waits.
    pub fn unset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}
