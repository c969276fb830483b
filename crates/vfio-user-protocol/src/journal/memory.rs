// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of a journal. One process writes it; its successor copies what it needs of it.
#![allow(unsafe_code)] // Maps shared memory, and gives the kernel addresses in it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate};
use rustix::io::{Errno, pread, pwrite, retry_on_intr};
use rustix::mm::{MapFlags, ProtFlags, mlock, mmap, munmap};

use super::fault;
use super::layout::{BUFFER_LEN, HEAD_LEN, Head, LEN, Line, MAGIC, NOTHING, VERSION, head, slot};

/// A mapped journal.
#[derive(Debug)]
pub(super) struct Memory {
    base: NonNull<u8>,
    file: OwnedFd,
}

// SAFETY: the address is that of a mapping of this value alone, which no thread has a right to.
unsafe impl Send for Memory {}

/// The message header of a call that is to be made, and what else the kernel is told.
pub(super) struct Call<'a> {
    pub(super) line: Line,
    /// The count of records, whose slot the call uses.
    pub(super) number: u64,
    /// Room for control data, or control data.
    pub(super) control: &'a mut [u8],
}

/// Makes the file of an empty journal. It never shrinks: so nobody who has it can take the memory
/// away from who maps it.
pub(super) fn create() -> Result<OwnedFd, Errno> {
    if size_of::<usize>() != 8 {
        return Err(Errno::OPNOTSUPP);
    }
    let file = rustix::fs::memfd_create(
        "vfio-user-journal",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    ftruncate(&file, LEN as u64)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let memory = Memory::map(file.try_clone().map_err(|_| Errno::MFILE)?)?;
    for line in [Line::Received, Line::Answered] {
        for number in [0, 1] {
            memory.set_u32(line.slot(number) + slot::TOOK, NOTHING);
        }
    }
    memory.set_u32(head::VERSION, VERSION);
    memory.set_u32(head::BUFFER_LEN, u32::try_from(BUFFER_LEN).map_err(|_| Errno::OVERFLOW)?);
    memory.set_u64(head::MAGIC, MAGIC);
    Ok(file)
}

/// Checks that `file`, which may be any, is memory of the size of a journal, and never shrinks.
///
/// # Errors
/// [`Errno::INVAL`]: it is not.
fn check(file: &OwnedFd) -> Result<(), Errno> {
    let sealed = fcntl_get_seals(file)?.contains(SealFlags::SHRINK);
    let is_one = sealed && fstat(file)?.st_size == LEN as i64 && size_of::<usize>() == 8;
    if is_one { Ok(()) } else { Err(Errno::INVAL) }
}

/// The journal of a former process. It is never mapped: whoever still has it may write to it.
pub(super) struct Former<'a>(&'a OwnedFd);

impl Former<'_> {
    /// `file` may be any file.
    ///
    /// # Errors
    /// [`Errno::INVAL`]: it is no memory of this size that cannot shrink.
    pub(super) fn new(file: &OwnedFd) -> Result<Former<'_>, Errno> {
        check(file)?;
        Ok(Former(file))
    }

    /// A copy of the head.
    pub(super) fn head(&self) -> Result<Head, Errno> {
        let mut copy = Box::new([0; HEAD_LEN]);
        self.copy(0, &mut copy[..])?;
        Ok(Head::new(copy))
    }

    /// A copy of `len` bytes of a buffer.
    pub(super) fn bytes(&self, at: usize, len: usize) -> Result<Vec<u8>, Errno> {
        let mut copy = vec![0; len];
        self.copy(at, &mut copy)?;
        Ok(copy)
    }

    /// Stores a word of the head, for whoever copies it later.
    pub(super) fn set_u32(&self, at: usize, value: u32) -> Result<(), Errno> {
        let stored = retry_on_intr(|| pwrite(self.0, &value.to_ne_bytes(), at as u64))?;
        if stored == size_of_val(&value) { Ok(()) } else { Err(Errno::INVAL) }
    }

    fn copy(&self, from: usize, into: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < into.len() {
            let at = (from + done) as u64;
            match retry_on_intr(|| pread(self.0, &mut into[done..], at))? {
                0 => return Err(Errno::INVAL),
                read => done += read,
            }
        }
        Ok(())
    }
}

impl Memory {
    /// Maps a journal, and locks its head in memory: a store of the kernel to it must not fail, not
    /// even in a process that is being killed. `file` may be any file.
    ///
    /// # Errors
    /// [`Errno::INVAL`]: it has another size, or may shrink. Otherwise the system refuses, for
    /// instance by `RLIMIT_MEMLOCK`.
    pub(super) fn map(file: OwnedFd) -> Result<Memory, Errno> {
        check(&file)?;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses an address that nobody uses.
        let base = unsafe { mmap(std::ptr::null_mut(), LEN, rights, MapFlags::SHARED, &file, 0)? };
        let base = NonNull::new(base.cast()).ok_or(Errno::FAULT)?;
        let memory = Memory { base, file };
        // SAFETY: the head is mapped.
        unsafe { mlock(memory.base.as_ptr().cast(), HEAD_LEN)? };
        Ok(memory)
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        assert!(at % 4 == 0 && at + 4 <= HEAD_LEN);
        // SAFETY: the word is mapped as long as this value lives, and aligned. Everybody who shares
        // it uses atomics, or is the kernel within a call of this process.
        unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(at).cast()) }
    }

    fn long(&self, at: usize) -> &AtomicU64 {
        assert!(at % 8 == 0 && at + 8 <= HEAD_LEN);
        // SAFETY: as in `word`.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(at).cast()) }
    }

    /// Stores a word of a slot that does not count yet, or of the head. Pairs with the copy of
    /// the successor, by way of [`count`](Self::count).
    pub(super) fn set_u32(&self, at: usize, value: u32) {
        fault::step();
        self.word(at).store(value, Ordering::Relaxed);
    }

    /// As [`set_u32`](Self::set_u32).
    pub(super) fn set_u64(&self, at: usize, value: u64) {
        fault::step();
        self.long(at).store(value, Ordering::Relaxed);
    }

    /// Makes the slot of `number` the one that counts. One store: before it, the successor sees the
    /// former slot, and afterwards this one. `Release`: no store before it, to the slot or to a
    /// buffer, is made after it. Pairs with the copy of the successor ([`Former`]), which the end
    /// of this process, or its message, comes before.
    pub(super) fn count(&self, line: Line, number: u64) {
        fault::step();
        self.long(line.count()).store(number, Ordering::Release);
        fault::step();
    }

    /// What the kernel has stored: the number of bytes, or [`NOTHING`].
    pub(super) fn took(&self, line: Line, number: u64) -> u32 {
        self.word(line.slot(number) + slot::TOOK).load(Ordering::Acquire)
    }

    /// What the kernel said of the last receipt.
    pub(super) fn said(&self, number: u64) -> u32 {
        self.word(Line::Received.slot(number) + slot::SAID).load(Ordering::Relaxed)
    }

    /// The address of `len` bytes of a buffer.
    fn range(&self, at: usize, len: usize) -> *mut u8 {
        assert!(at >= HEAD_LEN && len <= LEN && at <= LEN - len);
        // SAFETY: the range lies within the mapping.
        unsafe { self.base.as_ptr().add(at) }
    }

    /// Copies bytes into a buffer.
    pub(super) fn write(&self, at: usize, bytes: &[u8]) {
        fault::step();
        let to = self.range(at, bytes.len());
        // SAFETY: the range is mapped, and `bytes` are this process's own, elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Copies bytes out of a buffer.
    pub(super) fn read(&self, at: usize, into: &mut [u8]) {
        let from = self.range(at, into.len());
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    /// Prepares the call of a slot: `len` bytes of a buffer from `at` on.
    pub(super) fn prepare(&self, line: Line, number: u64, at: usize, len: usize) {
        let to = self.range(at, len);
        let slot = line.slot(number);
        assert!(slot + slot::LEN <= HEAD_LEN);
        fault::step();
        // SAFETY: the slot lies within the head, and both structures are aligned there.
        let part = unsafe { self.base.as_ptr().add(slot + slot::PART).cast::<libc::iovec>() };
        // SAFETY: likewise.
        let call = unsafe { self.base.as_ptr().add(slot + slot::CALL).cast::<libc::mmsghdr>() };
        // SAFETY: a structure of the C library of zeros is valid.
        let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        header.msg_hdr.msg_iov = part;
        header.msg_hdr.msg_iovlen = 1;
        header.msg_len = NOTHING;
        // SAFETY: both lie in the mapping, and only this process uses them now.
        unsafe {
            part.write(libc::iovec { iov_base: to.cast(), iov_len: len });
            call.write(header);
        }
        // `Relaxed`: `count` orders it.
        self.set_u32(slot + slot::TOOK, NOTHING);
    }

    /// Makes the call of a slot: receives or sends one message. Returns the number of bytes. The
    /// kernel stores it in the slot, too, before this process can be killed.
    pub(super) fn call(&self, socket: BorrowedFd<'_>, call: Call<'_>) -> Result<usize, Errno> {
        let slot = call.line.slot(call.number);
        // SAFETY: as in `prepare`.
        let header = unsafe { self.base.as_ptr().add(slot + slot::CALL).cast::<libc::mmsghdr>() };
        let len = call.control.len();
        let control = match call.control {
            [] => std::ptr::null_mut(),
            control => control.as_mut_ptr().cast(),
        };
        // SAFETY: the header is in the mapping.
        unsafe {
            (*header).msg_hdr.msg_control = control;
            (*header).msg_hdr.msg_controllen = len as _;
        }
        loop {
            fault::step();
            let fd = socket.as_raw_fd();
            // SAFETY: the header, its one part, and the control data are valid until the call
            // returns: `prepare` has checked the range, and `call` borrows the control data.
            let done = unsafe {
                match call.line {
                    Line::Received => {
                        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
                        libc::recvmmsg(fd, header, 1, flags as _, std::ptr::null_mut())
                    }
                    Line::Answered => {
                        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                        libc::sendmmsg(fd, header, 1, flags as _)
                    }
                }
            };
            let error = std::io::Error::last_os_error();
            fault::step();
            if done == 1 {
                return Ok(self.took(call.line, call.number) as usize);
            }
            match Errno::from_io_error(&error) {
                Some(Errno::INTR) => {}
                error => return Err(error.unwrap_or(Errno::IO)),
            }
        }
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is that of this value, and nobody has an address in it any more.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), LEN) };
    }
}
