// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device that answers numbers, and its driver in this process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vbus_core::shm::Memory;
use vbus_core::{
    Connection, Device, ErrorCode, Identity, Interrupt, Open, Progress, Region, Window,
};
use vbus_driver::{Function, Hal};
use vbus_process::{MEMORY_BYTES, Process, ProcessMemory};
use vbus_vfio_user::DeviceServer;

/// How long a round trip may take before the driver gives up.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Copies each new number in the first word of a region to the second word, and interrupts.
pub struct Echo;

#[derive(Default)]
struct Echoing(Option<(Window, Interrupt)>);

impl Device for Echo {
    fn identity(&self) -> Identity {
        Identity::user("echo")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::<Echoing>::default())
    }
}

impl Connection for Echoing {
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        self.0 = Some((region.window, region.interrupt));
        Ok(())
    }

    fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
        let Some((window, interrupt)) = &self.0 else { return Ok(Progress::Idle) };
        let number = window.words()[0].load(Ordering::Acquire);
        if window.words()[1].load(Ordering::Relaxed) == number {
            return Ok(Progress::Idle);
        }
        window.words()[1].store(number, Ordering::Release);
        interrupt.trigger();
        Ok(Progress::Busy)
    }
}

/// The driver of an [`Echo`].
pub struct Driver {
    pub function: Function<Process>,
    memory: ProcessMemory,
    handle: u32,
}

impl Driver {
    pub fn open(server: &DeviceServer) -> Driver {
        let process = Process::connect(server.path(), MEMORY_BYTES).expect("the echo's socket");
        let mut function = Function::probe(process.clone()).expect("the echo");
        function.open(0).expect("opening the echo");
        let memory = process.alloc(4096).expect("memory");
        let region = function.region_add(0, 0, &memory, (0, 64), None).expect("a region");
        let handle = region.handle();
        Driver { function, memory, handle }
    }

    /// Sends a number and waits for the answer.
    pub fn round_trip(&self, number: u64) {
        let words = self.memory.words();
        words[0].store(number, Ordering::Release);
        self.function.ring(self.handle);
        while words[1].load(Ordering::Acquire) != number {
            assert!(self.function.hal().wait(TIMEOUT), "no answer to {number}");
        }
    }
}

/// Sets the flag when it is dropped, so that the other threads end if this one panics.
pub struct Over<'a>(pub &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
