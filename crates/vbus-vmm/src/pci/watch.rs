//! Notices that a server has gone, so that the guest need not find out by an access; and passes
//! INTx on, where the kernel does not.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::channel;
use std::sync::{Arc, Weak};

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::PciRoot;
use crate::seccomp::{self, Thread};

/// Wakes the watching thread.
pub(super) struct Watcher(Arc<OwnedFd>);

impl Watcher {
    pub(super) fn new() -> std::io::Result<Watcher> {
        Ok(Watcher(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Has it look again at what is plugged.
    pub(super) fn wake(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// Starts the thread, with a filter of system calls or without; it ends with the root.
pub(super) fn start(root: &Arc<PciRoot>, filter: bool) -> Result<()> {
    let (wake, root) = (root.watcher.0.clone(), Arc::downgrade(root));
    let (tell, told) = channel();
    std::thread::Builder::new().name("pci-watch".into()).spawn(move || {
        let ready = if filter { seccomp::apply(Thread::Watch) } else { Ok(()) };
        let failed = ready.is_err();
        let _ = tell.send(ready);
        while !failed && watch(&root, &wake) {}
    })?;
    told.recv().context("the thread that watches devices has ended at once")?
}

/// Waits until something happens. False: the root is gone.
fn watch(root: &Weak<PciRoot>, wake: &OwnedFd) -> bool {
    let functions: Vec<_> = match root.upgrade() {
        Some(root) => {
            root.slots.iter().filter_map(|slot| Some((slot.number, slot.occupant()?.0))).collect()
        }
        None => return false,
    };
    let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
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
    let _ = rustix::io::read(wake.as_fd(), &mut [0; 8]);
    sources.iter().for_each(|source| source.take());
    let Some(root) = root.upgrade() else { return false };
    for ((number, function), fd) in functions.iter().zip(&fds[1..]) {
        let slot = &root.slots[usize::from(*number) - 1];
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
