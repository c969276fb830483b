// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The atomics of [`wake`](super::wake), of [`alarm_flag`](super::alarm_flag) and of
//! [`page_bits`](super::page_bits), and the mutex of [`hand_over`](super::hand_over). A model
//! checker replaces this file with its own.

pub use std::sync::Mutex;
pub use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::thread::{MembarrierCommand, membarrier};

pub use crate::lock::lock;

/// The fence of `AlarmFlag`.
#[inline(always)]
pub fn full_fence() {
    std::sync::atomic::fence(Ordering::SeqCst);
}

/// The fence of those that look at a `MarkSwitch`. It is one only together with [`heavy_fence`].
#[inline(always)]
pub fn light_fence() {
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
}

/// A full fence in each thread of this process. False: the kernel has no call for it.
pub fn heavy_fence() -> bool {
    let expedited = || {
        // Once would do. A second time it costs a system call.
        membarrier(MembarrierCommand::RegisterPrivateExpedited)?;
        membarrier(MembarrierCommand::PrivateExpedited)
    };
    // The second one takes some milliseconds.
    expedited().or_else(|_| membarrier(MembarrierCommand::Global)).is_ok()
}

/// The named orderings.
pub enum Order {
    /// The ordering of `WakeFlag::raise`.
    Raise,
    /// The ordering of `WakeFlag::lower`.
    Lower,
    /// The ordering of `PageBits::mark`.
    Mark,
    /// The ordering of `PageBits::take`.
    Take,
}

impl Order {
    /// The ordering in force.
    #[inline(always)]
    pub fn get(self) -> Ordering {
        match self {
            Order::Raise | Order::Mark => Ordering::Release,
            Order::Lower | Order::Take => Ordering::Acquire,
        }
    }
}
