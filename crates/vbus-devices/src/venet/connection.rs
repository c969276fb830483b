// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver's connection to a venet device: its regions, its calls, and the tasks that serve it.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use vbus_core::shm::abi::venet as abi;
use vbus_core::shm::ring::{DeviceEnd, Returns, SIGNAL_OFFSET};
use vbus_core::{Call, Connection, ErrorCode, Open, Region, Task, TaskHandle, Window, lock};
use vbus_net::front::{Receiver, RxQueue, RxSlot, Setting, TxQueue};
use vbus_net::{Filter, HEADER_BYTES, Mac, Offloads, Plug, Port, Rss, SharedSink, Steering, front};

use super::calls;
use super::device::{RING_MAX, VenetDevice, offloads};
use super::news::{News, Pending};
use super::pages::{Pages, PagesTask};
use super::ring::{RxEntries, TxEntries};

type Pair = front::Pair<TxEntries, RxEntries>;
type Rx = front::Rx<RxEntries>;

/// The rings of one queue pair.
#[derive(Default)]
struct Rings {
    tx: Option<Region>,
    rx: Option<Region>,
}

/// The settings of SET_COALESCE for one queue pair.
#[derive(Default)]
struct PairCoalesce {
    tx: Arc<Setting>,
    rx: Arc<Setting>,
}

/// A connection.
pub struct VenetConnection {
    device: Arc<VenetDevice>,
    open: Open,
    rings: Vec<Rings>,
    coalesce: Vec<PairCoalesce>,
    receiver: Arc<Receiver>,
    pages: Arc<Pages>,
    pages_task: TaskHandle,
    running: Option<Running>,
}

/// The state of a connection after START.
struct Running {
    plug: Arc<dyn Plug>,
    pairs: Vec<(Arc<Mutex<Pair>>, TaskHandle)>,
}

impl VenetConnection {
    pub fn new(device: Arc<VenetDevice>, open: Open) -> VenetConnection {
        let filter = Arc::new(Filter::new(device.config.mac));
        let pending = Pending::default();
        let told = (open.incarnation, open.notifier.clone());
        let pages = Arc::new(Pages::new(device.clone(), filter.clone(), pending.clone(), told));
        let pages_task = spawn(&open, 0, Box::new(PagesTask::new(pages.clone())));
        device.link.observe(Some(pages_task.clone()));
        let rings = device.pairs.iter().map(|_| Rings::default()).collect();
        let coalesce = device.pairs.iter().map(|_| PairCoalesce::default()).collect();
        let receiver = Arc::new(Receiver {
            mtu: usize::from(device.config.mtu),
            filter,
            offloads: AtomicU64::new(offloads(open.features).1.bits()),
            steering: Arc::new(Steering::new(device.config.queue_pairs)),
            hash: open.features & abi::F_HASH != 0,
            backpressure: device.config.backpressure,
            moved: moved(News::new(pending, pages_task.clone())),
        });
        VenetConnection {
            device,
            open,
            rings,
            coalesce,
            receiver,
            pages,
            pages_task,
            running: None,
        }
    }

    /// Serves the rings from here on.
    fn start(&mut self) -> Result<(), ErrorCode> {
        if self.running.is_some() {
            return Err(ErrorCode::DENIED);
        }
        let count = self.rings.iter().take_while(|rings| rings.tx.is_some()).count();
        let whole = |(i, rings): (usize, &Rings)| {
            rings.tx.is_some() == (i < count) && rings.rx.is_some() == (i < count)
        };
        if count == 0 || !self.rings.iter().enumerate().all(whole) {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        let queues = u16::try_from(count).map_err(|_| ErrorCode::BAD_ARGUMENT)?;
        let before = self.receiver.steering.queues();
        if !self.receiver.steering.set_queues(queues) {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        // From the plug on, other devices may steer frames by the new number.
        let started = self.start_queues(queues);
        if started.is_err() {
            self.receiver.steering.set_queues(before);
        }
        started
    }

    /// Plugs the driver in, with its first `queues` queue pairs.
    fn start_queues(&mut self, queues: u16) -> Result<(), ErrorCode> {
        let backend = &self.device.backend;
        let slots = self.device.pairs.iter().map(|counters| RxSlot::new(counters.clone()));
        let shares = backend.shares_sinks(self.open.features & abi::F_RSS != 0);
        let rx: Vec<Rx> = slots
            .map(|slot| match shares {
                true => Rx::Shared(Arc::new(Mutex::new(slot))),
                false => Rx::Own(slot),
            })
            .collect();
        let lanes = rx.iter().filter_map(|rx| match rx {
            Rx::Shared(slot) => Some(slot.clone() as SharedSink),
            Rx::Own(_) => None,
        });
        let shared = (self.receiver.filter.clone(), self.receiver.steering.clone());
        let (name, config) = (&self.device.name, &self.device.config);
        let port = Port::new(name, config.mtu, config.queue_pairs, shared, lanes.collect());
        let plug = backend.plug(Arc::new(port))?;
        let mut running = Running { plug, pairs: Vec::new() };
        for (i, rx) in rx.into_iter().enumerate() {
            if let Err(error) = self.spawn_pair(&mut running, i, rx) {
                running.stop();
                return Err(error);
            }
        }
        for i in 0..usize::from(queues) {
            let served =
                self.serve(&running, i, false).and_then(|()| self.serve(&running, i, true));
            if let Err(error) = served {
                running.stop();
                return Err(error);
            }
        }
        self.running = Some(running);
        self.pages_task.wake();
        Ok(())
    }

    /// Lets the back end set itself up for this many queues and these offloads, and then ends
    /// `call`. If that fails later, on another thread, `undo` runs there first.
    ///
    /// # Errors
    /// The back end cannot begin. The call has failed, and `undo` does not run.
    fn configure(
        &self,
        call: Call,
        (queues, offloads): (u16, Offloads),
        undo: impl FnOnce() + Send + 'static,
    ) -> Result<(), ErrorCode> {
        let running = self.running()?;
        let tasks: Vec<_> = running.pairs.iter().map(|(_, task)| task.clone()).collect();
        let done = move |result: Result<(), ErrorCode>| {
            if result.is_err() {
                undo();
            }
            tasks.iter().for_each(TaskHandle::wake); // Each checks whether it is in use now.
            call.finish(result.map(|()| 0));
        };
        running.plug.configure(queues, offloads, Box::new(done))
    }

    /// Makes pair `i`, without rings, and its task.
    fn spawn_pair(&self, running: &mut Running, i: usize, rx: Rx) -> Result<(), ErrorCode> {
        let index = u16::try_from(i).map_err(|_| ErrorCode::BAD_ARGUMENT)?;
        let (open, mut made) = (&self.open, None);
        let fail = open.fail.clone();
        let (worker, counters) = (open.worker.wrapping_add(i), open.counters.clone());
        let task = open.executor.spawn_with(
            worker,
            counters,
            move |error| fail.fail(error),
            |task| {
                let queue = running.plug.queue(index, task)?;
                let (memory, receiver) = (open.memory.clone(), self.receiver.clone());
                let tx_offloads = offloads(open.features).0;
                let counters = self.device.pairs[i].clone();
                let pair = Pair::new(rx, queue, memory, receiver, tx_offloads, counters);
                let pair = Arc::new(Mutex::new(pair));
                made = Some(pair.clone());
                Ok::<_, ErrorCode>(
                    Box::new(front::PairTask { pair, number: index }) as Box<dyn Task>
                )
            },
        )?;
        running.pairs.extend(made.map(|pair| (pair, task)));
        Ok(())
    }

    /// Gives the running pair `i` its transmit ring or its receive ring. The pair has no such ring
    /// if the driver has registered none.
    fn serve(&self, running: &Running, i: usize, is_rx: bool) -> Result<(), ErrorCode> {
        let (Some((pair, task)), Some(rings)) = (running.pairs.get(i), self.rings.get(i)) else {
            return Err(ErrorCode::BAD_ARGUMENT);
        };
        let region = if is_rx { &rings.rx } else { &rings.tx };
        match (region, is_rx) {
            (None, true) => lock(pair).set_rx(None),
            (None, false) => lock(pair).set_tx(None),
            (Some(region), true) => {
                let number = u16::try_from(i).map_err(|_| ErrorCode::BAD_ARGUMENT)?;
                let queue = RxQueue::new(
                    RxEntries::new(attach(region, true)?, region.interrupt.clone()),
                    self.open.memory.clone(),
                    self.receiver.clone(),
                    self.device.pairs[i].clone(),
                    (number, task.clone(), self.coalesce[i].rx.clone()),
                );
                lock(pair).set_rx(Some(queue));
            }
            (Some(region), false) => {
                let ring = TxEntries::new(attach(region, false)?, region.interrupt.clone());
                let queue = TxQueue::new(ring, HEADER_BYTES, self.coalesce[i].tx.clone());
                lock(pair).set_tx(Some(queue));
            }
        }
        if let Some(region) = region {
            // It also wakes the task.
            region.doorbell.bind(task).inspect_err(|_| match is_rx {
                true => lock(pair).set_rx(None),
                false => lock(pair).set_tx(None),
            })?;
        }
        Ok(())
    }

    /// The state after START; DENIED before it.
    fn running(&self) -> Result<&Running, ErrorCode> {
        self.running.as_ref().ok_or(ErrorCode::DENIED)
    }

    /// Fails with DENIED unless the driver has accepted one of these features.
    fn accepted(&self, features: u64) -> Result<(), ErrorCode> {
        if self.open.features & features != 0 { Ok(()) } else { Err(ErrorCode::DENIED) }
    }

    /// SET_OFFLOADS. The device delivers no frame by the old offloads after this returns.
    fn set_offloads(&self, offloads: Offloads) {
        self.receiver.set_offloads(offloads);
        for (pair, _) in self.running.iter().flat_map(|running| &running.pairs) {
            lock(pair).settle();
        }
    }

    /// SET_QUEUES. Returns the former number of queues.
    fn set_queues(&self, queues: u16) -> Result<u16, ErrorCode> {
        let running = self.running()?;
        let used = &self.rings[..usize::from(queues)];
        let whole = used.iter().all(|rings| rings.tx.is_some() && rings.rx.is_some());
        let before = self.receiver.steering.queues();
        if !whole || !self.receiver.steering.set_queues(queues) {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        for (pair, _) in &running.pairs {
            lock(pair).queues_changed();
        }
        Ok(before)
    }

    /// SET_COALESCE.
    fn set_coalesce(&self, calls::Coalesce { pair, rx, tx }: &calls::Coalesce) {
        for (i, of_pair) in self.coalesce.iter().enumerate() {
            if pair.is_none_or(|pair| usize::from(pair) == i) {
                of_pair.rx.set(rx.0, rx.1);
                of_pair.tx.set(tx.0, tx.1);
            }
        }
        for (_, task) in self.running.iter().flat_map(|running| &running.pairs) {
            task.wake(); // An interrupt that it holds back may go now.
        }
    }

    /// SET_MAC.
    fn set_mac(&self, mac: Mac) -> Result<(), ErrorCode> {
        if !self.running()?.plug.set_mac(mac) {
            return Err(ErrorCode::EXISTS);
        }
        self.pages_task.wake();
        Ok(())
    }

    /// SET_RSS.
    fn set_rss(&self, rss: Option<Rss>) -> Result<(), ErrorCode> {
        if rss.as_ref().is_some_and(|rss| rss.highest_queue().is_some()) {
            self.accepted(abi::F_RSS)?;
        }
        if self.receiver.steering.set_rss(rss) { Ok(()) } else { Err(ErrorCode::BAD_ARGUMENT) }
    }

    fn filter_changed(&self) {
        if let Some(running) = &self.running {
            running.plug.filter_changed();
        }
    }

    /// The place of the ring with region id `id`: its pair, whether it is the receive ring, and the
    /// region there, if there is one.
    fn ring_place(&mut self, id: u32) -> Result<(usize, bool, &mut Option<Region>), ErrorCode> {
        let is_rx = id % 2 == 1;
        let pair = usize::try_from(id / 2).map_err(|_| ErrorCode::BAD_ARGUMENT)?;
        let rings = self.rings.get_mut(pair).ok_or(ErrorCode::BAD_ARGUMENT)?;
        Ok((pair, is_rx, if is_rx { &mut rings.rx } else { &mut rings.tx }))
    }

    /// Takes region `handle` out of its pair. Returns the number of the pair, and whether the
    /// region is the receive ring.
    fn take_ring(&mut self, handle: u32) -> Option<(usize, bool)> {
        let mut rings = self.rings.iter_mut().enumerate();
        rings.find_map(|(i, rings)| {
            let tx = rings.tx.take_if(|region| region.handle == handle).map(|_| (i, false));
            tx.or_else(|| rings.rx.take_if(|region| region.handle == handle).map(|_| (i, true)))
        })
    }
}

impl Running {
    /// After this, neither the tasks nor the receive rings that other devices deliver to hold a
    /// window on the driver's memory.
    fn stop(self) {
        for (pair, task) in &self.pairs {
            task.stop();
            let mut pair = lock(pair);
            pair.set_tx(None);
            pair.set_rx(None);
        }
    }
}

/// Runs a task at the connection's place on the executor, or `beside` places after it.
fn spawn(open: &Open, beside: usize, task: Box<dyn Task>) -> TaskHandle {
    let fail = open.fail.clone();
    let worker = open.worker.wrapping_add(beside);
    open.executor.spawn(worker, task, open.counters.clone(), move |error| fail.fail(error))
}

/// What queue pairs call when frames have passed.
fn moved(news: News) -> Box<dyn Fn() + Send + Sync> {
    Box::new(move || news.moved())
}

/// Attaches the device's end of the transmit or receive ring in a region.
fn attach(region: &Region, is_rx: bool) -> Result<DeviceEnd<Window>, ErrorCode> {
    let ring = DeviceEnd::attach(region.window.clone())?;
    let returns = if is_rx { Returns::Runs } else { Returns::Counted };
    if ring.layout().returns() != returns || ring.layout().entries() > u32::from(RING_MAX) {
        return Err(ErrorCode::BAD_LAYOUT);
    }
    Ok(ring)
}

impl Connection for VenetConnection {
    fn check_region(&mut self, id: u32, _: u64) -> Result<(), ErrorCode> {
        if id == abi::REGION_STATUS || id == abi::REGION_COUNTERS {
            return Ok(());
        }
        let (_, _, place) = self.ring_place(id)?;
        if place.is_some() { Err(ErrorCode::EXISTS) } else { Ok(()) }
    }

    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        if region.id == abi::REGION_STATUS || region.id == abi::REGION_COUNTERS {
            self.pages.add(region)?;
            self.pages_task.wake();
            return Ok(());
        }
        let (pair, is_rx, place) = self.ring_place(region.id)?;
        if place.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        if region.signal_offset != Some(SIGNAL_OFFSET) {
            return Err(ErrorCode::BAD_SIGNAL);
        }
        // Check the ring here, so that the driver learns which one is wrong.
        attach(&region, is_rx)?;
        let handle = region.handle;
        *place = Some(region);
        let running = self.running.as_ref();
        let served = running.map_or(Ok(()), |running| self.serve(running, pair, is_rx));
        if served.is_err() {
            // The driver has changed the ring since it was checked. It is told that the device does
            // not have the region.
            self.take_ring(handle);
        }
        served
    }

    fn region_dropped(&mut self, handle: u32) -> Result<(), ErrorCode> {
        if self.pages.drop_region(handle) {
            return Ok(());
        }
        let taken = self.take_ring(handle);
        if let (Some((pair, is_rx)), Some(running)) = (taken, &self.running) {
            self.serve(running, pair, is_rx)?;
        }
        Ok(())
    }

    /// START, SET_OFFLOADS and SET_QUEUES end when the back end has set itself up.
    fn start_call(&mut self, mut call: Call) {
        if call.flags() != 0 {
            return call.finish(Err(ErrorCode::BAD_ARGUMENT));
        }
        let function = call.function();
        let begun = match function {
            abi::CALL_START if !call.buffer().is_empty() => Err(ErrorCode::BAD_LENGTH),
            abi::CALL_START => self.start().map(|()| None),
            abi::CALL_SET_OFFLOADS => calls::offloads(call.buffer(), self.open.features)
                .map(|offloads| self.set_offloads(offloads))
                .map(|()| None),
            abi::CALL_SET_QUEUES => calls::queues(call.buffer(), self.device.config.queue_pairs)
                .and_then(|queues| self.set_queues(queues))
                .map(Some),
            _ => {
                let result = self.call(function, 0, call.buffer());
                return call.finish(result);
            }
        };
        let before = match begun {
            Ok(before) => before,
            Err(error) => return call.finish(Err(error)),
        };
        if self.running.is_none() {
            return call.finish(Ok(0)); // The back end gets the offloads with START.
        }
        let (receiver, fail) = (self.receiver.clone(), self.open.fail.clone());
        let state = (receiver.steering.queues(), receiver.offloads());
        let later = receiver.clone();
        let undo = move || match before {
            // The back end goes on with the queues that it had.
            Some(before) => drop(later.steering.set_queues(before)),
            // The rings are served already.
            None if function == abi::CALL_START => fail.fail(ErrorCode::FAILED),
            None => {}
        };
        if self.configure(call, state, undo).is_err() {
            match before {
                Some(before) => drop(receiver.steering.set_queues(before)),
                None if function == abi::CALL_START => {
                    if let Some(running) = self.running.take() {
                        running.stop();
                    }
                }
                None => {}
            }
        }
    }

    /// The calls that end at once.
    fn call(&mut self, function: u32, _flags: u32, buffer: &mut [u8]) -> Result<u64, ErrorCode> {
        match function {
            abi::CALL_FILTER => {
                self.receiver.filter.set_addresses(calls::filter(buffer)?);
                self.filter_changed();
            }
            abi::CALL_SET_MAC => {
                self.accepted(abi::F_MAC)?;
                self.set_mac(calls::mac(buffer)?)?;
            }
            abi::CALL_SET_RSS => {
                self.accepted(abi::F_RSS | abi::F_HASH)?;
                self.set_rss(calls::rss(buffer)?)?;
            }
            abi::CALL_SET_COALESCE => {
                self.accepted(abi::F_COALESCE)?;
                self.set_coalesce(&calls::coalesce(buffer, self.device.config.queue_pairs)?);
            }
            abi::CALL_SET_VLANS => {
                self.accepted(abi::F_VLAN)?;
                self.receiver.filter.set_vlans(calls::vlans(buffer)?);
                self.filter_changed();
            }
            _ => return Err(ErrorCode::BAD_FUNCTION),
        }
        Ok(0)
    }
}

impl Drop for VenetConnection {
    /// After this, no task holds a window on the driver's memory.
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop();
        }
        self.device.link.observe(None);
        self.pages_task.stop();
        self.pages.close();
    }
}
