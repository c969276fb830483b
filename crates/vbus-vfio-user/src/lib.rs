// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where vfio-user and the bus meet: [`DeviceServer`] serves a device of the bus to a VMM, or to
//! any other client. It is the [`Target`](vfio_user_protocol::Target) of a
//! [`Server`](vfio_user_protocol::Server) on the device's own event loop.
//!
//! The other side without a VM is the crate `vbus_process`: the environment of a driver in a plain
//! process.
//!
//! The crate `vfio_user_protocol` has the protocol itself. `spec/vfio-user.md` says what the server
//! offers and refuses, command by command.
//!
//! ```
//! use std::sync::Arc;
//! use vbus_core::{Bus, Connection, Device, Executor, Identity, Open, Region, ErrorCode, Tuning};
//! use vbus_driver::Function;
//! use vbus_process::{MEMORY_BYTES, Process};
//! use vbus_vfio_user::DeviceServer;
//!
//! /// A device with one function: it gives the length of the buffer that it is called with.
//! struct Length;
//!
//! struct Use;
//!
//! impl Device for Length {
//!     fn identity(&self) -> Identity {
//!         Identity::user("length")
//!     }
//!     fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
//!         Ok(Box::new(Use))
//!     }
//! }
//!
//! impl Connection for Use {
//!     fn region_added(&mut self, _: Region) -> Result<(), ErrorCode> {
//!         Err(ErrorCode::BAD_ARGUMENT)
//!     }
//!     fn call(&mut self, _function: u32, _flags: u32, buffer: &mut [u8]) -> Result<u64, ErrorCode> {
//!         Ok(buffer.len() as u64)
//!     }
//! }
//!
//! let folder = tempfile::tempdir()?;
//! let bus = Bus::new(Executor::start(Tuning::default())?, Vec::new());
//! let endpoint = bus.add("length0", Arc::new(Length)).unwrap();
//! let server = DeviceServer::start(endpoint, &folder.path().join("length0.sock"), Default::default())?;
//!
//! // The driver: any process that may open the socket.
//! let mut function = Function::probe(Process::connect(server.path(), MEMORY_BYTES)?)?;
//! function.open(0)?;
//! assert_eq!(function.call(1, 0, &mut [0; 24])?, 24);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod device_server;
mod migration;
mod saved;

pub use device_server::{DeviceServer, HoldError, Keep};
pub use saved::{SavedData, SavedServer};
pub use vfio_user_protocol::state::Held;
pub use vfio_user_protocol::{Closer, bind_private, plain};

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
