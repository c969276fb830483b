//! The doorbells of one device: what the driver rings, and whom each wakes.

use std::fmt;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{ReadWriteFlags, preadv2};

use crate::counter::ConnectionCounters;
use crate::executor::{Interest, TaskHandle};
use crate::lock::lock;

/// The doorbells of one device, by number.
pub struct Doorbells {
    slots: Vec<Mutex<Target>>,
    counters: Arc<ConnectionCounters>,
}

#[derive(Default)]
struct Target {
    task: Option<TaskHandle>,
    /// Made when a connector asks for it: a doorbell that rings without the connector.
    eventfd: Option<Arc<OwnedFd>>,
}

impl Doorbells {
    /// `count` doorbells, which wake nobody. Rings are counted in `counters`.
    pub fn new(count: usize, counters: Arc<ConnectionCounters>) -> Arc<Doorbells> {
        let slots = (0..count).map(|_| Mutex::default()).collect();
        Arc::new(Doorbells { slots, counters })
    }

    /// Doorbell `number`, for the device.
    pub fn doorbell(self: &Arc<Self>, number: u32) -> Doorbell {
        Doorbell { doorbells: self.clone(), number }
    }

    /// The driver rings doorbell `number`. One that is bound to no task does nothing.
    pub fn ring(&self, number: u64) {
        let slot = usize::try_from(number).ok().and_then(|at| self.slots.get(at));
        let Some(slot) = slot else { return };
        if let Some(task) = &lock(slot).task {
            self.counters.doorbells.one();
            task.wake();
        }
    }

    /// An eventfd that rings doorbell `number`, for connectors that can have it written without
    /// their help. Always the same one.
    pub fn eventfd(&self, number: u32) -> rustix::io::Result<Arc<OwnedFd>> {
        let slot = self.slots.get(number as usize).ok_or(rustix::io::Errno::NOENT)?;
        let mut target = lock(slot);
        if let Some(fd) = &target.eventfd {
            return Ok(fd.clone());
        }
        let fd = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        if let Some(task) = &target.task {
            task.watch(fd.as_fd(), Interest::Read)?;
        }
        target.eventfd = Some(fd.clone());
        Ok(fd)
    }

    /// Adds to the doorbells counted those that rang by eventfd, which nobody sees one by one: an
    /// eventfd holds their number until it is read.
    pub fn count_eventfds(&self) {
        for slot in &self.slots {
            let target = lock(slot);
            let mut rung = [0; 8];
            // The peer holds the eventfd too, and could make a plain read wait. (Kernels before 5.9
            // cannot do this one, and do not count.)
            let read = |fd| {
                preadv2(fd, &mut [IoSliceMut::new(&mut rung)], u64::MAX, ReadWriteFlags::NOWAIT)
            };
            let Some(Ok(_)) = target.eventfd().map(read) else { continue };
            self.counters.doorbells.add(u64::from_ne_bytes(rung));
            // A ring whose event has not been collected yet goes unnoticed once the eventfd has
            // been read.
            if let Some(task) = &target.task {
                task.wake();
            }
        }
    }

    /// Lets doorbell `number` wake nobody any more.
    pub fn detach(&self, number: usize) {
        if let Some(slot) = self.slots.get(number) {
            lock(slot).detach();
        }
    }

    /// Lets no doorbell wake anybody any more.
    pub fn detach_all(&self) {
        self.slots.iter().for_each(|slot| lock(slot).detach());
    }
}

impl Target {
    fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        self.eventfd.as_ref().map(|fd| fd.as_fd())
    }

    fn detach(&mut self) {
        if let Some(task) = self.task.take() {
            if let Some(fd) = self.eventfd() {
                task.unwatch(fd);
            }
        }
    }
}

/// The driver's doorbell for a region, as its device sees it.
#[derive(Clone)]
pub struct Doorbell {
    doorbells: Arc<Doorbells>,
    number: u32,
}

impl Doorbell {
    /// Lets the doorbell wake `task` from now on, and wakes it once, in case it rang before.
    pub fn bind(&self, task: &TaskHandle) {
        let Some(slot) = self.doorbells.slots.get(self.number as usize) else { return };
        let mut target = lock(slot);
        target.detach();
        if let Some(fd) = target.eventfd() {
            if let Err(error) = task.watch(fd, Interest::Read) {
                tracing::error!(doorbell = self.number, %error, "cannot watch a doorbell");
            }
        }
        target.task = Some(task.clone());
        drop(target);
        task.wake();
    }

    /// Wakes what the doorbell wakes, as if the driver had rung it: for a thread of the device's
    /// own that has finished something. Does not block, and does nothing once the region is
    /// dropped.
    pub fn wake(&self) {
        let Some(slot) = self.doorbells.slots.get(self.number as usize) else { return };
        if let Some(task) = &lock(slot).task {
            task.wake();
        }
    }
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Doorbell").field(&self.number).finish()
    }
}
