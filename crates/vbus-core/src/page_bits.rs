// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which pages a device has written. This protocol is lock-free. `tests/it/page_bits_model.rs`
//! compiles this file with the atomics of a model checker.
//!
//! A writer stores in a page and then marks it. A reporter takes the marks, and then its peer
//! copies the pages that were marked. So the peer has copied what was stored, or the mark is there
//! for the next report. A mark before the store would be worth nothing: a reporter could take it,
//! and the peer could copy the page, before the store.

use super::sync::{AtomicBool, AtomicU64, Order, Ordering, heavy_fence, light_fence};

/// The marks of 64 pages.
#[repr(transparent)]
pub struct PageBits(AtomicU64);

impl PageBits {
    /// No marks.
    pub fn new() -> PageBits {
        PageBits(AtomicU64::new(0))
    }

    /// Marks pages, after the stores in them. It does not look first whether they are marked: what
    /// it saw could be taken before its stores are visible.
    pub fn mark(&self, pages: u64) {
        // Pairs with the fetch_and in `take`: who takes the marks sees the stores.
        self.0.fetch_or(pages, Order::Mark.get());
    }

    /// Takes the marks among `pages`.
    pub fn take(&self, pages: u64) -> u64 {
        // Most words have none. A mark that comes now is for the next report.
        if self.0.load(Ordering::Relaxed) & pages == 0 {
            return 0;
        }
        // Pairs with the fetch_or in `mark`.
        self.0.fetch_and(!pages, Order::Take.get()) & pages
    }
}

/// Whether writers mark what they write.
///
/// A writer stores and then looks. Whoever switches this on lets its peer copy all pages
/// afterwards. So the peer copies what was stored, or the writer sees that it has to mark the page.
/// The fence for that costs the writers nothing: a system call of the one who switches it on has
/// the effect of a fence in each of their threads.
pub struct MarkSwitch(AtomicBool);

impl MarkSwitch {
    /// Off.
    pub fn new() -> MarkSwitch {
        MarkSwitch(AtomicBool::new(false))
    }

    /// For a writer that has stored: whether it has to mark the page.
    #[inline(always)]
    pub fn is_on(&self) -> bool {
        // Pairs with the fence in `on`.
        light_fence();
        self.0.load(Ordering::Relaxed)
    }

    /// Switches it on. When this returns, a store that is not marked is visible to all. False: this
    /// machine does not have the system call, and it stays off.
    pub fn on(&self) -> bool {
        self.0.store(true, Ordering::Relaxed);
        // Pairs with the fence in `is_on`.
        let fenced = heavy_fence();
        if !fenced {
            self.off();
        }
        fenced
    }

    /// Switches it off. Writers may mark for a while.
    pub fn off(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}
