// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A signal that never blocks.
//!
//! Linux has no flag for a single write to an eventfd that prevents waiting: `RWF_NOWAIT` is not
//! supported there. But an asynchronous operation (`io_submit`) with `IOCB_FLAG_RESFD` adds 1 to an
//! eventfd inside the kernel when it completes. That addition never waits, and a full counter stays
//! full. The operation here is a poll of an empty file, which is ready at once, so the operation
//! completes within the call.
//!
//! Measured on one machine (Linux 6.18): 0.44 us a signal, against 0.18 us for an ordinary write
//! and 0.11 us for the cheapest system call. Two choices make it that cheap. A read of no bytes
//! instead of the poll costs 0.07 to 0.12 us more. A second call that takes the completion back
//! (`io_getevents`) costs 0.25 us more, so [`Signaller`] takes completions back in the ring that
//! the kernel shares with the process.
#![allow(unsafe_code, reason = "system calls that rustix lacks, and a ring shared with the kernel")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;

/// The most operations that the kernel keeps at a time. Each is taken back right after it was
/// submitted, so this bounds the threads that signal at the same time.
const OPERATIONS: usize = 64;
/// How often a submission is tried if other threads have used up all operations.
const TRIES: u32 = 1000;

/// `IOCB_CMD_POLL` and `IOCB_FLAG_RESFD` of linux/aio_abi.h.
const POLL: u16 = 5;
const RESFD: u32 = 1;
/// `POLLIN` and `POLLOUT`. An empty file is always ready for both.
const READY: u64 = 1 | 4;

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

/// The head of `struct aio_ring`, which the kernel maps into the process at the context's address.
/// Programs have relied on this layout since 2002; `magic` tells whether it is this one.
#[repr(C)]
struct Ring {
    id: u32,
    entries: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
    compatible: u32,
    incompatible: u32,
}

const RING_MAGIC: u32 = 0xa10a_10a1;

/// `struct io_event` of linux/aio_abi.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Completion([u64; 4]);

/// Signals eventfds without ever blocking. Any number of threads may use it at the same time.
#[derive(Debug)]
pub struct Signaller {
    /// `aio_context_t`, an unsigned long: the address of the ring.
    context: usize,
    /// Whether the kernel's ring has the layout of [`Ring`].
    ring: bool,
    /// An empty file, to poll.
    file: OwnedFd,
}

impl Signaller {
    /// Sets the kernel's part up, in some 30 us.
    ///
    /// # Errors
    /// The kernel has no asynchronous I/O (`CONFIG_AIO`), or no room for it: the sysctl
    /// `fs.aio-max-nr`, less the operations of all programs (`fs.aio-nr`), must leave 64.
    pub fn new() -> io::Result<Signaller> {
        let file = memfd_create("signaller", MemfdFlags::CLOEXEC)?;
        let mut context = 0_usize;
        // SAFETY: The kernel writes the context to `context`, which is valid for the call.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, OPERATIONS, &raw mut context) };
        check(result).map_err(|errno| {
            let error = io::Error::from(errno);
            let why = match errno {
                Errno::AGAIN => "; raise the sysctl fs.aio-max-nr",
                Errno::NOSYS => "; the kernel must have CONFIG_AIO",
                _ => "",
            };
            io::Error::new(error.kind(), format!("asynchronous I/O (io_setup): {error}{why}"))
        })?;
        let mut signaller = Signaller { context, ring: false, file };
        let ring = signaller.ring();
        signaller.ring = ring.magic == RING_MAGIC && ring.incompatible == 0;
        Ok(signaller)
    }

    /// The signaller that all parts of the process share. The first call makes it. A process that
    /// gives up rights must call this before.
    ///
    /// # Errors
    /// Those of [`Signaller::new`]. A later call tries again.
    pub fn of_process() -> io::Result<&'static Signaller> {
        static SIGNALLER: OnceLock<Signaller> = OnceLock::new();
        static MAKING: Mutex<()> = Mutex::new(());
        if let Some(signaller) = SIGNALLER.get() {
            return Ok(signaller);
        }
        let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(signaller) = SIGNALLER.get() {
            return Ok(signaller);
        }
        let signaller = Signaller::new()?;
        Ok(SIGNALLER.get_or_init(|| signaller))
    }

    /// Adds 1 to the counter of `eventfd`. If the counter is full, it stays full.
    ///
    /// # Errors
    /// [`Errno::INVAL`] or [`Errno::BADF`] if `eventfd` is no eventfd.
    pub fn signal(&self, eventfd: BorrowedFd<'_>) -> Result<(), Errno> {
        let descriptor = |fd: i32| u32::try_from(fd).unwrap_or(u32::MAX);
        let operation = Operation {
            opcode: POLL,
            file: descriptor(self.file.as_raw_fd()),
            buffer: READY,
            flags: RESFD,
            eventfd: descriptor(eventfd.as_raw_fd()),
            ..Operation::default()
        };
        let list = [&raw const operation];
        for _ in 0..TRIES {
            // SAFETY: The list has one operation, and both are valid for the call. The operation
            // has no buffer, and it is complete when the call returns, since the file is ready.
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

    fn ring(&self) -> &Ring {
        // SAFETY: The kernel has mapped the ring at the context's address, page-aligned, readable
        // and writable, until io_destroy, which only `drop` calls. The kernel changes only `head`
        // and `tail` after io_setup.
        unsafe { &*std::ptr::with_exposed_provenance::<Ring>(self.context) }
    }

    /// Takes completions back, so that there is room for further operations.
    fn take_completions(&self) {
        if self.ring {
            // Nobody reads the completions, so these accesses order nothing and pair with none. Of
            // two threads the later may store the older tail: those completions are then taken back
            // with the next signal.
            let ring = self.ring();
            ring.head.store(ring.tail.load(Ordering::Relaxed), Ordering::Relaxed);
            return;
        }
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
/// it was above 0. The call never blocks. Kernels before 5.9 refuse it; it then returns false.
pub fn take_signal(eventfd: BorrowedFd<'_>) -> bool {
    take_count(eventfd) > 0
}

/// As [`take_signal`]. Returns the counter before the call.
pub fn take_count(eventfd: BorrowedFd<'_>) -> u64 {
    let mut counter = [0; 8];
    let mut buffers = [io::IoSliceMut::new(&mut counter)];
    // The offset of all ones stands for "no offset", as for a stream.
    let flags = rustix::io::ReadWriteFlags::NOWAIT;
    let read = rustix::io::preadv2(eventfd, &mut buffers, u64::MAX, flags);
    read.map_or(0, |_| u64::from_ne_bytes(counter))
}

fn check(result: libc::c_long) -> Result<(), Errno> {
    if result >= 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
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
        let (mut signaller, event) = (Signaller::new().unwrap(), event());
        let each_counts = |signaller: &Signaller| {
            std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    let signal = || signaller.signal(event.as_fd()).unwrap();
                    scope.spawn(move || (0..EACH).for_each(|_| signal()));
                }
            });
            assert_eq!(count(&event), THREADS * EACH);
        };
        each_counts(&signaller);
        signaller.ring = false;
        each_counts(&signaller);
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
