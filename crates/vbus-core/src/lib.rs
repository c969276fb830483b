// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device end of vbus: bus, devices, connections, memory, interrupts, the event loop. It knows
//! neither PCI nor KVM nor QEMU.
//!
//! # Writing a device
//! If the driver sends bytes and the device answers with bytes, write a [`service`]. You write one
//! function, and `service` handles the ring, the buffers and the signals. The rest of this section
//! is about all other devices.
//!
//! A device implements two traits, and a third if configurations shall make it:
//!
//! 1. A [`Device`] sits on the [`Bus`]. It says what it is ([`Identity`]) and opens connections.
//! 2. A [`Connection`] is one driver's use of the device. It gets the driver's memory region by
//!    region. The bus passes the driver's calls to it, and polls it when the driver kicks. The bus
//!    drops it when the driver closes the device, is reset, unplugged or killed, or breaks the
//!    protocol.
//! 3. A [`DeviceClass`] makes devices from a configuration, for `vbus serve`.
//!
//! The usual device has a ring in its region. [`poll`](Connection::poll) takes entries and gives
//! them back. [`arm`](Connection::arm) asks for a kick before the connection sleeps.
//! [`disarm`](Connection::disarm) saves the driver its doorbells while the connection is polled.
//! This device returns each value doubled:
//!
//! ```
//! use std::sync::Arc;
//! use vbus_core::shm::{ring::{DeviceEnd, Return}, signal::Armed};
//! use vbus_core::*;
//!
//! struct Doubler;
//!
//! impl Device for Doubler {
//!     fn identity(&self) -> Identity {
//!         Identity::user("doubler")
//!     }
//!     fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
//!         Ok(Box::new(Doubling { ring: None }))
//!     }
//! }
//!
//! struct Doubling {
//!     ring: Option<(DeviceEnd<Window>, Interrupt)>,
//! }
//!
//! impl Connection for Doubling {
//!     fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
//!         // The header in the region is the driver's: `attach` reads it once and checks it.
//!         self.ring = Some((DeviceEnd::attach(region.window)?, region.interrupt));
//!         Ok(())
//!     }
//!     fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
//!         let Some((ring, interrupt)) = &mut self.ring else { return Ok(Progress::Idle) };
//!         let served = ring.serve_all(budget, |entry| {
//!             Some(Return { len: entry.len.wrapping_mul(2), ..entry.into() })
//!         })?;
//!         interrupt.kick(ring.post()); // once for all, and only if the driver sleeps
//!         Ok(if served == 0 { Progress::Idle } else { Progress::Busy })
//!     }
//!     fn arm(&mut self) -> Result<Armed, ErrorCode> {
//!         Ok(self.ring.as_mut().map_or(Armed::Waiting, |(ring, _)| ring.arm(0)))
//!     }
//!     fn disarm(&mut self) {
//!         if let Some((ring, _)) = &mut self.ring {
//!             ring.disarm();
//!         }
//!     }
//! }
//!
//! let bus = Bus::new(Executor::start(Tuning::default())?, Vec::new());
//! let endpoint = bus.add("double0", Arc::new(Doubler)).unwrap();
//! assert_eq!(endpoint.state(), ConnectionState::Closed); // a connector now offers it to drivers
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! A device reaches buffers whose addresses come with each entry through [`Open::memory`]: take a
//! [`View`] at the beginning of the poll and drop it at the end. A device with several queues
//! spawns a [`Task`] for each on the [`Executor`] and binds the region's [`Doorbell`] to it.
//!
//! While the driver's machine is moved, the bus logs the pages that the device writes. Views and
//! the ends of `shm` do that. A device that stores in the words of a [`Window`] without an end
//! calls [`stored`](vbus_shm::memory::stored) afterwards, and one that lets a system call write a
//! slice calls [`DriverSlice::wrote`](memory::DriverSlice::wrote).
//!
//! # Class numbers
//! A class has a number and a name ([`Identity`]). The specification has the numbers below
//! [`class::USER`](vbus_shm::abi::class::USER) (0x8000). All other classes may share the number
//! [`class::USER`](vbus_shm::abi::class::USER), which [`Identity::user`] gives: their drivers tell
//! them by name. Choose a number of your own from there to 0xffff if a driver has to find the class
//! without reading the name. The number is also the PCI subsystem id.
//!
//! # What may block
//! [`Connection::poll`], `arm`, `disarm`, `call`, `region_added` and `region_dropped` must not
//! block. The first three run on a worker, and all devices of that worker wait with them. The
//! others, [`Device::open`] and the drop of a connection may run on a worker too; over vfio-user
//! they run on one of a few threads beside the workers ([`Executor::aside`]). There they may take
//! some milliseconds, but a virtual CPU waits for them. A [`Watchdog`] reports a thread that has
//! been held for a second. [`Device::control`] may block, and so may [`DeviceClass::create`]. A
//! device that must block gives the work to a [`BlockingQueue`] or to a thread of its own, which
//! calls [`Doorbell::wake`] when it has finished. [`service`] does that for you. A call that must
//! block is kept ([`Connection::start_call`]) and answered from there.
//!
//! # What the bus does for a device
//! - It checks what the driver says of its regions. It never lets a device touch memory that was
//!   taken away: see [`memory`].
//! - It runs everything on the few threads of the [`Executor`], polls adaptively, and bounds the
//!   work of each turn.
//! - It counts ([`ConnectionCounters`]), and tells the driver why a connection ended
//!   ([`ErrorCode`]).
//!
//! A connector holds the device's [`Endpoint`], and needs nothing else of this crate.

mod alarm;
mod alarm_flag;
mod aside;
mod blocking;
mod bus;
mod call;
mod counter;
mod device;
mod doorbell;
mod endpoint;
mod events;
mod executor;
mod hand_over;
mod host;
mod interrupt;
mod lock;
mod losses;
pub mod memory;
mod metric;
mod page_bits;
mod router;
pub mod service;
pub mod settings;
pub mod state;
mod sync;
mod wake;
mod watchdog;

pub use blocking::BlockingQueue;
pub use bus::{Bus, BusError, DEVICES_MAX, NAME_MAX};
pub use call::{Call, Called, PendingCall};
pub use counter::{ConnectionCounters, Counter};
pub use device::{
    Connection, CreateError, Device, DeviceClass, Fail, Identity, Joined, Open, Region,
};
pub use doorbell::{Doorbell, Doorbells};
pub use endpoint::{Endpoint, MEMORY_LOST, OpenRequest, REGION_BYTES_MAX, RegionRequest};
pub use events::Notifier;
pub use executor::{Executor, Interest, Progress, Task, TaskHandle, Tuning};
pub use host::{ConnectionState, Host};
pub use interrupt::{Interrupt, InterruptSink, Route};
pub use lock::lock;
pub use memory::{Access, MAPS_MAX, MapError, MemoryContext, View, Window};
pub use metric::{Kind, Metric, Reason, Role};
pub use router::Router;
pub use state::{DeviceState, NotRestored, NotSaved};
pub use vbus_iovec as io_vec;
pub use vbus_shm::{self as shm, ErrorCode, Versions};
pub use watchdog::Watchdog;

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
