// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mapped files.

use std::any::Any;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::backing::Backing;
use crate::ranges::Guard;
use crate::reaper;

/// Part of a file, for [`Mapping::pieces`].
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// The first byte in the file.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
}

/// Mapped memory that may be taken away. No access to it ends the process.
///
/// Dropping it gives it to a thread that unmaps it, because unmapping much memory takes long.
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    page: usize,
    /// Ends before the range is unmapped.
    guard: Option<Guard>,
    /// Dropped when the range has been unmapped.
    held: Option<Box<dyn Any + Send>>,
}

// SAFETY: the mapping belongs to this value and does not move. The value itself never accesses it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on, shared. `offset` and `len` are that of whole
    /// pages of 4 KiB.
    ///
    /// # Errors
    /// The kernel refuses. Nothing is mapped then.
    pub fn file(
        file: impl AsFd,
        offset: u64,
        len: usize,
        prot: ProtFlags,
        backing: &Arc<Backing>,
    ) -> Result<Mapping, Errno> {
        Mapping::file_of_pages(file, offset, len, 4096, prot, backing)
    }

    /// As [`file`](Self::file), for a file with pages of `page` bytes. `offset` and `len` are that
    /// of whole pages.
    ///
    /// # Errors
    /// As for [`file`](Self::file).
    pub fn file_of_pages(
        file: impl AsFd,
        offset: u64,
        len: usize,
        page: usize,
        prot: ProtFlags,
        backing: &Arc<Backing>,
    ) -> Result<Mapping, Errno> {
        let (anywhere, flags) = (std::ptr::null_mut(), MapFlags::SHARED);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let mapped = unsafe { mmap(anywhere, len, prot, flags, file, offset) };
        Mapping::guarded(mapped?, len, page, backing)
    }

    /// Maps `pieces` one after another, for reading and writing. `page` is the size of the largest
    /// page among their files. Offset and length of each piece are that of whole pages of that
    /// size.
    ///
    /// # Errors
    /// The kernel refuses. Nothing is mapped then.
    pub fn pieces<'a>(
        pieces: impl Iterator<Item = Piece<'a>> + Clone,
        page: usize,
        backing: &Arc<Backing>,
    ) -> Result<Mapping, Errno> {
        let total = pieces.clone().try_fold(0_usize, |sum, piece| sum.checked_add(piece.len));
        let len = total.filter(|len| *len > 0).ok_or(Errno::INVAL)?;
        // Reserve the whole range and its alignment. Then give back what is too much.
        let room = len.checked_add(page).ok_or(Errno::NOMEM)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::empty(), MapFlags::PRIVATE)?
        };
        let first = (start as usize).next_multiple_of(page);
        let (before, after) =
            (first - start as usize, (start as usize + room).saturating_sub(first + len));
        // SAFETY: both ranges are parts of the reservation that nothing uses.
        unsafe {
            if before > 0 {
                let _ = munmap(start, before);
            }
            if after > 0 {
                let _ = munmap((first + len) as *mut _, after);
            }
        }
        let whole = Mapping::guarded(first as *mut _, len, page, backing)?;
        let mut at = first;
        for piece in pieces {
            // SAFETY: the target lies within `whole`, which nobody uses yet.
            unsafe {
                mmap(
                    at as *mut _,
                    piece.len,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED | MapFlags::FIXED,
                    piece.file,
                    piece.offset,
                )
            }?;
            at += piece.len;
        }
        Ok(whole)
    }

    /// Takes over the range, which has just been mapped.
    fn guarded(
        base: *mut std::ffi::c_void,
        len: usize,
        page: usize,
        backing: &Arc<Backing>,
    ) -> Result<Mapping, Errno> {
        let base = NonNull::new(base.cast::<u8>()).ok_or(Errno::NOMEM)?;
        let mut mapping = Mapping { base, len, page, guard: None, held: None };
        // SAFETY: the mapping keeps the range until the guard has ended.
        mapping.guard = Some(unsafe { Guard::new(base, len, page, backing) }?);
        Ok(mapping)
    }

    /// Keeps `held` until the memory has been unmapped: a share of a budget, for example.
    #[must_use]
    pub fn holding(mut self, held: impl Any + Send) -> Mapping {
        self.held = Some(Box::new(held));
        self
    }

    /// The first byte. The bytes are mapped as long as the mapping lives. Others may change them at
    /// any time, so they can be accessed as atomics, by raw copies and by system calls only.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none. A mapping always has some.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard = None;
        reaper::unmap(self.base.as_ptr() as usize, self.len, self.page, self.held.take());
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:#x}+{:#x})", self.base.as_ptr() as usize, self.len)
    }
}

/// Reads one byte of each page of the range. Use it when a system call has failed with EFAULT on
/// guarded memory: the signal handler then marks what is lost.
///
/// # Safety
/// The `len` bytes at `base` are guarded ([`Guard`], [`Mapping`]) and readable.
pub unsafe fn touch(base: NonNull<u8>, len: usize) {
    let last = len.checked_sub(1);
    for at in (0..len).step_by(4096).chain(last) {
        // SAFETY: the caller's promise.
        let _ = unsafe { base.as_ptr().add(at).read_volatile() };
    }
}
