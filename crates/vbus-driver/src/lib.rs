// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver end of vbus, for any environment: a kernel, a process in a guest, a plain process
//! beside the bus.
//!
//! The environment implements [`Hal`]. With it [`Function`] probes, opens and calls a device, and
//! [`venet`], [`state`] and [`sched`] drive the classes of vbus. The environment waits in its own
//! way, because it knows its interrupts, threads and descriptors. A driver that waits does three
//! things. It arms each signal that it waits for. It sleeps, unless one of the signals was missed.
//! When it wakes, it acknowledges the interrupt ([`Function::acknowledge`]) *before* it looks at
//! the signals.
//!
//! There are several kinds of doorbell. The VMM offers some of them, and the environment can ring
//! some of them ([`Hal::can_ring`]). A function takes the first kind that is offered and can be
//! rung. [`Function::choose_doorbell`] measures all such kinds and takes the cheapest.
//!
//! A driver crate needs no other crate of vbus. For a class of your own, [`shm`] has rings, state
//! pages and signals.
//!
//! This crate does not trust the device. It checks every number that the device returns before it
//! uses the number. If a device breaks the protocol, the driver gets an [`Error`], and this crate
//! accesses no memory outside the driver's own.
//!
//! ```
//! use vbus_driver::venet::{HEADER_BYTES, Nic, Piece};
//! use vbus_driver::{Dma, Error, Function, Hal};
//!
//! /// Sends a frame of at most 2000 bytes and waits until it is on its way.
//! fn send<H: Hal>(hal: H, frame: &[u8]) -> Result<(), Error> {
//!     let mut nic = Nic::open(Function::probe(hal.clone())?, 0, 0)?;
//!     let (mut tx, _rx) = nic.queue_pair(0, 32, 4096, 0)?;
//!     nic.start()?;
//!
//!     // The header, all zeros: nothing is left to the device. It is 12 bytes, and copies begin at multiples of 8.
//!     let mut bytes = [0; HEADER_BYTES + 2000];
//!     bytes[HEADER_BYTES..][..frame.len()].copy_from_slice(frame);
//!     let memory = hal.alloc(4096)?;
//!     memory.copy_in(0, &bytes);
//!
//!     let len = (HEADER_BYTES + frame.len()) as u32;
//!     tx.submit(&[Piece { addr: memory.address(0), len }])?;
//!     tx.post();
//!     while tx.reclaim()? == 0 {
//!         nic.function().check()?;
//!     }
//!     // Before the frame's memory goes. That of the rings the function keeps itself.
//!     nic.close();
//!     Ok(())
//! }
//! ```
#![no_std]

#[cfg(feature = "alloc")]
extern crate alloc;

mod costs;
mod doorbell;
mod error;
mod function;
mod hal;
pub mod pic;
mod regions;
pub mod requests;
pub mod sched;
pub mod state;
mod state_page;
pub mod venet;

pub use costs::{Cost, Costs};
pub use doorbell::Doorbell;
pub use error::{Error, NoMemory};
pub use function::{
    Acknowledger, Bell, ConnectionState, Events, Function, Info, Name, Region, has_signature,
};
pub use hal::{COMMAND_BOUND, Dma, Hal};
#[cfg(feature = "alloc")]
pub use regions::HeapTable;
pub use regions::{FixedTable, RegionTable};
pub use vbus_shm::{self as shm, ErrorCode, Memory, Pace, Rest, Versions};

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
