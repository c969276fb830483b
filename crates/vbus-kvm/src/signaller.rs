// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Signals eventfds that another process also holds.
//!
//! A peer can clear `O_NONBLOCK` on a shared eventfd and fill its counter. An ordinary `write`
//! would then block for as long as the peer likes. Linux has no flag for a single write that
//! prevents this (`RWF_NOWAIT` is not supported for eventfds). But an asynchronous operation
//! (`io_submit`) with `IOCB_FLAG_RESFD` signals an eventfd inside the kernel at its completion.
//! That signal never blocks, whatever the peer has done. The operation here is a read of no bytes,
//! which completes at once.
#![allow(unsafe_code, reason = "system calls that rustix lacks")]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;

use crate::Error;

/// The most operations that the kernel keeps at a time. Each is taken back right after it was
/// submitted, so this bounds the threads that signal at the same time.
const OPERATIONS: usize = 64;
/// How often a submission is tried if other threads have used up all operations.
const TRIES: u32 = 1000;

/// `IOCB_CMD_PREAD` and `IOCB_FLAG_RESFD` of linux/aio_abi.h.
const PREAD: u16 = 0;
const RESFD: u32 = 1;

/// `struct iocb` of linux/aio_abi.h, for a little-endian machine.
#[repr(C)]
#[derive(Default)]
struct Operation {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

/// `struct io_event` of linux/aio_abi.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Completion([u64; 4]);

/// Signals eventfds without ever blocking. Any number of threads may use it at the same time.
#[derive(Debug)]
pub struct Signaller {
    context: libc::c_ulong,
    /// An empty file, for reads of no bytes.
    file: OwnedFd,
}

impl Signaller {
    /// Sets the kernel's part up.
    ///
    /// # Errors
    /// The kernel has no asynchronous I/O, or no room for it (`/proc/sys/fs/aio-max-nr`).
    pub fn new() -> Result<Signaller, Error> {
        let file = memfd_create("signaller", MemfdFlags::CLOEXEC)
            .map_err(Error::system("memfd_create"))?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: The kernel writes the context to `context`, which is valid for the call.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, OPERATIONS, &raw mut context) };
        check(result).map_err(Error::system("io_setup (see /proc/sys/fs/aio-max-nr)"))?;
        Ok(Signaller { context, file })
    }

    /// Adds 1 to the counter of `eventfd`. If the counter is full, it stays full.
    ///
    /// # Errors
    /// [`Errno::INVAL`] or [`Errno::BADF`] if `eventfd` is no eventfd.
    pub fn signal(&self, eventfd: BorrowedFd<'_>) -> Result<(), Errno> {
        let descriptor = |fd: i32| u32::try_from(fd).unwrap_or(u32::MAX);
        let operation = Operation {
            opcode: PREAD,
            file: descriptor(self.file.as_raw_fd()),
            flags: RESFD,
            eventfd: descriptor(eventfd.as_raw_fd()),
            ..Operation::default()
        };
        let list = [&raw const operation];
        for _ in 0..TRIES {
            // SAFETY: The list has one operation, and both are valid for the call. The operation
            // has no buffer, and it is complete when the call returns, since a read of no bytes of
            // an empty file waits for nothing.
            let result =
                unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1_usize, list.as_ptr()) };
            self.take_completions();
            match check(result) {
                Err(Errno::AGAIN) => std::thread::yield_now(),
                other => return other,
            }
        }
        Err(Errno::AGAIN)
    }

    /// Takes completions back, so that there is room for further operations.
    fn take_completions(&self) {
        let mut completions = [Completion::default(); 4];
        // SAFETY: The array has room for as many completions as the call may write. A timeout is
        // not needed, since the call need not wait for any completion.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0_usize,
                completions.len(),
                completions.as_mut_ptr(),
                std::ptr::null_mut::<libc::timespec>(),
            )
        };
    }
}

impl Drop for Signaller {
    fn drop(&mut self) {
        // SAFETY: The context is this value's own, and is not used after this.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

/// Reads and clears the counter of an eventfd that a peer may have made blocking. Returns whether
/// it was above 0. The call never blocks.
pub fn take_signal(eventfd: BorrowedFd<'_>) -> bool {
    let mut counter = [0; 8];
    let mut buffers = [std::io::IoSliceMut::new(&mut counter)];
    // The offset of all ones stands for "no offset", as for a stream.
    let flags = rustix::io::ReadWriteFlags::NOWAIT;
    rustix::io::preadv2(eventfd, &mut buffers, u64::MAX, flags).is_ok()
}

fn check(result: libc::c_long) -> Result<(), Errno> {
    if result >= 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{OFlags, fcntl_setfl};

    use super::*;

    /// How long a test waits for a call that must not block.
    const BOUND: Duration = Duration::from_secs(60);

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
    }

    fn count(event: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(event, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    #[test]
    fn each_signal_counts_with_many_threads_too() {
        const THREADS: u64 = 100;
        const EACH: u64 = 200;
        let (signaller, event) = (Signaller::new().unwrap(), event());
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| (0..EACH).for_each(|_| signaller.signal(event.as_fd()).unwrap()));
            }
        });
        assert_eq!(count(&event), THREADS * EACH);
        assert!(signaller.signal(signaller.file.as_fd()).is_err(), "that is no eventfd");
    }

    #[test]
    fn a_peer_that_fills_the_counter_and_makes_it_blocking_stops_nobody() {
        let event = event();
        let full = u64::MAX - 1;
        rustix::io::write(&event, &full.to_ne_bytes()).unwrap();
        fcntl_setfl(&event, OFlags::empty()).unwrap();
        let (tell, told) = channel();
        std::thread::spawn(move || {
            Signaller::new().unwrap().signal(event.as_fd()).unwrap();
            let first = take_signal(event.as_fd());
            // The counter is 0 now, so an ordinary read would block.
            tell.send((first, take_signal(event.as_fd()))).unwrap();
        });
        assert_eq!(told.recv_timeout(BOUND), Ok((true, false)));
    }
}
