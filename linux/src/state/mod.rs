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

#![allow(unsafe_code, reason = "interrupts refer to what they are kept with")]

mod ffi;
mod file;
mod node;
mod page;

use core::fmt;
use core::ptr::NonNull;

use vbus_driver::state::{Owner, Pages};
use vbus_driver::{Error, Events, Function};

use crate::connection::{BUDGET, Connection};
use crate::dev_warn;
use crate::device::{Class, Device, report};
use crate::hal::KernelHal;
use crate::interrupt::{Interrupt, Interrupts};
use crate::kernel::lock::Mutex;
use crate::kernel::pci::Pci;
use crate::kernel::{Errno, KBox, KVec, Ref};
use crate::watch::{Watch, Watched};
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
    connection: Mutex<Connection<Pages<KernelHal>>>,
}

impl Shared {
    fn pci(&self) -> &Pci {
        &self.pci
    }

    /// Does something with the open device. Nobody else does meanwhile. All its commands wait for
    /// [`BUDGET`] together.
    fn with_connection<T>(
        &self,
        work: impl FnOnce(&mut Pages<KernelHal>) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match &mut *self.connection.lock() {
            Connection::Open(pages) => {
                pages.set_budget(Some(BUDGET));
                work(pages)
            }
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

/// A state device.
pub struct State {
    /// Dropped before what they refer to.
    interrupts: KVec<Interrupt<Watch<Core>>>,
    watch: KBox<Watch<Core>>,
}

impl State {
    fn new(device: &Device) -> Result<KBox<Self>, Errno> {
        let watch = KBox::new(Watch::new(Core::new(device)?)?)?;
        let vectors = device.interrupts();
        let name = device.info().name;
        let interrupts = KVec::from_fn(usize::from(vectors.count()), |vector| {
            let vector = u16::try_from(vector).map_err(|_| Errno::INVALID)?;
            let target = NonNull::from(&*watch);
            // SAFETY: the watch stays at its place until the interrupts are dropped.
            unsafe {
                vectors.request(vector, format_args!("vbus-{name}-{vector}"), target, interrupted)
            }
        })?;
        // An event may have come before the handlers, and would not come again.
        watch.soon();
        Ok(KBox::new(Self { interrupts, watch })?)
    }
}

/// In interrupt context.
fn interrupted(watch: &Watch<Core>, vector: u16) {
    let mut found = false;
    for Entry { page, node } in watch.entries.iter() {
        if page.vector() == vector && page.interrupted() {
            node.wake();
            found = true;
        }
    }
    // Events of the function come on vector 0. A look at them costs several exits.
    if vector == 0 && !found {
        watch.soon();
    }
}

impl Core {
    fn new(device: &Device) -> Result<KBox<Self>, Errno> {
        let (pci, hal) = (device.pci(), device.hal());
        let doorbell = device.doorbell().kind;
        let report = |error| report(pci, error);
        let open = |mut function: Function<KernelHal>| {
            function.set_budget(Some(BUDGET));
            Pages::open(function)
        };
        let mut pages = device.function().and_then(open).map_err(report)?;
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
    fn close(&self, as_what: Connection<Pages<KernelHal>>) {
        let mut connection = self.shared.connection.lock();
        self.disconnect();
        *connection = as_what;
    }

    /// No page rings any more. The caller holds the connection.
    fn disconnect(&self) {
        self.entries.iter().for_each(|entry| entry.page.disconnect());
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

impl Watched for Core {
    fn hal(&self) -> &KernelHal {
        &self.hal
    }

    fn look(&self) -> Result<Events, Error> {
        self.shared.connection.lock().look(Pages::function)
    }

    fn reopen(&self) -> Result<(), Error> {
        let mut connection = self.shared.connection.lock();
        self.disconnect();
        connection.reopen(|| {
            let mut function = self.hal.function(self.doorbell)?;
            function.set_budget(Some(BUDGET));
            let mut pages = Pages::open(function)?;
            let live = self.entries.iter().filter(|entry| entry.page.is_live());
            for entry in live {
                entry.page.register(&mut pages)?;
            }
            Ok(pages)
        })?;
        drop(connection);
        // Whoever waits looks again, and asks for an interrupt again.
        self.entries.iter().for_each(|entry| entry.node.wake());
        Ok(())
    }

    fn sleep(&self) {
        self.close(Connection::Asleep);
    }

    fn wake(&self) -> Result<(), Error> {
        self.shared.connection.lock().wake();
        self.reopen()
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
    fn suspend(&self) {
        self.watch.suspend();
    }

    fn resume(&self) -> Result<(), Error> {
        self.watch.resume()
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.interrupts = KVec::new();
        self.watch.pause();
        self.watch.close(Connection::Left);
        // The device has let go of the pages, and nobody opens any other.
        for Entry { page, node } in self.watch.entries.iter() {
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
