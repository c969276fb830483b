// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log of the pages that the device has written.
//!
//! A log has a bit for each page of [`PAGE`] bytes of the driver's addresses. It keeps the bits in
//! chunks, and has a chunk only where the device has written. It does not ask which addresses are
//! mapped: what was written stays in the log when the map has gone.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::PAGE;
use super::budget::{Account, Charge, Exceeded};
use super::peer_bitmap::PeerBitmap;
use crate::lock::lock;
use crate::page_bits::{MarkSwitch, PageBits};

/// Pages of a chunk: 128 MiB of the driver's addresses.
const CHUNK: u64 = 512 * 64;
/// Bytes of memory of a chunk, and of its place in the tree.
const CHUNK_COST: u64 = CHUNK / 8 + 128;

/// Why there is no log, or no report.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The log is on already.
    #[error("the log is on already")]
    On,
    /// The log is off, or the peer reads it by itself.
    #[error("the log is off, or the peer has it")]
    Off,
    /// The kernel has no membarrier(2).
    #[error("the log needs membarrier(2), which this kernel or its filter refuses")]
    NoFence,
    /// A range or a size is not a number of whole pages, or wraps around.
    #[error("{0:#x} bytes at {1:#x} are not whole pages")]
    Range(u64, u64),
    /// The size of a reported page is no power of two, or the bitmap has too few words.
    #[error("a bitmap of {words} words for pages of {page_size:#x} bytes")]
    Bitmap {
        /// Bytes for which a bit stands.
        page_size: u64,
        /// Words of the bitmap.
        words: usize,
    },
    /// The device has written at more places than the log may have room for. It is not complete.
    #[error("the log is not complete: it exceeds {0}")]
    Lost(Exceeded),
}

/// The bits of [`CHUNK`] pages.
struct Chunk {
    words: Box<[PageBits]>,
    _charge: Charge,
}

/// A log.
pub(super) struct Log {
    /// The pages that are logged, in order and without overlaps. None: all.
    ranges: Vec<Range<u64>>,
    /// Where the marks go in place of `chunks`, if the peer reads them by itself.
    peer: Option<Arc<PeerBitmap>>,
    chunks: RwLock<BTreeMap<u64, Chunk>>,
    account: Arc<Account>,
    /// Set before `is_lost` is.
    exceeded: Mutex<Option<Exceeded>>,
    is_lost: AtomicBool,
}

/// The bits `from..to` of a word.
fn bits(from: u64, to: u64) -> u64 {
    let below = |n: u64| 1u64.checked_shl(u32::try_from(n).unwrap_or(64)).map_or(!0, |bit| bit - 1);
    below(to) & !below(from)
}

impl Log {
    /// An empty log of the bytes in `ranges`, or of all if there are none. The pages at the ends of
    /// a range belong to it as a whole.
    pub(super) fn new(account: Arc<Account>, ranges: &[Range<u64>]) -> Log {
        let mut pages: Vec<_> =
            ranges.iter().map(|range| range.start / PAGE..range.end.div_ceil(PAGE)).collect();
        pages.sort_unstable_by_key(|range| range.start);
        let mut joined: Vec<Range<u64>> = Vec::with_capacity(pages.len());
        for range in pages {
            match joined.last_mut().filter(|last| last.end >= range.start) {
                Some(last) => last.end = last.end.max(range.end),
                None => joined.push(range),
            }
        }
        Log {
            ranges: joined,
            peer: None,
            chunks: RwLock::default(),
            account,
            exceeded: Mutex::default(),
            is_lost: AtomicBool::new(false),
        }
    }

    /// A log of all pages that `bitmap` covers, in the bitmap.
    pub(super) fn of_peer(account: Arc<Account>, bitmap: Arc<PeerBitmap>) -> Log {
        Log { peer: Some(bitmap), ..Log::new(account, &[]) }
    }

    /// The device has written some of the `len` bytes at `addr`.
    #[cold]
    pub(super) fn mark(&self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1) else { return };
        let pages = addr / PAGE..addr.saturating_add(last) / PAGE + 1;
        if self.ranges.is_empty() {
            return self.mark_pages(pages);
        }
        let first = self.ranges.partition_point(|range| range.end <= pages.start);
        for range in self.ranges[first..].iter().take_while(|range| range.start < pages.end) {
            self.mark_pages(range.start.max(pages.start)..range.end.min(pages.end));
        }
    }

    fn mark_pages(&self, pages: Range<u64>) {
        if let Some(bitmap) = &self.peer {
            return bitmap.mark(pages);
        }
        let mut at = pages.start;
        while at < pages.end {
            let number = at / CHUNK;
            let end = pages.end.min((number + 1) * CHUNK);
            let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(chunk) = chunks.get(&number) {
                chunk.each(at % CHUNK, end - at, |bits, _, wanted| bits.mark(wanted));
                at = end;
                continue;
            }
            drop(chunks);
            if !self.add(number) {
                return;
            }
        }
    }

    /// Makes a chunk, if there is none. False: the log may not become larger.
    fn add(&self, number: u64) -> bool {
        if self.is_lost.load(Ordering::Relaxed) {
            return false;
        }
        let charge = match self.account.charge(CHUNK_COST) {
            Ok(charge) => charge,
            Err(exceeded) => {
                *lock(&self.exceeded) = Some(exceeded);
                // Pairs with the load in `take`, which is in the thread of a report: the report
                // after the write says so, because the device's write came to the reporter's
                // knowledge by a lock or by a message.
                self.is_lost.store(true, Ordering::Release);
                return false;
            }
        };
        let mut chunks = self.chunks.write().unwrap_or_else(PoisonError::into_inner);
        chunks.entry(number).or_insert_with(|| Chunk {
            words: (0..CHUNK / 64).map(|_| PageBits::new()).collect(),
            _charge: charge,
        });
        true
    }

    /// Takes the pages that were marked within `start..start + len`, and sets a bit of `bitmap` for
    /// each: bit `n % 64` of word `n / 64` stands for `page_size` bytes from
    /// `start + n * page_size` on. `start` and `len` must be multiples of [`PAGE`].
    pub(super) fn report(
        &self,
        start: u64,
        len: u64,
        page_size: u64,
        bitmap: &mut [u64],
    ) -> Result<(), LogError> {
        if self.peer.is_some() {
            return Err(LogError::Off);
        }
        let end = start.checked_add(len).filter(|_| (start | len) % PAGE == 0);
        let end = end.ok_or(LogError::Range(len, start))?;
        let wrong = LogError::Bitmap { page_size, words: bitmap.len() };
        if !page_size.is_power_of_two()
            || len.div_ceil(page_size).div_ceil(64) > bitmap.len() as u64
        {
            return Err(wrong);
        }
        // Pairs with the store in `add`.
        if self.is_lost.load(Ordering::Acquire) {
            if let Some(exceeded) = *lock(&self.exceeded) {
                return Err(LogError::Lost(exceeded));
            }
        }
        let pages = start / PAGE..end / PAGE;
        let shift = page_size.trailing_zeros();
        let mut found = |page: u64| {
            let first = (page * PAGE - start) >> shift;
            let last = ((page + 1) * PAGE - 1 - start) >> shift;
            let mut at = first;
            while at <= last {
                let end = (last + 1).min((at / 64 + 1) * 64);
                if let Some(word) = usize::try_from(at / 64).ok().and_then(|i| bitmap.get_mut(i)) {
                    *word |= bits(at % 64, at % 64 + (end - at));
                }
                at = end;
            }
        };
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        for (number, chunk) in chunks.range(pages.start / CHUNK..pages.end.div_ceil(CHUNK)) {
            let first = number * CHUNK;
            let from = pages.start.max(first);
            let count = pages.end.min(first + CHUNK) - from;
            chunk.each(from - first, count, |bits, at, wanted| {
                let mut marks = bits.take(wanted);
                while marks != 0 {
                    found(first + at + u64::from(marks.trailing_zeros()));
                    marks &= marks - 1;
                }
            });
        }
        Ok(())
    }
}

impl Chunk {
    /// Calls `each` with the words that have the bits of `count` pages from `from` on: the word,
    /// its first page in the chunk, and the bits.
    fn each(&self, from: u64, count: u64, mut each: impl FnMut(&PageBits, u64, u64)) {
        let (mut at, end) = (from, from + count);
        while at < end {
            let first = at / 64 * 64;
            let until = end.min(first + 64);
            if let Some(word) = usize::try_from(first / 64).ok().and_then(|i| self.words.get(i)) {
                each(word, first, bits(at - first, until - first));
            }
            at = until;
        }
    }
}

/// The log of a context, for windows: they outlive the views that have it in their table.
pub(super) struct LogSlot {
    switch: MarkSwitch,
    /// Set as long as the switch is on.
    log: Mutex<Option<Arc<Log>>>,
}

impl LogSlot {
    /// The log is off.
    pub(super) fn new() -> LogSlot {
        LogSlot { switch: MarkSwitch::new(), log: Mutex::default() }
    }

    /// Whether a write by a window, which has come before this call, has to be marked.
    #[inline(always)]
    pub(super) fn is_on(&self) -> bool {
        self.switch.is_on()
    }

    /// The device has written some of the `len` bytes at `addr`.
    pub(super) fn mark(&self, addr: u64, len: u64) {
        let log = lock(&self.log).clone();
        if let Some(log) = log {
            log.mark(addr, len);
        }
    }

    /// Switches the log on. When this returns, a write by a window that is not marked is visible to
    /// the peer.
    pub(super) fn set(&self, log: Arc<Log>) -> Result<(), LogError> {
        let mut slot = lock(&self.log);
        if slot.is_some() {
            return Err(LogError::On);
        }
        *slot = Some(log);
        drop(slot);
        if !self.switch.on() {
            *lock(&self.log) = None;
            return Err(LogError::NoFence);
        }
        Ok(())
    }

    /// Switches the log off. Returns it.
    pub(super) fn take(&self) -> Option<Arc<Log>> {
        self.switch.off();
        lock(&self.log).take()
    }

    pub(super) fn get(&self) -> Option<Arc<Log>> {
        lock(&self.log).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Budget, Resource};
    use super::*;

    #[test]
    fn writes_that_are_scattered_get_an_error_and_no_more_memory() {
        // A client may have half of 8192 maps, and so 124 chunks.
        let account = Budget::of_memory(16 << 20).client(None).account("");
        let log = Log::new(account.clone(), &[]);
        let report = |log: &Log| log.report(0, PAGE, PAGE, &mut [0]);
        for chunk in 0..124 {
            log.mark(chunk * CHUNK * PAGE + 5, 1);
            report(&log).unwrap();
        }
        assert_eq!(account.left(Resource::Maps), 4096 - 124 * 33);
        log.mark(1 << 50, 1);
        let error = report(&log).unwrap_err();
        assert!(matches!(error, LogError::Lost(_)), "{error}");
        // It stays so. What is in the log already costs no more.
        log.mark(0, 1);
        log.mark(1 << 51, 1);
        assert_eq!(report(&log), Err(error));
        drop(log);
        assert_eq!(account.left(Resource::Maps), 4096);
    }

    #[test]
    fn each_bit_of_a_word_is_one_page() {
        assert_eq!((bits(0, 64), bits(0, 0), bits(63, 64)), (!0, 0, 1 << 63));
        assert_eq!(bits(4, 8), 0xf0);
        let log = Log::new(Budget::of_memory(1 << 30).client(None).account(""), &[]);
        // From the last page of a chunk into the next one, and the last page of all.
        log.mark((CHUNK - 1) * PAGE, 2 * PAGE);
        log.mark(u64::MAX, 1);
        log.mark(u64::MAX, 0);
        let mut bitmap = [0];
        log.report((CHUNK - 32) * PAGE, 64 * PAGE, PAGE, &mut bitmap).unwrap();
        assert_eq!(bitmap, [0b11 << 31]);
        let mut bitmap = [0];
        log.report(u64::MAX - 64 * PAGE + 1 - PAGE, 64 * PAGE, PAGE, &mut bitmap).unwrap();
        assert_eq!(bitmap, [0], "the page before the last one was not written");
    }
}
