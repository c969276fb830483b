// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lasting windows on the driver's memory.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use vbus_mapping::Mapping;
use vbus_shm::sync::Word;

use super::file::SharedFile;
use super::log::LogSlot;

/// A lasting mapping of a region of the driver's memory, as words; see
/// [`MemoryContext::window`](super::MemoryContext::window). Clones share the mapping.
///
/// The ends of `vbus_shm` say where they store. A device that stores in the words itself calls
/// [`stored`](vbus_shm::memory::stored) afterwards. Otherwise the store is lost when the driver's
/// machine is moved.
#[derive(Clone)]
pub struct Window {
    _keep: Keep,
    base: NonNull<Word>,
    words: usize,
    log: Arc<LogSlot>,
    origin: Origin,
}

/// Where the bytes of a window are in the driver's memory.
#[derive(Clone)]
pub(super) enum Origin {
    /// At this address, one after another.
    At(u64),
    /// In pages of `1 << shift` bytes at these addresses.
    Pages(Arc<[u64]>, u32),
}

impl Origin {
    /// Calls `each` with the addresses and lengths of the `len` bytes at byte `at`.
    fn runs(&self, at: u64, len: u64, mut each: impl FnMut(u64, u64)) {
        match self {
            Origin::At(addr) => each(addr.wrapping_add(at), len),
            Origin::Pages(pages, shift) => {
                let page = 1u64 << shift;
                let (mut at, end) = (at, at + len);
                while at < end {
                    let inside = at % page;
                    let run = (page - inside).min(end - at);
                    let addr = usize::try_from(at >> shift).ok().and_then(|i| pages.get(i));
                    if let Some(addr) = addr {
                        each(addr + inside, run);
                    }
                    at += run;
                }
            }
        }
    }
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
    ///
    /// What is written through it goes to `log`, by the addresses of `origin`.
    pub(super) fn new(
        keep: Keep,
        base: NonNull<u8>,
        words: usize,
        (log, origin): (Arc<LogSlot>, Origin),
    ) -> Window {
        Window { _keep: keep, base: base.cast(), words, log, origin }
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

    #[inline(always)]
    fn is_logged(&self) -> bool {
        self.log.is_on()
    }

    #[cold]
    fn wrote(&self, first: usize, count: usize) {
        let (at, len) = (first as u64 * 8, count as u64 * 8);
        self.origin.runs(at, len, |addr, len| self.log.mark(addr, len));
    }
}
