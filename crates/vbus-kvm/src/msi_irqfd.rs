// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A message-signalled interrupt by an eventfd.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vmm_sys_util::eventfd::EventFd;

use crate::routes::{Route, Routes};
use crate::{Error, sys, take_signal};

/// An eventfd that raises the interrupt of its route with each write: MSI, one vector of MSI-X, or
/// a synthetic interrupt. KVM handles the write; no thread is woken.
///
/// The interrupt is masked at first. While it is masked, the eventfd keeps what was written to it.
/// Unmasking sends that as one interrupt, as MSI-X demands of its pending bits. Dropping this value
/// stops the interrupt and frees its number.
#[derive(Debug)]
pub struct MsiIrqfd {
    routes: Arc<Routes>,
    gsi: u32,
    eventfd: EventFd,
    unmasked: bool,
}

impl MsiIrqfd {
    /// Makes an interrupt with a new eventfd. It is masked and has no route.
    ///
    /// # Errors
    /// [`Error::Routes`] or [`Error::System`] if there are no more routes or descriptors.
    pub fn new(routes: Arc<Routes>) -> Result<MsiIrqfd, Error> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(Error::system("eventfd"))?;
        MsiIrqfd::with_eventfd(routes, eventfd)
    }

    /// Makes an interrupt from `eventfd`, which should be non-blocking. It must not be the eventfd
    /// of another interrupt of this virtual machine.
    ///
    /// # Errors
    /// [`Error::Routes`] if there are no more routes.
    pub fn with_eventfd(routes: Arc<Routes>, eventfd: OwnedFd) -> Result<MsiIrqfd, Error> {
        let gsi = routes.alloc()?;
        Ok(MsiIrqfd { routes, gsi, eventfd: sys::as_event(eventfd), unmasked: false })
    }

    /// The eventfd that the device writes.
    pub fn eventfd(&self) -> BorrowedFd<'_> {
        sys::as_fd(&self.eventfd)
    }

    /// Sets the route. The interrupt may be masked or not. No event is lost or doubled: each one
    /// takes either the former route or this one.
    ///
    /// # Errors
    /// As [`Routes::set`]. The former route then remains.
    pub fn set(&mut self, route: Route) -> Result<(), Error> {
        self.routes.set(self.gsi, Some(route))
    }

    /// The route.
    pub fn route(&self) -> Option<Route> {
        self.routes.get(self.gsi)
    }

    /// Unmasks the interrupt. A pending one is sent at once.
    ///
    /// # Errors
    /// [`Error::NoInterrupt`] if it has no route. [`Error::System`] if KVM refuses. It is still
    /// masked then.
    pub fn unmask(&mut self) -> Result<(), Error> {
        if self.unmasked {
            return Ok(());
        }
        if self.route().is_none() {
            return Err(Error::NoInterrupt("it has no route".into()));
        }
        self.routes
            .vm()
            .register_irqfd(&self.eventfd, self.gsi)
            .map_err(Error::kvm("KVM_IRQFD"))?;
        self.unmasked = true;
        Ok(())
    }

    /// Masks the interrupt. After this returns, KVM raises none until it is unmasked.
    ///
    /// # Errors
    /// [`Error::System`] if KVM refuses. It is not masked then.
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

    /// Whether the interrupt is masked.
    pub fn is_masked(&self) -> bool {
        !self.unmasked
    }

    /// Whether the interrupt is masked and was signalled since (MSI-X: its pending bit).
    pub fn is_pending(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.eventfd(), PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        !self.unmasked && poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Drops a pending interrupt, as a reset does.
    pub fn forget(&mut self) {
        if !self.unmasked {
            take_signal(self.eventfd());
        }
    }
}

impl Drop for MsiIrqfd {
    fn drop(&mut self) {
        if self.mask().is_ok() {
            self.routes.free(self.gsi);
        }
    }
}

impl AsFd for MsiIrqfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd()
    }
}
