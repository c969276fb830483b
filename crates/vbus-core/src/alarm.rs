// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tells one waiter that a thread of the event loop has woken.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use crate::alarm_flag::AlarmFlag;

/// Set by the waiter, rung by the threads. While it is not set, ringing costs a fence and a load.
pub(crate) struct Alarm {
    flag: AlarmFlag,
    fd: OwnedFd,
}

impl Alarm {
    pub(crate) fn new() -> std::io::Result<Alarm> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Alarm { flag: AlarmFlag::new(), fd })
    }

    /// For a thread that has stored that it is awake.
    pub(crate) fn ring(&self) {
        if self.flag.ring() {
            // It fails only if the counter is full.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// Sets the alarm. Afterwards the waiter looks whether a thread is awake, and waits only if
    /// none is.
    pub(crate) fn set(&self) {
        let _ = rustix::io::read(&self.fd, &mut [0; 8]); // It was not rung: nothing to read.
        self.flag.set();
    }

    /// Nobody waits. The descriptor becomes unreadable.
    pub(crate) fn unset(&self) {
        self.flag.unset();
        let _ = rustix::io::read(&self.fd, &mut [0; 8]); // It was not rung: nothing to read.
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
