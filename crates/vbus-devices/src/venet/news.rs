// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tells the task of the pages that counters have changed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vbus_core::TaskHandle;

/// Whether counters have changed since the task last read them.
#[derive(Clone, Debug, Default)]
pub struct Pending(Arc<AtomicBool>);

impl Pending {
    /// Clears the flag; the task reads the counters after this. Pairs with the swap in
    /// [`News::moved`]: if a sender found the flag set and did not wake the task, the task sees
    /// that sender's counters.
    pub fn take(&self) {
        self.0.swap(false, Ordering::Acquire);
    }

    /// Sets the flag: the task will read the counters again without a wake-up.
    pub fn keep(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Whoever moves frames calls this to wake the task of the pages.
#[derive(Clone, Debug)]
pub struct News {
    pending: Pending,
    task: TaskHandle,
}

impl News {
    /// Wakes `task`, which reads `pending`.
    pub fn new(pending: Pending, task: TaskHandle) -> News {
        News { pending, task }
    }

    /// The caller has moved frames.
    pub fn moved(&self) {
        // Pairs with the swap of `Pending::take`.
        if !self.pending.0.swap(true, Ordering::Release) {
            self.task.wake();
        }
    }
}
