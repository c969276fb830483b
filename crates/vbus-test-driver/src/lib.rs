// SPDX-License-Identifier: Apache-2.0 OR MIT
//! For tests of device classes: a driver in the same process as the device. It writes the registers
//! through an [`Endpoint`], and shares memory with the device as a virtual machine would.
//!
//! ```
//! use std::sync::Arc;
//! use vbus_core::{Connection, Device, ErrorCode, Identity, Open, Region};
//!
//! struct Nothing;
//! struct Opened;
//! impl Device for Nothing {
//!     fn identity(&self) -> Identity {
//!         Identity::user("nothing")
//!     }
//!     fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
//!         Ok(Box::new(Opened))
//!     }
//! }
//! impl Connection for Opened {
//!     fn region_added(&mut self, _: Region) -> Result<(), ErrorCode> {
//!         Ok(())
//!     }
//! }
//!
//! let bus = vbus_test_driver::bus(1, Vec::new());
//! let endpoint = bus.add("nothing", Arc::new(Nothing)).unwrap();
//! let memory = vbus_test_driver::Memory::new(&endpoint, 1 << 20);
//! vbus_test_driver::open(&endpoint, &memory, 0).unwrap();
//! assert_eq!(
//!     vbus_test_driver::call(&endpoint, &memory, 7, &[]),
//!     Err(ErrorCode::BAD_FUNCTION)
//! );
//! ```
#![allow(clippy::unwrap_used)] // Tests may panic.

mod fresh;
mod lingering;
mod mounts;
mod mutation;
mod random;
pub mod saved;
pub mod virtio;

pub use fresh::{FreshProcess, serve};
pub use lingering::{lingering, send_lingering, take_descriptors};
pub use mounts::{NO_MOUNT, run_with_own_mounts};
pub use mutation::mutate;
pub use random::Random;

use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vbus_core::memory::MemoryContext;
use vbus_core::{
    Access, Bus, Called, DeviceClass, Endpoint, ErrorCode, Executor, InterruptSink, OpenRequest,
    RegionRequest, Tuning, Window,
};

/// How long a test waits for an event that must come.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// A bus with these classes, whose tasks run on `workers` threads.
pub fn bus(workers: usize, classes: Vec<Box<dyn DeviceClass>>) -> Bus {
    let executor = Executor::start(Tuning { workers, ..Tuning::default() }).unwrap();
    Bus::new(executor, classes)
}

/// Receives a device's interrupts, so that a test can wait for them.
#[derive(Default)]
pub struct Interrupts {
    count: Mutex<u64>,
    news: Condvar,
}

impl InterruptSink for Interrupts {
    fn trigger(&self, _vector: u16) {
        *self.count.lock().unwrap() += 1;
        self.news.notify_all();
    }
}

impl Interrupts {
    /// Waits until `done` returns a value. Asks `done` again after each interrupt. Panics if no
    /// value comes within [`TIMEOUT`].
    pub fn wait<T>(&self, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
        let end = Instant::now() + TIMEOUT;
        loop {
            let before = *self.count.lock().unwrap();
            if let Some(value) = done() {
                return value;
            }
            let count = self.count.lock().unwrap();
            let left = end
                .checked_duration_since(Instant::now())
                .unwrap_or_else(|| panic!("waited in vain for {what}"));
            // The upper bound is for changes that cause no interrupt.
            let bound = left.min(Duration::from_millis(20));
            drop(self.news.wait_timeout_while(count, bound, |count| *count == before).unwrap());
        }
    }
}

/// Memory that a driver shares with its device.
pub struct Memory {
    /// The driver's own map of it.
    pub context: MemoryContext,
    fd: OwnedFd,
    next: u64,
    len: u64,
}

impl Memory {
    /// Fresh memory at address 0, mapped for the device behind `endpoint`.
    pub fn new(endpoint: &Endpoint, len: u64) -> Memory {
        let memory = Memory::alone(len);
        memory.share(endpoint);
        memory
    }

    /// Fresh memory at address 0 that no device has yet.
    pub fn alone(len: u64) -> Memory {
        let fd = memfd_create("driver", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, len).unwrap();
        Memory::of(fd, len)
    }

    /// The memory of another driver, from its [`file`](Self::file) of `len` bytes.
    pub fn of(fd: OwnedFd, len: u64) -> Memory {
        let context = MemoryContext::new();
        context.map(0, len, Some((fd.try_clone().unwrap(), 0)), Access::BOTH).unwrap();
        Memory { context, fd, next: 4096, len }
    }

    /// Maps the same memory for the device behind another endpoint.
    pub fn share(&self, endpoint: &Endpoint) {
        endpoint.map(0, self.len, Some((self.file(), 0)), Access::BOTH).unwrap();
    }

    /// The memory's file.
    pub fn file(&self) -> OwnedFd {
        self.fd.try_clone().unwrap()
    }

    /// Memory for something of `len` bytes; address 0 is never given out.
    pub fn alloc(&mut self, len: usize) -> u64 {
        let at = self.next;
        self.next += (len as u64).next_multiple_of(4096);
        assert!(self.next <= self.len, "the driver's memory is used up");
        at
    }

    /// `len` bytes at `addr`, to share with the device.
    pub fn window(&self, addr: u64, len: usize) -> Window {
        self.context.window(addr, len as u64).unwrap()
    }

    /// Writes `bytes` at `addr`.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.context.view().write(addr, bytes).unwrap();
    }

    /// `len` bytes at `addr`.
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.context.view().read(addr, &mut bytes).unwrap();
        bytes
    }
}

/// OPEN with a good handshake.
pub fn open(endpoint: &Endpoint, memory: &Memory, features: u64) -> Result<(), ErrorCode> {
    memory.write(0, &0x1234_5678_9abc_u64.to_le_bytes());
    endpoint.open(OpenRequest::new((0, 0x1234_5678_9abc)).with_features(features))
}

/// REGION_ADD.
pub fn add(
    endpoint: &Endpoint,
    id: u32,
    addr: u64,
    len: usize,
    signal: usize,
) -> Result<u32, ErrorCode> {
    let (len, signal) = (len as u64, Some(signal as u64));
    endpoint.region_add(RegionRequest::new(id, addr, len).with_signal(signal))
}

/// CALL with a buffer at address 2048. Waits for the end of a call that takes time.
pub fn call(
    endpoint: &Endpoint,
    memory: &Memory,
    function: u32,
    buffer: &[u8],
) -> Result<u64, ErrorCode> {
    if !buffer.is_empty() {
        memory.write(2048, buffer);
    }
    let pending = match endpoint.call(function, 0, 2048, buffer.len() as u64)? {
        Called::Later(pending) => pending,
        called => return called.now(),
    };
    let end = Instant::now() + TIMEOUT;
    loop {
        match pending.result() {
            Some(result) => return result,
            None => assert!(Instant::now() < end, "the call has not ended"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
