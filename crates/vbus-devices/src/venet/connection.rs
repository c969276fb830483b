//! What a driver opens: its regions, the calls START and FILTER, and the tasks that follow.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use vbus_core::shm::abi::venet as abi;
use vbus_core::shm::ring::{DeviceEnd, Returns, SIGNAL_OFFSET};
use vbus_core::{Connection, ErrorCode, Open, Region, Task, TaskHandle, Window};

use super::filter::Filter;
use super::pair::{Pair, TxQueue};
use super::port::{Lane, Port};
use super::rx::RxQueue;
use super::status::{StatusPage, StatusTask};
use super::{RING_MAX, Shared};
use vbus_core::lock;

/// A number for each port of this program.
static NEXT_PORT: AtomicU64 = AtomicU64::new(1);

/// The rings of one queue pair, before the start.
#[derive(Default)]
struct Rings {
    tx: Option<Region>,
    rx: Option<Region>,
}

/// A connection.
pub struct VenetConnection {
    device: Arc<Shared>,
    open: Open,
    rings: Vec<Rings>,
    filter: Arc<Mutex<Filter>>,
    status: Arc<StatusPage>,
    status_task: TaskHandle,
    running: Option<Running>,
}

struct Running {
    port: Arc<Port>,
    tasks: Vec<TaskHandle>,
}

impl VenetConnection {
    pub fn new(device: Arc<Shared>, open: Open) -> VenetConnection {
        let status =
            Arc::new(StatusPage::new(device.config.mac, device.link.clone(), device.pairs.clone()));
        let status_task = spawn(&open, 0, Box::new(StatusTask::new(status.clone())));
        status.set_task(status_task.clone());
        let rings = device.pairs.iter().map(|_| Rings::default()).collect();
        VenetConnection {
            device,
            open,
            rings,
            filter: Arc::default(),
            status,
            status_task,
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
        let mut lanes = Vec::with_capacity(count);
        let mut sending = Vec::with_capacity(count);
        for (i, rings) in self.rings[..count].iter().enumerate() {
            let (Some(tx), Some(rx)) = (&rings.tx, &rings.rx) else {
                return Err(ErrorCode::BAD_ARGUMENT);
            };
            let tx_ring = attach(tx, Returns::Counted)?;
            let rx_ring = attach(rx, Returns::Entries)?;
            let counters = self.device.pairs[i].clone();
            let queue = RxQueue::new(
                rx_ring,
                rx.interrupt.clone(),
                self.open.memory.clone(),
                counters.clone(),
                self.device.capture.clone(),
                self.device.config.patience,
            );
            lanes.push(Lane {
                index: u16::try_from(i).unwrap_or(u16::MAX),
                rx: Mutex::new(Some(queue)),
                task: OnceLock::new(),
                counters,
            });
            sending.push((
                TxQueue { ring: tx_ring, interrupt: tx.interrupt.clone() },
                tx.doorbell.clone(),
                rx.doorbell.clone(),
            ));
        }
        let port = Arc::new(Port {
            id: NEXT_PORT.fetch_add(1, Ordering::Relaxed),
            name: self.device.name.clone(),
            mac: self.device.config.mac,
            mtu: usize::from(self.device.config.mtu),
            features: self.open.features,
            filter: self.filter.clone(),
            lanes,
            status: self.status.clone(),
        });
        let queues = self.device.backend.connect(&port)?;
        let mut tasks = Vec::with_capacity(count);
        for (i, ((tx, tx_doorbell, rx_doorbell), queue)) in
            sending.into_iter().zip(queues).enumerate()
        {
            let lane = &port.lanes[i];
            let memory = self.open.memory.clone();
            let capture = self.device.capture.clone();
            let pair = Pair::new(
                port.clone(),
                lane.index,
                tx,
                queue,
                memory,
                lane.counters.clone(),
                capture,
            );
            let task = spawn(&self.open, i, Box::new(pair));
            let _ = lane.task.set(task.clone()); // Set once, here.
            // Which also wakes the task, so that it sees its own handle.
            tx_doorbell.bind(&task);
            rx_doorbell.bind(&task);
            tasks.push(task);
        }
        self.running = Some(Running { port, tasks });
        self.status.wake();
        Ok(())
    }
}

/// Runs a task of the connection beside the connection, or `beside` places further on.
fn spawn(open: &Open, beside: usize, task: Box<dyn Task>) -> TaskHandle {
    let fail = open.fail.clone();
    let place = open.place.wrapping_add(beside);
    open.executor.spawn(place, task, open.counters.clone(), move |status| fail.fail(status))
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
            return self.status.add(region);
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
        if self.status.drop_region(handle) {
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
                *lock(&self.filter) = Filter::parse(buffer)?;
                if let Some(running) = &self.running {
                    self.device.backend.filter_changed(&running.port);
                }
            }
            _ => return Err(ErrorCode::BAD_FUNCTION),
        }
        Ok(0)
    }
}

impl Drop for VenetConnection {
    /// Afterwards nobody holds a window on the driver's memory: tasks first, then the rings that
    /// others deliver to, then the status page.
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            for task in &running.tasks {
                task.stop();
            }
            for lane in &running.port.lanes {
                drop(lock(&lane.rx).take());
            }
        }
        self.status_task.stop();
        self.status.close();
    }
}
