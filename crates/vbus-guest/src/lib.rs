//! The guest's side of vbus on Linux: finds the functions of a vbus and drives them from user
//! space. In a virtual machine they are functions of the PCI bus ([`PciSource`]: sysfs,
//! `uio_pci_generic`, huge pages; it needs root). A plain process drives them over their vfio-user
//! sockets ([`SocketSource`]), without a virtual machine and without root. Both are a [`Source`],
//! and give a [`Hal`](vbus_driver::Hal) and an [`Interrupt`] for each function.
//!
//! A driver is written once, over any source:
//!
//! ```no_run
//! use vbus_driver::Function;
//! use vbus_guest::{PciSource, SocketSource, Source, claim};
//! use vbus_shm::abi::class;
//!
//! fn drive(source: &impl Source) -> anyhow::Result<()> {
//!     // The first free function of that class; or the one that is called, say, "echo0".
//!     let (found, (hal, interrupt)) = claim(source, class::USER, "echo", None)?;
//!     let mut function = Function::probe(hal)?;
//!     function.open(0)?;
//!     println!("{} is open, its name is {}", found.id, function.info().name);
//!     // Registers regions with `function.region_add`, rings with `function.ring`, and waits for
//!     // `interrupt.fd()` to become readable.
//!     # let _ = interrupt;
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
mod socket;
mod source;

pub use pci::PciSource;
pub use socket::SocketSource;
pub use source::{Claimed, Found, Interrupt, Source, claim, is_meant};
