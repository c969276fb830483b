// SPDX-License-Identifier: Apache-2.0 OR MIT
//! INTx in the kernel: a level-triggered interrupt on a pin, by eventfds.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::eventfd::EventFd;

use crate::routes::{IrqChip, Routes};
use crate::{Error, sys};

/// Two eventfds that drive a level-triggered interrupt on a pin of KVM's I/O APIC (INTx).
///
/// The device writes the *assert* eventfd, and KVM raises the pin. When the guest ends the
/// interrupt, KVM lowers the pin and writes the *ended* eventfd. A device that still has a reason
/// to interrupt then writes *assert* again. No thread of the VMM is woken. Several devices may
/// share a pin. Dropping this value lowers the pin and disconnects the eventfds.
#[derive(Debug)]
pub struct IntxIrqfd {
    routes: Arc<Routes>,
    pin: u32,
    assert: EventFd,
    ended: EventFd,
}

impl IntxIrqfd {
    /// Makes both eventfds and connects them to `pin`.
    ///
    /// # Errors
    /// [`Error::Missing`] if the I/O APIC is not the kernel's; the VMM's own I/O APIC must then
    /// handle INTx. [`Error::NoInterrupt`] if the I/O APIC has no such pin. [`Error::System`] if
    /// the process has no more descriptors, or if KVM refuses.
    pub fn new(routes: Arc<Routes>, pin: u32) -> Result<IntxIrqfd, Error> {
        if routes.irqchip() != IrqChip::Kernel {
            return Err(Error::Missing("I/O APIC in the kernel, which INTx by eventfds needs"));
        }
        if pin >= crate::routes::IOAPIC_PINS {
            return Err(Error::NoInterrupt(format!("pin {pin}")));
        }
        let event = || {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            eventfd(0, flags).map(sys::as_event).map_err(Error::system("eventfd"))
        };
        let irqfd = IntxIrqfd { assert: event()?, ended: event()?, pin, routes };
        irqfd
            .routes
            .vm()
            .register_irqfd_with_resample(&irqfd.assert, &irqfd.ended, pin)
            .map_err(Error::kvm("KVM_IRQFD with resample"))?;
        Ok(irqfd)
    }

    /// The eventfd that the device writes to assert the interrupt.
    pub fn assert(&self) -> BorrowedFd<'_> {
        sys::as_fd(&self.assert)
    }

    /// The eventfd that becomes readable when the guest has ended the interrupt (vfio-user: the
    /// eventfd of the action UNMASK).
    pub fn ended(&self) -> BorrowedFd<'_> {
        sys::as_fd(&self.ended)
    }

    /// Tells the device that the interrupt has ended although no guest has ended it.
    ///
    /// A VMM calls this before it resets KVM's I/O APIC, which forgets an asserted interrupt. A
    /// device that went on waiting for the end would assert nothing again.
    pub fn end(&self) {
        // The device may have made the eventfd blocking. This call does not block. It fails only
        // for something that is no eventfd.
        let _ = self.routes.signaller().signal(self.ended());
    }
}

impl Drop for IntxIrqfd {
    fn drop(&mut self) {
        // KVM refuses this if registration failed, which does no harm.
        let _ = self.routes.vm().unregister_irqfd(&self.assert, self.pin);
    }
}
