// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the log of written pages costs a device: frames through a receive ring, each of which the
//! device copies into the driver's buffer and returns. `off` and `on` are the log; the number is
//! that of the frames.
//!
//! ```text
//! cargo run --release -p vbus-core --example log_cost -- off 10000000
//! ```
#![allow(clippy::unwrap_used)] // A measurement that fails has no result.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vbus_core::shm::ring::{DeviceEnd, DriverEnd, Entry, Layout, Return, Returns};
use vbus_core::{Access, MemoryContext};

/// The driver's memory.
const BYTES: u64 = 4 << 20;
/// The buffers: behind the ring.
const BUFFERS: u64 = 1 << 20;
const BUFFER: u64 = 2048;
const ENTRIES: u32 = 256;
/// Bytes of a frame: short, so that the copy hides little.
const FRAME: usize = 64;
/// Frames for which the rings are posted once.
const BATCH: u32 = 32;

fn main() {
    let mut words = std::env::args().skip(1);
    let (log, frames) = (words.next(), words.next());
    let frames: u32 = frames.and_then(|word| word.parse().ok()).unwrap_or(1_000_000);
    let file = memfd_create("driver", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, BYTES).unwrap();
    let context = MemoryContext::new();
    context.map(0, BYTES, Some((file, 0)), Access::BOTH).unwrap();
    let layout = Layout::new(ENTRIES, Returns::Entries).unwrap();
    let window = context.window(0, layout.bytes() as u64).unwrap();
    let mut driver = DriverEnd::create(window.clone(), layout, 0).unwrap();
    let mut device = DeviceEnd::attach(window).unwrap();
    if log.as_deref() == Some("on") {
        context.start_log(&[]).unwrap();
    }
    let frame = [7; FRAME];
    for _ in 0..frames / BATCH {
        for id in 0..BATCH {
            let addr = BUFFERS + u64::from(id) * BUFFER;
            let len = u32::try_from(BUFFER).unwrap();
            driver.submit(Entry { addr, len, id: u16::try_from(id).unwrap(), flags: 0 }).unwrap();
        }
        let _ = driver.post();
        let view = context.view();
        for _ in 0..BATCH {
            let entry = device.take().unwrap().unwrap();
            view.write(entry.addr, &frame).unwrap();
            device.give_back(Return { len: u32::try_from(FRAME).unwrap(), ..entry.into() });
        }
        drop(view);
        let _ = device.post();
        while driver.reap().unwrap().is_some() {}
    }
}
