// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtio driver in the process: it finds the parts of BAR0 by the capabilities, agrees on
//! features, and has split queues in memory that it shares with the device.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vbus_core::Endpoint;
use vbus_pci::{IrqIndex, PciFunction, region};

use crate::{Memory, TIMEOUT};

/// ACKNOWLEDGE and DRIVER of the device status.
pub const FOUND: u8 = 3;
/// FEATURES_OK of the device status.
pub const FEATURES_OK: u8 = 8;
/// DRIVER_OK of the device status.
pub const DRIVER_OK: u8 = 4;
/// DEVICE_NEEDS_RESET of the device status.
pub const NEEDS_RESET: u8 = 0x40;

/// The feature VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// The feature RING_RESET.
pub const RING_RESET: u64 = 1 << 40;

/// Fields of the common configuration: offset and bytes.
#[expect(missing_docs, reason = "the names are the standard's")]
pub mod field {
    pub const DEVICE_SELECT: (u64, usize) = (0x00, 4);
    pub const DEVICE_FEATURE: (u64, usize) = (0x04, 4);
    pub const DRIVER_SELECT: (u64, usize) = (0x08, 4);
    pub const DRIVER_FEATURE: (u64, usize) = (0x0c, 4);
    pub const CONFIG_VECTOR: (u64, usize) = (0x10, 2);
    pub const NUM_QUEUES: (u64, usize) = (0x12, 2);
    pub const STATUS: (u64, usize) = (0x14, 1);
    pub const GENERATION: (u64, usize) = (0x15, 1);
    pub const SELECT: (u64, usize) = (0x16, 2);
    pub const SIZE: (u64, usize) = (0x18, 2);
    pub const VECTOR: (u64, usize) = (0x1a, 2);
    pub const ENABLE: (u64, usize) = (0x1c, 2);
    pub const NOTIFY_OFF: (u64, usize) = (0x1e, 2);
    pub const DESC: (u64, usize) = (0x20, 8);
    pub const DRIVER: (u64, usize) = (0x28, 8);
    pub const DEVICE: (u64, usize) = (0x30, 8);
    pub const RESET: (u64, usize) = (0x3a, 2);
}

/// The offsets in BAR0 that the capabilities tell.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parts {
    /// The common configuration.
    pub common: u64,
    /// The notify area.
    pub notify: u64,
    /// The ISR status.
    pub isr: u64,
    /// The device configuration.
    pub device: u64,
    /// The multiplier of the notify area.
    pub stride: u64,
    /// The offset of the window in the configuration space.
    pub window: u64,
}

/// A driver with its function.
pub struct Driver {
    /// The function.
    pub function: PciFunction,
    /// The device behind it.
    pub endpoint: Arc<Endpoint>,
    /// The memory that it shares with the device.
    pub memory: Memory,
    /// Where its parts are.
    pub parts: Parts,
}

impl Driver {
    /// Finds the parts of `function`, and shares memory with the device behind `endpoint`.
    pub fn new(endpoint: Arc<Endpoint>, mut function: PciFunction) -> Driver {
        let mut space = [0; 256];
        function.read(region::CONFIG, 0, &mut space);
        let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
        let mut parts = Parts::default();
        for capability in vbus_pci::vbus_pci_config::capabilities(&space) {
            let (id, at) = capability.unwrap();
            if id != 9 {
                continue;
            }
            let offset = u64::from(word(at + 8));
            match space[at + 3] {
                1 => parts.common = offset,
                2 => (parts.notify, parts.stride) = (offset, word(at + 16).into()),
                3 => parts.isr = offset,
                4 => parts.device = offset,
                5 => parts.window = at as u64,
                kind => panic!("capability of kind {kind}"),
            }
        }
        let memory = Memory::new(&endpoint, 4 << 20);
        Driver { function, endpoint, memory, parts }
    }

    /// Reads `len` bytes of BAR0.
    pub fn read(&mut self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.function.read(region::BAR0, offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    /// Reads a field of the common configuration.
    pub fn get(&mut self, (offset, len): (u64, usize)) -> u64 {
        self.read(self.parts.common + offset, len)
    }

    /// Writes a field of the common configuration.
    pub fn set(&mut self, (offset, len): (u64, usize), value: u64) {
        let offset = self.parts.common + offset;
        self.function.write(region::BAR0, offset, &value.to_le_bytes()[..len]);
    }

    /// The device status.
    pub fn status(&mut self) -> u8 {
        u8::try_from(self.get(field::STATUS)).unwrap()
    }

    /// Reads the ISR status, which clears it.
    pub fn isr(&mut self) -> u64 {
        self.read(self.parts.isr, 1)
    }

    /// Reads `len` bytes of the device configuration.
    pub fn config(&mut self, offset: u64, len: usize) -> u64 {
        self.read(self.parts.device + offset, len)
    }

    /// The features that the device offers.
    pub fn offered(&mut self) -> u64 {
        self.set(field::DEVICE_SELECT, 0);
        let low = self.get(field::DEVICE_FEATURE);
        self.set(field::DEVICE_SELECT, 1);
        low | self.get(field::DEVICE_FEATURE) << 32
    }

    /// Resets the device and accepts `features`. Returns whether the device agrees.
    pub fn agree(&mut self, features: u64) -> bool {
        self.set(field::STATUS, 0);
        assert_eq!(self.status(), 0);
        self.set(field::STATUS, FOUND.into());
        for half in 0..2 {
            self.set(field::DRIVER_SELECT, half);
            self.set(field::DRIVER_FEATURE, features >> (32 * half) & 0xffff_ffff);
        }
        self.set(field::STATUS, (FOUND | FEATURES_OK).into());
        self.status() & FEATURES_OK != 0
    }

    /// Sets DRIVER_OK.
    pub fn start(&mut self) {
        self.set(field::STATUS, (FOUND | FEATURES_OK | DRIVER_OK).into());
    }

    /// Enables queue `index` with `size` descriptors.
    pub fn queue(&mut self, index: u16, size: u16) -> Queue {
        let mut queue = Queue::new(&mut self.memory, size);
        self.set(field::SELECT, index.into());
        self.set(field::SIZE, size.into());
        self.set(field::DESC, queue.desc);
        self.set(field::DRIVER, queue.driver);
        self.set(field::DEVICE, queue.device);
        self.set(field::ENABLE, 1);
        queue.notify = self.parts.notify + self.get(field::NOTIFY_OFF) * self.parts.stride;
        queue
    }

    /// Tells the device that `queue` has buffers.
    pub fn notify(&mut self, queue: &Queue) {
        self.function.write(region::BAR0, queue.notify, &[0; 2]);
    }

    /// Connects interrupt `number` of an index to an eventfd.
    pub fn connect(&mut self, index: IrqIndex, number: u32) -> Signal {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        let theirs = fd.try_clone().unwrap();
        self.function.connect_irqs(index, number, vec![Some(theirs)]).unwrap();
        Signal(fd)
    }
}

/// The driver's end of an interrupt.
pub struct Signal(pub OwnedFd);

impl Signal {
    /// Waits for the interrupt.
    pub fn wait(&self) {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let limit = Timespec::try_from(TIMEOUT).unwrap();
        assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "no interrupt");
        assert!(self.take());
    }

    /// Whether the interrupt has come since the last look.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

/// The driver's end of a split queue. Chain *n* begins at descriptor 4 *n*.
pub struct Queue {
    /// Descriptors.
    pub size: u16,
    /// Where the descriptor table is.
    pub desc: u64,
    /// Where the available ring is.
    pub driver: u64,
    /// Where the used ring is.
    pub device: u64,
    notify: u64,
    next: u16,
    seen: u16,
}

/// The most descriptors of a chain of these tests.
const CHAIN: u16 = 4;

impl Queue {
    /// A queue of `size` descriptors that no device has yet.
    pub fn new(memory: &mut Memory, size: u16) -> Queue {
        let desc = memory.alloc(16 * usize::from(size));
        let driver = memory.alloc(6 + 2 * usize::from(size));
        let device = memory.alloc(6 + 8 * usize::from(size));
        Queue { size, desc, driver, device, notify: 0, next: 0, seen: 0 }
    }

    /// Makes a chain of these buffers available: address, bytes, and whether the device may write.
    pub fn add(&mut self, memory: &Memory, parts: &[(u64, u32, bool)]) {
        let chains = self.size / CHAIN;
        let head = self.next % chains * CHAIN;
        for (i, &(addr, len, write)) in (0..).zip(parts) {
            let more = usize::from(i) + 1 < parts.len();
            let flags = u16::from(more) | if write { 2 } else { 0 };
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&addr.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&(head + i + 1).to_le_bytes());
            memory.write(self.desc + 16 * u64::from(head + i), &bytes);
        }
        self.publish(memory);
    }

    /// Makes the next chain available.
    fn publish(&mut self, memory: &Memory) {
        let head = self.next % (self.size / CHAIN) * CHAIN;
        let slot = u64::from(self.next % self.size);
        memory.write(self.driver + 4 + 2 * slot, &head.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        // The device may run at any time: the entry is there before the index.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        memory.write(self.driver + 2, &self.next.to_le_bytes());
    }

    /// Makes a chain of these parts available, by an indirect table: address and bytes. `write`:
    /// the device may write them.
    pub fn add_table(&mut self, memory: &mut Memory, parts: &[(u64, u32)], write: bool) {
        const WRITE: u64 = 2;
        const INDIRECT: u64 = 4;
        let mut table = Vec::new();
        for (i, &(addr, len)) in (1..).zip(parts) {
            let more = u64::from(i < parts.len() as u64);
            let flags = more | if write { WRITE } else { 0 };
            table.extend(addr.to_le_bytes());
            table.extend((u64::from(len) | flags << 32 | i << 48).to_le_bytes());
        }
        let place = memory.alloc(table.len());
        memory.write(place, &table);
        let head = self.desc + 16 * u64::from(self.next % (self.size / CHAIN) * CHAIN);
        let parts = [place.to_le_bytes(), (table.len() as u64 | INDIRECT << 32).to_le_bytes()];
        memory.write(head, &parts.concat());
        self.publish(memory);
    }

    /// The next chain that came back: the number of its first descriptor, and the bytes written.
    pub fn used(&mut self, memory: &Memory) -> Option<(u32, u32)> {
        let index = memory.read(self.device + 2, 2);
        if u16::from_le_bytes([index[0], index[1]]) == self.seen {
            return None;
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let slot = u64::from(self.seen % self.size);
        let bytes = memory.read(self.device + 4 + 8 * slot, 8);
        self.seen = self.seen.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        Some((word(0), word(4)))
    }

    /// Waits for the next chain that comes back.
    pub fn wait(&mut self, memory: &Memory) -> (u32, u32) {
        eventually("a used buffer", || self.used(memory))
    }
}

/// Asks `done` until it returns a value.
pub fn eventually<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + TIMEOUT;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
