//! Interrupts that are levels.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::eventfd::EventFd;

use crate::routes::{Chip, Routes};
use crate::{Error, sys};

/// Two eventfds that make a level on a pin of KVM's I/O APIC (INTx): a write to the one asserts it,
/// and when the guest ends the interrupt, KVM takes it back and writes the other, whereupon the
/// device, if it has still something to say, writes the first again. No thread of the VMM is woken.
/// Any number may share a pin. Dropped: taken back.
#[derive(Debug)]
pub struct Level {
    routes: Arc<Routes>,
    pin: u32,
    assert: EventFd,
    ended: EventFd,
}

impl Level {
    /// One on `pin`, connected.
    ///
    /// # Errors
    /// [`Error::Missing`] if the I/O APIC is not the kernel's: the VMM's own I/O APIC has to do
    /// this then. [`Error::NoInterrupt`] if it has no such pin. No more descriptors.
    pub fn new(routes: Arc<Routes>, pin: u32) -> Result<Level, Error> {
        if routes.chip() != Chip::Kernel {
            return Err(Error::Missing("I/O APIC in the kernel, whose pins could be levels"));
        }
        if pin >= crate::routes::IOAPIC_PINS {
            return Err(Error::NoInterrupt(format!("pin {pin}")));
        }
        let event = || {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            eventfd(0, flags).map(sys::as_event).map_err(Error::system("eventfd"))
        };
        let level = Level { assert: event()?, ended: event()?, pin, routes };
        level
            .routes
            .vm()
            .register_irqfd_with_resample(&level.assert, &level.ended, pin)
            .map_err(Error::kvm("KVM_IRQFD with resample"))?;
        Ok(level)
    }

    /// What the device writes to assert it.
    pub fn assert(&self) -> BorrowedFd<'_> {
        sys::as_fd(&self.assert)
    }

    /// Tells the device that the interrupt has ended, though no guest has: for a VMM that resets
    /// KVM's I/O APIC, which forgets what was asserted then. A device that waits for the end would
    /// assert nothing any more.
    pub fn end(&self) {
        // A full counter says it already.
        let _ = self.ended.write(1);
    }

    /// Becomes readable when the guest has ended the interrupt (vfio-user: the eventfd of UNMASK).
    pub fn ended(&self) -> BorrowedFd<'_> {
        sys::as_fd(&self.ended)
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        // One that was never registered is refused here, which is as well.
        let _ = self.routes.vm().unregister_irqfd(&self.assert, self.pin);
    }
}
