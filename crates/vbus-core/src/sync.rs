// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The atomics of [`wake`](super::wake). A model checker replaces this file with its own.

pub use std::sync::atomic::AtomicBool;

use std::sync::atomic::Ordering;

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
