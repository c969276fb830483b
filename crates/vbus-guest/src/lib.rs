//! The guest's side of vbus on Linux: finds the functions of a vbus and drives them from user
//! space. In a virtual machine they are functions of the PCI bus ([`PciSource`]: sysfs,
//! `uio_pci_generic`, huge pages; it needs root). A plain process drives them over their vfio-user
//! sockets ([`SocketSource`]), without a virtual machine and without root. Both are a [`Source`],
//! and give a [`Hal`](vbus_driver::Hal) and an [`Interrupt`] for each function.
//!
//! A driver is written once, over any source:
//!
//! ```no_run
//! use std::time::Duration;
//! use vbus_driver::{Function, requests::Requests};
//! use vbus_guest::{PciSource, SocketSource, Source, USER_CLASS, claim, wait};
//!
//! fn drive(source: &impl Source) -> anyhow::Result<()> {
//!     // The first free function of that class; or the one that is called, say, "echo0".
//!     let (found, (hal, mut interrupt)) = claim(source, USER_CLASS, "echo", None)?;
//!     let mut echo = Requests::open(Function::probe(hal)?, "echo", 1, 0)?;
//!     let mut response = [0; 64];
//!     let mut wait = || wait(&mut *interrupt, Duration::from_secs(1)).unwrap_or(false);
//!     let len = echo.call(b"hello", &mut response, &mut wait)?;
//!     println!("{} answers {:?}", found.id, &response[..len]);
//!     Ok(())
//! }
//!
//! # fn main() -> anyhow::Result<()> {
//! drive(&PciSource::new()?)?; // in a guest
//! drive(&SocketSource::One("/run/vbus/echo0.sock".into())) // in a plain process
//! # }
//! ```
//!
//! The program `vbus-guest` drives the devices of vbus's own classes.

mod pci;
mod reopen;
mod socket;
mod source;

pub use pci::PciSource;
pub use reopen::keep_open;
pub use socket::SocketSource;
pub use source::{Claimed, Found, Interrupt, Source, claim, is_meant, wait};
/// The number of classes of one's own, whose name tells them apart: for [`claim`].
pub use vbus_shm::abi::class::USER as USER_CLASS;
