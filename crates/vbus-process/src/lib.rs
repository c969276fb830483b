// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver's environment in a plain process. The driver reaches its device over the socket,
//! without a VM and without root.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use vbus_core::shm::Memory;
use vbus_core::shm::abi::{bar0, capability};
use vbus_core::shm::sync::{Ordering, Word};
use vbus_core::{Access, MemoryContext, Trust, Window, lock};
use vbus_driver::{COMMAND_BOUND, Dma, Doorbell, Hal, HeapTable, NoMemory};

use vfio_user_protocol::{Client, ClientError, pci};

/// The default size of the memory that a process shares with its device. The system provides the
/// memory only when it is used.
pub const MEMORY_BYTES: u64 = 64 << 20;

/// The address of that memory as the device sees it. It is no valid offset in the memory, so that a
/// driver that mixes up addresses and offsets fails at once.
const BASE: u64 = 0x1_0000_0000;
const PAGE: usize = 4096;
/// The value of every register of a function that has gone.
const GONE: u32 = u32::MAX;

/// A device reached over its socket. Clones are handles to the same connection, which ends with the
/// last of them and of its memory.
#[derive(Clone)]
pub struct Process(Arc<Shared>);

struct Shared {
    client: Mutex<Client>,
    socket: OwnedFd,
    interrupt: OwnedFd,
    /// By handle.
    doorbells: Vec<Option<OwnedFd>>,
    memory: MemoryContext,
    /// Free runs of memory: offset and length. Memory that was never used is zero. Memory that
    /// comes back is zeroed.
    free: Mutex<BTreeMap<usize, usize>>,
}

impl Process {
    /// Connects to the device at the socket `path` and shares `memory_bytes` of memory with it
    /// (whole pages).
    ///
    /// # Errors
    /// Those of [`Client::connect`] and of the calls that follow; [`Errno`]s of the memory file.
    pub fn connect(path: impl AsRef<Path>, memory_bytes: u64) -> Result<Process, ClientError> {
        let mut client = Client::connect(path)?;
        let file = memfd_create("vbus", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, memory_bytes)?;
        fcntl_add_seals(&file, SealFlags::SHRINK)?;
        client.dma_map(file.as_fd(), 0, BASE, memory_bytes)?;
        let memory = MemoryContext::new(Trust::Sealed);
        memory.map(BASE, memory_bytes, Some((file, 0)), Access::BOTH).map_err(|_| Errno::NOMEM)?;

        let interrupt = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        client.connect_irqs(pci::IRQ_MSI, 0, &[interrupt.as_fd()])?;
        let mut doorbells = Vec::new();
        for io in client.io_eventfds(pci::REGION_BAR0)? {
            let number =
                io.offset.checked_sub(bar0::DOORBELLS).map(|at| at / bar0::DOORBELL_STRIDE);
            let Some(handle) = number.filter(|at| *at < u64::from(bar0::DOORBELL_COUNT)) else {
                continue;
            };
            let handle = usize::try_from(handle).unwrap_or(usize::MAX);
            doorbells.resize_with(doorbells.len().max(handle + 1), || None);
            doorbells[handle] = Some(io.fd);
        }
        let bytes = usize::try_from(memory_bytes).map_err(|_| Errno::NOMEM)?;
        let socket = client.as_fd().try_clone_to_owned().map_err(|_| Errno::MFILE)?;
        let free = Mutex::new(BTreeMap::from([(0, bytes)]));
        Ok(Process(Arc::new(Shared {
            client: Mutex::new(client),
            socket,
            interrupt,
            doorbells,
            memory,
            free,
        })))
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
        lock(&self.0.client).connect_irqs(pci::IRQ_MSIX, 0, &borrowed)?;
        Ok(fds)
    }

    /// The eventfd that becomes readable when the device interrupts. Non-blocking; reading it takes
    /// the interrupt.
    pub fn interrupt(&self) -> BorrowedFd<'_> {
        self.0.interrupt.as_fd()
    }

    /// The socket: a poll for [`PollFlags::RDHUP`] tells when the device has gone. Nothing else may
    /// be done with it.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.0.socket.as_fd()
    }

    /// The memory that is shared with the device, as the process sees it: for system calls that
    /// fill and empty buffers.
    pub fn memory(&self) -> &MemoryContext {
        &self.0.memory
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
        rustix::io::read(&self.0.interrupt, &mut [0; 8]).is_ok()
    }

    fn read(&self, region: u32, offset: u64, bytes: &mut [u8]) {
        if lock(&self.0.client).region_read(region, offset, bytes).is_err() {
            bytes.fill(0xff);
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        // Writes to a function that has gone are lost, as on a PCI bus.
        let _ = lock(&self.0.client).region_post(pci::REGION_BAR0, offset, bytes);
    }
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
        let len = bytes.checked_next_multiple_of(PAGE).filter(|len| *len > 0).ok_or(NoMemory)?;
        let mut free = lock(&self.0.free);
        let (at, have) = free
            .iter()
            .find(|(_, have)| **have >= len)
            .map(|(at, have)| (*at, *have))
            .ok_or(NoMemory)?;
        free.remove(&at);
        if have > len {
            free.insert(at + len, have - len);
        }
        drop(free);
        let window = self.0.memory.window(BASE + at as u64, len as u64).map_err(|_| NoMemory)?;
        Ok(ProcessMemory(Arc::new(Allocation { process: self.clone(), window, at, len })))
    }

    fn ring(&self, doorbell: Doorbell, handle: u32) {
        let fd = self.0.doorbells.get(handle as usize).and_then(Option::as_ref);
        match fd.filter(|_| doorbell.kind == capability::KIND_MMIO) {
            // The write does not block: the device never lets the count grow so far.
            Some(fd) => drop(rustix::io::write(fd, &1u64.to_ne_bytes())),
            None => self.write32(doorbell.offset(handle), 1),
        }
    }

    fn now(&self) -> u64 {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        now.tv_sec
            .unsigned_abs()
            .wrapping_mul(1_000_000_000)
            .wrapping_add(now.tv_nsec.unsigned_abs())
    }

    fn pause(&self, waited: u64) -> bool {
        // Short at first, then in proportion to the time waited: a long command causes few reads.
        std::thread::sleep(Duration::from_nanos((waited / 4).clamp(10_000, 1_000_000)));
        waited < COMMAND_BOUND
    }
}

/// Memory that a process shares with its device. Dropping the last clone frees it.
#[derive(Clone)]
pub struct ProcessMemory(Arc<Allocation>);

struct Allocation {
    process: Process,
    window: Window,
    at: usize,
    len: usize,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process").field("memory", &self.0.memory).finish_non_exhaustive()
    }
}

impl fmt::Debug for ProcessMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessMemory")
            .field("at", &self.0.at)
            .field("len", &self.0.len)
            .finish_non_exhaustive()
    }
}

impl Memory for ProcessMemory {
    fn words(&self) -> &[Word] {
        self.0.window.words()
    }
}

impl Dma for ProcessMemory {
    fn page_shift(&self) -> u8 {
        0
    }

    fn address(&self, offset: usize) -> u64 {
        BASE + (self.0.at + offset) as u64
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.window.words().iter().for_each(|word| word.store(0, Ordering::Relaxed));
        let (mut at, mut len) = (self.at, self.len);
        let mut free = lock(&self.process.0.free);
        if let Some((before, have)) =
            free.range(..at).next_back().map(|(a, l)| (*a, *l)).filter(|(a, l)| a + l == at)
        {
            free.remove(&before);
            (at, len) = (before, have + len);
        }
        if let Some(have) = free.remove(&(at + len)) {
            len += have;
        }
        free.insert(at, len);
    }
}
