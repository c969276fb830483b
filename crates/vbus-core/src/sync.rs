//! The atomics of [`wake`](super::wake), where a model checker can put its own.

pub use std::sync::atomic::AtomicBool;

use std::sync::atomic::Ordering;

/// The named orderings.
pub enum Order {
    /// Of `WakeFlag::raise`.
    Raise,
    /// Of `WakeFlag::lower`.
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
