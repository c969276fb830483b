//! What the protocols need of memory: a slice of words.

use super::sync::{Ordering, Word};

/// Bytes in a [`Word`].
pub const WORD: usize = 8;

/// Memory that both ends see, as words. The slice must be the same one (address and length) at each
/// call.
pub trait Memory {
    /// The words, in order of address.
    fn words(&self) -> &[Word];
}

impl Memory for &[Word] {
    #[inline(always)]
    fn words(&self) -> &[Word] {
        self
    }
}

/// The low half of a word: where the layouts keep a 32-bit number, the high half is not looked at.
#[inline(always)]
pub(super) const fn low(word: u64) -> u32 {
    (word & 0xffff_ffff) as u32
}

/// A header's word that has to be a 32-bit number, read once.
pub(super) fn read_u32(word: &Word) -> Option<u32> {
    u32::try_from(word.load(Ordering::Relaxed)).ok()
}
