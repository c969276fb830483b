// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Hal of a driver that reaches its device over a socket.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use vbus_driver::{Doorbell, Hal, HeapTable, NoMemory, has_signature};
use vbus_eventfd::{PeerEventfd, take_signal};
use vbus_shm::abi::{bar0, capability};
use vfio_user_protocol::{Client, ClientError, Patience, pci};

use crate::clock;
use crate::memory::{BASE, Pool, ProcessMemory};

/// The value of every register of a function that has gone.
const GONE: u32 = u32::MAX;

/// A device reached over its socket. Clones are handles to the same connection. The connection ends
/// with the last of them.
#[derive(Clone)]
pub struct Process(Arc<Attached>);

struct Attached {
    client: Mutex<Client>,
    socket: OwnedFd,
    interrupt: OwnedFd,
    /// By handle.
    doorbells: Vec<Option<PeerEventfd>>,
    pool: Arc<Pool>,
}

impl Process {
    /// Connects to the device at the socket `path` and shares `memory_bytes` of memory with it
    /// (whole pages). A function that is none of vbus has no interrupt and no doorbells here: the
    /// driver finds out what it is when it probes it.
    ///
    /// # Errors
    /// Those of [`Client::connect`] and of the calls that follow; [`Errno`]s of the memory file.
    pub fn connect(path: impl AsRef<Path>, memory_bytes: u64) -> Result<Process, ClientError> {
        let mut client = Client::connect(path)?;
        let (pool, file) = Pool::new(memory_bytes)?;
        client.dma_map(file.as_fd(), 0, BASE, memory_bytes)?;

        let interrupt = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let doorbells = if is_of_vbus(&mut client)? {
            client.connect_irqs(pci::IRQ_MSI, 0, &[interrupt.as_fd()])?;
            doorbells(&mut client)?
        } else {
            Vec::new()
        };
        let socket = client.as_fd().try_clone_to_owned().map_err(|_| Errno::MFILE)?;
        let (client, pool) = (Mutex::new(client), Arc::new(pool));
        Ok(Process(Arc::new(Attached { client, socket, interrupt, doorbells, pool })))
    }

    /// Connects the first `count` vectors of the device's MSI-X, if it has that: an eventfd for
    /// each, non-blocking. From now on its interrupts come there, and
    /// [`interrupt`](Self::interrupt) is silent.
    ///
    /// # Errors
    /// Those of [`Client::connect_irqs`]; [`Errno`]s of the eventfds.
    pub fn connect_vectors(&self, count: u16) -> Result<Vec<OwnedFd>, ClientError> {
        let new = |_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let fds = (0..count).map(new).collect::<Result<Vec<_>, _>>()?;
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.client().connect_irqs(pci::IRQ_MSIX, 0, &borrowed)?;
        Ok(fds)
    }

    /// The eventfd that becomes readable when the device interrupts, for polls.
    /// [`take_interrupt`](Self::take_interrupt) reads it.
    pub fn interrupt(&self) -> BorrowedFd<'_> {
        self.0.interrupt.as_fd()
    }

    /// The socket: a poll for [`PollFlags::RDHUP`] tells when the device has gone. Nothing else may
    /// be done with it.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.0.socket.as_fd()
    }

    /// Waits for an interrupt, at most `bound`, and takes it. False: none came, or the device has
    /// gone.
    pub fn wait(&self, bound: Duration) -> bool {
        let mut fds = [
            PollFd::new(&self.0.interrupt, PollFlags::IN),
            PollFd::new(&self.0.socket, PollFlags::RDHUP | PollFlags::HUP),
        ];
        let deadline = Instant::now().checked_add(bound);
        loop {
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            if poll(&mut fds, left.as_ref()) != Err(Errno::INTR) {
                break;
            }
        }
        self.take_interrupt()
    }

    /// Takes an interrupt. Returns whether there was one. It never blocks, even if the device has
    /// made the eventfd block.
    pub fn take_interrupt(&self) -> bool {
        take_signal(self.0.interrupt.as_fd())
    }

    /// Sets how long accesses wait for a device that does not answer. At first it is 5 s. An access
    /// beyond that ends the connection.
    pub fn set_patience(&self, patience: Patience) {
        self.client().set_patience(patience);
    }

    fn client(&self) -> MutexGuard<'_, Client> {
        // A thread that panicked within a request leaves a client whose requests fail.
        self.0.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, region: u32, offset: u64, bytes: &mut [u8]) {
        if self.client().region_read(region, offset, bytes).is_err() {
            bytes.fill(0xff);
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        // Writes to a function that has gone are lost, as on a PCI bus.
        let _ = self.client().region_post(pci::REGION_BAR0, offset, bytes);
    }
}

/// Whether the function has the signature of vbus.
fn is_of_vbus(client: &mut Client) -> Result<bool, ClientError> {
    let mut space = [0; 256];
    client.region_read(pci::REGION_CONFIG, 0, &mut space)?;
    Ok(has_signature(|offset| {
        let word = space.get(usize::from(offset)..).and_then(|rest| rest.first_chunk());
        word.map_or(GONE, |word| u32::from_le_bytes(*word))
    }))
}

/// The eventfds of the doorbells, by handle.
fn doorbells(client: &mut Client) -> Result<Vec<Option<PeerEventfd>>, ClientError> {
    let mut doorbells = Vec::new();
    for io in client.io_eventfds(pci::REGION_BAR0)? {
        let number = io.offset.checked_sub(bar0::DOORBELLS).map(|at| at / bar0::DOORBELL_STRIDE);
        let Some(handle) = number.filter(|at| *at < u64::from(bar0::DOORBELL_COUNT)) else {
            continue;
        };
        let handle = usize::try_from(handle).unwrap_or(usize::MAX);
        doorbells.resize_with(doorbells.len().max(handle + 1), || None);
        doorbells[handle] = Some(PeerEventfd::new(io.fd).map_err(|_| Errno::AGAIN)?);
    }
    Ok(doorbells)
}

impl Hal for Process {
    type Dma = ProcessMemory;
    type Regions = HeapTable<ProcessMemory>;

    fn config_read32(&self, offset: u16) -> u32 {
        let mut bytes = GONE.to_le_bytes();
        self.read(pci::REGION_CONFIG, u64::from(offset), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn read32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(pci::REGION_BAR0, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn read64(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(pci::REGION_BAR0, offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn write32(&self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    fn write64(&self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    fn alloc(&self, bytes: usize) -> Result<ProcessMemory, NoMemory> {
        self.0.pool.alloc(bytes).ok_or(NoMemory)
    }

    fn ring(&self, doorbell: Doorbell, handle: u32) {
        let fd = self.0.doorbells.get(handle as usize).and_then(Option::as_ref);
        match fd.filter(|_| doorbell.kind == capability::KIND_MMIO) {
            Some(fd) => fd.signal(),
            None => self.write32(doorbell.offset(handle), 1),
        }
    }

    fn now(&self) -> u64 {
        clock::now()
    }

    fn pause(&self, waited: u64) -> bool {
        clock::pause(waited)
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process")
            .field("doorbells", &self.0.doorbells.len())
            .finish_non_exhaustive()
    }
}
