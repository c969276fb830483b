//! What the protocols need of memory: a slice of words.

use super::sync::Word;

/// Bytes in a [`Word`].
pub const WORD: usize = 8;

/// Memory that both ends see, as words. The slice must be the same one (address and length) at each call.
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
