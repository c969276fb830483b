// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The atomics of all protocols of this crate. They stand in one file, so that a model checker can
//! put its own atomics in their place.
//!
//! Where a protocol depends on an order, it names the place ([`Fence`], [`Edge`]) and not the
//! ordering. `vbus-shm-model` compiles the same protocols over another `sync`. A test can take out
//! each place there. So the tests show that each place is needed.

pub use core::sync::atomic::Ordering;

#[cfg(not(target_endian = "little"))]
compile_error!(
    "vbus needs a little-endian machine: words of shared memory are in the machine's own order"
);

/// A word of shared memory: 64 bits, aligned, little-endian. All accesses have this one size, so
/// there are no races of mixed sizes. A torn value is a wrong value, but never undefined behaviour.
pub type Word = core::sync::atomic::AtomicU64;

/// The places that need a fence. Each has a name, so that a test can take out one fence and see the
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

/// The words by which one end publishes and the other end observes. One end stores with release,
/// and the other loads with acquire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// A signal's `seq`.
    Seq,
    /// The second word of a ring's slot: the tag.
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

/// Stores `value`. An end that [`observe`]s the value sees everything that was written before.
#[inline(always)]
pub fn publish(word: &Word, value: u64, _at: Edge) {
    word.store(value, Ordering::Release);
}

/// Loads a word that the other end [`publish`]es, and makes visible what that end wrote before.
#[inline(always)]
pub fn observe(word: &Word, _at: Edge) -> u64 {
    word.load(Ordering::Acquire)
}

/// Asks the processor to fetch the cache line of `word`, which this end reads soon. It orders
/// nothing, and does nothing on machines for which the compiler knows no such instruction.
#[inline(always)]
pub fn prefetch(word: &Word) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        #[allow(unsafe_code, reason = "the instruction is a hint: it has no effect that shows")]
        // SAFETY: a prefetch reads nothing into the program, and no address makes it fail.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(core::ptr::from_ref(word).cast());
        }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = word;
}

/// Sets `bits` and returns the word as it was before. An end that clears them by [`clear_bits`]
/// sees everything that was written before.
#[inline(always)]
pub fn set_bits(word: &Word, bits: u64, _at: Edge) -> u64 {
    word.fetch_or(bits, Ordering::Release)
}

/// Clears `bits` and returns the word as it was before. Makes visible what the other end wrote
/// before it [set](set_bits) them.
#[inline(always)]
pub fn clear_bits(word: &Word, bits: u64, _at: Edge) -> u64 {
    word.fetch_and(!bits, Ordering::Acquire)
}
