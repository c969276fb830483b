//! Tells the task of the pages that counters have moved.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vbus_core::TaskHandle;

/// Whether there is news that the task has not looked at.
#[derive(Clone, Debug, Default)]
pub struct Pending(Arc<AtomicBool>);

impl Pending {
    /// The task looks from here on. Pairs with the swap of [`News::moved`]: the task sees the
    /// counters of everybody who found the flag set and left the wake-up to others.
    pub fn take(&self) {
        self.0.swap(false, Ordering::Acquire);
    }

    /// The task will look again by itself.
    pub fn keep(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// For everybody who moves frames.
#[derive(Clone, Debug)]
pub struct News {
    pending: Pending,
    task: TaskHandle,
}

impl News {
    /// Wakes `task`, which looks at `pending`.
    pub fn new(pending: Pending, task: TaskHandle) -> News {
        News { pending, task }
    }

    /// Frames were moved.
    pub fn moved(&self) {
        // Pairs with the swap of `Pending::take`.
        if !self.pending.0.swap(true, Ordering::Release) {
            self.task.wake();
        }
    }
}
