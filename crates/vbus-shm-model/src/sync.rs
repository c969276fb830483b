//! The same interface as `vbus_shm::sync`, over loom, with every place removable.

use std::cell::Cell;

pub use loom::sync::atomic::Ordering;

/// A word of shared memory.
pub type Word = loom::sync::atomic::AtomicU64;

/// As in `vbus-shm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// In `post`.
    Post,
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

/// As in `vbus-shm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// A signal's `seq`.
    Seq,
    /// The second word of a ring's entry.
    Tag,
    /// A word of an interrupt page's pending bits.
    Line,
}

/// A place that orders something.
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
    // Of the test's own thread: loom runs its threads as coroutines of the thread that checks the
    // model.
    static REMOVED: Cell<Option<Place>> = const { Cell::new(None) };
}

/// Takes `place` out for what this thread checks from here on; `None` puts it back.
pub fn remove(place: Option<Place>) {
    REMOVED.set(place);
}

fn present(place: Place) -> bool {
    REMOVED.get() != Some(place)
}

/// A fence at a named place, unless it was taken out.
pub fn fence(at: Fence) {
    if present(Place::Fence(at)) {
        loom::sync::atomic::fence(match at {
            Fence::Post | Fence::Arm | Fence::Raise | Fence::Level | Fence::Unmask => {
                Ordering::SeqCst
            }
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
    word.fetch_or(
        bits,
        if present(Place::Publish(at)) { Ordering::Release } else { Ordering::Relaxed },
    )
}

/// An exchange with acquire, or a relaxed one if the place was taken out.
pub fn clear_bits(word: &Word, bits: u64, at: Edge) -> u64 {
    word.fetch_and(
        !bits,
        if present(Place::Observe(at)) { Ordering::Acquire } else { Ordering::Relaxed },
    )
}
