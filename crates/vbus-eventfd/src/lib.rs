// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Signals and reads eventfds that another process also holds, and never blocks.
//!
//! A peer can clear `O_NONBLOCK` on an eventfd that it shares with us, because the flag belongs to
//! the open file and not to our descriptor. It can then fill the counter. An ordinary `write` now
//! waits for as long as the peer likes, and so does an ordinary `read` of an empty counter. To set
//! the flag again before each call does not help: the peer can clear it in between.
//!
//! - [`Signaller`] adds 1 to a counter inside the kernel. That never blocks.
//! - [`take_signal`] and [`take_count`] read and clear a counter, and never block.
//! - [`PeerEventfd`] is an eventfd of a peer with both calls.
//!
//! ```
//! use rustix::event::{EventfdFlags, eventfd};
//! use rustix::fs::{OFlags, fcntl_setfl};
//! use vbus_eventfd::PeerEventfd;
//!
//! let peer = eventfd(0, EventfdFlags::CLOEXEC)?;
//! let ours = PeerEventfd::new(peer.try_clone()?)?;
//! rustix::io::write(&peer, &(u64::MAX - 1).to_ne_bytes())?; // The counter is full,
//! fcntl_setfl(&peer, OFlags::empty())?; // and the eventfd blocks.
//! ours.signal();
//! assert!(ours.take());
//! assert!(!ours.take());
//! # Ok::<(), std::io::Error>(())
//! ```

mod signaller;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

pub use signaller::{Signaller, take_count, take_signal};

/// An eventfd that a peer also holds. Nothing that the peer does with it makes a call here block.
#[derive(Debug)]
pub struct PeerEventfd {
    fd: OwnedFd,
    signaller: &'static Signaller,
}

impl PeerEventfd {
    /// Takes over an eventfd. Another kind of descriptor is never signalled.
    ///
    /// # Errors
    /// Those of [`Signaller::of_process`].
    pub fn new(fd: OwnedFd) -> io::Result<PeerEventfd> {
        Ok(PeerEventfd { fd, signaller: Signaller::of_process()? })
    }

    /// Adds 1 to the counter. A full counter stays full: its reader has a signal waiting already.
    pub fn signal(&self) {
        // It fails for a descriptor that is no eventfd, and if the kernel has no memory for the
        // operation for as long as `Signaller::signal` tries.
        let _ = self.signaller.signal(self.fd.as_fd());
    }

    /// Clears the counter. Returns whether it was above 0.
    pub fn take(&self) -> bool {
        take_signal(self.fd.as_fd())
    }

    /// Whether the counter is above 0.
    pub fn is_signalled(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        retry_on_intr(|| poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&now)))
            .is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for PeerEventfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
