// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From an address to words. Only this file of the crate trusts its caller about memory.
#![allow(unsafe_code)] // Shared memory begins as a raw pointer.

use core::ptr::NonNull;

use super::memory::WORD;
use super::sync::Word;

/// The `bytes` bytes at `at` as words, or `None` if `at` is not aligned to 8. The slice ends with
/// the last whole word.
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
    // SAFETY: `at` is aligned, as checked. The caller promises that the memory is mapped and that
    // the program accesses it only through atomics. Any 8 bytes are a valid `Word`.
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
