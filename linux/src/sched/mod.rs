// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The scheduling class of virtual CPUs (spec/sched.md): the driver of the class `sched`.
//!
//! While the device is open, a hook in Linux's scheduler posts the class and priority of what a CPU
//! runs, at the switch. There is no hook while there is no device.
#![allow(unsafe_code, reason = "interrupts refer to what they are kept with")]

mod ffi;
mod hook;
mod slot;

use core::ptr::NonNull;

use vbus_driver::sched::Cpus;
use vbus_driver::{Error, Events};

use crate::connection::{BUDGET, Connection};
use crate::device::{Class, Device, report};
use crate::hal::KernelHal;
use crate::interrupt::Interrupt;
use crate::kernel::lock::Mutex;
use crate::kernel::{Errno, KBox};
use crate::watch::{Watch, Watched};
use hook::Hook;

/// Takes a device of the class.
pub fn probe(device: &Device) -> Result<KBox<Sched>, Errno> {
    let hal = device.hal().clone();
    let doorbell = device.doorbell().kind;
    let open = Open::new(&hal, doorbell).map_err(|error| report(device.pci(), error))?;
    let connection = Mutex::new(Connection::Open(open))?;
    let watch = KBox::new(Watch::new(KBox::new(Core { hal, doorbell, connection })?)?)?;
    let name = device.info().name;
    let target = NonNull::from(&*watch);
    // Only events interrupt: the driver waits for no report.
    let event = |watch: &Watch<Core>, _| watch.soon();
    // SAFETY: the watch stays at its place until the interrupt is dropped.
    let interrupt =
        unsafe { device.interrupts().request(0, format_args!("vbus-{name}"), target, event) }?;
    watch.soon();
    Ok(KBox::new(Sched { _interrupt: interrupt, watch })?)
}

/// A device of the class.
pub struct Sched {
    /// Dropped before what it refers to.
    _interrupt: Interrupt<Watch<Core>>,
    watch: KBox<Watch<Core>>,
}

struct Core {
    hal: KernelHal,
    /// The kind of doorbell in use.
    doorbell: u8,
    connection: Mutex<Connection<Open>>,
}

/// An open device that gets posts.
struct Open {
    /// Dropped first: no CPU posts when the connection ends.
    _hook: Hook,
    cpus: Cpus<KernelHal>,
}

impl Open {
    fn new(hal: &KernelHal, doorbell: u8) -> Result<Self, Error> {
        let mut function = hal.function(doorbell)?;
        function.set_budget(Some(BUDGET));
        let mut cpus = Cpus::open(function)?;
        let hook = Hook::new(&mut cpus)?;
        Ok(Self { _hook: hook, cpus })
    }
}

impl Watched for Core {
    fn hal(&self) -> &KernelHal {
        &self.hal
    }

    fn look(&self) -> Result<Events, Error> {
        self.connection.lock().look(|open| open.cpus.function())
    }

    fn reopen(&self) -> Result<(), Error> {
        self.connection.lock().reopen(|| Open::new(&self.hal, self.doorbell))
    }

    fn sleep(&self) {
        *self.connection.lock() = Connection::Asleep;
    }

    fn wake(&self) -> Result<(), Error> {
        self.connection.lock().wake();
        self.reopen()
    }

    fn gone(&self) {
        // No CPU posts to a device that is not there. The driver opens it again if it comes back.
        self.connection.lock().lose();
    }

    fn config_changed(&self) {
        // The limits are fixed for the life of a device.
    }

    fn announce(&self) {
        // There is nothing to announce.
    }
}

impl Class for Sched {
    fn suspend(&self) {
        self.watch.suspend();
    }

    fn resume(&self) -> Result<(), Error> {
        self.watch.resume()
    }
}
