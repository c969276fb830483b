// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The handler of SIGBUS.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::backing::Backing;
use crate::ranges;

/// The handler writes to this eventfd. Stored with `Release` before the handler is installed;
/// loaded with `Acquire`. -1: there is none.
static EVENT: AtomicI32 = AtomicI32::new(-1);

static INSTALLED: OnceLock<Result<OwnedFd, Errno>> = OnceLock::new();

/// Installs the handler, at the first call. It replaces that of Rust's runtime for stack overflows,
/// which raise SIGSEGV rather than SIGBUS on Linux.
pub(crate) fn install() -> Result<(), Errno> {
    let done = INSTALLED.get_or_init(|| {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        EVENT.store(std::os::fd::AsRawFd::as_raw_fd(&event), Ordering::Release);
        // SAFETY: all zeros are a valid sigaction without flags and with an empty mask; `on_sigbus`
        // has the signature that SA_SIGINFO asks for.
        let failed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction =
                on_sigbus as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) != 0
        };
        if failed { Err(Errno::INVAL) } else { Ok(event) }
    });
    done.as_ref().map(drop).map_err(|error| *error)
}

/// An eventfd that the handler writes whenever it has marked a [`Backing`](crate::Backing) as lost.
/// Nobody reads it: watch it edge-triggered, and look at each backing at every event.
///
/// # Errors
/// The process has no descriptor left, or the kernel takes no handler.
pub fn losses() -> Result<BorrowedFd<'static>, Errno> {
    install()?;
    match INSTALLED.get() {
        Some(Ok(event)) => Ok(event.as_fd()),
        _ => Err(Errno::INVAL),
    }
}

/// Handles SIGBUS. It may interrupt any code, so it only uses atomics and system calls.
extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    /// A page with a fault of the hardware. libc has no name for it.
    const BUS_MCEERR_AR: i32 = 4;
    // SAFETY: the kernel passes a valid siginfo. For these codes it has an address.
    let (code, at) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // SAFETY: the address of this thread's errno. What the interrupted code sees of it must not
    // change.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    let of_memory = [libc::BUS_ADRERR, libc::BUS_OBJERR, BUS_MCEERR_AR].contains(&code);
    if !of_memory || !replace(at) {
        // SAFETY: both calls are allowed in a handler. An instruction that faulted faults again
        // when this function returns, and that ends the program as if there were no handler. A
        // signal that somebody sent has to be sent anew; it comes when this function returns.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            if code <= 0 {
                libc::raise(signal);
            }
        }
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

/// Lays other memory over the part of a guarded range that has the address `at`, or over the whole
/// range.
fn replace(at: usize) -> bool {
    let Some(found) = ranges::find(at) else { return false };
    // SAFETY: the thread that faulted uses the range, so the range is still guarded, and its guard
    // keeps the backing.
    let backing = unsafe { &*found.backing };
    // Each part is a mapping of its own, and the kernel bounds those of a process. A part that is
    // the whole range splits nothing.
    let (part, whole) = (found.part, found.whole);
    let many = part != whole && !backing.may_split();
    let laid = match many {
        true => lay_private(whole) || lay_spare(part, backing),
        false => lay_spare(part, backing) || lay_private(whole),
    };
    if !laid {
        return false;
    }
    backing.lose();
    let one = 1_u64.to_ne_bytes();
    // SAFETY: the bytes are valid. Whether the write succeeds does not matter: at worst the owner
    // learns of the loss with the next one.
    unsafe { libc::write(EVENT.load(Ordering::Acquire), one.as_ptr().cast(), one.len()) };
    true
}

/// Lays the spare of `backing` over a part (address, bytes) of a guarded range.
fn lay_spare((base, len): (usize, usize), backing: &Backing) -> bool {
    let Some((spare, spare_len)) = backing.spare() else { return false };
    if spare_len < len {
        return false;
    }
    // A length of 0 makes a second mapping of the same shared memory. It replaces the part in one
    // step. The system call itself is used, because libc's function may do more.
    // SAFETY: the part is a mapping that its owner lets us replace (see `Guard::new`).
    let done = unsafe {
        libc::syscall(
            libc::SYS_mremap,
            spare.as_ptr(),
            0_usize,
            len,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            base,
        )
    };
    usize::try_from(done) == Ok(base)
}

/// Lays one mapping of zeros over a guarded range (address, bytes). It may replace many mappings by
/// one, and needs memory only where somebody writes.
fn lay_private((base, len): (usize, usize)) -> bool {
    let flags = libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    // SAFETY: the range is a mapping that its owner lets us replace (see `Guard::new`).
    let done = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            base,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0_usize,
        )
    };
    usize::try_from(done) == Ok(base)
}
