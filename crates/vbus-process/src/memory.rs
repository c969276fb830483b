// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory that a process shares with its device.
#![allow(unsafe_code)] // Maps shared memory.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use vbus_driver::Dma;
use vbus_mapping::{Backing, Mapping};
use vbus_shm::Memory;
use vbus_shm::sync::{Ordering, Word};

/// The default size of the memory that a process shares with its device. The system provides a page
/// only when it is first used.
pub const MEMORY_BYTES: u64 = 64 << 20;

/// The address of the memory as the device sees it. It is no valid offset in the memory, so that a
/// driver that mixes up addresses and offsets fails at once.
pub(crate) const BASE: u64 = 0x1_0000_0000;
/// An allocation has whole pages.
const PAGE: usize = 4096;

/// A memory file, mapped, with the list of its free ranges.
pub(crate) struct Pool {
    mapping: Mapping,
    /// Free ranges: offset and length. All bytes in them are zero.
    free: Mutex<BTreeMap<usize, usize>>,
}

impl Pool {
    /// Makes a memory file of `bytes` bytes, which nobody can shrink, and maps it. Returns the file
    /// too, for the device.
    pub(crate) fn new(bytes: u64) -> Result<(Pool, OwnedFd), Errno> {
        let file = memfd_create("vbus", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, bytes)?;
        fcntl_add_seals(&file, SealFlags::SHRINK)?;
        let bytes = usize::try_from(bytes).map_err(|_| Errno::NOMEM)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // The device can punch holes into the file. If a hole gets no page, this end reads zeros.
        let mapping = Mapping::file(&file, 0, bytes, protection, &Backing::zeros(PAGE)?)?;
        let free = Mutex::new(BTreeMap::from([(0, bytes)]));
        Ok((Pool { mapping, free }, file))
    }

    /// Allocates `bytes` bytes, rounded up to whole pages. `None`: no free range is long enough, or
    /// `bytes` is 0.
    pub(crate) fn alloc(self: &Arc<Self>, bytes: usize) -> Option<ProcessMemory> {
        let len = bytes.checked_next_multiple_of(PAGE).filter(|len| *len > 0)?;
        let mut free = self.free();
        let (at, have) =
            free.iter().find(|(_, have)| **have >= len).map(|(at, have)| (*at, *have))?;
        free.remove(&at);
        if have > len {
            free.insert(at + len, have - len);
        }
        drop(free);
        // SAFETY: the range is within the mapping.
        let base = unsafe { self.mapping.base().add(at) };
        Some(ProcessMemory(Arc::new(Allocation { pool: self.clone(), base, at, len })))
    }

    /// Puts a range back, and joins it with the free ranges beside it.
    fn release(&self, mut at: usize, mut len: usize) {
        let mut free = self.free();
        let before = free.range(..at).next_back().map(|(at, len)| (*at, *len));
        if let Some((before, have)) = before.filter(|(before, have)| before + have == at) {
            free.remove(&before);
            (at, len) = (before, have + len);
        }
        if let Some(have) = free.remove(&(at + len)) {
            len += have;
        }
        free.insert(at, len);
    }

    /// The list is whole after each of its changes, so a thread that panicked has not broken it.
    fn free(&self) -> MutexGuard<'_, BTreeMap<usize, usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory that a process shares with its device. It is zero at first. Dropping the last clone frees
/// it.
#[derive(Clone)]
pub struct ProcessMemory(Arc<Allocation>);

struct Allocation {
    pool: Arc<Pool>,
    base: NonNull<u8>,
    /// The offset in the pool.
    at: usize,
    len: usize,
}

// SAFETY: `base` points into the pool's mapping. All accesses are atomics and system calls, which
// any thread may use.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Allocation {
    #[inline(always)]
    fn words(&self) -> &[Word] {
        // SAFETY: the range is within the mapping, which `pool` keeps. Nobody accesses it but
        // through atomics and system calls.
        unsafe { vbus_shm::raw::words(self.base, self.len) }.unwrap_or_default()
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.words().iter().for_each(|word| word.store(0, Ordering::Relaxed));
        self.pool.release(self.at, self.len);
    }
}

impl fmt::Debug for ProcessMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessMemory")
            .field("at", &self.0.at)
            .field("len", &self.0.len)
            .finish_non_exhaustive()
    }
}

impl Memory for ProcessMemory {
    #[inline(always)]
    fn words(&self) -> &[Word] {
        self.0.words()
    }
}

impl Dma for ProcessMemory {
    fn page_shift(&self) -> u8 {
        0
    }

    fn address(&self, offset: usize) -> u64 {
        BASE + (self.0.at + offset) as u64
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn freed_memory_is_zero_and_joins_its_neighbours() {
        let pool = Arc::new(Pool::new(4 * PAGE as u64).unwrap().0);
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [1, 2, 0, 3]] {
            let mut pages: Vec<_> = (0..4).map(|_| pool.alloc(1)).collect();
            assert!(pool.alloc(1).is_none() && pool.alloc(0).is_none());
            for (at, page) in pages.iter().flatten().enumerate() {
                assert_eq!(page.address(8), BASE + (at * PAGE) as u64 + 8);
                page.words()[5].store(7, Ordering::Relaxed);
            }
            order.iter().for_each(|page| pages[*page] = None);
            let whole = pool.alloc(4 * PAGE).unwrap();
            assert!(whole.words().iter().all(|word| word.load(Ordering::Relaxed) == 0));
        }
    }
}
