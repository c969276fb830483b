// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tells one waiter that a thread of the event loop has woken.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};

/// Set by the waiter, rung by the threads. While it is not set, ringing costs a load.
pub(crate) struct Alarm {
    set: AtomicBool,
    fd: OwnedFd,
}

impl Alarm {
    pub(crate) fn new() -> std::io::Result<Alarm> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Alarm { set: AtomicBool::new(false), fd })
    }

    /// For a thread that has stored that it is awake.
    pub(crate) fn ring(&self) {
        // Pairs with the fence in `set`: if this load does not see the alarm set, the waiter sees
        // that the thread is awake.
        fence(Ordering::SeqCst);
        if self.set.load(Ordering::Relaxed) && self.set.swap(false, Ordering::Relaxed) {
            // It fails only if the counter is full.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// Sets the alarm. Afterwards the waiter looks whether a thread is awake, and waits only if
    /// none is.
    pub(crate) fn set(&self) {
        let _ = rustix::io::read(&self.fd, &mut [0; 8]); // It was not rung: nothing to read.
        self.set.store(true, Ordering::Relaxed);
        // Pairs with the fence in `ring`.
        fence(Ordering::SeqCst);
    }

    /// Nobody waits.
    pub(crate) fn unset(&self) {
        self.set.store(false, Ordering::Relaxed);
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
