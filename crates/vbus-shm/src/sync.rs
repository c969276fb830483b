//! The atomics that every protocol here is written with, in one place, so that a model checker can put its own in their stead.

pub use core::sync::atomic::Ordering;

/// A word of shared memory. All shared memory is accessed as aligned little-endian 64-bit words: one type of access, so no mixed-size
/// races, and a torn value is a wrong value but never undefined behaviour.
pub type Word = core::sync::atomic::AtomicU64;

/// The places that need a fence, named so that a test can take out one at a time and see the protocol fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// In `post`, between the store of `seq` and the load of `arm`. Full.
    Post,
    /// In `arm`, between the store of `arm` and the load of `seq`. Full.
    Arm,
    /// In a state page's `read`, between the copy and the second look at the version. Acquire.
    Read,
}

/// A fence at a named place.
#[inline(always)]
pub fn fence(at: Fence) {
    match at {
        Fence::Post | Fence::Arm => core::sync::atomic::fence(Ordering::SeqCst),
        Fence::Read => core::sync::atomic::fence(Ordering::Acquire),
    }
}
