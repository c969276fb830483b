// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Closes descriptors of the peer.
//!
//! A close can wait for what the peer controls: for a file system that the peer made itself (FUSE),
//! or for the data of a socket that lingers (`SO_LINGER`). So a thread of its own does it, which
//! starts when there is something to close, and nobody waits for it. A server has one such thread
//! at most. While many descriptors wait for it, the server does not read from its client.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The number of descriptors that wait for their close, from which on no more are taken in.
const FULL: usize = 64;

/// How often a stream is read before it is closed.
const READS: u32 = 64;

/// Closes descriptors, in order. Clones are handles to the same thread.
#[derive(Clone, Default)]
pub struct Closer(Arc<Mutex<Waiting>>);

#[derive(Default)]
struct Waiting {
    /// What to close, and whether to read it first.
    fds: VecDeque<(OwnedFd, bool)>,
    /// The thread runs.
    running: bool,
    /// The thread is closing a descriptor.
    closing: bool,
}

impl Closer {
    /// Nothing to close, and no thread.
    #[must_use]
    pub fn new() -> Closer {
        Closer::default()
    }

    /// Closes `fd` soon. It does not wait.
    pub fn close(&self, fd: OwnedFd) {
        self.push(fd, false);
    }

    /// As [`close`](Self::close), after what the peer has sent was read: so the peer gets the end
    /// of the stream, and no error. For a non-blocking socket.
    pub(crate) fn close_stream(&self, socket: OwnedFd) {
        self.push(socket, true);
    }

    /// As [`close`](Self::close), if nobody else has the descriptor. If two threads have it, and
    /// both call this, it is closed.
    pub(crate) fn close_last(&self, fd: Arc<OwnedFd>) {
        if let Some(fd) = Arc::into_inner(fd) {
            self.close(fd);
        }
    }

    fn push(&self, fd: OwnedFd, read: bool) {
        let mut waiting = self.lock();
        waiting.fds.push_back((fd, read));
        if !waiting.running {
            let closer = self.clone();
            let thread = std::thread::Builder::new().name("close".into());
            // If there is no thread to be had, the next close tries again.
            waiting.running = thread.spawn(move || closer.run()).is_ok();
        }
    }

    /// The number of descriptors that are not closed yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        let waiting = self.lock();
        waiting.fds.len() + usize::from(waiting.closing)
    }

    /// Whether so many descriptors wait that their owner must not get more.
    pub(crate) fn is_full(&self) -> bool {
        self.waiting() >= FULL
    }

    fn run(&self) {
        loop {
            let mut waiting = self.lock();
            waiting.closing = false;
            let Some((fd, read)) = waiting.fds.pop_front() else {
                waiting.running = false;
                return;
            };
            waiting.closing = true;
            drop(waiting);
            if read {
                // A peer that sends on and on is not read for ever.
                for _ in 0..READS {
                    if !rustix::io::read(&fd, &mut [0; 4096]).is_ok_and(|bytes| bytes > 0) {
                        break;
                    }
                }
            }
            drop(fd);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Closer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Closer").field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}

/// Descriptors that came from the peer. They may be of anything. Dropping this lets a [`Closer`]
/// close them.
#[derive(Debug, Default)]
pub struct PeerFds {
    fds: Vec<OwnedFd>,
    closer: Closer,
}

impl PeerFds {
    /// None yet. `closer` will close those that are added.
    #[must_use]
    pub fn new(closer: Closer) -> PeerFds {
        PeerFds { fds: Vec::new(), closer }
    }

    /// The descriptors.
    #[must_use]
    pub fn as_slice(&self) -> &[OwnedFd] {
        &self.fds
    }

    /// Takes them out, if closing them cannot wait: eventfds, for instance.
    #[must_use]
    pub fn into_harmless(mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }

    /// Where new ones are appended.
    pub(crate) fn list(&mut self) -> &mut Vec<OwnedFd> {
        &mut self.fds
    }

    /// All of them, and none remain here.
    pub(crate) fn take(&mut self) -> PeerFds {
        PeerFds { fds: std::mem::take(&mut self.fds), closer: self.closer.clone() }
    }
}

impl Drop for PeerFds {
    fn drop(&mut self) {
        self.fds.drain(..).for_each(|fd| self.closer.close(fd));
    }
}
