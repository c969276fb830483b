//! A device of the bus, served: the adapter between the [`Server`] on one side, and the device's
//! function and memory on the other, and its place on the event loop.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use rustix::io::Errno;
use vbus_core::{Access, Endpoint, ErrorCode, Interest, MapError, Progress, Task, TaskHandle};
use vbus_pci::{
    INDEX_COUNT, IrqError, IrqIndex, Options, PciFunction, REGION_COUNT, device_function,
};

use crate::server::{Server, Stats};
use crate::target::{DeviceInfo, IoEventFd, IrqAction, IrqInfo, Mapping, RegionInfo, Target};

/// A device's socket, served until this is dropped. Dropping it disconnects the client and removes
/// the socket.
#[derive(Debug)]
pub struct DeviceServer {
    path: PathBuf,
    task: TaskHandle,
    /// The server's descriptor, to end the watch with.
    ready: OwnedFd,
    seen: Arc<Mutex<Seen>>,
}

/// What the task tells of its server.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    connected: bool,
    stats: Stats,
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(|e| e.into_inner())
}

impl DeviceServer {
    /// Offers the device at the socket `path` (made with mode 0600), as a PCI function of the form
    /// that `options` says. It is served on the device's own event loop.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] if somebody listens at `path`; whatever else the system
    /// refuses.
    pub fn start(
        endpoint: Arc<Endpoint>,
        path: &Path,
        options: Options,
    ) -> io::Result<DeviceServer> {
        let executor = endpoint.executor().clone();
        let place = endpoint.place();
        let name = endpoint.name().to_owned();
        let server = Server::bind(path, name, Served::new(endpoint, options))?;
        let ready = server.as_fd().try_clone_to_owned()?;
        // Its errors are its clients'; it never fails, so nobody need be told.
        let seen = Arc::<Mutex<Seen>>::default();
        let task = ServerTask { server, seen: seen.clone() };
        let task = executor.spawn(place, Box::new(task), Arc::default(), |_| {});
        if let Err(error) = task.watch(&ready, Interest::Read) {
            task.stop();
            return Err(error.into());
        }
        // What came between the first poll and the watch.
        task.wake();
        Ok(DeviceServer { path: path.to_owned(), task, ready, seen })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a client is there and agreed with.
    pub fn is_connected(&self) -> bool {
        lock(&self.seen).connected
    }

    /// What its server has seen so far.
    pub fn stats(&self) -> Stats {
        lock(&self.seen).stats
    }
}

impl Drop for DeviceServer {
    fn drop(&mut self) {
        self.task.unwatch(&self.ready);
        self.task.stop();
    }
}

struct ServerTask {
    server: Server<Served>,
    seen: Arc<Mutex<Seen>>,
}

impl Task for ServerTask {
    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let mut work = 0;
        let progress = loop {
            let outcome = self.server.ready(Instant::now());
            work += outcome.work;
            if !outcome.more {
                break if work > 0 { Progress::Busy } else { Progress::Idle };
            }
            if work >= budget {
                break Progress::Busy;
            }
        };
        *lock(&self.seen) =
            Seen { connected: self.server.is_connected(), stats: self.server.stats() };
        Ok(progress)
    }

    fn deadline(&self) -> Option<Instant> {
        self.server.deadline()
    }

    fn adaptive(&self) -> bool {
        false
    }
}

/// What a client reaches: the device's function, and the memory that the client lends the device.
struct Served {
    function: PciFunction,
    endpoint: Arc<Endpoint>,
}

impl Served {
    fn new(endpoint: Arc<Endpoint>, options: Options) -> Served {
        Served { function: device_function(endpoint.clone(), options), endpoint }
    }
}

impl Target for Served {
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo { resettable: true, regions: REGION_COUNT, irqs: INDEX_COUNT }
    }

    fn region_info(&self, region: u32) -> RegionInfo {
        let size = self.function.region_size(region);
        RegionInfo { size, readable: size > 0, writable: size > 0 }
    }

    fn irq_info(&self, index: u32) -> IrqInfo {
        let Some(index) = IrqIndex::from_number(index) else { return IrqInfo::default() };
        let intx = index == IrqIndex::Intx;
        IrqInfo {
            count: self.function.irq_count(index),
            maskable: intx,
            automasked: intx,
            fixed_size: !intx,
        }
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.function.read(region, offset, data);
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.function.write(region, offset, data);
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, action: IrqAction) -> Result<(), Errno> {
        let index = IrqIndex::from_number(index).ok_or(Errno::INVAL)?;
        let done = match action {
            IrqAction::DisableAll => {
                self.function.disconnect_irqs(index);
                Ok(())
            }
            IrqAction::Connect { start, eventfds } => {
                self.function.connect_irqs(index, start, eventfds)
            }
            // An index that can be masked has one interrupt.
            IrqAction::ConnectMask { eventfds, .. } => {
                self.function.connect_mask(index, true, eventfds.into_iter().next().flatten())
            }
            IrqAction::ConnectUnmask { eventfds, .. } => {
                self.function.connect_mask(index, false, eventfds.into_iter().next().flatten())
            }
            IrqAction::Trigger(numbers) => {
                numbers.iter().try_for_each(|&n| self.function.trigger_irq(index, n))
            }
            IrqAction::Mask(numbers) => {
                numbers.iter().try_for_each(|_| self.function.mask_irq(index, true))
            }
            IrqAction::Unmask(numbers) => {
                numbers.iter().try_for_each(|_| self.function.mask_irq(index, false))
            }
        };
        done.map_err(|error| match error {
            IrqError::NoSuch | IrqError::NotMaskable | IrqError::NotEventfd => Errno::INVAL,
            IrqError::Os(errno) => errno,
        })
    }

    fn dma_map(&mut self, mapping: Mapping) -> Result<(), Errno> {
        let Mapping { address, size, readable, writable, memory } = mapping;
        let access = Access { read: readable, write: writable };
        self.endpoint.map(address, size, memory, access).map_err(|error| {
            tracing::warn!(device = self.endpoint.name(), %error, "memory at {address:#x} cannot be used");
            match error {
                MapError::Range(..) | MapError::FileTooSmall | MapError::Unsealed => Errno::INVAL,
                MapError::Overlap(..) => Errno::EXIST,
                MapError::Limit | MapError::LimitOfAll => Errno::NOSPC,
                MapError::Os(errno) => errno,
            }
        })
    }

    fn dma_unmap(&mut self, address: u64, size: u64) {
        self.endpoint.unmap(address, size);
    }

    fn dma_unmap_all(&mut self) {
        self.endpoint.unmap_all();
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.function.reset();
        Ok(())
    }

    fn io_eventfds(&mut self, region: u32) -> Vec<IoEventFd> {
        let eventfds = self.function.io_eventfds(region).unwrap_or_else(|error| {
            tracing::warn!(device = self.endpoint.name(), %error, "no eventfds for the doorbells");
            Vec::new()
        });
        let duplicate = |eventfd: &vbus_pci::IoEventFd| {
            Some(IoEventFd {
                fd: eventfd.fd.try_clone().ok()?,
                offset: eventfd.offset,
                size: 0,
                datamatch: None,
            })
        };
        eventfds.iter().filter_map(duplicate).collect()
    }

    fn disconnected(&mut self) {
        self.function.disconnected();
        self.endpoint.unmap_all();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.disconnected();
    }
}
