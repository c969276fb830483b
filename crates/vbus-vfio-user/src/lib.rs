//! The vfio-user connector of vbus: a server for VMMs, a client for plain processes.
//!
//! [`Server`] offers one device function, anything that implements [`Target`], on a UNIX socket to one client at
//! a time. It never blocks and belongs to no event loop: watch its descriptor, call [`Server::ready`].
//! [`DeviceServer`] offers a device of the bus so, on the device's event loop. [`Client`] is the other end, and
//! [`Process`] the environment of a driver over it, for programs that drive a device without a VM.
//!
//! What the server offers and refuses, command by command, is in `spec/vfio-user.md`.

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
pub use process::{MEMORY_BYTES, Process, ProcessMemory};
pub use remote::{BadReply, RemoteMemory};
pub use rustix::io::Errno;
pub use server::{Outcome, Server, Stats, Timeouts};
pub use target::{DeviceInfo, IoEventFd, IrqAction, IrqInfo, Mapping, RegionInfo, Target};
