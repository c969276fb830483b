// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The doorbells of one device. The driver rings them. Each wakes a task.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vbus_eventfd::{Signaller, take_count};
use vbus_shm::ErrorCode;

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
    /// Made when a connector asks for it. A write to it rings the doorbell without the connector.
    eventfd: Option<Arc<OwnedFd>>,
    /// Who waits for the eventfd itself, in place of a task: see [`Doorbell::lend`].
    lent: bool,
}

impl Doorbells {
    /// `count` doorbells that wake no task yet. `counters` counts the rings.
    pub fn new(count: usize, counters: Arc<ConnectionCounters>) -> Arc<Doorbells> {
        let slots = (0..count).map(|_| Mutex::default()).collect();
        Arc::new(Doorbells { slots, counters })
    }

    /// Doorbell `number`, for the device.
    pub fn doorbell(self: &Arc<Self>, number: u32) -> Doorbell {
        Doorbell { doorbells: self.clone(), number }
    }

    /// Rings doorbell `number`, for the driver. A doorbell that is bound to no task does nothing.
    pub fn ring(&self, number: u64) {
        let slot = usize::try_from(number).ok().and_then(|at| self.slots.get(at));
        let Some(slot) = slot else { return };
        let target = lock(slot);
        if target.task.is_some() {
            // Otherwise the eventfd counts the ring.
            self.counters.doorbells.one();
        }
        target.wake();
    }

    /// An eventfd that rings doorbell `number`, for connectors whose peer can write it directly.
    /// Each call returns the same eventfd, until [`forget_eventfds`](Self::forget_eventfds).
    pub fn eventfd(&self, number: u32) -> rustix::io::Result<Arc<OwnedFd>> {
        let slot = self.slots.get(number as usize).ok_or(Errno::NOENT)?;
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

    /// Lets `fd`, an eventfd of the peer, ring doorbell `number` from now on, and no other one.
    /// `None`: no eventfd rings it.
    ///
    /// # Errors
    /// The system cannot watch it. No eventfd rings the doorbell then.
    pub fn set_eventfd(&self, number: u32, fd: Option<Arc<OwnedFd>>) -> rustix::io::Result<()> {
        let slot = self.slots.get(number as usize).ok_or(Errno::NOENT)?;
        let mut target = lock(slot);
        let former = target.eventfd.take();
        if let Some(task) = &target.task {
            if let Some(former) = &former {
                task.unwatch(former);
            }
            if let Some(fd) = &fd {
                task.watch(fd, Interest::Read)?;
            }
            // The former one may have rung unseen, or the new one before it was watched.
            task.wake();
        }
        target.eventfd = fd;
        Ok(())
    }

    /// The peer has gone: its eventfds ring no doorbell any more. The next peer gets new ones,
    /// which the former peer cannot reach.
    pub fn forget_eventfds(&self) {
        self.count_eventfds();
        for slot in &self.slots {
            let mut target = lock(slot);
            let Some(fd) = target.eventfd.take() else { continue };
            if let Some(task) = &target.task {
                task.unwatch(&fd);
            }
        }
    }

    /// The eventfds that connectors have asked for, by number: what another process needs to take
    /// this device's place before its peer.
    pub fn eventfds(&self) -> Vec<(u32, Arc<OwnedFd>)> {
        let fd =
            |(number, slot): (u32, &Mutex<Target>)| Some((number, lock(slot).eventfd.clone()?));
        (0..).zip(&self.slots).filter_map(fd).collect()
    }

    /// Makes `fd` the eventfd of doorbell `number`, in place of a new one. The peer has it already.
    ///
    /// # Errors
    /// There is no such doorbell, it has an eventfd already, or the system cannot watch this one.
    pub fn adopt_eventfd(&self, number: u32, fd: OwnedFd) -> rustix::io::Result<()> {
        let slot = self.slots.get(number as usize).ok_or(Errno::NOENT)?;
        let mut target = lock(slot);
        if target.eventfd.is_some() {
            return Err(Errno::EXIST);
        }
        if let Some(task) = &target.task {
            task.watch(&fd, Interest::Read)?;
        }
        target.eventfd = Some(Arc::new(fd));
        Ok(())
    }

    /// Whether doorbell `number` wakes a task.
    pub(crate) fn is_bound(&self, number: u32) -> bool {
        self.slots.get(number as usize).is_some_and(|slot| lock(slot).task.is_some())
    }

    /// Counts the rings that came by eventfd. Nobody sees these one by one: an eventfd holds their
    /// number until somebody reads it. Kernels before 5.9 have no safe way to read it: these rings
    /// are then not counted.
    pub fn count_eventfds(&self) {
        for slot in &self.slots {
            let target = lock(slot);
            let rung = target.eventfd().map_or(0, take_count);
            if rung == 0 {
                continue;
            }
            self.counters.doorbells.add(rung);
            // The read hides a ring whose event the worker has not collected yet. So wake the task.
            if let Some(task) = &target.task {
                task.wake();
            }
        }
    }

    /// Unbinds doorbell `number`: it wakes no task any more.
    pub fn detach(&self, number: usize) {
        if let Some(slot) = self.slots.get(number) {
            lock(slot).detach();
        }
    }

    /// Unbinds all doorbells.
    pub fn detach_all(&self) {
        self.slots.iter().for_each(|slot| lock(slot).detach());
    }
}

/// Adds 1 to an eventfd that a peer may hold, and never blocks.
fn signal(fd: BorrowedFd<'_>) {
    // It fails if the kernel has no memory for it for long. The signaller was there before.
    let _ = Signaller::of_process().and_then(|signaller| Ok(signaller.signal(fd)?));
}

impl Target {
    fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        self.eventfd.as_ref().map(|fd| fd.as_fd())
    }

    fn wake(&self) {
        if let Some(task) = &self.task {
            task.wake();
        } else if let Some(fd) = self.eventfd().filter(|_| self.lent) {
            signal(fd);
        }
    }

    fn detach(&mut self) {
        self.lent = false;
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
    /// Binds the doorbell to `task`. It also wakes the task once, because the doorbell may have
    /// rung before.
    ///
    /// # Errors
    /// [`ErrorCode::LIMIT`]: the system cannot watch the doorbell. It is then bound to no task.
    pub fn bind(&self, task: &TaskHandle) -> Result<(), ErrorCode> {
        let Some(slot) = self.doorbells.slots.get(self.number as usize) else { return Ok(()) };
        let mut target = lock(slot);
        target.detach();
        if let Some(fd) = target.eventfd() {
            if let Err(error) = task.watch(fd, Interest::Read) {
                tracing::error!(
                    device = self.doorbells.counters.device(),
                    doorbell = self.number,
                    %error,
                    "cannot watch a doorbell"
                );
                return Err(ErrorCode::LIMIT);
            }
        }
        target.task = Some(task.clone());
        drop(target);
        task.wake();
        Ok(())
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Unbinds the doorbell from its task, and lets it write an eventfd, for somebody who waits for
    /// that himself: the kernel. The eventfd is the one that connectors get. The doorbell may have
    /// rung before: [`wake`](Self::wake) says so to whoever waits, once he is ready for it.
    /// [`bind`](Self::bind) ends this.
    ///
    /// # Errors
    /// The process has no more descriptors. The doorbell is then bound to nothing.
    pub fn lend(&self) -> io::Result<Arc<OwnedFd>> {
        Signaller::of_process()?;
        let slot = self.doorbells.slots.get(self.number as usize).ok_or(Errno::NOENT)?;
        lock(slot).detach();
        let fd = self.doorbells.eventfd(self.number)?;
        lock(slot).lent = true;
        Ok(fd)
    }

    /// Unbinds the doorbell: it wakes no task, and writes no eventfd.
    pub fn unbind(&self) {
        self.doorbells.detach(self.number as usize);
    }

    /// Wakes the task that the doorbell wakes, or whoever has it lent, as if the driver had rung
    /// it. A device's own thread calls this when it has finished something. Does not block. Does
    /// nothing once the region is dropped.
    pub fn wake(&self) {
        let Some(slot) = self.doorbells.slots.get(self.number as usize) else { return };
        lock(slot).wake();
    }
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Doorbell").field(&self.number).finish()
    }
}
