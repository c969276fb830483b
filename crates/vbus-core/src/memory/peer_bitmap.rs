// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bitmap of written pages that the peer shares and reads by itself.
#![allow(unsafe_code)] // Makes references to atomics out of addresses in the peer's memory.

use std::fmt;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::ProtFlags;
use vbus_mapping::{Backing, Mapping};

use super::budget::{Account, Resource};
use super::file::Found;
use super::{MapError, PAGE};
use crate::page_bits::PageBits;

/// Bytes of a word of the bitmap, and the pages that it stands for.
const WORD: u64 = 8;
const PAGES: u64 = 64;

/// A bitmap in a file of the peer. Bit `n % 8` of byte `n / 8` stands for the page of [`PAGE`]
/// bytes at `n * PAGE`. The peer takes bits whenever it likes. A file that is truncated takes the
/// bitmap away and does no other harm.
pub struct PeerBitmap {
    mapping: Mapping,
    /// Where the bitmap begins in the mapping, in bytes.
    skip: usize,
    pages: u64,
}

impl PeerBitmap {
    pub(super) fn new(
        account: &Arc<Account>,
        file: BorrowedFd<'_>,
        offset: u64,
        bytes: u64,
    ) -> Result<PeerBitmap, MapError> {
        let wrong = || MapError::Range(offset, bytes);
        let end = offset.checked_add(bytes).filter(|_| bytes > 0 && offset % WORD == 0);
        let end = end.ok_or_else(wrong)?;
        let found = Found::new(file)?;
        if end > found.size() {
            return Err(MapError::FileTooSmall);
        }
        if !found.is_writable() {
            return Err(MapError::ReadOnly);
        }
        let page = found.page();
        let from = offset - offset % page;
        let len = end.checked_next_multiple_of(page).ok_or_else(wrong)? - from;
        let size = |bytes: u64| usize::try_from(bytes).map_err(|_| MapError::Os(Errno::NOMEM));
        let shares = (
            account.take(Resource::AddressSpace, len)?,
            account.take(Resource::Mappings, 1)?,
            account.take(Resource::Pages, len)?,
        );
        let backing: Arc<Backing> = Backing::zeros(4096)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let mapping = Mapping::file_of_pages(file, from, size(len)?, size(page)?, prot, &backing)?;
        let pages = bytes.saturating_mul(8);
        Ok(PeerBitmap { mapping: mapping.holding(shares), skip: size(offset - from)?, pages })
    }

    /// Bytes of the addresses that the bitmap covers, from 0 on.
    pub fn covers(&self) -> u64 {
        self.pages.saturating_mul(PAGE)
    }

    /// Marks pages, after the stores in them. Pages that the bitmap does not cover have no mark.
    pub(super) fn mark(&self, pages: Range<u64>) {
        let end = pages.end.min(self.pages);
        let mut at = pages.start;
        while at < end {
            let first = at / PAGES * PAGES;
            let until = end.min(first + PAGES);
            let bits = (!0 << (at - first)) & (!0 >> (first + PAGES - until));
            if let Some(word) = self.word(first / PAGES) {
                // The bytes of the bitmap are in order, whatever those of this machine's words are.
                word.mark(u64::to_le(bits));
            }
            at = until;
        }
    }

    /// A word of the bitmap. The last one may reach beyond it, within its page.
    fn word(&self, number: u64) -> Option<&PageBits> {
        let at = self.skip.checked_add(usize::try_from(number * WORD).ok()?)?;
        if at + size_of::<PageBits>() > self.mapping.len() {
            return None;
        }
        // SAFETY: it lies within the mapping, which is guarded and lives as long as `self`, at a
        // multiple of its size: the mapping begins with a page, and `skip` was checked. Atomics are
        // all that this process makes of these bytes.
        Some(unsafe { self.mapping.base().add(at).cast::<PageBits>().as_ref() })
    }
}

impl fmt::Debug for PeerBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerBitmap").field("pages", &self.pages).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::super::Budget;
    use super::*;

    fn file(bytes: u64) -> OwnedFd {
        let file = memfd_create("bitmap", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes).unwrap();
        file
    }

    fn bitmap(file: &OwnedFd, offset: u64, bytes: u64) -> Result<PeerBitmap, MapError> {
        let account = Budget::of_memory(1 << 30).client(None).account("");
        PeerBitmap::new(&account, file.as_fd(), offset, bytes)
    }

    #[test]
    fn each_page_has_its_bit_and_none_lies_outside() {
        // A file that ends within a word, and a bitmap that begins within a page.
        let (offset, bytes) = (4096 + 16, 21);
        let file = file(offset + bytes);
        let bitmap = bitmap(&file, offset, bytes).unwrap();
        assert_eq!(bitmap.covers(), 21 * 8 * PAGE);
        for pages in [0..1, 9..11, 63..130, 167..1000, 500..501, u64::MAX - 1..u64::MAX] {
            bitmap.mark(pages);
        }
        let mut content = vec![0; 8192];
        let read = rustix::io::pread(&file, &mut content, 0).unwrap();
        let (before, marks) = content[..read].split_at(4096 + 16);
        assert!(before.iter().all(|byte| *byte == 0));
        let mut expected = [0_u8; 21];
        for page in [0, 9, 10, 167].into_iter().chain(63..130) {
            expected[page / 8] |= 1 << (page % 8);
        }
        assert_eq!(marks, expected);
        // A peer that takes the file away harms nobody.
        ftruncate(&file, 0).unwrap();
        bitmap.mark(0..168);
    }

    #[test]
    fn a_file_that_cannot_be_a_bitmap_is_refused() {
        let small = file(4096);
        for (offset, bytes) in
            [(0, 4097), (4096, 1), (u64::MAX - 7, 8), (4, 8), (0, 0), (0, u64::MAX)]
        {
            assert!(bitmap(&small, offset, bytes).is_err(), "{offset} {bytes}");
        }
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        assert!(bitmap(&event, 0, 8).is_err());
    }
}
