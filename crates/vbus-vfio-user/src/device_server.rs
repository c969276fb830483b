// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Serves a device of the bus. A task on the device's worker runs the [`Server`], and passes its
//! calls on to the device's function and memory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::io::Errno;
use vbus_core::memory::Resource;
use vbus_core::{
    Access, Endpoint, ErrorCode, Interest, MEMORY_LOST, MapError, Progress, Task, TaskHandle, lock,
};
use vbus_eventfd::Signaller;
use vbus_pci::{IrqError, IrqIndex, Options, PciFunction, device_function};
use vfio_user_protocol::{
    DeviceInfo, IoEventFd, IrqAction, IrqInfo, Mapping, RegionInfo, Server, Stats, Target,
};

/// The server of a device's socket. Dropping it disconnects the client and removes the socket.
#[derive(Debug)]
pub struct DeviceServer {
    path: PathBuf,
    task: TaskHandle,
    /// The descriptor of the server, which the event loop watches.
    ready: OwnedFd,
    seen: Arc<Mutex<Seen>>,
}

/// The state of the server, as its task last published it.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    connected: bool,
    stats: Stats,
}

impl DeviceServer {
    /// Makes the socket `path` with mode 0600, and serves the device there as a PCI function.
    /// `options` chooses the optional parts of the function. The server runs on the device's own
    /// event loop.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] if somebody listens at `path`. Otherwise an error of the
    /// system.
    pub fn start(
        endpoint: Arc<Endpoint>,
        path: &Path,
        options: Options,
    ) -> io::Result<DeviceServer> {
        let name = endpoint.name().to_owned();
        Self::spawn(Server::bind(path, name, Served::new(endpoint.clone(), options))?, &endpoint)
    }

    /// Offers the device as [`start`](Self::start) does, to clients that connect to `listener`: a
    /// non-blocking UNIX stream socket that listens at `path`. Dropping the server leaves the file
    /// at `path` alone.
    ///
    /// # Errors
    /// The system refuses, for instance because this process has too many descriptors.
    pub fn with_listener(
        endpoint: Arc<Endpoint>,
        listener: OwnedFd,
        path: &Path,
        options: Options,
    ) -> io::Result<DeviceServer> {
        let name = endpoint.name().to_owned();
        let served = Served::new(endpoint.clone(), options);
        Self::spawn(Server::with_listener(listener, path, name, served)?, &endpoint)
    }

    fn spawn(server: Server<Served>, endpoint: &Endpoint) -> io::Result<DeviceServer> {
        // If the kernel lacks what interrupts need, the operator learns it now.
        Signaller::of_process()?;
        let executor = endpoint.executor().clone();
        let worker = endpoint.worker();
        let memory = endpoint.memory().clone();
        let counters = Arc::new(endpoint.counters().beside());
        let path = server.path().to_owned();
        let ready = server.as_fd().try_clone_to_owned()?;
        // The task itself never fails: every error ends a client and no more.
        let seen = Arc::<Mutex<Seen>>::default();
        let task = ServerTask { server, seen: seen.clone() };
        let task = executor.spawn(worker, Box::new(task), counters, |_| {});
        if let Err(error) = task.watch(&ready, Interest::Read) {
            task.stop();
            return Err(error.into());
        }
        let waker = task.clone();
        memory.on_loss(move || waker.wake());
        // A client may have come between the first poll and the watch.
        task.wake();
        Ok(DeviceServer { path, task, ready, seen })
    }

    /// The path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a client is connected and has negotiated.
    pub fn is_connected(&self) -> bool {
        lock(&self.seen).connected
    }

    /// The server's statistics so far.
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
    fn work(&self) -> String {
        "messages of its socket".into()
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let mut work = 0;
        let progress = loop {
            if self.server.target().endpoint.memory().is_lost() {
                self.server.fail(MEMORY_LOST);
            }
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

/// The target of the server: the device's function, and the memory that the client shares with the
/// device.
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
        DeviceInfo::PCI
    }

    fn region_info(&self, region: u32) -> RegionInfo {
        let size = self.function.region_size(region);
        RegionInfo::new(size, size > 0, size > 0)
    }

    fn irq_info(&self, index: u32) -> IrqInfo {
        match IrqIndex::from_number(index) {
            Some(index @ IrqIndex::Intx) if self.function.irq_count(index) > 0 => IrqInfo::intx(),
            Some(IrqIndex::Intx) | None => IrqInfo::default(),
            Some(index) => IrqInfo::messages(self.function.irq_count(index)),
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
            // Only INTx can be masked, which has one interrupt.
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
            // A later version of the protocol may have more kinds.
            _ => return Err(Errno::OPNOTSUPP),
        };
        done.map_err(|error| match error {
            IrqError::Os(errno) => errno,
            _ => Errno::INVAL,
        })
    }

    fn max_dma_maps(&self) -> u32 {
        u32::try_from(vbus_core::MAPS_MAX).unwrap_or(u32::MAX)
    }

    fn dma_map(&mut self, mapping: Mapping) -> Result<(), Errno> {
        let Mapping { address, size, readable, writable, memory, .. } = mapping;
        let access = Access::new(readable, writable);
        self.endpoint.map(address, size, memory, access).map_err(|error| {
            tracing::warn!(
                device = self.endpoint.name(), %error,
                "memory at {address:#x} cannot be used"
            );
            match error {
                MapError::Overlap(..) => Errno::EXIST,
                MapError::Limit => Errno::NOSPC,
                MapError::Budget(exceeded) => match exceeded.resource {
                    Resource::Descriptors => Errno::MFILE,
                    Resource::AddressSpace | Resource::Mappings => Errno::NOMEM,
                    _ => Errno::NOSPC,
                },
                MapError::ReadOnly => Errno::ACCESS,
                MapError::Os(errno) => errno,
                _ => Errno::INVAL,
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
            Some(IoEventFd::new(eventfd.fd.try_clone().ok()?, eventfd.offset))
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
