// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lasting windows on the driver's memory.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use vbus_mapping::Mapping;
use vbus_shm::sync::Word;

use super::file::SharedFile;

/// A lasting mapping of a region of the driver's memory, as words; see
/// [`MemoryContext::window`](super::MemoryContext::window). Clones share the mapping.
#[derive(Clone)]
pub struct Window {
    _keep: Keep,
    base: NonNull<Word>,
    words: usize,
}

// SAFETY: the words are atomics in a mapping that the window keeps alive.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

/// What keeps a window mapped.
#[derive(Clone)]
pub(super) enum Keep {
    /// The window is a part of the file.
    File(#[expect(dead_code, reason = "held for its drop")] Arc<SharedFile>),
    /// The window's own mapping.
    Own(#[expect(dead_code, reason = "held for its drop")] Arc<Mapping>),
}

impl Window {
    /// The `words` words at `base`, which are mapped for reading and writing as long as `keep`
    /// lives.
    pub(super) fn new(keep: Keep, base: NonNull<u8>, words: usize) -> Window {
        Window { _keep: keep, base: base.cast(), words }
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.words * 8
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window").field("bytes", &self.bytes()).finish_non_exhaustive()
    }
}

impl vbus_shm::Memory for Window {
    #[inline(always)]
    fn words(&self) -> &[Word] {
        // SAFETY: `words` aligned words, mapped readable and writable as long as the window lives;
        // others access them at will, but Rust only as atomics.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }
}
