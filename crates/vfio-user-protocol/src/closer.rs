// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Closes descriptors of the peer.
//!
//! A close can wait for what the peer controls: for a file system that the peer made itself (FUSE),
//! or for the data of a socket that lingers (`SO_LINGER`). So a thread of its own does it, and
//! nobody waits for it. A server has such a thread for each connection that has something to close.
//! It starts with that, and may outlive the connection: the next client does not wait for it. While
//! many descriptors wait for it, the server does not read from the client that sent them. A client
//! has one such thread from its connection on: a thread that makes a call may not be able to start
//! another (seccomp).

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The number of descriptors that wait for their close, from which on no more are taken in.
const FULL: usize = 16;

/// How often a stream is read before it is closed.
const READS: u32 = 64;

/// Closes descriptors, in order. Clones are handles to the same thread.
#[derive(Clone, Default)]
pub struct Closer(Arc<Handles>);

/// All handles together. The thread has none.
#[derive(Default)]
struct Handles(Arc<Shared>);

/// What the handles and the thread share.
#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    /// Notified when a thread that stays has something to do.
    pushed: Condvar,
}

#[derive(Default)]
struct Waiting {
    /// What to close, and whether to read it first.
    fds: VecDeque<(OwnedFd, bool)>,
    /// The thread runs.
    running: bool,
    /// The thread is closing a descriptor.
    closing: bool,
    /// The thread waits for more when it has closed everything.
    stays: bool,
}

impl Waiting {
    /// The number of descriptors that are not closed yet.
    fn count(&self) -> usize {
        self.fds.len() + usize::from(self.closing)
    }
}

impl Closer {
    /// Nothing to close, and no thread.
    #[must_use]
    pub fn new() -> Closer {
        Closer::default()
    }

    /// As [`new`](Self::new), with a thread that runs until the last handle is dropped. So nothing
    /// starts a thread later.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn started() -> io::Result<Closer> {
        let closer = Closer::new();
        let mut waiting = closer.lock();
        closer.start(&mut waiting)?;
        waiting.stays = true;
        drop(waiting);
        Ok(closer)
    }

    /// Closes `fd` soon. It does not wait.
    pub fn close(&self, fd: OwnedFd) {
        self.push(fd, false);
    }

    /// Closes descriptors that may be of anything, on a thread of their own. It does not wait.
    pub fn let_go(fds: Vec<OwnedFd>) {
        let closer = Closer::new();
        fds.into_iter().for_each(|fd| closer.close(fd));
    }

    /// As [`close`](Self::close), after what the peer has sent was read: so the peer gets the end
    /// of the stream, and no error. For a non-blocking socket.
    pub(crate) fn close_stream(&self, socket: OwnedFd) {
        self.push(socket, true);
    }

    /// As [`close`](Self::close), if nobody else has the descriptor. If two threads have it, and
    /// both call this, it is closed.
    pub fn close_last(&self, fd: Arc<OwnedFd>) {
        if let Some(fd) = Arc::into_inner(fd) {
            self.close(fd);
        }
    }

    fn push(&self, fd: OwnedFd, read: bool) {
        let mut waiting = self.lock();
        waiting.fds.push_back((fd, read));
        if waiting.running {
            self.0.0.pushed.notify_one();
        } else {
            // If there is no thread to be had, the next close and `is_full` try again.
            let _ = self.start(&mut waiting);
        }
    }

    fn start(&self, waiting: &mut Waiting) -> io::Result<()> {
        let shared = self.0.0.clone();
        let thread = std::thread::Builder::new().name("close".into());
        thread.spawn(move || shared.run())?;
        waiting.running = true;
        Ok(())
    }

    /// The number of descriptors that are not closed yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.lock().count()
    }

    /// Whether so many descriptors wait that their owner must not get more.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.look() >= FULL
    }

    /// Whether a descriptor is not closed yet.
    #[must_use]
    pub fn is_at_work(&self) -> bool {
        self.look() > 0
    }

    /// As [`waiting`](Self::waiting). If descriptors wait because there was no thread to be had,
    /// this tries again to start it.
    fn look(&self) -> usize {
        let mut waiting = self.lock();
        if !waiting.running && !waiting.fds.is_empty() {
            let _ = self.start(&mut waiting);
        }
        waiting.count()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.0.lock()
    }
}

impl Shared {
    fn run(&self) {
        loop {
            let mut waiting = self.lock();
            waiting.closing = false;
            while waiting.fds.is_empty() && waiting.stays {
                waiting = self.pushed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
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
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Handles {
    fn drop(&mut self) {
        self.0.lock().stays = false;
        self.0.pushed.notify_one();
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
    pub fn list(&mut self) -> &mut Vec<OwnedFd> {
        &mut self.fds
    }

    /// All of them, and none remain here.
    #[must_use]
    pub fn take(&mut self) -> PeerFds {
        PeerFds { fds: std::mem::take(&mut self.fds), closer: self.closer.clone() }
    }
}

impl Drop for PeerFds {
    fn drop(&mut self) {
        self.fds.drain(..).for_each(|fd| self.closer.close(fd));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_closer_that_got_no_thread_tries_again() {
        let closer = Closer::new();
        let (mut end, fd) = UnixStream::pair().unwrap();
        // As if the system had refused a thread, and nothing came after it.
        closer.lock().fds.extend((0..FULL).map(|_| (fd.try_clone().unwrap().into(), false)));
        drop(fd);
        assert!(!closer.lock().running);
        let _ = closer.is_full();
        assert_eq!(end.read(&mut [0]).unwrap(), 0, "all are closed");
    }

    #[test]
    fn a_thread_that_stays_closes_what_comes_and_ends_with_the_last_handle() {
        let closer = Closer::started().unwrap();
        for _ in 0..3 {
            let (mut end, fd) = UnixStream::pair().unwrap();
            PeerFds { fds: vec![fd.into()], closer: closer.clone() };
            assert_eq!(end.read(&mut [0]).unwrap(), 0);
            assert!(closer.lock().running, "no other thread has to start");
        }
        let shared = Arc::downgrade(&closer.0.0);
        let (mut end, fd) = UnixStream::pair().unwrap();
        closer.close(fd.into());
        drop(closer);
        assert_eq!(end.read(&mut [0]).unwrap(), 0, "what waits is closed first");
        while shared.strong_count() > 0 {
            std::thread::yield_now();
        }
    }
}
