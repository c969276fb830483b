//! The atomics that every protocol here is written with, in one place, so that a model checker can
//! put its own in their stead.
//!
//! Wherever a protocol depends on order, it names the place ([`Fence`], [`Edge`]) instead of an
//! ordering. The models in `vbus-shm-model` compile the same protocols over a `sync` in which each
//! place can be taken out, and show that each is needed.

pub use core::sync::atomic::Ordering;

#[cfg(not(target_endian = "little"))]
compile_error!(
    "vbus keeps words of shared memory in the machine's own order, which has to be little-endian"
);

/// A word of shared memory. All shared memory is accessed as aligned little-endian 64-bit words:
/// one type of access, so no mixed-size races, and a torn value is a wrong value but never
/// undefined behaviour.
pub type Word = core::sync::atomic::AtomicU64;

/// The places that need a fence, named so that a test can take out one at a time and see the
/// protocol fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// In `post`, between the store of `seq` and the load of `arm`. Full.
    Post,
    /// In `resume`, between the new store of `seq` and the load of `arm`. Full.
    Resume,
    /// In `arm`, between the store of `arm` and the load of `seq`. Full.
    Arm,
    /// In a state page's `read`, between the copy and the second look at the version. Acquire.
    Read,
    /// In an interrupt page's `raise`, between setting the bit and the loads of level and mask.
    /// Full.
    Raise,
    /// In an interrupt page's `publish`, between the store of the level and the loads of the bits.
    /// Full.
    Level,
    /// In an interrupt page's `unmask`, between the store of the mask and the load of the bit.
    /// Full.
    Unmask,
}

/// The words by which one end publishes and the other observes: a release store and the acquire
/// load that reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// A signal's `seq`.
    Seq,
    /// The second word of a ring's entry, with the lap tag.
    Tag,
    /// A word of an interrupt page's pending bits.
    Line,
}

/// A fence at a named place.
#[inline(always)]
pub fn fence(at: Fence) {
    match at {
        Fence::Post | Fence::Resume | Fence::Arm | Fence::Raise | Fence::Level | Fence::Unmask => {
            core::sync::atomic::fence(Ordering::SeqCst)
        }
        Fence::Read => core::sync::atomic::fence(Ordering::Acquire),
    }
}

/// Stores `value` so that whoever [`observe`]s it sees everything written before.
#[inline(always)]
pub fn publish(word: &Word, value: u64, _at: Edge) {
    word.store(value, Ordering::Release);
}

/// Loads a word that the other end [`publish`]es.
#[inline(always)]
pub fn observe(word: &Word, _at: Edge) -> u64 {
    word.load(Ordering::Acquire)
}

/// Sets `bits`, so that whoever [`clear_bits`] them sees everything written before. Returns what
/// was there.
#[inline(always)]
pub fn set_bits(word: &Word, bits: u64, _at: Edge) -> u64 {
    word.fetch_or(bits, Ordering::Release)
}

/// Clears `bits`; everything is visible that was written before they were [set](set_bits). Returns
/// what was there.
#[inline(always)]
pub fn clear_bits(word: &Word, bits: u64, _at: Edge) -> u64 {
    word.fetch_and(!bits, Ordering::Acquire)
}
