// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that notices when a server has gone, so that the guest need not find out by an
//! access. It also passes INTx on if the I/O APIC is in this process.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Weak};

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::hierarchy::Hierarchy;
use crate::seccomp::{self, Thread};

/// A handle of the thread. Dropping it ends the thread.
pub(super) struct Watcher(Arc<Request>);

/// What the handle asks of the thread.
struct Request {
    /// Look again.
    wake: OwnedFd,
    /// End.
    end: AtomicBool,
}

impl Watcher {
    /// Starts the thread, with a filter of system calls or without.
    pub(super) fn start(hierarchy: &Arc<Hierarchy>, filter: bool) -> Result<Watcher> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let request = Arc::new(Request { wake, end: AtomicBool::new(false) });
        let watcher = Watcher(request.clone());
        let hierarchy = Arc::downgrade(hierarchy);
        let (tell, told) = channel();
        std::thread::Builder::new().name("pci-watch".into()).spawn(move || {
            let ready = if filter { seccomp::apply(Thread::Watch) } else { Ok(()) };
            let failed = ready.is_err();
            let _ = tell.send(ready);
            while !failed && watch(&hierarchy, &request) {}
        })?;
        told.recv().context("the thread that watches devices has ended at once")??;
        Ok(watcher)
    }

    /// Makes the thread look again at the devices that are plugged.
    pub(super) fn wake(&self) {
        // The count of this process's own eventfd is never full.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        // Pairs with the load in `watch`.
        self.0.end.store(true, Ordering::Release);
        self.wake();
    }
}

/// Waits until something happens, and handles it. Returns false if the thread must end.
fn watch(hierarchy: &Weak<Hierarchy>, request: &Request) -> bool {
    // Pairs with the store in `Watcher::drop`.
    if request.end.load(Ordering::Acquire) {
        return false;
    }
    let functions: Vec<_> = match hierarchy.upgrade() {
        Some(hierarchy) => hierarchy
            .slots
            .iter()
            .filter_map(|slot| Some((slot.number, slot.occupant()?.0)))
            .collect(),
        None => return false,
    };
    let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    let mut fds = vec![PollFd::new(&request.wake, PollFlags::IN)];
    fds.extend(
        functions
            .iter()
            .map(|(_, function)| PollFd::from_borrowed_fd(function.connection(), PollFlags::RDHUP)),
    );
    let sources: Vec<_> = functions.iter().filter_map(|(_, function)| function.intx()).collect();
    fds.extend(
        sources.iter().map(|source| PollFd::from_borrowed_fd(source.assert(), PollFlags::IN)),
    );
    if poll(&mut fds, None).is_err() {
        return true;
    }
    let _ = rustix::io::read(request.wake.as_fd(), &mut [0; 8]);
    sources.iter().for_each(|source| source.take());
    let Some(hierarchy) = hierarchy.upgrade() else { return false };
    for ((number, function), fd) in functions.iter().zip(&fds[1..]) {
        let slot = &hierarchy.slots[usize::from(*number) - 1];
        if fd.revents().intersects(ended) && slot.vanish(function) {
            tracing::warn!(
                "{}: its server at {} has gone; slot {number} is empty",
                function.name,
                function.socket.display()
            );
        }
    }
    true
}
