// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bytes of the driver's memory within a view.

use std::ptr::NonNull;

use vbus_shm::ErrorCode;

use super::Access;
use super::table::Table;
use crate::io_vec::{IoVec, IoVecMut};

/// Bytes of the driver's memory. The driver may write them at any time. So they can be copied, or
/// passed to system calls, but never borrowed. They lie in one piece or in several
/// ([`pieces`](Self::pieces)).
#[derive(Clone, Copy)]
pub struct DriverSlice<'a> {
    base: NonNull<u8>,
    /// Number of bytes at `base`. The table has the rest.
    run: usize,
    len: usize,
    addr: u64,
    /// The peer lets the device write here.
    write: bool,
    table: &'a Table,
}

// SAFETY: a pointer into a mapping that the view keeps; used by raw copies and system calls only.
unsafe impl Send for DriverSlice<'_> {}

impl<'a> DriverSlice<'a> {
    /// The `len` bytes at `addr`. All of them must be mapped, for writing if `write`, else for
    /// reading.
    #[inline]
    pub(super) fn new(
        table: &'a Table,
        addr: u64,
        len: usize,
        write: bool,
    ) -> Result<DriverSlice<'a>, ErrorCode> {
        let access = if write { Access::WRITE } else { Access::READ };
        let run = table.run(addr, len, access)?;
        if run.len < len {
            table.runs(addr, len, access, |_| Ok(()))?;
        }
        Ok(DriverSlice { base: run.base, run: run.len, len, addr, write, table })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Splits at byte `mid`. A `mid` beyond the length is cut to the length.
    pub fn split_at(self, mid: usize) -> (DriverSlice<'a>, DriverSlice<'a>) {
        let mid = mid.min(self.len);
        let front = DriverSlice { run: self.run.min(mid), len: mid, ..self };
        (front, self.skip(mid))
    }

    /// The slice without its first `count` bytes. It must have that many.
    fn skip(self, count: usize) -> DriverSlice<'a> {
        let (addr, len) = (self.addr.wrapping_add(count as u64), self.len - count);
        if count < self.run || len == 0 {
            // SAFETY: count <= run.
            let base = unsafe { self.base.add(count.min(self.run)) };
            return DriverSlice { base, run: self.run - count.min(self.run), len, addr, ..self };
        }
        // The whole range was looked up when the slice was made, and the view's table does not
        // change.
        match self.table.run(addr, len, Access { read: false, write: false }) {
            Ok(run) => DriverSlice { base: run.base, run: run.len, len, addr, ..self },
            Err(_) => DriverSlice { run: 0, len: 0, ..self },
        }
    }

    /// Whether the peer lets the device write here.
    pub(super) fn is_for_writing(&self) -> bool {
        self.write
    }

    /// The `count` bytes at byte `at`, if they lie in the first of the slice's pieces.
    #[inline(always)]
    pub(super) fn near(&self, at: usize, count: usize) -> Option<NonNull<u8>> {
        let near = at.checked_add(count).is_some_and(|end| end <= self.run);
        // SAFETY: `at` lies within the first piece.
        near.then(|| unsafe { self.base.add(at) })
    }

    /// The `count` bytes at byte `at`. `None`: the slice has fewer, or they lie in two pieces.
    #[inline(always)]
    pub(super) fn place(&self, at: usize, count: usize) -> Option<NonNull<u8>> {
        self.near(at, count).or_else(|| self.far(at, count))
    }

    #[cold]
    fn far(&self, at: usize, count: usize) -> Option<NonNull<u8>> {
        let end = at.checked_add(count)?;
        (end <= self.len).then(|| self.skip(at)).and_then(|rest| rest.near(0, count))
    }

    /// The pieces of the slice, in order. Each is contiguous in this process's memory. A slice has
    /// more than one piece only if it crosses from one map into the next.
    pub fn pieces(&self) -> impl Iterator<Item = DriverSlice<'a>> + use<'a> {
        let mut rest = *self;
        std::iter::from_fn(move || {
            let (piece, after) = rest.split_at(rest.run);
            rest = after;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// Copies to `out`, as many bytes as the shorter one has. Returns that number.
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let mut at = 0;
        for piece in self.pieces() {
            let to = &mut out[at..];
            let len = piece.len.min(to.len());
            // SAFETY: both ranges are valid for len bytes; they may overlap no Rust object but
            // `out`.
            unsafe { copy(piece.base.as_ptr(), to.as_mut_ptr(), len) };
            at += len;
        }
        at
    }

    /// Copies from `bytes`, as many bytes as the shorter one has. Returns that number. A slice that
    /// is only for reading takes none.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut at = 0;
        if !self.write {
            return 0;
        }
        for piece in self.pieces() {
            let from = &bytes[at..];
            let len = piece.len.min(from.len());
            // SAFETY: as in copy_to.
            unsafe { copy(from.as_ptr(), piece.base.as_ptr(), len) };
            at += len;
        }
        self.wrote(at);
        at
    }

    /// Copies from another driver's memory, as many bytes as the shorter one has. Returns that
    /// number. A slice that is only for reading takes none.
    pub fn copy_from_driver(&self, from: DriverSlice<'_>) -> usize {
        let total = if self.write { self.len.min(from.len) } else { 0 };
        let (mut to, mut from) = (*self, from);
        let mut left = total;
        while left > 0 {
            let len = left.min(to.run).min(from.run);
            if len == 0 {
                break;
            }
            // SAFETY: both ranges are valid for len bytes. They may overlap, if the peer maps its
            // memory so. The result is then garbage in the peer's own memory.
            unsafe { copy(from.base.as_ptr(), to.base.as_ptr(), len) };
            (to, from, left) = (to.skip(len), from.skip(len), left - len);
        }
        self.wrote(total - left);
        total - left
    }

    /// The first `len` bytes of the slice have been written by a system call, to which
    /// [`io_vecs_mut`](Self::io_vecs_mut) gave them. If the driver's memory is being moved, the log
    /// of written pages has them from now on. A `len` beyond the length is cut to the length.
    #[inline(always)]
    pub fn wrote(&self, len: usize) {
        self.wrote_at(0, len.min(self.len));
    }

    /// The `len` bytes at byte `at` have been written.
    #[inline(always)]
    pub(super) fn wrote_at(&self, at: usize, len: usize) {
        self.table.wrote(self.addr.wrapping_add(at as u64), len);
    }

    /// The bytes for [`writev`](crate::io_vec::writev), which reads them: one vector for each of
    /// the [`pieces`](Self::pieces).
    pub fn io_vecs(&self) -> impl Iterator<Item = IoVec<'a>> + use<'a> {
        // SAFETY: the view keeps the mapping for 'a.
        self.pieces().map(|piece| unsafe { IoVec::shared(piece.base, piece.len) })
    }

    /// The bytes for [`readv`](crate::io_vec::readv), which writes them: one vector for each of the
    /// [`pieces`](Self::pieces). If the slice is only for reading, the system call fails with
    /// EFAULT.
    ///
    /// After the system call the caller says by [`wrote`](Self::wrote) how much of each slice the
    /// kernel has written, at least; after a failure all of it, because it may have written some.
    pub fn io_vecs_mut(&self) -> impl Iterator<Item = IoVecMut<'a>> + use<'a> {
        let write = self.write;
        self.pieces().map(move |piece| match write {
            // SAFETY: the view keeps the mapping for 'a. References to its bytes are to atomics
            // only.
            true => unsafe { IoVecMut::shared(piece.base, piece.len) },
            false => IoVecMut::nowhere(piece.len),
        })
    }

    /// Reads one byte of each page. A system call on memory that its owner has taken away fails
    /// with EFAULT, and says no more. Touching the memory then lets the bus see the loss, and end
    /// the connection.
    pub fn touch(&self) {
        for piece in self.pieces() {
            // SAFETY: the view keeps the mapping, which is guarded.
            unsafe { vbus_mapping::touch(piece.base, piece.len) };
        }
    }
}

/// Copies bytes that another process may be writing. On x86-64 it uses an instruction that the
/// compiler cannot look into, so a race gives torn bytes and nothing else. On other machines it
/// copies volatile bytes.
///
/// # Safety
/// `from` must be readable and `to` writable for `len` bytes.
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise; the direction flag is clear by the ABI.
    unsafe {
        std::arch::asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..len {
        // SAFETY: the caller's promise.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) };
    }
}
