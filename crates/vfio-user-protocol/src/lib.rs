// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Both ends of the vfio-user protocol.
//!
//! [`Server`] serves one PCI function on a UNIX socket to one client at a time. The function
//! implements [`Target`]. The client is QEMU (`-device vfio-user-pci`), another VMM, or a program.
//! A server never blocks, and needs no event loop of its own: a program watches its descriptor and
//! calls [`Server::ready`], or lets [`Server::run`] do both. [`Session`](session::Session) is the
//! same without sockets. [`Client`] is the other end.
//!
//! The crate implements version 0.1 of the protocol, as QEMU's `docs/interop/vfio-user.rst` has it.
//! [`message`] describes each message, and [`migration`] how a client moves a device from one
//! server to another. The crate does not implement regions that the client maps, and access to the
//! client's memory by message (`DMA_READ`, `DMA_WRITE`). It refuses both in the way that the
//! protocol provides.
//!
//! A server is also plain data: [`Server::save`] makes a [`ServerState`](state::ServerState), and
//! another process goes on with [`Server::restore`]. The client notices nothing.
//!
//! An end does not trust the other one. No message makes a server panic, block, or allocate without
//! bound. A wrong command gets an errno. A peer that breaks the protocol loses its connection, with
//! one line in the log ([`tracing`]).
//!
//! ```
//! use vfio_user_protocol::{Client, Errno, IrqAction, IrqInfo, RegionInfo, Server, Target, pci};
//!
//! /// A device of one register, without a configuration space: enough for the client below.
//! #[derive(Default)]
//! struct Register([u8; 8]);
//!
//! impl Target for Register {
//!     fn region_info(&self, region: u32) -> RegionInfo {
//!         if region == pci::REGION_BAR0 { RegionInfo::read_write(8) } else { RegionInfo::default() }
//!     }
//!     fn irq_info(&self, _: u32) -> IrqInfo {
//!         IrqInfo::default()
//!     }
//!     fn read(&mut self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
//!         data.copy_from_slice(&self.0[offset as usize..][..data.len()]);
//!         Ok(())
//!     }
//!     fn write(&mut self, _: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
//!         self.0[offset as usize..][..data.len()].copy_from_slice(data);
//!         Ok(())
//!     }
//!     fn set_irqs(&mut self, _: u32, _: IrqAction) -> Result<(), Errno> {
//!         Err(Errno::INVAL)
//!     }
//!     fn reset(&mut self) -> Result<(), Errno> {
//!         self.0 = [0; 8];
//!         Ok(())
//!     }
//!     fn disconnected(&mut self) {}
//! }
//!
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("register.sock");
//! let mut server = Server::bind(&path, "register", Register::default())?;
//! let (stop, stopped) = std::os::unix::net::UnixStream::pair()?;
//! let thread = std::thread::spawn(move || server.run_until(&stopped));
//!
//! let mut client = Client::connect(&path)?;
//! client.region_write(pci::REGION_BAR0, 2, &[7, 8])?;
//! let mut data = [0; 4];
//! client.region_read(pci::REGION_BAR0, 0, &mut data)?;
//! assert_eq!(data, [0, 0, 7, 8]);
//!
//! drop((client, stop));
//! thread.join().unwrap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod candidate;
mod client;
mod closer;
mod eventfd;
mod failure;
mod features;
pub mod journal;
mod listen;
pub mod message;
pub mod migration;
mod patience;
mod peer;
pub mod plain;
mod poller;
mod server;
pub mod session;
pub mod socket;
pub mod state;
mod target;
pub mod version;

pub use client::{Client, ClientError};
pub use closer::{Closer, PeerFds};
pub use eventfd::is_eventfd;
pub use listen::bind_private;
pub use patience::{Allowance, Patience};
pub use rustix::io::Errno;
pub use server::{Outcome, Peer, Server, Stats, Timeouts};
pub use session::Effort;
pub use target::{DeviceInfo, IoEventFd, IrqAction, IrqInfo, Mapping, RegionInfo, Target, pci};
