//! From an address to words: the one place of this crate that trusts its caller about memory.
#![allow(unsafe_code)] // Shared memory begins as a raw pointer.

use core::ptr::NonNull;

use super::memory::WORD;
use super::sync::Word;

/// The `bytes` bytes at `at` as words, or `None` where `at` is not aligned to 8. Bytes after the
/// last whole word are left out.
///
/// # Safety
/// For all of `'a` the memory must stay mapped readable and writable, and this program may access
/// it only through atomics (or from code outside of Rust's sight, such as a system call). What
/// other processes or virtual machines do to it does not matter.
pub unsafe fn words<'a>(at: NonNull<u8>, bytes: usize) -> Option<&'a [Word]> {
    let at = at.cast::<Word>();
    if !at.is_aligned() {
        return None;
    }
    // SAFETY: aligned as checked; mapped and accessed by atomics alone as the caller promises.
    // `Word` has the size and validity of u64, for which any bytes will do.
    Some(unsafe { core::slice::from_raw_parts(at.as_ptr(), bytes / WORD) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::Ordering;

    #[test]
    fn words_cover_whole_words_of_aligned_memory() {
        let memory = [Word::new(1), Word::new(2), Word::new(3)];
        let at = NonNull::from(&memory).cast::<u8>();
        // SAFETY: `memory` outlives the slices and is atomic.
        let (whole, odd) = unsafe { (words(at, 23).expect("aligned"), words(at.add(4), 8)) };
        assert_eq!(whole.len(), 2);
        assert_eq!(whole[1].load(Ordering::Relaxed), 2);
        assert!(odd.is_none());
    }
}
