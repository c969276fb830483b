// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Vectors of the system calls `readv` and `writev`, over memory that other processes may change.
//!
//! [`std::io::IoSlice`] holds a `&[u8]`. Rust forbids a `&[u8]` of bytes that somebody else writes.
//! An [`IoVec`] and an [`IoVecMut`] hold a pointer and a length, which only the kernel uses.
//!
//! ```
//! use vbus_iovec::{IoVec, IoVecMut, readv, writev};
//! use vbus_shm::sync::{Ordering, Word};
//!
//! let (reader, writer) = rustix::pipe::pipe()?;
//! let shared = [Word::new(u64::from_le_bytes(*b"12345678"))];
//! writev(&writer, &[IoVec::new(b"head "), IoVec::words(&shared, 4, 4)])?;
//! let mut text = [0; 9];
//! assert_eq!(readv(&reader, &mut [IoVecMut::new(&mut text)])?, 9);
//! assert_eq!(&text, b"head 5678");
//! # Ok::<(), rustix::io::Errno>(())
//! ```
#![allow(unsafe_code)] // Gives pointers to the kernel.

use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use rustix::io::{Errno, retry_on_intr};
use vbus_shm::sync::Word;

/// Bytes that [`writev`] reads: the process's own, or shared ones.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct IoVec<'a>(libc::iovec, PhantomData<&'a [u8]>);

/// Bytes that [`readv`] writes: the process's own, or shared ones.
#[repr(transparent)]
pub struct IoVecMut<'a>(libc::iovec, PhantomData<&'a mut [u8]>);

impl<'a> IoVec<'a> {
    /// No bytes.
    pub const EMPTY: IoVec<'static> =
        IoVec(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }, PhantomData);

    /// Bytes of this process.
    pub fn new(bytes: &'a [u8]) -> IoVec<'a> {
        let iov_base = bytes.as_ptr().cast_mut().cast();
        IoVec(libc::iovec { iov_base, iov_len: bytes.len() }, PhantomData)
    }

    /// `len` bytes of shared words, from byte `offset` on. Both are cut to the words.
    pub fn words(words: &'a [Word], offset: usize, len: usize) -> IoVec<'a> {
        let (iov_base, iov_len) = range(words, offset, len);
        IoVec(libc::iovec { iov_base, iov_len }, PhantomData)
    }

    /// Bytes that others may change.
    ///
    /// # Safety
    /// The `len` bytes at `base` are mapped for `'a`.
    pub unsafe fn shared(base: NonNull<u8>, len: usize) -> IoVec<'a> {
        IoVec(libc::iovec { iov_base: base.as_ptr().cast(), iov_len: len }, PhantomData)
    }
}

impl<'a> IoVecMut<'a> {
    /// No bytes.
    pub const EMPTY: IoVecMut<'static> =
        IoVecMut(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }, PhantomData);

    /// Bytes of this process.
    pub fn new(bytes: &'a mut [u8]) -> IoVecMut<'a> {
        let iov_base = bytes.as_mut_ptr().cast();
        IoVecMut(libc::iovec { iov_base, iov_len: bytes.len() }, PhantomData)
    }

    /// `len` bytes of shared words, from byte `offset` on. Both are cut to the words. The words are
    /// atomics: the kernel may write them through a shared borrow.
    pub fn words(words: &'a [Word], offset: usize, len: usize) -> IoVecMut<'a> {
        let (iov_base, iov_len) = range(words, offset, len);
        IoVecMut(libc::iovec { iov_base, iov_len }, PhantomData)
    }

    /// Bytes that others may change.
    ///
    /// # Safety
    /// The `len` bytes at `base` are mapped for `'a`. No reference to them exists in this process,
    /// except to atomics.
    pub unsafe fn shared(base: NonNull<u8>, len: usize) -> IoVecMut<'a> {
        IoVecMut(libc::iovec { iov_base: base.as_ptr().cast(), iov_len: len }, PhantomData)
    }
}

impl IoVecMut<'_> {
    /// `len` bytes at the address 0, where nothing is: [`readv`] fails with [`Errno::FAULT`].
    pub fn nowhere(len: usize) -> IoVecMut<'static> {
        IoVecMut(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: len }, PhantomData)
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }
}

/// Address and length of `len` bytes from byte `offset` on, cut to the words.
fn range(words: &[Word], offset: usize, len: usize) -> (*mut libc::c_void, usize) {
    let bytes = size_of_val(words);
    let offset = offset.min(bytes);
    // The kernel, or another process, writes the words as it likes: no reference leaves here.
    let base = words.as_ptr().cast_mut().cast::<u8>().wrapping_add(offset);
    (base.cast(), len.min(bytes - offset))
}

/// Reads from `fd` into the vectors, in order. Returns the number of bytes. A call that a signal
/// interrupts is repeated.
///
/// # Errors
/// The system call's: [`Errno::INVAL`] for more than 1024 vectors, [`Errno::FAULT`] for memory
/// that is not mapped for writing.
pub fn readv(fd: impl AsFd, vectors: &mut [IoVecMut<'_>]) -> Result<usize, Errno> {
    let count = libc::c_int::try_from(vectors.len()).map_err(|_| Errno::INVAL)?;
    retry_on_intr(|| {
        // SAFETY: the type is transparent over an iovec. The kernel writes only memory that each
        // vector has for its lifetime.
        let bytes = unsafe { libc::readv(fd.as_fd().as_raw_fd(), vectors.as_ptr().cast(), count) };
        result(bytes)
    })
}

/// Writes the vectors to `fd`, in order. Returns the number of bytes. A call that a signal
/// interrupts is repeated.
///
/// # Errors
/// The system call's: [`Errno::INVAL`] for more than 1024 vectors.
pub fn writev(fd: impl AsFd, vectors: &[IoVec<'_>]) -> Result<usize, Errno> {
    let count = libc::c_int::try_from(vectors.len()).map_err(|_| Errno::INVAL)?;
    retry_on_intr(|| {
        // SAFETY: the type is transparent over an iovec. The kernel reads only memory that each
        // vector has for its lifetime.
        let bytes = unsafe { libc::writev(fd.as_fd().as_raw_fd(), vectors.as_ptr().cast(), count) };
        result(bytes)
    })
}

/// The outcome of a system call that has just returned `bytes`.
fn result(bytes: isize) -> Result<usize, Errno> {
    usize::try_from(bytes)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn vectors_of_words_are_cut_to_the_words() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let words = [u64::from_le_bytes(*b"01234567"), u64::from_le_bytes(*b"89abcdef")];
        let words = words.map(Word::new);
        let vectors = [(0, 3), (12, 100), (16, 1), (usize::MAX, 1)];
        let vectors = vectors.map(|(offset, len)| IoVec::words(&words, offset, len));
        assert_eq!(writev(&writer, &vectors), Ok(7));
        let vectors = [(15, usize::MAX), (6, 4)];
        let mut vectors = vectors.map(|(offset, len)| IoVecMut::words(&words, offset, len));
        assert_eq!(readv(&reader, &mut vectors), Ok(5));
        let now = [0, 1].map(|i| words[i].load(Ordering::Relaxed).to_le_bytes());
        assert_eq!(now.concat(), b"01234512cdabcde0");
        let mut rest = [0; 4];
        assert_eq!(readv(&reader, &mut [IoVecMut::new(&mut rest)]), Ok(2));
        assert_eq!(&rest, b"ef\0\0");
    }

    #[test]
    fn the_system_calls_tell_their_errors() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        assert_eq!(writev(&reader, &[IoVec::new(b"x")]), Err(Errno::BADF));
        assert_eq!(readv(&writer, &mut [IoVecMut::EMPTY]), Err(Errno::BADF));
        assert_eq!(writev(&writer, &[IoVec::EMPTY; 1025]), Err(Errno::INVAL));
    }
}
