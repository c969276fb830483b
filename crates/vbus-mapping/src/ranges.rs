// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ranges of memory that the signal handler knows.
//!
//! The handler may interrupt any thread at any point, also one that changes the ranges. So it takes
//! no lock. It reads a slot, and reads the slot's sequence number before and after. If the number
//! has changed, the slot is not the one that it looks for: the thread that faulted uses its range,
//! and nobody changes the slot of a range that is in use.

use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use crate::backing::Backing;
use crate::signal;

/// Number of slots in a block.
const BLOCK: usize = 256;

struct Slot {
    /// Odd while the slot is being changed. The first store of a change pairs with the handler's
    /// second load, by the fences; the last store (`Release`) pairs with its first load
    /// (`Acquire`).
    sequence: AtomicU64,
    /// The range's first byte. 0: the slot is free.
    base: AtomicUsize,
    len: AtomicUsize,
    grain: AtomicUsize,
    backing: AtomicPtr<Backing>,
}

/// Slots. A block is made when the earlier blocks are full, and then stays for ever.
struct Block {
    slots: [Slot; BLOCK],
    /// Stored with `Release` when the next block has been made; loaded with `Acquire`.
    next: AtomicPtr<Block>,
}

impl Block {
    const fn new() -> Block {
        Block { slots: [const { Slot::free() }; BLOCK], next: AtomicPtr::new(ptr::null_mut()) }
    }

    fn next(&self) -> Option<&'static Block> {
        // SAFETY: null, or a block that stays for ever.
        unsafe { self.next.load(Ordering::Acquire).as_ref() }
    }
}

static FIRST: Block = Block::new();

/// The slots that are free. Whoever changes a slot holds this lock, or has taken the slot from the
/// list.
static FREE: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());

fn blocks() -> impl Iterator<Item = &'static Block> {
    std::iter::successors(Some(&FIRST), |block| block.next())
}

fn take() -> &'static Slot {
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(slot) = free.pop() {
        return slot;
    }
    // The first block is in no list before the first call.
    static BEGUN: AtomicUsize = AtomicUsize::new(0);
    let block = if BEGUN.swap(1, Ordering::Relaxed) == 0 {
        &FIRST
    } else {
        let block: &'static Block = Box::leak(Box::new(Block::new()));
        if let Some(last) = blocks().last() {
            last.next.store(ptr::from_ref(block).cast_mut(), Ordering::Release);
        }
        block
    };
    free.extend(block.slots[1..].iter());
    &block.slots[0]
}

impl Slot {
    const fn free() -> Slot {
        Slot {
            sequence: AtomicU64::new(0),
            base: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            grain: AtomicUsize::new(0),
            backing: AtomicPtr::new(ptr::null_mut()),
        }
    }

    fn set(&self, base: usize, len: usize, grain: usize, backing: *const Backing) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.base.store(base, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.grain.store(grain, Ordering::Relaxed);
        self.backing.store(backing.cast_mut(), Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// What the handler needs to know of `at`. `None`: `at` is not in the range, or the slot is
    /// being changed.
    fn find(&self, at: usize) -> Option<Found> {
        let sequence = self.sequence.load(Ordering::Acquire);
        let (base, len) = (self.base.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        let (grain, backing) =
            (self.grain.load(Ordering::Relaxed), self.backing.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let stable = sequence % 2 == 0 && self.sequence.load(Ordering::Relaxed) == sequence;
        let inside = at.wrapping_sub(base);
        if !stable || base == 0 || inside >= len || grain == 0 {
            return None;
        }
        let begin = inside - inside % grain;
        let part = (base + begin, grain.min(len - begin));
        Some(Found { part, whole: (base, len), backing })
    }
}

/// A range that has an address. Places are pairs of address and length.
pub(crate) struct Found {
    /// The part around the address that is replaced at a time.
    pub part: (usize, usize),
    /// The range.
    pub whole: (usize, usize),
    /// Valid as long as the range is guarded.
    pub backing: *const Backing,
}

/// Finds the range with the address `at`. A signal handler may call it.
pub(crate) fn find(at: usize) -> Option<Found> {
    blocks().flat_map(|block| &block.slots).find_map(|slot| slot.find(at))
}

/// A range of mapped memory that the signal handler knows. [`Mapping`](crate::Mapping) has one. A
/// guard of its own is for memory that somebody else maps.
#[derive(Debug)]
pub struct Guard {
    slot: Held,
    backing: Arc<Backing>,
}

struct Held(&'static Slot);

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0.base.load(Ordering::Relaxed))
    }
}

impl Guard {
    /// Guards the `len` bytes at `base`, which are a mapping with pages of `page` bytes. `base` and
    /// `len` are multiples of `page`. The first guard of the process installs the signal handler.
    ///
    /// # Safety
    /// The range is mapped, and stays so while the guard lives. It may be replaced by other memory
    /// at any time.
    ///
    /// # Errors
    /// The kernel has no memory to promise for pages of this size, or takes no handler.
    pub unsafe fn new(
        base: NonNull<u8>,
        len: usize,
        page: usize,
        backing: &Arc<Backing>,
    ) -> Result<Guard, Errno> {
        signal::install()?;
        backing.reserve(page)?;
        let slot = take();
        let grain = Backing::grain(page);
        slot.set(base.as_ptr() as usize, len, grain, Arc::as_ptr(backing));
        Ok(Guard { slot: Held(slot), backing: backing.clone() })
    }

    /// What stands behind the range.
    pub fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.slot.0.set(0, 0, 0, ptr::null());
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.slot.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_ranges_than_a_block_has_are_all_found() {
        let backing = Backing::zeros(4096).unwrap();
        // The addresses are never accessed.
        let at = |i: usize| NonNull::new((0x10_0000 + i * 0x4000) as *mut u8).unwrap();
        // SAFETY: no access to these addresses raises a signal, because there is none.
        let guard = |i| unsafe { Guard::new(at(i), 0x2000, 4096, &backing) }.unwrap();
        let mut guards: Vec<_> = (0..3 * BLOCK).map(guard).collect();
        let found = |i: usize, offset: usize| find(at(i).as_ptr() as usize + offset);
        for i in 0..guards.len() {
            let base = at(i).as_ptr() as usize;
            assert_eq!(found(i, 0x1fff).map(|found| found.part), Some((base, 0x2000)));
            assert!(found(i, 0x2000).is_none());
        }
        guards.truncate(10);
        assert!(found(9, 0).is_some() && found(10, 0).is_none());
        guards.extend((10..20).map(guard));
        assert!(found(19, 0x1000).is_some());
    }

    #[test]
    fn a_part_is_a_grain_of_the_range() {
        let backing = Backing::zeros(4096).unwrap();
        let base = NonNull::new(0x7000_0000 as *mut u8).unwrap();
        // SAFETY: no access to these addresses raises a signal, because there is none.
        let _guard = unsafe { Guard::new(base, 5 << 20, 4096, &backing) }.unwrap();
        let part = |offset: usize| {
            find(0x7000_0000 + offset).map(|found| (found.part.0 - 0x7000_0000, found.part.1))
        };
        assert_eq!(part(0), Some((0, 2 << 20)));
        assert_eq!(part((2 << 20) + 5), Some((2 << 20, 2 << 20)));
        assert_eq!(part((5 << 20) - 1), Some((4 << 20, 1 << 20)), "the last one is shorter");
        assert_eq!(part(5 << 20), None);
    }
}
