// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver's connection to a venet device: its regions, its calls, and the tasks that serve it.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::shm::abi::venet as abi;
use vbus_core::shm::ring::{DeviceEnd, Returns, SIGNAL_OFFSET};
use vbus_core::{Call, Connection, ErrorCode, Open, Region, Task, TaskHandle, Window, state};
use vbus_net::front::{PairsState, Receiver, ReceiverState, Setting, Setup};
use vbus_net::{Filter, HEADER_BYTES, Mac, Offloads, Rss, Steering, is_group};

use super::calls;
use super::device::{RING_MAX, VenetDevice, offloads};
use super::news::{News, Pending};
use super::pages::{Pages, PagesState, PagesTask};
use super::ring::{RxEntries, TxEntries};

/// The queue pairs of a connection.
type Pairs = vbus_net::front::Pairs<TxEntries, RxEntries>;

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
    /// After START.
    running: Option<Pairs>,
}

impl VenetConnection {
    pub fn new(device: Arc<VenetDevice>, open: Open) -> VenetConnection {
        let filter = Arc::new(Filter::new(device.nic.config.mac));
        let pending = Pending::default();
        let told = (open.incarnation, open.notifier.clone());
        let pages = Arc::new(Pages::new(device.clone(), filter.clone(), pending.clone(), told));
        let pages_task = spawn(&open, 0, Box::new(PagesTask::new(pages.clone())));
        device.nic.link.observe(Some(pages_task.clone()));
        let rings = device.nic.pairs.iter().map(|_| Rings::default()).collect();
        let coalesce = device.nic.pairs.iter().map(|_| PairCoalesce::default()).collect();
        let receiver = Arc::new(Receiver {
            mtu: usize::from(device.nic.config.mtu),
            filter,
            offloads: AtomicU64::new(offloads(open.features).1.bits()),
            steering: Arc::new(Steering::new(device.nic.config.queue_pairs)),
            hash: open.features & abi::F_HASH != 0,
            backpressure: device.nic.config.backpressure,
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

    /// The connection of a driver that had these regions with a device that this one goes on for.
    pub fn again(
        device: Arc<VenetDevice>,
        open: Open,
        regions: Vec<Region>,
        saved: &Value,
    ) -> Result<VenetConnection, String> {
        let Saved { receiver, coalesce, pages, pairs } = state::read_part(saved)?;
        let own = device.nic.config.mac;
        let mut this = VenetConnection::new(device, open);
        this.set_receiver(&receiver)?;
        if coalesce.len() != this.coalesce.len() {
            return Err(format!("coalesce has {} pairs", coalesce.len()));
        }
        for (pair, saved) in this.coalesce.iter().zip(&coalesce) {
            pair.rx.set(saved.rx.0, saved.rx.1);
            pair.tx.set(saved.tx.0, saved.tx.1);
        }
        this.pages.set_announces(pages.announces);
        for region in regions {
            let id = region.id;
            let placed = this.place_again(region, &pages);
            placed.map_err(|error| format!("region id {id}: {error}"))?;
        }
        match pairs {
            Some(pairs) => this.start_again(&receiver, &pairs)?,
            None if receiver.mac() != own => {
                return Err("a driver that has not started has another address".into());
            }
            None => {}
        }
        Ok(this)
    }

    /// Sets what the driver accepts. It must have accepted the features for that.
    fn set_receiver(&self, saved: &ReceiverState) -> Result<(), String> {
        let features = self.open.features;
        let bits = saved.offloads() << abi::F_RX_SHIFT;
        let has = |wanted: u64, what: &str| match features & wanted != 0 {
            true => Ok(()),
            false => Err(format!("{what} is there without its feature")),
        };
        calls::offloads(&bits.to_le_bytes(), features)
            .map_err(|_| "offloads are none that were accepted")?;
        if saved.has_vlans() {
            has(abi::F_VLAN, "vlans")?;
        }
        if let Some(by_hash) = saved.has_rss() {
            has(if by_hash { abi::F_RSS } else { abi::F_RSS | abi::F_HASH }, "rss")?;
        }
        if saved.mac() != self.device.nic.config.mac {
            has(abi::F_MAC, "another address")?;
        }
        let pairs = self.device.nic.config.queue_pairs;
        self.receiver.restore(saved, abi::FILTER_MAX as usize, pairs)
    }

    /// Puts a region in its place. Its ring or page is in use already.
    fn place_again(&mut self, region: Region, pages: &PagesState) -> Result<(), ErrorCode> {
        if region.id == abi::REGION_STATUS || region.id == abi::REGION_COUNTERS {
            return self.pages.add_again(region, pages);
        }
        let (_, is_rx, place) = self.ring_place(region.id)?;
        if place.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        if region.signal_offset != Some(SIGNAL_OFFSET) {
            return Err(ErrorCode::BAD_SIGNAL);
        }
        attach(&region, is_rx)?;
        *place = Some(region);
        Ok(())
    }

    /// Serves the rings again.
    fn start_again(&mut self, receiver: &ReceiverState, saved: &PairsState) -> Result<(), String> {
        let failed = |error: ErrorCode| format!("the driver's rings cannot be served: {error}");
        let running = self.plug_in().map_err(failed)?;
        let mac = receiver.mac();
        if mac != self.device.nic.config.mac
            && (mac == Mac::default() || is_group(mac) || !running.plug().set_mac(mac))
        {
            return Err("the driver's address belongs to another device".into());
        }
        for i in 0..self.rings.len() {
            for is_rx in [false, true] {
                self.serve(&running, i, is_rx, resume).map_err(failed)?;
            }
        }
        running.restore(saved)?;
        let (queues, fail) = (self.receiver.steering.queues(), self.open.fail.clone());
        let done = move |result: Result<(), ErrorCode>| {
            if let Err(error) = result {
                fail.fail(error);
            }
        };
        let offloads = self.receiver.offloads();
        running.plug().configure(queues, offloads, Box::new(done)).map_err(failed)?;
        self.running = Some(running);
        Ok(())
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

    /// Plugs the driver in, with queue pairs that have no rings.
    fn plug_in(&self) -> Result<Pairs, ErrorCode> {
        let (open, fail) = (&self.open, self.open.fail.clone());
        Pairs::start(&Setup {
            nic: &self.device.nic,
            receiver: &self.receiver,
            by_hash: open.features & abi::F_RSS != 0,
            tx_offloads: offloads(open.features).0,
            memory: &open.memory,
            place: (&open.executor, open.worker, &open.counters),
            fail: Arc::new(move |error| fail.fail(error)),
        })
    }

    /// Plugs the driver in, with its first `queues` queue pairs.
    fn start_queues(&mut self, queues: u16) -> Result<(), ErrorCode> {
        let running = self.plug_in()?;
        for i in 0..usize::from(queues) {
            self.serve(&running, i, false, attach)?;
            self.serve(&running, i, true, attach)?;
        }
        self.running = Some(running);
        self.pages_task.wake();
        Ok(())
    }

    /// Gives the running pair `i` its transmit ring or its receive ring. The pair has no such ring
    /// if the driver has registered none. `end` makes the device's end of the ring.
    fn serve(
        &self,
        running: &Pairs,
        i: usize,
        is_rx: bool,
        end: fn(&Region, bool) -> Result<DeviceEnd<Window>, ErrorCode>,
    ) -> Result<(), ErrorCode> {
        let (Some(task), Some(rings)) = (running.task(i), self.rings.get(i)) else {
            return Err(ErrorCode::BAD_ARGUMENT);
        };
        let forget = || match is_rx {
            true => running.set_rx(i, None),
            false => running.set_tx(i, None),
        };
        let Some(region) = (if is_rx { &rings.rx } else { &rings.tx }) else {
            forget();
            return Ok(());
        };
        let (interrupt, coalesce) = (region.interrupt.clone(), &self.coalesce[i]);
        let ring = end(region, is_rx)?;
        match is_rx {
            true => {
                running.set_rx(i, Some((RxEntries::new(ring, interrupt), coalesce.rx.clone())));
            }
            false => {
                let ring = TxEntries::new(ring, interrupt);
                running.set_tx(i, Some((ring, HEADER_BYTES, coalesce.tx.clone())));
            }
        }
        // It also wakes the task.
        region.doorbell.bind(task).inspect_err(|_| forget())
    }

    /// The state after START; DENIED before it.
    fn running(&self) -> Result<&Pairs, ErrorCode> {
        self.running.as_ref().ok_or(ErrorCode::DENIED)
    }

    /// Fails with DENIED unless the driver has accepted one of these features.
    fn accepted(&self, features: u64) -> Result<(), ErrorCode> {
        if self.open.features & features != 0 { Ok(()) } else { Err(ErrorCode::DENIED) }
    }

    /// SET_OFFLOADS. The device delivers no frame by the old offloads after this returns.
    fn set_offloads(&self, offloads: Offloads) {
        self.receiver.set_offloads(offloads);
        self.running.iter().for_each(Pairs::settle);
    }

    /// SET_QUEUES.
    fn set_queues(&self, queues: u16) -> Result<(), ErrorCode> {
        let running = self.running()?;
        let used = &self.rings[..usize::from(queues)];
        let whole = used.iter().all(|rings| rings.tx.is_some() && rings.rx.is_some());
        if !whole || !self.receiver.steering.set_queues(queues) {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        running.queues_changed();
        Ok(())
    }

    /// SET_COALESCE.
    fn set_coalesce(&self, calls::Coalesce { pair, rx, tx }: &calls::Coalesce) {
        for (i, of_pair) in self.coalesce.iter().enumerate() {
            if pair.is_none_or(|pair| usize::from(pair) == i) {
                of_pair.rx.set(rx.0, rx.1);
                of_pair.tx.set(tx.0, tx.1);
            }
        }
        for task in self.running.iter().flat_map(Pairs::tasks) {
            task.wake(); // An interrupt that it holds back may go now.
        }
    }

    /// SET_MAC.
    fn set_mac(&self, mac: Mac) -> Result<(), ErrorCode> {
        if !self.running()?.plug().set_mac(mac) {
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
            running.plug().filter_changed();
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

/// The connection as plain data (spec/state-format.md, "venet").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    receiver: ReceiverState,
    /// The settings of SET_COALESCE for each queue pair.
    coalesce: Vec<CoalesceState>,
    pages: PagesState,
    /// `None`: the driver has not called START.
    pairs: Option<PairsState>,
}

/// Makes a connection's part one that outlasts the process ([`vbus_core::Device::outlast`]). The
/// rings resume from memory. Whoever goes on writes the pages anew.
pub fn outlast(connection: &mut Value) -> Result<(), String> {
    let mut saved: Saved = state::read_part(connection)?;
    saved.pages.outlast();
    saved.pairs.iter_mut().for_each(PairsState::outlast);
    *connection = state::part(&saved)?;
    Ok(())
}

/// Microseconds and frames of each ring.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CoalesceState {
    rx: (u32, u32),
    tx: (u32, u32),
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
    check(DeviceEnd::attach(region.window.clone())?, is_rx)
}

/// Attaches it in place of the end of a device that this one goes on for. The driver is interrupted
/// anyway.
fn resume(region: &Region, is_rx: bool) -> Result<DeviceEnd<Window>, ErrorCode> {
    check(DeviceEnd::resume(region.window.clone())?.0, is_rx)
}

/// Checks that a ring has the shape of a transmit or receive ring.
fn check(ring: DeviceEnd<Window>, is_rx: bool) -> Result<DeviceEnd<Window>, ErrorCode> {
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
        let served = running.map_or(Ok(()), |running| self.serve(running, pair, is_rx, attach));
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
            self.serve(running, pair, is_rx, attach)?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Value, String> {
        let coalesce = |pair: &PairCoalesce| CoalesceState { rx: pair.rx.get(), tx: pair.tx.get() };
        state::part(&Saved {
            receiver: self.receiver.save(),
            coalesce: self.coalesce.iter().map(coalesce).collect(),
            pages: self.pages.save(),
            pairs: self.running.as_ref().map(Pairs::save).transpose()?,
        })
    }

    /// START, SET_OFFLOADS and SET_QUEUES end when the back end has set itself up. If it fails, the
    /// driver's choices are what they were.
    fn start_call(&mut self, mut call: Call) {
        if call.flags() != 0 {
            return call.finish(Err(ErrorCode::BAD_ARGUMENT));
        }
        let (function, before) = (call.function(), self.receiver.choices());
        let begun = match function {
            abi::CALL_START if !call.buffer().is_empty() => Err(ErrorCode::BAD_LENGTH),
            abi::CALL_START => self.start(),
            abi::CALL_SET_OFFLOADS => calls::offloads(call.buffer(), self.open.features)
                .map(|offloads| self.set_offloads(offloads)),
            abi::CALL_SET_QUEUES => {
                calls::queues(call.buffer(), self.device.nic.config.queue_pairs)
                    .and_then(|queues| self.set_queues(queues))
            }
            _ => {
                let result = self.call(function, 0, call.buffer());
                return call.finish(result);
            }
        };
        if let Err(error) = begun {
            return call.finish(Err(error));
        }
        let Some(running) = &self.running else {
            return call.finish(Ok(0)); // The back end gets the offloads with START.
        };
        let (is_start, fail) = (function == abi::CALL_START, self.open.fail.clone());
        let done = move |result: Result<(), ErrorCode>| {
            if let (true, Err(error)) = (is_start, result) {
                fail.fail(error); // The rings are served already.
            }
            call.finish(result.map(|()| 0));
        };
        // If the back end cannot begin, the call has failed.
        let begun = running.configure(before, Box::new(done));
        if is_start && begun.is_err() {
            self.running = None;
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
                self.set_coalesce(&calls::coalesce(buffer, self.device.nic.config.queue_pairs)?);
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
        self.running = None;
        self.device.nic.link.observe(None);
        self.pages_task.stop();
        self.pages.close();
    }
}
