// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's side of vbus on Linux: finds the functions of a vbus and drives them from user
//! space. In a virtual machine they are functions of the PCI bus ([`PciSource`]). That source uses
//! sysfs, `uio_pci_generic` and huge pages, and needs root. A plain process drives them over their
//! vfio-user sockets ([`SocketSource`]), without a virtual machine and without root. Both
//! implement [`Source`], which gives a [`Hal`](vbus_driver::Hal) and an [`Interrupt`] for each
//! function.
//!
//! One driver works with any source:
//!
//! ```no_run
//! use std::time::Duration;
//! use vbus_driver::{Function, requests::Requests};
//! use vbus_guest::{PciSource, SocketSource, Source, USER_CLASS, claim, wait};
//!
//! fn drive(source: &impl Source) -> anyhow::Result<()> {
//!     // `None` takes the first free function of the class; `Some("echo0")` takes the one of that
// name.
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
pub use vbus_process::Patience;
/// The class number of all classes outside of vbus, for [`claim`]. The class's name tells them
/// apart.
pub use vbus_shm::abi::class::USER as USER_CLASS;

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
