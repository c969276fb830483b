// SPDX-License-Identifier: Apache-2.0 OR MIT
//! State pages as character devices, `/dev/vbus/DEVICE/PAGE` (spec/state.md): the driver of the
//! class `state`.
//!
//! A file is one value, of as many bytes as the page has. `read` takes and `write` gives whole
//! values. `poll` waits for a newer one. `mmap` maps the page itself, as the device sees it
//! (spec/shared-memory.md, "State page"): a page of the device to be read, a page of the driver
//! also to be written.
//!
//! A page's memory stays while the device is lost and comes back: files and mappings go on. When
//! the device is unplugged, mappings get memory with the last values, which the device does not
//! reach, and it stays until the last of them has gone.

#![allow(unsafe_code, reason = "interrupts and the watch refer to what they are kept with")]

mod ffi;
mod file;
mod node;
mod page;

use core::fmt;
use core::ptr::NonNull;

use vbus_driver::state::{Owner, Pages};
use vbus_driver::{Error, Events, Function};

use crate::device::{Class, Device};
use crate::hal::KernelHal;
use crate::interrupt::{Interrupt, Interrupts};
use crate::kernel::lock::Mutex;
use crate::kernel::pci::Pci;
use crate::kernel::{Errno, KBox, KVec, Ref};
use crate::watch::{self, Watch, Watched};
use crate::{dev_err, dev_warn};
use node::{Folder, Node, PathName};
use page::Page;

/// Permissions of a page of the device: everybody may read it.
const MODE_DEVICE: u32 = 0o444;
/// Permissions of a page of the driver: everybody may read it, and the superuser may write it.
const MODE_DRIVER: u32 = 0o644;

/// Takes a device of the class.
pub fn probe(device: &Device) -> Result<KBox<State>, Errno> {
    State::new(device)
}

/// What all pages of a device share.
struct Shared {
    pci: Pci,
    connection: Mutex<Connection>,
}

/// The device now.
enum Connection {
    Open(Pages<KernelHal>),
    /// It was lost, and could not be opened again yet.
    Lost(Error),
    /// The system sleeps.
    Asleep,
    /// The driver has left the device.
    Left,
}

impl Shared {
    fn pci(&self) -> &Pci {
        &self.pci
    }

    /// Does something with the open device. Nobody else does meanwhile.
    fn with_connection<T>(
        &self,
        work: impl FnOnce(&mut Pages<KernelHal>) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match &mut *self.connection.lock() {
            Connection::Open(pages) => work(pages),
            Connection::Lost(_) | Connection::Asleep => Err(Errno::AGAIN),
            Connection::Left => Err(Errno::NO_DEVICE),
        }
    }
}

/// A page, and its node in /dev.
struct Entry {
    page: Ref<Page>,
    node: Node,
}

/// What the watch looks at.
struct Core {
    hal: KernelHal,
    /// The kind of doorbell in use.
    doorbell: u8,
    shared: Ref<Shared>,
    entries: KVec<Entry>,
    /// Dropped after the nodes.
    _folder: Folder,
}

/// What interrupts look at.
struct Handlers {
    // Dropped before what it refers to.
    watch: Watch<Core>,
    core: KBox<Core>,
}

/// A state device.
pub struct State {
    /// Dropped before what they refer to.
    interrupts: KVec<Interrupt<Handlers>>,
    handlers: KBox<Handlers>,
}

impl State {
    fn new(device: &Device) -> Result<KBox<Self>, Errno> {
        let core = Core::new(device)?;
        // SAFETY: the core stays at its place until the watch, which is before it, is dropped. No
        // method of the core drops the watch.
        let watch = unsafe { Watch::new(NonNull::from(&*core)) }?;
        let handlers = KBox::new(Handlers { watch, core })?;
        let vectors = device.interrupts();
        let name = device.info().name;
        let interrupts = KVec::from_fn(usize::from(vectors.count()), |vector| {
            let vector = u16::try_from(vector).map_err(|_| Errno::INVALID)?;
            let target = NonNull::from(&*handlers);
            // SAFETY: the handlers stay at their place until the interrupts are dropped.
            unsafe {
                vectors.request(
                    vector,
                    format_args!("vbus-{name}-{vector}"),
                    target,
                    Handlers::interrupted,
                )
            }
        })?;
        // An event may have come before the handlers, and would not come again.
        handlers.watch.soon();
        Ok(KBox::new(Self { interrupts, handlers })?)
    }
}

impl Handlers {
    /// In interrupt context.
    fn interrupted(&self, vector: u16) {
        let mut found = false;
        for Entry { page, node } in self.core.entries.iter() {
            if page.vector() == vector && page.interrupted() {
                node.wake();
                found = true;
            }
        }
        // Events of the function come on vector 0. A look at them costs several exits.
        if vector == 0 && !found {
            self.watch.soon();
        }
    }
}

impl Core {
    fn new(device: &Device) -> Result<KBox<Self>, Errno> {
        let (pci, hal) = (device.pci(), device.hal());
        let doorbell = device.doorbell().kind;
        let report = |error: Error| {
            dev_err!(pci, "the device cannot be used: {error}");
            Errno::from(error)
        };
        let mut pages = open(hal, doorbell).map_err(report)?;
        let mut descriptions = KVec::new();
        // There are 256 pages at most.
        for number in 0..pages.count() {
            descriptions.push(pages.describe(number).map_err(report)?)?;
        }
        let shared = Ref::new(Shared {
            pci: pci.clone(),
            connection: Mutex::new(Connection::Open(pages))?,
        })?;
        let folder = folder(pci, device)?;
        let mut entries = KVec::new();
        for description in descriptions.iter() {
            let name = description.name;
            let vector = vector(device.interrupts(), description.number)?;
            let page = Ref::new(Page::new(&shared, description, vector)?)?;
            let mode = match description.owner {
                Owner::Device => MODE_DEVICE,
                Owner::Driver => MODE_DRIVER,
            };
            let is_other = |entry: &Entry| entry.page.description().name != name;
            if name.as_str().is_empty() || !entries.iter().all(is_other) {
                dev_warn!(
                    pci,
                    "page {} has no name of its own, and gets no node",
                    description.number
                );
                continue;
            }
            let node = Node::new(&folder, &PathName::new(name.as_str()), mode, &page)?;
            entries.push(Entry { page, node })?;
        }
        let hal = hal.clone();
        Ok(KBox::new(Self { hal, doorbell, shared, entries, _folder: folder })?)
    }

    /// Ends the connection. Pages keep their memory.
    fn close(&self, as_what: Connection) {
        let mut connection = self.shared.connection.lock();
        for entry in self.entries.iter() {
            entry.page.disconnect();
        }
        *connection = as_what;
    }
}

/// The folder in /dev/vbus: by the device's name, and with the function's address behind it if
/// another device of this machine has the same name.
fn folder(pci: &Pci, device: &Device) -> Result<Folder, Errno> {
    let name = device.info().name;
    let name = match name.as_str() {
        "" => "unnamed",
        name => name,
    };
    match Folder::new(pci, &PathName::new(name)) {
        Err(Errno::EXISTS) => {
            let address = pci.address();
            dev_warn!(
                pci,
                "another device has the name {name} too; this one is /dev/vbus/{name}@{address}"
            );
            Folder::new(pci, &PathName::with_address(name, address))
        }
        result => result,
    }
}

/// The vector of a page: the device has as many as pages, and the machine may have fewer.
fn vector(interrupts: &Interrupts, number: u32) -> Result<u16, Errno> {
    let vector = number % u32::from(interrupts.count().max(1));
    u16::try_from(vector).map_err(|_| Errno::INVALID)
}

fn open(hal: &KernelHal, doorbell: u8) -> Result<Pages<KernelHal>, Error> {
    let mut function = Function::probe(hal.clone())?;
    function.use_doorbell(doorbell)?;
    Pages::open(function)
}

impl Watched for Core {
    fn hal(&self) -> &KernelHal {
        &self.hal
    }

    fn look(&self) -> Result<Events, Error> {
        match &*self.shared.connection.lock() {
            Connection::Open(pages) => watch::look(pages.function()),
            Connection::Lost(error) => Err(*error),
            Connection::Asleep | Connection::Left => Ok(Events::default()),
        }
    }

    fn reopen(&self) -> Result<(), Error> {
        self.close(Connection::Lost(Error::Gone));
        let mut connection = self.shared.connection.lock();
        let reopened = open(&self.hal, self.doorbell).and_then(|mut pages| {
            let live = self.entries.iter().filter(|entry| entry.page.is_live());
            for entry in live {
                entry.page.register(&mut pages)?;
            }
            Ok(pages)
        });
        match reopened {
            Ok(pages) => *connection = Connection::Open(pages),
            Err(error) => {
                *connection = Connection::Lost(error);
                return Err(error);
            }
        }
        drop(connection);
        // Whoever waits looks again, and asks for an interrupt again.
        self.entries.iter().for_each(|entry| entry.node.wake());
        Ok(())
    }

    fn gone(&self) {
        // It may come back. If it does not, the kernel takes it from the driver.
    }

    fn config_changed(&self) {
        // The number of pages is fixed for the life of a device.
    }

    fn announce(&self) {
        // There is nothing to announce.
    }
}

impl Class for State {
    fn suspend(&self) -> Result<(), Errno> {
        self.handlers.watch.pause();
        self.handlers.core.close(Connection::Asleep);
        Ok(())
    }

    fn resume(&self) -> Result<(), Errno> {
        let core = &self.handlers.core;
        let reopened = core.reopen();
        // If that failed, the watch tries again.
        self.handlers.watch.soon();
        reopened.or_else(|error| {
            dev_warn!(core.hal.pci(), "the device cannot be opened again yet: {error}");
            Ok(())
        })
    }

    fn shutdown(&self) {
        self.handlers.watch.pause();
        self.handlers.core.close(Connection::Asleep);
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let core = &self.handlers.core;
        self.handlers.watch.pause();
        self.interrupts = KVec::new();
        // An interrupt may have come between the two.
        self.handlers.watch.pause();
        core.close(Connection::Left);
        // The device has let go of the pages, and nobody opens any other.
        for Entry { page, node } in core.entries.iter() {
            page.retire();
            node.unmap();
            node.wake();
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shared")
    }
}
