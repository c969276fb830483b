// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One epoll descriptor that watches all sockets of a server.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

/// The most events that one call takes: more than a server has sockets.
const EVENTS: usize = 32;

/// A set of watched descriptors, each with a token.
pub(crate) struct Poller {
    epoll: OwnedFd,
    /// A signal interrupts this many calls.
    #[cfg(test)]
    pub(crate) interruptions: std::cell::Cell<u32>,
}

impl Poller {
    pub(crate) fn new() -> Result<Poller, Errno> {
        Ok(Poller {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            #[cfg(test)]
            interruptions: std::cell::Cell::default(),
        })
    }

    pub(crate) fn add(&self, fd: impl AsFd, token: u64, interest: EventFlags) -> Result<(), Errno> {
        epoll::add(&self.epoll, fd, EventData::new_u64(token), interest)
    }

    pub(crate) fn modify(
        &self,
        fd: impl AsFd,
        token: u64,
        interest: EventFlags,
    ) -> Result<(), Errno> {
        epoll::modify(&self.epoll, fd, EventData::new_u64(token), interest)
    }

    /// Watches a descriptor no more. It may stay open.
    pub(crate) fn remove(&self, fd: impl AsFd) {
        // Only one that is not watched is an error.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Returns the tokens of the descriptors that are ready now. If there are many, it returns some
    /// of them. It does not wait.
    ///
    /// It repeats a call that a signal interrupts. An event loop that watches the epoll descriptor
    /// may report each event only once. If this call missed an event, nobody might ever take it.
    pub(crate) fn ready(&self) -> Vec<u64> {
        loop {
            let mut space = [MaybeUninit::uninit(); EVENTS];
            match self.look(&mut space) {
                Ok(events) => return events.iter().map(|event| event.data.u64()).collect(),
                Err(Errno::INTR) => {}
                // Not possible: descriptor and buffer belong to this value.
                Err(error) => {
                    tracing::error!("epoll_wait: {error}");
                    return Vec::new();
                }
            }
        }
    }

    fn look<'a>(
        &self,
        space: &'a mut [MaybeUninit<Event>; EVENTS],
    ) -> Result<&'a mut [Event], Errno> {
        #[cfg(test)]
        if let Some(left) = self.interruptions.get().checked_sub(1) {
            self.interruptions.set(left);
            return Err(Errno::INTR);
        }
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&self.epoll, space, Some(&now)).map(|(events, _)| events)
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
