// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The allocator's table: which pages of an arena are in use, and by how many handles. A driver
//! needs no other allocator.

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// The most blocks that can be in use at a time.
pub const BLOCKS_MAX: usize = 256;

/// A block in use.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    page: u32,
    pages: u32,
    /// The number of handles to it; 0: this entry of the table is free.
    users: u32,
}

/// The arena's table: blocks of whole pages, first fit, each with a count of its handles.
#[derive(Debug)]
pub struct Blocks {
    pages: u32,
    blocks: [Block; BLOCKS_MAX],
}

/// A block, by its index in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u8);

impl Blocks {
    /// Makes an arena of `pages` free pages.
    pub const fn new(pages: u32) -> Blocks {
        Blocks { pages, blocks: [Block { page: 0, pages: 0, users: 0 }; BLOCKS_MAX] }
    }

    /// Takes a block of `bytes` bytes (more than 0), rounded up to pages, with one handle. Returns
    /// its key and first page; `None` if there is no room.
    pub fn take(&mut self, bytes: usize) -> Option<(Key, u32)> {
        let pages = u32::try_from((bytes as u64).div_ceil(PAGE)).ok().filter(|pages| *pages > 0)?;
        let place = self.blocks.iter().position(|block| block.users == 0)?;
        // The first gap is at the beginning, or after a block.
        let begins = self.used().map(|block| block.page + block.pages);
        let page = begins.chain([0]).filter(|page| self.is_free(*page, pages)).min()?;
        self.blocks[place] = Block { page, pages, users: 1 };
        Some((Key(u8::try_from(place).ok()?), page))
    }

    /// Counts one more handle to a block.
    pub fn share(&mut self, key: Key) {
        self.blocks[usize::from(key.0)].users += 1;
    }

    /// Counts one handle fewer. After the last one the block is free.
    pub fn release(&mut self, key: Key) {
        self.blocks[usize::from(key.0)].users -= 1;
    }

    /// The number of pages in use.
    pub fn in_use(&self) -> u32 {
        self.used().map(|block| block.pages).sum()
    }

    fn used(&self) -> impl Iterator<Item = &Block> {
        self.blocks.iter().filter(|block| block.users > 0)
    }

    fn is_free(&self, page: u32, pages: u32) -> bool {
        let Some(end) = page.checked_add(pages).filter(|end| *end <= self.pages) else {
            return false;
        };
        self.used().all(|block| end <= block.page || block.page + block.pages <= page)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn blocks_are_apart_and_come_back_with_their_last_handle() {
        let mut blocks = Blocks::new(10);
        let (a, at) = blocks.take(1).unwrap();
        assert_eq!(at, 0);
        let (b, at) = blocks.take(2 * 4096 + 1).unwrap();
        assert_eq!(at, 1);
        let (_, at) = blocks.take(4096).unwrap();
        assert_eq!((at, blocks.in_use()), (4, 5));
        blocks.share(b);
        blocks.release(b);
        // The block is too large for every gap.
        assert_eq!(blocks.take(6 * 4096), None);
        blocks.release(b);
        let (_, at) = blocks.take(2 * 4096).unwrap();
        assert_eq!(at, 1);
        blocks.release(a);
        assert_eq!(blocks.take(4096).unwrap().1, 0);
        assert_eq!(blocks.take(4096).unwrap().1, 3);
        assert_eq!(blocks.take(5 * 4096).unwrap().1, 5);
        assert_eq!((blocks.take(1), blocks.in_use()), (None, 10));
    }

    #[test]
    fn impossible_sizes_are_refused() {
        let mut blocks = Blocks::new(1000);
        assert_eq!(blocks.take(0), None);
        assert_eq!(blocks.take(usize::MAX), None);
        for _ in 0..BLOCKS_MAX {
            blocks.take(1).unwrap();
        }
        assert_eq!(blocks.take(1), None);
        assert_eq!(Blocks::new(0).take(1), None);
    }

    #[test]
    fn random_use_keeps_blocks_apart() {
        let mut blocks = Blocks::new(256);
        let mut held: Vec<(Key, u32, u32)> = Vec::new();
        let mut random = 1u64;
        for _ in 0..20_000 {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let bytes = (random >> 33) as usize % (20 * 4096) + 1;
            if random >> 63 == 0 {
                if let Some((key, page)) = blocks.take(bytes) {
                    let pages = u32::try_from(bytes.div_ceil(4096)).unwrap();
                    assert!(page + pages <= 256);
                    assert!(
                        held.iter().all(|(_, at, count)| page + pages <= *at || at + count <= page)
                    );
                    held.push((key, page, pages));
                }
            } else if !held.is_empty() {
                let (key, ..) = held.swap_remove(bytes % held.len());
                blocks.release(key);
            }
            assert_eq!(blocks.in_use(), held.iter().map(|(.., pages)| pages).sum::<u32>());
        }
    }
}
