// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An environment in this process. The registers are those of a [`PciFunction`]. A file holds the
//! shared memory. Interrupts are an eventfd.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::Value;
use vbus_core::{Access, Bus, Endpoint, Executor, MemoryContext, Tuning, Window};
use vbus_driver::{Dma, FixedTable, Function, Hal, NoMemory};
use vbus_pci::{IrqIndex, Options, PciFunction, device_function, region};
use vbus_shm::Memory;
use vbus_shm::sync::Word;

/// How long a test waits for an event that must come.
pub const TIMEOUT: Duration = Duration::from_secs(60);

const BASE: u64 = 0x10_0000_0000;
const BYTES: u64 = 64 << 20;

/// A bus with all classes.
pub fn bus() -> Bus {
    let executor = Executor::start(Tuning { workers: 2, ..Tuning::default() }).unwrap();
    let mut classes = vbus_devices::classes();
    classes.push(Box::new(vbus_sched::SchedClass::new()));
    Bus::new(executor, classes)
}

/// The environment.
#[derive(Clone)]
pub struct Local(Arc<Inner>);

struct Inner {
    endpoint: Arc<Endpoint>,
    function: Mutex<PciFunction>,
    memory: MemoryContext,
    next: AtomicU64,
    interrupt: OwnedFd,
    /// Memory has pages of `1 << page_shift` bytes in reverse order. 0: it is contiguous.
    page_shift: u8,
}

impl Local {
    /// Makes a device of `class` on `bus`, and an environment for it.
    pub fn new(bus: &Bus, name: &str, class: &str, config: &Value) -> Local {
        bus.create(name, class, config).unwrap();
        Local::attach(bus, name, 0)
    }

    /// Makes an environment for the device `name`, with memory that is contiguous or in pages.
    pub fn attach(bus: &Bus, name: &str, page_shift: u8) -> Local {
        let endpoint = bus.get(name).unwrap();
        let mut function = device_function(endpoint.clone(), Options::default());
        let file = memfd_create("driver", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, BYTES).unwrap();
        endpoint.map(BASE, BYTES, Some((file.try_clone().unwrap(), 0)), Access::BOTH).unwrap();
        let memory = MemoryContext::new();
        memory.map(BASE, BYTES, Some((file, 0)), Access::BOTH).unwrap();
        let interrupt = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        function
            .connect_irqs(IrqIndex::Msi, 0, vec![Some(interrupt.try_clone().unwrap())])
            .unwrap();
        let next = AtomicU64::new(BASE);
        Local(Arc::new(Inner {
            endpoint,
            function: Mutex::new(function),
            memory,
            next,
            interrupt,
            page_shift,
        }))
    }

    /// Probes the function.
    pub fn probe(&self) -> Function<Local> {
        Function::probe(self.clone()).unwrap()
    }

    /// Takes the device's memory away.
    pub fn unmap(&self) {
        self.0.endpoint.unmap_all();
    }

    /// Gives the device other memory at the same addresses.
    pub fn map_other(&self, file: OwnedFd) {
        self.0.endpoint.map(BASE, BYTES, Some((file, 0)), Access::BOTH).unwrap();
    }

    /// Takes an interrupt. Returns whether one had come.
    pub fn interrupted(&self) -> bool {
        rustix::io::read(&self.0.interrupt, &mut [0; 8]).is_ok()
    }

    /// Waits for an interrupt, and takes it.
    pub fn wait_interrupt(&self) {
        let mut fds = [PollFd::new(&self.0.interrupt, PollFlags::IN)];
        let bound = Timespec::try_from(TIMEOUT).unwrap();
        assert_eq!(poll(&mut fds, Some(&bound)).unwrap(), 1, "no interrupt came");
        assert!(self.interrupted());
    }

    fn access<T>(&self, access: impl FnOnce(&mut PciFunction) -> T) -> T {
        access(&mut self.0.function.lock().unwrap())
    }

    fn read<const N: usize>(&self, region: u32, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.access(|function| function.read(region, offset, &mut bytes));
        bytes
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.function.get_mut().unwrap().disconnected();
        self.endpoint.unmap_all();
    }
}

/// Calls `done` until it returns a value. Panics if it does not within the time limit.
pub fn until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + TIMEOUT;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

impl std::fmt::Debug for Local {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Local")
    }
}

impl Hal for Local {
    type Dma = LocalMemory;
    type Regions = FixedTable<LocalMemory, 64>;

    fn config_read32(&self, offset: u16) -> u32 {
        u32::from_le_bytes(self.read(region::CONFIG, u64::from(offset)))
    }

    fn read32(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(region::BAR0, offset))
    }

    fn read64(&self, offset: u64) -> u64 {
        u64::from_le_bytes(self.read(region::BAR0, offset))
    }

    fn write32(&self, offset: u64, value: u32) {
        self.access(|function| function.write(region::BAR0, offset, &value.to_le_bytes()));
    }

    fn write64(&self, offset: u64, value: u64) {
        self.access(|function| function.write(region::BAR0, offset, &value.to_le_bytes()));
    }

    fn alloc(&self, bytes: usize) -> Result<LocalMemory, NoMemory> {
        let page = 1u64 << self.0.page_shift.max(12);
        let len = (bytes as u64).next_multiple_of(page);
        let at = self.0.next.fetch_add(len, Ordering::Relaxed);
        if at + len > BASE + BYTES {
            return Err(NoMemory);
        }
        // Small allocations are contiguous, because some must be.
        if self.0.page_shift == 0 || bytes <= LocalMemory::CONTIGUOUS_MIN {
            let window = self.0.memory.window(at, len).map_err(|_| NoMemory)?;
            return Ok(LocalMemory { window, pages: vec![at], shift: 0 });
        }
        let pages: Vec<u64> = (0..len / page).rev().map(|i| at + i * page).collect();
        let window = self
            .0
            .memory
            .window_of_pages(&pages, self.0.page_shift.into(), len)
            .map_err(|_| NoMemory)?;
        Ok(LocalMemory { window, pages, shift: self.0.page_shift })
    }

    fn now(&self) -> u64 {
        static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
        START.elapsed().as_nanos() as u64
    }
}

/// Memory of a [`Local`].
#[derive(Clone, Debug)]
pub struct LocalMemory {
    window: Window,
    pages: Vec<u64>,
    shift: u8,
}

impl Memory for LocalMemory {
    fn words(&self) -> &[Word] {
        self.window.words()
    }
}

impl Dma for LocalMemory {
    fn page_shift(&self) -> u8 {
        self.shift
    }

    fn address(&self, offset: usize) -> u64 {
        match self.shift {
            0 => self.pages[0] + offset as u64,
            shift => self.pages[offset >> shift] + (offset & ((1 << shift) - 1)) as u64,
        }
    }
}
