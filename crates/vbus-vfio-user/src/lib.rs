//! The vfio-user connector of vbus: a server for VMMs, a client for plain processes.
//!
//! [`Server`] offers one device function, anything that implements [`Target`], on a UNIX socket to
//! one client at a time. It never blocks and belongs to no event loop: watch its descriptor, call
//! [`Server::ready`]. [`DeviceServer`] offers a device of the bus so, on the device's event loop.
//! [`Client`] is the other end, and [`Process`] the environment of a driver over it, for programs
//! that drive a device without a VM.
//!
//! What the server offers and refuses, command by command, is in `spec/vfio-user.md`.
//!
//! ```
//! use std::sync::Arc;
//! use vbus_core::{Bus, Connection, Device, Executor, Identity, Open, Region, ErrorCode, Trust, Tuning};
//! use vbus_driver::Function;
//! use vbus_vfio_user::{DeviceServer, MEMORY_BYTES, Process};
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
//! let bus = Bus::new(Executor::start(Tuning::default())?, Vec::new(), Trust::Sealed);
//! let endpoint = bus.add("length0", Arc::new(Length)).unwrap();
//! let server = DeviceServer::start(endpoint, &folder.path().join("length0.sock"), Default::default())?;
//!
//! // The driver: any process that may open the socket.
//! let mut function = Function::probe(Process::connect(server.path(), MEMORY_BYTES)?)?;
//! function.open(0)?;
//! assert_eq!(function.call(1, 0, &mut [0; 24])?, 24);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bus;
mod client;
mod listen;
mod process;
pub mod protocol;
mod refuse;
mod remote;
mod server;
pub mod session;
mod shared;
pub mod socket;
mod target;
pub mod version;

pub use bus::DeviceServer;
pub use client::{Client, ClientError};
pub use listen::bind_private;
pub use process::{MEMORY_BYTES, Process, ProcessMemory};
pub use remote::{BadReply, RemoteMemory};
pub use rustix::io::Errno;
pub use server::{Outcome, Server, Stats, Timeouts};
pub use target::{DeviceInfo, IoEventFd, IrqAction, IrqInfo, Mapping, RegionInfo, Target};
