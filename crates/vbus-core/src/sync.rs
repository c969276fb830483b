// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The atomics of [`wake`](super::wake) and of [`alarm_flag`](super::alarm_flag), and the mutex of
//! [`hand_over`](super::hand_over). A model checker replaces this file with its own.

pub use std::sync::Mutex;
pub use std::sync::atomic::{AtomicBool, Ordering};

pub use crate::lock::lock;

/// The fence of `AlarmFlag`.
#[inline(always)]
pub fn full_fence() {
    std::sync::atomic::fence(Ordering::SeqCst);
}

/// The named orderings.
pub enum Order {
    /// The ordering of `WakeFlag::raise`.
    Raise,
    /// The ordering of `WakeFlag::lower`.
    Lower,
}

impl Order {
    /// The ordering in force.
    #[inline(always)]
    pub fn get(self) -> Ordering {
        match self {
            Order::Raise => Ordering::Release,
            Order::Lower => Ordering::Acquire,
        }
    }
}
