// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same interface as `vbus_shm::sync`, over words that count their accesses.
//!
//! One thread runs both ends, so orders do not matter here. The models over loom test the orders.

use std::cell::Cell;
use std::sync::atomic::AtomicU64;

pub use std::sync::atomic::Ordering;

use crate::mortal::{mortal, one_less};
use crate::sync::{Edge as LoomEdge, Fence as LoomFence};

/// The same as in `vbus-shm`.
pub type Fence = LoomFence;
/// The same as in `vbus-shm`.
pub type Edge = LoomEdge;

thread_local! {
    /// Accesses that this thread may still make.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Runs `life` and stops it before it makes more than `left` accesses. Returns `None` if it stopped
/// `life`. Subtracts the accesses of `life` from `left`.
pub fn live<T>(left: &mut u32, life: impl FnOnce() -> T) -> Option<T> {
    LEFT.set(Some(*left));
    let outcome = mortal(life);
    *left = LEFT.take().unwrap_or(0);
    outcome
}

fn access() {
    LEFT.set(one_less(LEFT.get()));
}

/// A word of shared memory.
#[derive(Debug, Default)]
pub struct Word(AtomicU64);

impl Word {
    /// A word that holds `value`.
    pub const fn new(value: u64) -> Word {
        Word(AtomicU64::new(value))
    }

    /// The same as for an atomic.
    pub fn load(&self, order: Ordering) -> u64 {
        access();
        self.0.load(order)
    }

    /// The same as for an atomic.
    pub fn store(&self, value: u64, order: Ordering) {
        access();
        self.0.store(value, order);
    }

    /// The same as for an atomic.
    pub fn swap(&self, value: u64, order: Ordering) -> u64 {
        access();
        self.0.swap(value, order)
    }
}

/// Nothing: there is one thread.
pub fn fence(_: Fence) {}

/// A store.
pub fn publish(word: &Word, value: u64, _: Edge) {
    word.store(value, Ordering::Relaxed);
}

/// A load.
pub fn observe(word: &Word, _: Edge) -> u64 {
    word.load(Ordering::Relaxed)
}

/// Nothing: a hint has no effect that a model could show.
pub fn prefetch(_: &Word) {}
