// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the protocols need of memory: a slice of words.

use super::sync::{Ordering, Word};

/// Bytes in a [`Word`].
pub const WORD: usize = 8;

/// Memory that both ends see, as words. Each call must return the same slice: the same address and
/// length.
pub trait Memory {
    /// The words, in order of address.
    fn words(&self) -> &[Word];

    /// Whether the memory wants to know by [`wrote`](Self::wrote) where an end has stored. An end
    /// asks after its stores, and at least once for each call of a method of the end. That orders
    /// the stores before the question, as far as the memory needs it.
    #[inline(always)]
    fn is_logged(&self) -> bool {
        false
    }

    /// An end has stored in some of the `count` words from `first` on.
    fn wrote(&self, first: usize, count: usize) {
        let _ = (first, count);
    }
}

/// Tells a memory that wants to know it of stores in some of the `count` words from `first` on. The
/// ends do this themselves. It is for those who store in the words of a memory without an end.
#[inline(always)]
pub fn stored<M: Memory>(mem: &M, first: usize, count: usize) {
    if mem.is_logged() {
        mem.wrote(first, count);
    }
}

impl Memory for &[Word] {
    #[inline(always)]
    fn words(&self) -> &[Word] {
        self
    }
}

/// The low half of a word. The layouts keep a 32-bit number there.
#[inline(always)]
pub(super) const fn low(word: u64) -> u32 {
    (word & 0xffff_ffff) as u32
}

/// Reads a header's word once. `None`: it is not a 32-bit number.
pub(super) fn read_u32(word: &Word) -> Option<u32> {
    u32::try_from(word.load(Ordering::Relaxed)).ok()
}
