// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that devices can reach: a part of the largest run of RAM, allocated in pages.
#![allow(unsafe_code, reason = "hands out memory")]

use core::cell::RefCell;
use core::fmt;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

use flat::blocks::{Blocks, Key, PAGE};
use vbus_driver::{Dma, NoMemory};
use vbus_shm::Memory;
use vbus_shm::memory::WORD;
use vbus_shm::sync::Word;

/// The most bytes that this allocator uses.
const BYTES_MAX: u64 = 64 << 20;

struct Pool(RefCell<Blocks>);

// SAFETY: only one processor uses it, and no interrupt handler does.
unsafe impl Sync for Pool {}

static POOL: Pool = Pool(RefCell::new(Blocks::new(0)));
static BASE: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

/// Sets the memory, by address and length. Nothing else may use it.
pub fn init((address, bytes): (u64, u64)) {
    let base = address.next_multiple_of(PAGE);
    let bytes = bytes.saturating_sub(base - address).min(BYTES_MAX) / PAGE * PAGE;
    BASE.store(base, Ordering::Relaxed);
    BYTES.store(bytes, Ordering::Relaxed);
    *POOL.0.borrow_mut() = Blocks::new((bytes / PAGE) as u32);
}

/// Bytes that can be allocated.
pub fn bytes() -> u64 {
    BYTES.load(Ordering::Relaxed)
}

/// The number of pages in use.
pub fn pages_in_use() -> u32 {
    POOL.0.borrow().in_use()
}

/// A block of memory.
pub struct Block {
    key: Key,
    words: &'static [Word],
}

impl Block {
    /// Allocates a zeroed block of at least `bytes` bytes, in whole pages.
    pub fn new(bytes: usize) -> Result<Block, NoMemory> {
        let (key, page) = POOL.0.borrow_mut().take(bytes).ok_or(NoMemory)?;
        let at = (BASE.load(Ordering::Relaxed) + u64::from(page) * PAGE) as *mut u8;
        let bytes = bytes.next_multiple_of(PAGE as usize);
        // SAFETY: the table reserves this RAM for the block until its last handle is dropped. A
        // device that used it before has released it. Both ends access it as atomic words from here
        // on. The slice lives as long as the handles, and only they give it out.
        let words = unsafe {
            ptr::write_bytes(at, 0, bytes);
            core::slice::from_raw_parts(at.cast::<Word>(), bytes / WORD)
        };
        Ok(Block { key, words })
    }
}

impl Clone for Block {
    fn clone(&self) -> Block {
        POOL.0.borrow_mut().share(self.key);
        Block { key: self.key, words: self.words }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        POOL.0.borrow_mut().release(self.key);
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Block({:#x}, {} words)", self.address(0), self.words.len())
    }
}

impl Memory for Block {
    fn words(&self) -> &[Word] {
        self.words
    }
}

impl Dma for Block {
    const CONTIGUOUS_MIN: usize = 1 << 20;

    fn page_shift(&self) -> u8 {
        0
    }

    fn address(&self, offset: usize) -> u64 {
        // Virtual and physical addresses are equal.
        self.words.as_ptr() as u64 + offset as u64
    }
}
