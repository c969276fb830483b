//! Interrupts that are messages.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vmm_sys_util::eventfd::EventFd;

use crate::routes::{Route, Routes};
use crate::{Error, sys};

/// An eventfd, each write to which is an interrupt of its route: MSI, one vector of MSI-X, or a
/// synthetic interrupt. No thread is woken for it. Dropped: nothing more comes, and its number is
/// free.
///
/// It begins masked. While it is masked the eventfd keeps what is written to it, and unmasking
/// sends it, as one interrupt: just what MSI-X wants of its pending bits.
#[derive(Debug)]
pub struct Message {
    routes: Arc<Routes>,
    gsi: u32,
    eventfd: EventFd,
    unmasked: bool,
}

impl Message {
    /// One with an eventfd of its own, masked and without a route.
    ///
    /// # Errors
    /// No more routes or descriptors.
    pub fn new(routes: Arc<Routes>) -> Result<Message, Error> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(Error::system("eventfd"))?;
        Message::with_eventfd(routes, eventfd)
    }

    /// One that comes from `eventfd`, which should be non-blocking and must not be the eventfd of
    /// another interrupt of this virtual machine.
    ///
    /// # Errors
    /// No more routes.
    pub fn with_eventfd(routes: Arc<Routes>, eventfd: OwnedFd) -> Result<Message, Error> {
        let gsi = routes.alloc()?;
        Ok(Message { routes, gsi, eventfd: sys::as_event(eventfd), unmasked: false })
    }

    /// What the device writes to.
    pub fn eventfd(&self) -> BorrowedFd<'_> {
        sys::as_fd(&self.eventfd)
    }

    /// Gives it a route, masked or not. Not one event is lost or doubled: each takes the route
    /// before or this one.
    ///
    /// # Errors
    /// As [`Routes::set`]; the route is then the one before.
    pub fn set(&mut self, route: Route) -> Result<(), Error> {
        self.routes.set(self.gsi, Some(route))
    }

    /// The route.
    pub fn route(&self) -> Option<Route> {
        self.routes.get(self.gsi)
    }

    /// Lets interrupts come, from those on that are pending.
    ///
    /// # Errors
    /// [`Error::NoInterrupt`] without a route, and what KVM says: it is masked still.
    pub fn unmask(&mut self) -> Result<(), Error> {
        if self.unmasked {
            return Ok(());
        }
        if self.route().is_none() {
            return Err(Error::NoInterrupt("a message without a route".into()));
        }
        self.routes
            .vm()
            .register_irqfd(&self.eventfd, self.gsi)
            .map_err(Error::kvm("KVM_IRQFD"))?;
        self.unmasked = true;
        Ok(())
    }

    /// Keeps interrupts back. None comes any more when this returns.
    ///
    /// # Errors
    /// What KVM says: it is not masked.
    pub fn mask(&mut self) -> Result<(), Error> {
        if self.unmasked {
            self.routes
                .vm()
                .unregister_irqfd(&self.eventfd, self.gsi)
                .map_err(Error::kvm("KVM_IRQFD"))?;
            self.unmasked = false;
        }
        Ok(())
    }

    /// Whether it is masked.
    pub fn is_masked(&self) -> bool {
        !self.unmasked
    }

    /// Whether an interrupt waits for being unmasked (MSI-X: its pending bit).
    pub fn is_pending(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.eventfd(), PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        !self.unmasked && poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Drops what is pending, as a reset does.
    pub fn forget(&mut self) {
        if !self.unmasked {
            let _ = rustix::io::read(self.eventfd(), &mut [0; 8]);
        }
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        if self.mask().is_ok() {
            self.routes.free(self.gsi);
        }
    }
}

impl AsFd for Message {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd()
    }
}
