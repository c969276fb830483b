// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The interrupts of this module's devices that a controller can carry (*sources*), and the
//! controllers that carry them.
//!
//! A source has its own vector all the time, and its handler there. A controller that carries it
//! gives it a line, with a second handler that does the same. So it does not matter when a route
//! begins or ends: the device then interrupts once more, on the other way.
#![allow(unsafe_code, reason = "a list of the whole module, and handlers in it")]

use core::cell::UnsafeCell;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use vbus_driver::Name;

use super::domain::{Domain, Number};
use super::ffi;
use crate::kernel::alloc::NoMemory;
use crate::kernel::irq::{Handler, Irq, NAME_BYTES, Traits};
use crate::kernel::log::Text;
use crate::kernel::pci::Pci;
use crate::kernel::{Errno, KBox, KVec};

/// A controller that can carry sources.
pub trait Carrier: Sync {
    /// There are sources that it may not have tried to carry. From any context.
    fn wake(&self);
}

/// An interrupt of a device.
pub struct Source {
    /// Dropped before the handler.
    line: Option<Line>,
    /// No other source had this number before.
    id: u64,
    pci: Pci,
    name: Name<32>,
    vector: u16,
    /// What /proc/interrupts calls it.
    label: Text<NAME_BYTES>,
    handler: KBox<dyn Handler>,
    /// Connections that its device has had: a route ends with each.
    opens: u32,
}

/// The line of a source. The handler is dropped before the number.
struct Line {
    carrier: u64,
    _irq: Irq<Pass>,
    _number: Number,
}

/// Handles the interrupts of a line as those of the source's own vector.
struct Pass(NonNull<dyn Handler>);

// SAFETY: it shares a handler, which is Sync.
unsafe impl Send for Pass {}
// SAFETY: as above.
unsafe impl Sync for Pass {}

impl Handler for Pass {
    fn interrupt(&self) -> bool {
        // SAFETY: the handler stays at its place until the line, which is before it, is dropped.
        unsafe { self.0.as_ref() }.interrupt()
    }
}

/// A source that a controller has not tried to carry since its device was opened.
pub struct Wish {
    /// Which source it is.
    pub id: u64,
    /// The name of its device on the bus.
    pub name: Name<32>,
    /// Its vector.
    pub vector: u16,
    /// Connections that its device has had.
    pub opens: u32,
}

/// All sources and carriers of the module.
pub struct Lists {
    sources: KVec<Source>,
    carriers: KVec<(u64, NonNull<dyn Carrier>)>,
    /// The number of the next source or carrier.
    next: u64,
}

struct Global(UnsafeCell<Lists>);

// SAFETY: only the holder of the lock gets at the lists, whose parts may be used in any thread.
unsafe impl Sync for Global {}

static GLOBAL: Global =
    Global(UnsafeCell::new(Lists { sources: KVec::new(), carriers: KVec::new(), next: 1 }));

/// The locked lists.
pub struct Guard(PhantomData<*mut ()>);

/// Waits until nobody else has the lists. It sleeps. No handler of an interrupt waits for them.
pub fn lock() -> Guard {
    // SAFETY: it has no conditions, and no caller holds it.
    unsafe { ffi::shim_sources_lock() };
    Guard(PhantomData)
}

impl Deref for Guard {
    type Target = Lists;

    fn deref(&self) -> &Lists {
        // SAFETY: the lock is held.
        unsafe { &*GLOBAL.0.get() }
    }
}

impl DerefMut for Guard {
    fn deref_mut(&mut self) -> &mut Lists {
        // SAFETY: the lock is held, and the guard is borrowed alone.
        unsafe { &mut *GLOBAL.0.get() }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // SAFETY: this thread has locked it.
        unsafe { ffi::shim_sources_unlock() };
    }
}

/// A source in the lists. Dropping it takes it out, and waits until its handler does not run for a
/// line.
#[derive(Debug)]
pub struct Registered(u64);

impl Drop for Registered {
    fn drop(&mut self) {
        lock().sources.take_if(|source| source.id == self.0);
    }
}

/// Puts an interrupt of a device into the lists. `opens` tells the connections that the device has
/// had, in time for the next [`opened`]. The caller may sleep.
pub fn register(
    pci: &Pci,
    (name, vector): (Name<32>, u16),
    label: Text<NAME_BYTES>,
    handler: KBox<dyn Handler>,
    opens: impl FnOnce() -> u32,
) -> Result<Registered, NoMemory> {
    let mut lists = lock();
    let (id, pci, opens) = (lists.number(), pci.clone(), opens());
    lists.sources.push(Source { id, pci, name, vector, label, handler, opens, line: None })?;
    lists.wake();
    Ok(Registered(id))
}

/// A device was opened, and has had this many connections now: routes of its interrupts have ended.
/// The caller may sleep.
pub fn opened(pci: &Pci, opens: u32) {
    let mut lists = lock();
    let mut any = false;
    for source in lists.sources.iter_mut().filter(|source| source.pci == *pci) {
        source.opens = opens;
        any = true;
    }
    if any {
        lists.wake();
    }
}

/// A carrier in the lists. Dropping it takes it out; its sources have no lines then.
#[derive(Debug)]
pub struct Carrying(u64);

impl Carrying {
    /// Adds a carrier. The caller may sleep.
    ///
    /// # Safety
    /// `carrier` stays valid, at its place, and is only shared, until the result is dropped.
    pub unsafe fn new(carrier: NonNull<dyn Carrier>) -> Result<Self, NoMemory> {
        let mut lists = lock();
        let id = lists.number();
        lists.carriers.push((id, carrier))?;
        Ok(Self(id))
    }

    /// The carrier's number, for the methods of [`Lists`].
    pub fn id(&self) -> u64 {
        self.0
    }
}

impl Drop for Carrying {
    fn drop(&mut self) {
        let mut lists = lock();
        lists.carriers.take_if(|(id, _)| *id == self.0);
        for source in lists.sources.iter_mut() {
            source.line.take_if(|line| line.carrier == self.0);
        }
    }
}

impl Lists {
    fn number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    fn wake(&self) {
        for (_, carrier) in self.carriers.iter() {
            // SAFETY: carriers are valid as long as they are in the list.
            unsafe { carrier.as_ref() }.wake();
        }
    }

    /// Whether a source is still there.
    pub fn has(&self, source: u64) -> bool {
        self.sources.iter().any(|other| other.id == source)
    }

    /// A source whose device is open, and for which `tried` does not tell the number of its
    /// connections. Of two devices with one name there is none: they are on different buses, and
    /// the name tells the carrier's bus nothing of which is meant.
    pub fn wish(&self, carrier: u64, tried: impl Fn(u64) -> Option<u32>) -> Option<Wish> {
        let wanted = |source: &&Source| {
            source.opens != 0
                && tried(source.id) != Some(source.opens)
                && source.line.as_ref().is_none_or(|line| line.carrier == carrier)
                && !self
                    .sources
                    .iter()
                    .any(|other| other.pci != source.pci && other.name == source.name)
        };
        let source = self.sources.iter().find(wanted)?;
        let Source { id, name, vector, opens, .. } = *source;
        Some(Wish { id, name, vector, opens })
    }

    /// Lets a source handle the interrupts of a line of a carrier too. The function of the carrier
    /// is `pci`.
    pub fn carry(
        &mut self,
        id: u64,
        carrier: u64,
        pci: &Pci,
        domain: &Domain,
        line: u16,
    ) -> Result<(), Errno> {
        let source = self.sources.iter_mut().find(|source| source.id == id);
        let source = source.ok_or(Errno::NO_DEVICE)?;
        if source.line.is_some() {
            return Ok(());
        }
        let number = domain.number(line)?;
        let pass = KBox::new(Pass(NonNull::from(&*source.handler)))?;
        let label = source.label.as_bytes();
        let irq = Irq::new(pci, number.get(), Traits::default(), label, pass)?;
        source.line = Some(Line { carrier, _irq: irq, _number: number });
        Ok(())
    }

    /// The carrier does not carry a source.
    pub fn leave(&mut self, id: u64, carrier: u64) {
        if let Some(source) = self.sources.iter_mut().find(|source| source.id == id) {
            source.line.take_if(|line| line.carrier == carrier);
        }
    }
}
