// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which source comes by which line: routes are made for sources whose devices were opened, and
//! follow their lines to other processors.

use core::sync::atomic::{AtomicU32, Ordering};

use vbus_driver::pic::{Line, Pic, Source};
use vbus_driver::{Error, ErrorCode, Name};
use vbus_shm::pic::LINES_MAX;

use super::domain::Domain;
use super::sources::{self, Wish};
use crate::connection::BUDGET;
use crate::hal::KernelHal;
use crate::kernel::KVec;
use crate::kernel::alloc::NoMemory;

/// The lines of a controller.
pub struct Lines {
    lines: KVec<Slot>,
}

/// A line.
#[derive(Default)]
struct Slot {
    /// The source that has it.
    user: Option<User>,
    /// The number of the page that its route leads to.
    routed: Option<u32>,
}

struct User {
    source: u64,
    name: Name<32>,
    vector: u16,
}

/// What this connection of the controller has tried.
#[derive(Default)]
pub struct Tried(KVec<Try>);

struct Try {
    source: u64,
    /// The connections that its device had had then.
    opens: u32,
}

/// Where the routes of lines shall lead: the number of a page, for each line.
pub type Homes = [AtomicU32; LINES_MAX as usize];

/// The page that the route of a line shall lead to, of this many pages.
pub fn home(homes: &Homes, line: u16, pages: u32) -> u32 {
    let home = homes.get(usize::from(line)).map_or(0, |home| home.load(Ordering::Relaxed));
    home % pages.max(1)
}

/// A controller with an open connection, and what it carries for whom.
pub struct Carrier<'a> {
    /// The controller.
    pub pic: &'a mut Pic<KernelHal>,
    /// What it has tried.
    pub tried: &'a mut Tried,
    /// Its pages.
    pub pages: u32,
    /// Its number in the list of carriers.
    pub id: u64,
    /// Its lines, as interrupts of the kernel.
    pub domain: &'a Domain,
    /// Where they shall lead.
    pub homes: &'a Homes,
}

impl Lines {
    /// No line has a source.
    pub fn new() -> Result<Self, NoMemory> {
        let lines = KVec::from_fn(usize::from(LINES_MAX), |_| Ok::<_, NoMemory>(Slot::default()));
        Ok(Self { lines: lines? })
    }

    /// The connection is another one: there are no routes.
    pub fn forget_routes(&mut self) {
        self.lines.iter_mut().for_each(|slot| slot.routed = None);
    }

    /// Makes routes for sources that have none, and moves those whose lines have another home.
    ///
    /// # Errors
    /// The device does not work. Routes that it refuses are no error.
    pub fn update(&mut self, carrier: &mut Carrier<'_>) -> Result<(), Error> {
        carrier.pic.set_budget(Some(BUDGET));
        let lists = sources::lock();
        for slot in self.lines.iter_mut() {
            if slot.user.as_ref().is_some_and(|user| !lists.has(user.source)) {
                *slot = Slot::default();
            }
        }
        while carrier.tried.0.take_if(|tried| !lists.has(tried.source)).is_some() {}
        drop(lists);
        // Each turn notes another try. A device that opens again and again makes more of them only
        // as fast as it opens.
        while let Some(wish) = carrier.wish() {
            self.carry(carrier, &wish)?;
            carrier.tried.note(&wish)?;
        }
        self.follow(carrier)
    }

    /// Routes a source to a line, unless the device refuses.
    fn carry(&mut self, carrier: &mut Carrier<'_>, wish: &Wish) -> Result<(), Error> {
        let is_its = |slot: &Slot| slot.user.as_ref().is_some_and(|user| user.source == wish.id);
        let is_new = |slot: &Slot| slot.user.is_none();
        let lines = &mut self.lines;
        let line = lines.iter().position(is_its).or_else(|| lines.iter().position(is_new));
        let Some((line, index)) = line.and_then(|line| Some((u16::try_from(line).ok()?, line)))
        else {
            return Ok(());
        };
        let Some(slot) = lines.get_mut(index) else { return Ok(()) };
        if slot.user.is_none() {
            // Vectors of queues go to a processor each, as they do without a controller.
            let nth = wish.vector.checked_sub(1).unwrap_or(line);
            if let Some(home) = carrier.homes.get(index) {
                home.store(u32::from(nth) % carrier.pages.max(1), Ordering::Relaxed);
            }
        }
        let pci = carrier.pic.function().hal().pci().clone();
        if sources::lock().carry(wish.id, carrier.id, &pci, carrier.domain, line).is_err() {
            // The kernel has no interrupt for it now. The source has its own.
            *slot = Slot::default();
            return Ok(());
        }
        let page = home(carrier.homes, line, carrier.pages);
        let from = Source { device: wish.name.as_str(), vector: wish.vector };
        let to = Line { cpu: page, number: line };
        let result = match carrier.pic.route(from, to) {
            // It is one of this connection.
            Err(Error::Refused { code: ErrorCode::EXISTS, .. }) => {
                carrier.pic.relocate(from, to).map(drop)
            }
            result => result,
        };
        match result {
            Ok(()) => {
                let Wish { id: source, name, vector, .. } = *wish;
                *slot = Slot { user: Some(User { source, name, vector }), routed: Some(page) };
                Ok(())
            }
            Err(error) => {
                sources::lock().leave(wish.id, carrier.id);
                *slot = Slot::default();
                refused(error)
            }
        }
    }

    /// Moves routes whose lines have another home.
    fn follow(&mut self, carrier: &mut Carrier<'_>) -> Result<(), Error> {
        for (number, slot) in (0..).zip(self.lines.iter_mut()) {
            let page = home(carrier.homes, number, carrier.pages);
            let (Some(user), Some(routed)) = (&slot.user, slot.routed) else { continue };
            if routed == page {
                continue;
            }
            let from = Source { device: user.name.as_str(), vector: user.vector };
            slot.routed = match carrier.pic.relocate(from, Line { cpu: page, number }) {
                Ok(_) => Some(page),
                // The other device's connection has ended. With the next one there is a new route.
                Err(error) => refused(error).map(|()| None)?,
            };
        }
        Ok(())
    }
}

impl Carrier<'_> {
    fn wish(&self) -> Option<Wish> {
        let tried = |id| {
            let tried = self.tried.0.iter().find(|tried| tried.source == id);
            tried.map(|tried| tried.opens)
        };
        sources::lock().wish(self.id, tried)
    }
}

impl Tried {
    fn note(&mut self, wish: &Wish) -> Result<(), NoMemory> {
        match self.0.iter_mut().find(|tried| tried.source == wish.id) {
            Some(tried) => tried.opens = wish.opens,
            None => self.0.push(Try { source: wish.id, opens: wish.opens })?,
        }
        Ok(())
    }
}

/// Lets through only what is no refusal.
fn refused(error: Error) -> Result<(), Error> {
    match error {
        Error::Refused { .. } | Error::Class { .. } => Ok(()),
        error => Err(error),
    }
}
