// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The scheduling class of virtual CPUs (spec/sched.md): the driver of the class `sched`.
//!
//! While the device is open, a hook in Linux's scheduler posts the class and priority of what a CPU
//! runs, at the switch. There is no hook while there is no device.
#![allow(unsafe_code, reason = "interrupts and the watch refer to what they are kept with")]

mod ffi;
mod hook;
mod slot;

use core::ptr::NonNull;

use vbus_driver::sched::Cpus;
use vbus_driver::{Error, Events, Function};

use crate::device::{Class, Device};
use crate::hal::KernelHal;
use crate::interrupt::Interrupt;
use crate::kernel::lock::Mutex;
use crate::kernel::{Errno, KBox};
use crate::watch::{self, Watch, Watched};
use crate::{dev_err, dev_warn};
use hook::Hook;

/// Takes a device of the class.
pub fn probe(device: &Device) -> Result<KBox<Sched>, Errno> {
    let hal = device.hal().clone();
    let doorbell = device.doorbell().kind;
    let open = Open::new(&hal, doorbell).map_err(|error| {
        dev_err!(device.pci(), "the device cannot be used: {error}");
        Errno::from(error)
    })?;
    let connection = Mutex::new(Connection::Open(open))?;
    let core = KBox::new(Core { hal, doorbell, connection })?;
    // SAFETY: the core stays at its place until the watch, which is before it, is dropped. No
    // method of the core drops the watch.
    let watch = unsafe { Watch::new(NonNull::from(&*core)) }?;
    let handlers = KBox::new(Handlers { watch, core })?;
    let name = device.info().name;
    let target = NonNull::from(&*handlers);
    // Only events interrupt: the driver waits for no report.
    let event = |handlers: &Handlers, _| handlers.watch.soon();
    // SAFETY: the handlers stay at their place until the interrupt is dropped.
    let interrupt =
        unsafe { device.interrupts().request(0, format_args!("vbus-{name}"), target, event) }?;
    handlers.watch.soon();
    Ok(KBox::new(Sched { interrupt: Some(interrupt), handlers })?)
}

/// A device of the class.
pub struct Sched {
    /// Dropped before what it refers to.
    interrupt: Option<Interrupt<Handlers>>,
    handlers: KBox<Handlers>,
}

struct Handlers {
    // Dropped before what it refers to.
    watch: Watch<Core>,
    core: KBox<Core>,
}

struct Core {
    hal: KernelHal,
    /// The kind of doorbell in use.
    doorbell: u8,
    connection: Mutex<Connection>,
}

/// The device now.
#[allow(clippy::large_enum_variant, reason = "there is one for each device, in a box")]
enum Connection {
    Open(Open),
    /// It was lost, and could not be opened again yet.
    Lost(Error),
    /// The system sleeps, or the driver leaves the device.
    Asleep,
}

/// An open device that gets posts.
struct Open {
    /// Dropped first: no CPU posts when the connection ends.
    _hook: Hook,
    cpus: Cpus<KernelHal>,
}

impl Open {
    fn new(hal: &KernelHal, doorbell: u8) -> Result<Self, Error> {
        let mut function = Function::probe(hal.clone())?;
        function.use_doorbell(doorbell)?;
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
        match &*self.connection.lock() {
            Connection::Open(open) => watch::look(open.cpus.function()),
            Connection::Lost(error) => Err(*error),
            Connection::Asleep => Ok(Events::default()),
        }
    }

    fn reopen(&self) -> Result<(), Error> {
        let mut connection = self.connection.lock();
        // The former one ends before.
        *connection = Connection::Lost(Error::Gone);
        *connection = match Open::new(&self.hal, self.doorbell) {
            Ok(open) => Connection::Open(open),
            Err(error) => {
                *connection = Connection::Lost(error);
                return Err(error);
            }
        };
        Ok(())
    }

    fn gone(&self) {
        // No CPU posts to a device that is not there. The driver opens it again if it comes back.
        *self.connection.lock() = Connection::Lost(Error::Gone);
    }

    fn config_changed(&self) {
        // The limits are fixed for the life of a device.
    }

    fn announce(&self) {
        // There is nothing to announce.
    }
}

impl Core {
    fn sleep(&self) {
        *self.connection.lock() = Connection::Asleep;
    }
}

impl Class for Sched {
    fn suspend(&self) -> Result<(), Errno> {
        self.handlers.watch.pause();
        self.handlers.core.sleep();
        Ok(())
    }

    fn resume(&self) -> Result<(), Errno> {
        let core = &self.handlers.core;
        if let Err(error) = core.reopen() {
            dev_warn!(core.hal.pci(), "the device cannot be opened again yet: {error}");
        }
        // If that failed, the watch tries again.
        self.handlers.watch.soon();
        Ok(())
    }

    fn shutdown(&self) {
        self.handlers.watch.pause();
        self.handlers.core.sleep();
    }
}

impl Drop for Sched {
    fn drop(&mut self) {
        self.interrupt = None;
        self.handlers.watch.pause();
        self.handlers.core.sleep();
    }
}
