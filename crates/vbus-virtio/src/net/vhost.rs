// SPDX-License-Identifier: Apache-2.0 OR MIT
//! vhost-net: the kernel carries the frames of a card whose back end is a TAP interface.
//!
//! A [`Vhost`] is what a device has of it. An [`AtWork`] is the kernel at work for one driver. It
//! gives the kernel the addresses that the driver's memory has in this process, the rings, and
//! their eventfds: a ring's kick is its doorbell's eventfd, and its call is the eventfd of its
//! interrupt. Where an interrupt has none, a task forwards it.
#![allow(unsafe_code)] // The kernel gets addresses in the driver's memory.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vbus_core::memory::{MemoryContext, NoRegions, Region, Regions};
use vbus_core::{Doorbell, ErrorCode, Progress, Task, TaskHandle, lock};
use vbus_net::Opener;
use vbus_tap::{RingPlace, VhostRegion, VhostRing, vhost_advice};

use super::abi::feature;
use crate::device::{Call, feature as common};
use crate::queue::{Format, Layout};

/// The most regions of memory that are given to the kernel. Its module takes 64 unless it has a
/// parameter.
const REGIONS_MAX: usize = 4096;

/// The features that change what the rings hold. The kernel must know those that the driver has
/// accepted.
const OF_RINGS: u64 = common::VERSION_1
    | common::EVENT_IDX
    | common::INDIRECT_DESC
    | common::IN_ORDER
    | feature::MRG_RXBUF;

/// The features that the kernel cannot have, whatever it says.
const NEVER: u64 = common::RING_PACKED | feature::RSS | feature::HASH_REPORT;

/// The features that a card does not offer if the kernel shall carry its frames: those of
/// [`NEVER`], and what would have no effect.
const NOT_OFFERED: u64 = NEVER | feature::CTRL_VLAN | feature::NOTF_COAL | feature::VQ_NOTF_COAL;

/// The kernel's end of a queue pair. The methods are those of [`vbus_tap::Vhost`].
pub trait End: Send + Sync {
    fn features(&self) -> Result<u64, Errno>;
    fn set_owner(&self) -> Result<(), Errno>;
    fn reset_owner(&self) -> Result<(), Errno>;
    fn set_features(&self, features: u64) -> Result<(), Errno>;
    /// # Safety
    /// As [`vbus_tap::Vhost::set_memory`].
    unsafe fn set_memory(&self, regions: &[VhostRegion]) -> Result<(), Errno>;
    /// # Safety
    /// As [`vbus_tap::Vhost::set_ring`].
    unsafe fn set_ring(&self, ring: VhostRing, place: &RingPlace, next: u16) -> Result<(), Errno>;
    fn position(&self, ring: VhostRing) -> Result<u16, Errno>;
    fn set_kick(&self, ring: VhostRing, eventfd: Option<BorrowedFd<'_>>) -> Result<(), Errno>;
    fn set_call(&self, ring: VhostRing, eventfd: Option<BorrowedFd<'_>>) -> Result<(), Errno>;
    fn set_error(&self, ring: VhostRing, eventfd: Option<BorrowedFd<'_>>) -> Result<(), Errno>;
    fn set_backend(&self, ring: VhostRing, tap: Option<BorrowedFd<'_>>) -> Result<(), Errno>;
}

impl End for vbus_tap::Vhost {
    fn features(&self) -> Result<u64, Errno> {
        self.features()
    }

    fn set_owner(&self) -> Result<(), Errno> {
        self.set_owner()
    }

    fn reset_owner(&self) -> Result<(), Errno> {
        self.reset_owner()
    }

    fn set_features(&self, features: u64) -> Result<(), Errno> {
        self.set_features(features)
    }

    unsafe fn set_memory(&self, regions: &[VhostRegion]) -> Result<(), Errno> {
        // SAFETY: the caller's.
        unsafe { self.set_memory(regions) }
    }

    unsafe fn set_ring(&self, ring: VhostRing, place: &RingPlace, next: u16) -> Result<(), Errno> {
        // SAFETY: the caller's.
        unsafe { self.set_ring(ring, place, next) }
    }

    fn position(&self, ring: VhostRing) -> Result<u16, Errno> {
        self.position(ring)
    }

    fn set_kick(&self, ring: VhostRing, eventfd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        self.set_kick(ring, eventfd)
    }

    fn set_call(&self, ring: VhostRing, eventfd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        self.set_call(ring, eventfd)
    }

    fn set_error(&self, ring: VhostRing, eventfd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        self.set_error(ring, eventfd)
    }

    fn set_backend(&self, ring: VhostRing, tap: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        self.set_backend(ring, tap)
    }
}

/// What a device has of vhost-net.
pub struct Vhost {
    device: String,
    pairs: u16,
    opener: Arc<dyn Opener>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The setting `vhost`.
    wanted: bool,
    /// The kernel's ends. They stay until the device goes.
    ends: Option<Arc<Ends>>,
    /// Why this process carries the frames, though the setting is true.
    why: Option<String>,
    /// Whether the kernel carries frames now.
    carries: bool,
}

/// The kernel's ends of the queue pairs, and the features that they have.
pub struct Ends {
    ends: Vec<Box<dyn End>>,
    features: u64,
}

impl Vhost {
    /// That of a device with `pairs` queue pairs. `wanted`: the setting `vhost`. If the kernel's
    /// ends cannot be opened, the log says why, and the device works without.
    pub fn new(device: &str, pairs: u16, opener: Arc<dyn Opener>, wanted: bool) -> Vhost {
        let vhost = Vhost { device: device.into(), pairs, opener, state: Mutex::default() };
        if wanted {
            if let Err(why) = vhost.want(true) {
                vhost.fell_back(why);
            }
        }
        lock(&vhost.state).wanted = wanted;
        vhost
    }

    /// That of a device for which these are the kernel's ends.
    #[cfg(test)]
    pub fn with(device: &str, pairs: u16, ends: Vec<Box<dyn End>>) -> Vhost {
        let ends = Some(Arc::new(Ends::of(ends).unwrap()));
        let state = Mutex::new(State { wanted: true, ends, ..State::default() });
        Vhost { device: device.into(), pairs, opener: Arc::new(vbus_net::Direct), state }
    }

    /// Takes the setting. The next driver finds it. May block.
    ///
    /// # Errors
    /// The kernel's ends cannot be opened. The text says why. Nothing has changed.
    pub fn want(&self, wanted: bool) -> Result<(), String> {
        if wanted && lock(&self.state).ends.is_none() {
            let ends = self.open()?;
            lock(&self.state).ends = Some(Arc::new(ends));
        }
        let mut state = lock(&self.state);
        state.wanted = wanted;
        state.why = None;
        Ok(())
    }

    /// Whether the operator wants the kernel to carry the frames.
    pub fn is_wanted(&self) -> bool {
        lock(&self.state).wanted
    }

    fn open(&self) -> Result<Ends, String> {
        let ends = self.opener.vhost(self.pairs).map_err(|error| {
            let advice = Errno::from_io_error(&error).map(vhost_advice);
            format!("{error}{}{}", if advice.is_some() { "; " } else { "" }, advice.unwrap_or(""))
        })?;
        Ends::of(ends.into_iter().map(|end| Box::new(end) as _).collect())
    }

    /// The features of `offered` that the card offers.
    pub fn offer(&self, offered: u64) -> u64 {
        let state = lock(&self.state);
        match state.ends.as_ref().filter(|_| state.wanted) {
            Some(ends) => offered & !NOT_OFFERED & (!OF_RINGS | ends.features),
            None => offered,
        }
    }

    /// The kernel's ends, if the kernel shall carry the frames of a driver with these features.
    /// Otherwise the log says why not, if the setting is true.
    pub fn ends_for(&self, features: u64) -> Option<Arc<Ends>> {
        let ends = {
            let state = lock(&self.state);
            state.ends.clone().filter(|_| state.wanted)?
        };
        match ends.check(features) {
            Ok(()) => Some(ends),
            Err(why) => {
                self.fell_back(why);
                None
            }
        }
    }

    /// The kernel carries the frames from now on, or no longer.
    pub fn carries(&self, carries: bool) {
        let mut state = lock(&self.state);
        state.carries = carries;
        if carries {
            state.why = None;
            drop(state);
            tracing::info!(device = self.device, "the kernel carries the frames (vhost-net)");
        }
    }

    /// This process carries the frames of this driver.
    pub fn fell_back(&self, why: String) {
        let device = &self.device;
        tracing::warn!(device, "vhost = true, but the bus itself carries the frames: {why}");
        self.note(why);
    }

    /// Keeps why this process carries the frames, for those who ask.
    pub fn note(&self, why: String) {
        let mut state = lock(&self.state);
        (state.carries, state.why) = (false, Some(why));
    }

    /// Whether the kernel carries the frames now, and why it does not, though it should.
    pub fn inspect(&self) -> (bool, Option<String>) {
        let state = lock(&self.state);
        (state.carries, state.why.clone())
    }
}

impl Ends {
    fn of(ends: Vec<Box<dyn End>>) -> Result<Ends, String> {
        let known: Result<Vec<u64>, Errno> = ends.iter().map(|end| end.features()).collect();
        let known = known.map_err(|error| format!("/dev/vhost-net has no features: {error}"))?;
        Ok(Ends { ends, features: known.into_iter().fold(!0, |all, features| all & features) })
    }

    /// Whether the kernel can serve a driver that has accepted these features.
    fn check(&self, features: u64) -> Result<(), String> {
        for (bit, what) in [
            (
                common::RING_PACKED,
                "packed queues, and vhost-net has split ones; set packed = false",
            ),
            (feature::RSS, "receive-side scaling, which vhost-net has not; set rss = false"),
            (feature::HASH_REPORT, "hashes, which vhost-net does not report; set rss = false"),
        ] {
            if features & bit != 0 {
                return Err(format!("the driver uses {what}"));
            }
        }
        match features & OF_RINGS & !self.features {
            0 => Ok(()),
            lacks => Err(format!("the driver uses features that vhost-net lacks: {lacks:#x}")),
        }
    }
}

/// Why the kernel cannot serve a ring, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The kernel cannot have the memory.
    #[error(transparent)]
    Regions(#[from] NoRegions),
    /// The ring is not in one piece in memory that the device may read and write.
    #[error("a queue is not in one piece of the driver's memory")]
    Place,
    /// A request failed.
    #[error("{0}: {1}")]
    Request(&'static str, Errno),
    /// The process has no more descriptors.
    #[error("no eventfd can be made: {0}")]
    Eventfd(#[from] io::Error),
}

impl Fault {
    /// Whether the kernel can go on when the log of what is written has ended.
    pub fn is_of_log(&self) -> bool {
        matches!(self, Fault::Regions(NoRegions::Logged))
    }
}

/// Whether the kernel can have the memory. It can have none that has no region.
pub fn can_have(memory: &MemoryContext) -> bool {
    memory.regions(REGIONS_MAX).is_ok_and(|regions| !regions.list().is_empty())
}

trait During<T> {
    fn during(self, what: &'static str) -> Result<T, Fault>;
}

impl<T> During<T> for Result<T, Errno> {
    fn during(self, what: &'static str) -> Result<T, Fault> {
        self.map_err(|error| match error {
            // The module's own limit.
            Errno::TOOBIG => Fault::Request(
                "the driver's memory has more regions than vhost takes (max_mem_regions)",
                error,
            ),
            error => Fault::Request(what, error),
        })
    }
}

/// The kernel at work for a driver. Dropping it ends the work: the kernel then touches nothing of
/// the driver's any more.
pub struct AtWork {
    ends: Arc<Ends>,
    /// What the kernel has of the driver's memory. It stays mapped until the kernel has let go.
    memory: Option<Regions>,
    /// The rings that the kernel serves, by the numbers of their queues.
    rings: Vec<Option<Ring>>,
    signals: Arc<Signals>,
}

struct Ring {
    layout: Layout,
    place: RingPlace,
    call: Call,
    /// Written by the kernel if the interrupt has no eventfd.
    forward: OwnedFd,
}

/// The ring of a queue: that of the pair.
fn ring_of(index: u16) -> VhostRing {
    if index % 2 == 0 { VhostRing::Rx } else { VhostRing::Tx }
}

fn place(layout: &Layout, memory: &Regions) -> Result<RingPlace, Fault> {
    debug_assert_eq!(layout.format, Format::Split);
    let hosts = layout.ranges().map(|(addr, len)| memory.host(addr, len));
    let [Some(descriptors), Some(available), Some(used)] = hosts else { return Err(Fault::Place) };
    Ok(RingPlace { size: layout.size, descriptors, available, used })
}

impl AtWork {
    /// Lets the kernel begin for a driver with these features and this memory. It has no rings yet.
    /// The task of `signals` hears of bad rings.
    pub fn begin(
        ends: Arc<Ends>,
        features: u64,
        memory: &MemoryContext,
        signals: Arc<Signals>,
    ) -> Result<AtWork, Fault> {
        let queues = ends.ends.len() * 2;
        // Dropping it ends what has begun.
        let mut work = AtWork { ends, memory: None, rings: Vec::new(), signals };
        work.rings.resize_with(queues, || None);
        // The driver's addresses are those of the maps: the kernel needs no IOMMU of its own.
        let features = features & OF_RINGS & work.ends.features;
        for end in &work.ends.ends {
            end.set_owner().during("VHOST_SET_OWNER")?;
            end.set_features(features).during("VHOST_SET_FEATURES")?;
        }
        work.memory_changed(memory)?;
        Ok(work)
    }

    fn end(&self, index: u16) -> Result<&dyn End, Fault> {
        let end = self.ends.ends.get(usize::from(index / 2));
        end.map(|end| &**end).ok_or(Fault::Request("no such queue", Errno::NOENT))
    }

    /// Gives the kernel queue `index`, whose next available buffer has the index `next`. `tap` is
    /// the queue of the interface for the pair. It must be in use: the kernel does not wait for one
    /// that is not. On an error the kernel does not have the queue.
    pub fn add(
        &mut self,
        index: u16,
        (layout, next): (Layout, u16),
        (doorbell, call): (&Doorbell, &Call),
        tap: BorrowedFd<'_>,
    ) -> Result<(), Fault> {
        let memory = self.memory.as_ref().ok_or(Fault::Place)?;
        let place = place(&layout, memory)?;
        let forward = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let forward = forward.map_err(io::Error::from)?;
        self.signals.forward(index, &forward, call)?;
        let added = Ring { layout, place, call: call.clone(), forward };
        let (end, ring) = (self.end(index)?, ring_of(index));
        let begin = || {
            // SAFETY: `place` is in `self.memory`, which stays mapped until the kernel has let go:
            // `Drop` and `memory_changed` see to that. It is memory of a peer.
            unsafe { end.set_ring(ring, &place, next) }.during("VHOST_SET_VRING_ADDR")?;
            end.set_error(ring, Some(self.signals.error.as_fd())).during("VHOST_SET_VRING_ERR")?;
            set_call(end, ring, &added)?;
            let kick = doorbell.lend()?;
            end.set_kick(ring, Some(kick.as_fd())).during("VHOST_SET_VRING_KICK")?;
            end.set_backend(ring, Some(tap)).during("VHOST_NET_SET_BACKEND")?;
            // A kick that the kernel saw before had no effect.
            doorbell.wake();
            Ok(())
        };
        let begun: Result<(), Fault> = begin();
        if let Err(fault) = begun {
            doorbell.unbind();
            self.signals.forget(index);
            let _ = self.let_go(index); // It has begun to fail before.
            return Err(fault);
        }
        if let Some(slot) = self.rings.get_mut(usize::from(index)) {
            *slot = Some(added);
        }
        Ok(())
    }

    /// Takes queue `index` back. Returns the index of its next available buffer: no buffer is in
    /// flight. When this returns, the kernel does not touch the ring or its buffers.
    pub fn remove(&mut self, index: u16, doorbell: &Doorbell) -> Result<u16, Fault> {
        let next = self.let_go(index);
        doorbell.unbind();
        self.signals.forget(index);
        if let Some(slot) = self.rings.get_mut(usize::from(index)) {
            *slot = None;
        }
        next
    }

    fn let_go(&self, index: u16) -> Result<u16, Fault> {
        let (end, ring) = (self.end(index)?, ring_of(index));
        end.set_backend(ring, None).during("VHOST_NET_SET_BACKEND")?;
        let next = end.position(ring).during("VHOST_GET_VRING_BASE")?;
        // The eventfds may be a peer's.
        end.set_kick(ring, None).during("VHOST_SET_VRING_KICK")?;
        end.set_call(ring, None).during("VHOST_SET_VRING_CALL")?;
        end.set_error(ring, None).during("VHOST_SET_VRING_ERR")?;
        Ok(next)
    }

    /// The eventfds of the interrupts may have changed.
    pub fn calls_changed(&self) -> Result<(), Fault> {
        for (index, ring) in (0..).zip(&self.rings) {
            if let Some(ring) = ring {
                set_call(self.end(index)?, ring_of(index), ring)?;
            }
        }
        Ok(())
    }

    /// Gives the kernel the memory as it is now. When this returns, it touches no other memory.
    ///
    /// # Errors
    /// The kernel cannot have the memory, or a ring is no longer where it was. The kernel may then
    /// still have the former memory, which stays mapped.
    pub fn memory_changed(&mut self, memory: &MemoryContext) -> Result<(), Fault> {
        let memory = memory.regions(REGIONS_MAX)?;
        for ring in self.rings.iter().flatten() {
            if place(&ring.layout, &memory)? != ring.place {
                return Err(Fault::Place);
            }
        }
        let region = |&Region { start, len, host }: &Region| VhostRegion { start, len, host };
        let table: Vec<_> = memory.list().iter().map(region).collect();
        for end in &self.ends.ends {
            // SAFETY: the regions stay mapped as long as `self.memory` has them. It keeps these, or
            // the former ones until all ends have let go of them. It is memory of a peer, which
            // this process reaches by atomic accesses, raw copies and system calls alone.
            unsafe { end.set_memory(&table) }.during("VHOST_SET_MEM_TABLE")?;
        }
        self.memory = Some(memory);
        Ok(())
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        for end in &self.ends.ends {
            // It fails for an end that had no owner yet.
            let _ = end.reset_owner();
        }
        // Only now may the driver's memory go.
        self.memory = None;
    }
}

/// Lets the kernel interrupt the driver: by the interrupt's own eventfd, or through the task of
/// the signals.
fn set_call(end: &dyn End, which: VhostRing, ring: &Ring) -> Result<(), Fault> {
    let direct = ring.call.eventfd();
    // A peer may have given something else than an eventfd.
    if direct.is_some_and(|direct| end.set_call(which, Some(direct.as_fd())).is_ok()) {
        return Ok(());
    }
    end.set_call(which, Some(ring.forward.as_fd())).during("VHOST_SET_VRING_CALL")
}

/// What the kernel tells this process.
pub struct Signals {
    /// A ring is bad.
    error: OwnedFd,
    /// The interrupts that have no eventfd, by the numbers of the queues.
    forwarded: Mutex<Vec<(u16, OwnedFd, Call)>>,
    task: Mutex<Option<TaskHandle>>,
}

impl Signals {
    pub fn new() -> io::Result<Arc<Signals>> {
        let error = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Signals { error, forwarded: Mutex::default(), task: Mutex::default() }))
    }

    /// Lets `task` watch the signals.
    pub fn watched_by(&self, task: &TaskHandle) -> io::Result<()> {
        task.watch(&self.error, vbus_core::Interest::Read)?;
        *lock(&self.task) = Some(task.clone());
        Ok(())
    }

    fn forward(&self, index: u16, eventfd: &OwnedFd, call: &Call) -> Result<(), Fault> {
        let eventfd = eventfd.try_clone()?;
        if let Some(task) = &*lock(&self.task) {
            task.watch(&eventfd, vbus_core::Interest::Read).map_err(io::Error::from)?;
        }
        lock(&self.forwarded).push((index, eventfd, call.clone()));
        Ok(())
    }

    /// Forwards no interrupts of queue `index` any more. The kernel does not write its eventfd any
    /// more, but may have done so before: the driver gets that interrupt now.
    fn forget(&self, index: u16) {
        lock(&self.forwarded).retain(|(of, eventfd, call)| {
            if *of != index {
                return true;
            }
            if let Some(task) = &*lock(&self.task) {
                task.unwatch(eventfd);
            }
            if taken(eventfd) {
                call.notify(true);
            }
            false
        });
    }

    /// Forwards interrupts. Returns whether there was one.
    fn pass_on(&self) -> bool {
        let forwarded = lock(&self.forwarded);
        let rung = forwarded.iter().filter(|(_, eventfd, _)| taken(eventfd));
        rung.fold(false, |_, (_, _, call)| {
            call.notify(true);
            true
        })
    }
}

/// Whether an eventfd of this process was written since the last look.
fn taken(eventfd: &OwnedFd) -> bool {
    rustix::io::read(eventfd, &mut [0; 8]).is_ok()
}

/// The task that hears what the kernel tells. `bad` is called when a ring is bad, until it returns
/// true: the kernel will have no ring soon.
pub struct SignalsTask {
    pub signals: Arc<Signals>,
    pub bad: Box<dyn Fn() -> bool + Send>,
    /// `bad` has returned true.
    pub told: bool,
}

impl Task for SignalsTask {
    fn work(&self) -> String {
        "the signals of vhost-net".into()
    }

    fn poll(&mut self, _budget: u32) -> Result<Progress, ErrorCode> {
        if taken(&self.signals.error) && !self.told {
            self.told = (self.bad)();
        }
        Ok(if self.signals.pass_on() { Progress::Busy } else { Progress::Idle })
    }

    fn adaptive(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use vbus_core::{Executor, Host, Tuning};

    use super::*;
    use crate::device::Transport;

    #[derive(Default)]
    struct Interrupts(AtomicU32);

    impl Transport for Interrupts {
        fn queue_used(&self, _index: u16) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }

        fn config_changed(&self, _config: Vec<u8>, _tell: bool) {}
    }

    fn eventfd() -> OwnedFd {
        super::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
    }

    #[test]
    fn the_last_interrupt_of_a_queue_that_leaves_is_forwarded() {
        let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
        let host = Host::new("n", executor, 1, 3);
        let interrupts = Arc::new(Interrupts::default());
        let signals = Signals::new().unwrap();
        let queues = [0, 1].map(|index| {
            let call = Call::new(interrupts.clone(), index, host.counters().clone());
            let eventfd = eventfd();
            signals.forward(index, &eventfd, &call).unwrap();
            eventfd
        });
        let count = || interrupts.0.load(Ordering::Relaxed);
        // As the kernel does, and no task has looked since.
        for eventfd in &queues {
            rustix::io::write(eventfd, &1_u64.to_ne_bytes()).unwrap();
        }
        signals.forget(0);
        assert_eq!(count(), 1);
        signals.forget(0);
        assert!(signals.pass_on());
        assert_eq!(count(), 2);
        signals.forget(1);
        assert_eq!(count(), 2, "it had been forwarded");
    }

    #[test]
    fn a_bad_ring_is_told_until_somebody_acts() {
        let signals = Signals::new().unwrap();
        let calls = Arc::new(AtomicU32::new(0));
        let of_task = calls.clone();
        let bad = Box::new(move || of_task.fetch_add(1, Ordering::Relaxed) == 1);
        let mut task = SignalsTask { signals: signals.clone(), bad, told: false };
        for told in [0, 1, 2, 2] {
            assert_eq!(calls.load(Ordering::Relaxed), told);
            rustix::io::write(&signals.error, &1_u64.to_ne_bytes()).unwrap();
            task.poll(1).unwrap();
        }
    }
}
