// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same interface as `vbus_shm::sync`, over loom. A test can take out every place.

use std::cell::Cell;

pub use loom::sync::atomic::Ordering;

use crate::mortal::{mortal, one_less};

/// A word of shared memory.
#[derive(Debug)]
pub struct Word(loom::sync::atomic::AtomicU64);

loom::thread_local! {
    /// How many accesses and fences a thread of the model may still make.
    static LEFT: Cell<Option<u32>> = Cell::new(None);
}

/// Runs `life` and stops it before its access or fence number `left`, counted from 0. Returns
/// `None` if it stopped `life`.
pub fn live<T>(left: u32, life: impl FnOnce() -> T) -> Option<T> {
    LEFT.with(|place| place.set(Some(left)));
    let outcome = mortal(life);
    LEFT.with(|place| place.set(None));
    outcome
}

fn access() {
    LEFT.with(|left| left.set(one_less(left.get())));
}

impl Word {
    /// A word that holds `value`.
    pub fn new(value: u64) -> Word {
        Word(loom::sync::atomic::AtomicU64::new(value))
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

/// The same as in `vbus-shm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// In `post`.
    Post,
    /// In `resume` of a sender.
    Resume,
    /// In `arm`.
    Arm,
    /// In a state page's `read`.
    Read,
    /// In an interrupt page's `raise`.
    Raise,
    /// In an interrupt page's `publish`.
    Level,
    /// In an interrupt page's `unmask`.
    Unmask,
}

/// The same as in `vbus-shm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// A signal's `seq`.
    Seq,
    /// The second word of a ring's entry.
    Tag,
    /// A word of an interrupt page's pending bits.
    Line,
}

/// A place in a protocol that needs an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A fence.
    Fence(Fence),
    /// The release of a publishing store.
    Publish(Edge),
    /// The acquire of an observing load.
    Observe(Edge),
}

thread_local! {
    // It belongs to the test's own thread: loom runs the threads of a model as coroutines of the
    // thread that checks the model.
    static REMOVED: Cell<Option<Place>> = const { Cell::new(None) };
}

/// Takes out `place` for all models that this thread checks from now on. `None` puts it back.
pub fn remove(place: Option<Place>) {
    REMOVED.set(place);
}

fn present(place: Place) -> bool {
    REMOVED.get() != Some(place)
}

/// A fence at a named place, unless the test took it out. A thread can end before it, as before an
/// access.
pub fn fence(at: Fence) {
    access();
    if present(Place::Fence(at)) {
        loom::sync::atomic::fence(match at {
            Fence::Post
            | Fence::Resume
            | Fence::Arm
            | Fence::Raise
            | Fence::Level
            | Fence::Unmask => Ordering::SeqCst,
            Fence::Read => Ordering::Acquire,
        });
    }
}

/// A release store, or a relaxed one if the place was taken out.
pub fn publish(word: &Word, value: u64, at: Edge) {
    word.store(
        value,
        if present(Place::Publish(at)) { Ordering::Release } else { Ordering::Relaxed },
    );
}

/// An acquire load, or a relaxed one if the place was taken out.
pub fn observe(word: &Word, at: Edge) -> u64 {
    word.load(if present(Place::Observe(at)) { Ordering::Acquire } else { Ordering::Relaxed })
}

/// An exchange with release, or a relaxed one if the place was taken out.
pub fn set_bits(word: &Word, bits: u64, at: Edge) -> u64 {
    word.0.fetch_or(
        bits,
        if present(Place::Publish(at)) { Ordering::Release } else { Ordering::Relaxed },
    )
}

/// An exchange with acquire, or a relaxed one if the place was taken out.
pub fn clear_bits(word: &Word, bits: u64, at: Edge) -> u64 {
    word.0.fetch_and(
        !bits,
        if present(Place::Observe(at)) { Ordering::Acquire } else { Ordering::Relaxed },
    )
}

/// Nothing: a hint has no effect that a model could show.
pub fn prefetch(_: &Word) {}
