//! What a driver opens: its regions, its calls, and the tasks that serve it.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use vbus_core::shm::abi::venet as abi;
use vbus_core::shm::ring::{DeviceEnd, Returns, SIGNAL_OFFSET};
use vbus_core::{Connection, ErrorCode, Open, Region, Task, TaskHandle, Window, lock};
use vbus_net::{Filter, Offloads, Plug, Port, SharedSink, Steering};

use super::calls;
use super::device::{RING_MAX, VenetDevice, offloads};
use super::news::{News, Pending};
use super::pages::{Pages, PagesTask};
use super::pair::{Pair, PairTask, Rx};
use super::rx::{Receiver, RxQueue, RxSlot};
use super::tx::TxQueue;

/// The rings of one queue pair.
#[derive(Default)]
struct Rings {
    tx: Option<Region>,
    rx: Option<Region>,
}

/// A connection.
pub struct VenetConnection {
    device: Arc<VenetDevice>,
    open: Open,
    rings: Vec<Rings>,
    filter: Arc<Filter>,
    pages: Arc<Pages>,
    pages_task: TaskHandle,
    news: News,
    running: Option<Running>,
}

/// A connection that has started.
struct Running {
    plug: Arc<dyn Plug>,
    receiver: Arc<Receiver>,
    pairs: Vec<(Arc<Mutex<Pair>>, TaskHandle)>,
}

impl VenetConnection {
    pub fn new(device: Arc<VenetDevice>, open: Open) -> VenetConnection {
        let filter = Arc::new(Filter::new(device.config.mac));
        let pending = Pending::default();
        let (link, pairs) = (device.link.clone(), device.pairs.clone());
        let pages = Arc::new(Pages::new(filter.clone(), link, pairs, pending.clone()));
        let pages_task = spawn(&open, 0, Box::new(PagesTask::new(pages.clone())));
        device.link.observe(Some(pages_task.clone()));
        let rings = device.pairs.iter().map(|_| Rings::default()).collect();
        let news = News::new(pending, pages_task.clone());
        VenetConnection { device, open, rings, filter, pages, pages_task, news, running: None }
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
        let (tx_offloads, rx_offloads) = offloads(self.open.features);
        let receiver = Arc::new(Receiver {
            mtu: usize::from(self.device.config.mtu),
            filter: self.filter.clone(),
            offloads: AtomicU64::new(rx_offloads.bits()),
            backpressure: self.device.config.backpressure,
            news: self.news.clone(),
        });
        let backend = &self.device.backend;
        let rx: Vec<Rx> = (self.rings.iter())
            .map(|_| match backend.shares_sinks() {
                true => Rx::Shared(Arc::default()),
                false => Rx::Own(RxSlot::default()),
            })
            .collect();
        let lanes = rx.iter().filter_map(|rx| match rx {
            Rx::Shared(slot) => Some(slot.clone() as SharedSink),
            Rx::Own(_) => None,
        });
        let shared = (self.filter.clone(), Arc::new(Steering::new(queues)));
        let (name, config) = (&self.device.name, &self.device.config);
        let port = Port::new(name, config.mtu, config.queue_pairs, shared, lanes.collect());
        let plug = backend.plug(Arc::new(port))?;
        plug.set_queues(queues)?;
        plug.set_rx_offloads(rx_offloads)?;
        let mut running = Running { plug, receiver, pairs: Vec::new() };
        for (i, rx) in rx.into_iter().enumerate() {
            if let Err(error) = self.spawn_pair(&mut running, i, rx, tx_offloads) {
                running.stop();
                return Err(error);
            }
        }
        for i in 0..count {
            if let Err(error) = self.serve(&running, i) {
                running.stop();
                return Err(error);
            }
        }
        self.running = Some(running);
        self.pages_task.wake();
        Ok(())
    }

    /// Makes pair `i`, without rings, and its task.
    fn spawn_pair(
        &self,
        running: &mut Running,
        i: usize,
        rx: Rx,
        tx_offloads: Offloads,
    ) -> Result<(), ErrorCode> {
        let index = u16::try_from(i).map_err(|_| ErrorCode::BAD_ARGUMENT)?;
        let (open, mut made) = (&self.open, None);
        let fail = open.fail.clone();
        let (place, counters) = (open.place.wrapping_add(i), open.counters.clone());
        let task = open.executor.spawn_with(
            place,
            counters,
            move |error| fail.fail(error),
            |task| {
                let queue = running.plug.queue(index, task)?;
                let (memory, receiver) = (open.memory.clone(), running.receiver.clone());
                let counters = self.device.pairs[i].clone();
                let pair = Pair::new(rx, queue, memory, receiver, tx_offloads, counters);
                let pair = Arc::new(Mutex::new(pair));
                made = Some(pair.clone());
                Ok::<_, ErrorCode>(Box::new(PairTask(pair)) as Box<dyn Task>)
            },
        )?;
        running.pairs.extend(made.map(|pair| (pair, task)));
        Ok(())
    }

    /// Lets the running pair `i` serve the rings that it has.
    fn serve(&self, running: &Running, i: usize) -> Result<(), ErrorCode> {
        let (Some((pair, task)), Some(rings)) = (running.pairs.get(i), self.rings.get(i)) else {
            return Err(ErrorCode::BAD_ARGUMENT);
        };
        if let Some(region) = &rings.tx {
            let ring = attach(region, Returns::Counted)?;
            lock(pair).set_tx(Some(TxQueue::new(ring, region.interrupt.clone())));
            // Wakes the task too.
            region.doorbell.bind(task);
        }
        if let Some(region) = &rings.rx {
            let ring = attach(region, Returns::Entries)?;
            let queue = RxQueue::new(
                ring,
                region.interrupt.clone(),
                self.open.memory.clone(),
                running.receiver.clone(),
                self.device.pairs[i].clone(),
                task.clone(),
            );
            lock(pair).set_rx(Some(queue));
            region.doorbell.bind(task);
        }
        Ok(())
    }
}

impl Running {
    /// Afterwards nobody holds a window on the driver's memory: neither the tasks, nor the receive
    /// rings that other devices deliver to.
    fn stop(self) {
        for (pair, task) in &self.pairs {
            task.stop();
            let mut pair = lock(pair);
            pair.set_tx(None);
            pair.set_rx(None);
        }
    }
}

/// Runs a task of the connection beside the connection, or `beside` places further on.
fn spawn(open: &Open, beside: usize, task: Box<dyn Task>) -> TaskHandle {
    let fail = open.fail.clone();
    let place = open.place.wrapping_add(beside);
    open.executor.spawn(place, task, open.counters.clone(), move |error| fail.fail(error))
}

/// The device's end of the ring in a region.
fn attach(region: &Region, returns: Returns) -> Result<DeviceEnd<Window>, ErrorCode> {
    let ring = DeviceEnd::attach(region.window.clone())?;
    if ring.layout().returns() != returns || ring.layout().entries() > u32::from(RING_MAX) {
        return Err(ErrorCode::BAD_LAYOUT);
    }
    Ok(ring)
}

impl Connection for VenetConnection {
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        if region.id == abi::REGION_STATUS {
            self.pages.add(region)?;
            self.pages_task.wake();
            return Ok(());
        }
        let is_rx = region.id % 2 == 1;
        let pair = usize::try_from(region.id / 2).map_err(|_| ErrorCode::BAD_ARGUMENT)?;
        let rings = self.rings.get_mut(pair).ok_or(ErrorCode::BAD_ARGUMENT)?;
        if self.running.is_some() {
            return Err(ErrorCode::DENIED);
        }
        let place = if is_rx { &mut rings.rx } else { &mut rings.tx };
        if place.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        if region.signal_offset != Some(SIGNAL_OFFSET) {
            return Err(ErrorCode::BAD_SIGNAL);
        }
        // Checked here, so that the driver learns which ring is wrong; attached at the start.
        attach(&region, if is_rx { Returns::Entries } else { Returns::Counted })?;
        *place = Some(region);
        Ok(())
    }

    fn region_dropped(&mut self, handle: u32) -> Result<(), ErrorCode> {
        if self.pages.drop_region(handle) {
            return Ok(());
        }
        if self.running.is_some() {
            return Err(ErrorCode::DENIED);
        }
        for rings in &mut self.rings {
            rings.tx.take_if(|region| region.handle == handle);
            rings.rx.take_if(|region| region.handle == handle);
        }
        Ok(())
    }

    fn call(&mut self, function: u32, flags: u32, buffer: &mut [u8]) -> Result<u64, ErrorCode> {
        if flags != 0 {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        match function {
            abi::CALL_START if !buffer.is_empty() => return Err(ErrorCode::BAD_LENGTH),
            abi::CALL_START => self.start()?,
            abi::CALL_FILTER => {
                self.filter.set_addresses(calls::filter(buffer)?);
                if let Some(running) = &self.running {
                    running.plug.filter_changed();
                }
            }
            _ => return Err(ErrorCode::BAD_FUNCTION),
        }
        Ok(0)
    }
}

impl Drop for VenetConnection {
    /// Afterwards nobody holds a window on the driver's memory.
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stop();
        }
        self.device.link.observe(None);
        self.pages_task.stop();
        self.pages.close();
    }
}
