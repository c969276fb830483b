// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration space of a PCI function: its fields, its capabilities, and the MSI-X table.
//!
//! Two programs need the same bytes: the function of a device (`vbus-pci`), and a VMM that shows
//! such a function to its guest (`vbus-vmm`). This crate holds the code that is the same for both.
//! It does no input and no output, allocates memory only when it makes a space, and knows nothing
//! of vbus.
//!
//! [`Space`] is bytes with write masks. [`Builder`] lays out the space of a function with a header
//! of type 0. It makes a [`ConfigSpace`], which tells what a driver has set up. [`capabilities`]
//! walks the list of capabilities in any bytes, also hostile ones. [`MsixTable`] is the table that
//! lies in a BAR.
//!
//! ```
//! use vbus_pci_config::{Builder, Header, capabilities, capability};
//!
//! let header = Header {
//!     vendor: 0x1af4,
//!     device: 0x10f5,
//!     class: 0xff_00_00,
//!     interrupt_pin: 1,
//!     ..Header::default()
//! };
//! let mut space = Builder::new(256, &header).bar(0, 0x1000).msi(0x40, false).build();
//!
//! // A driver sizes the BAR, places it, and enables it.
//! space.write(0x10, &[0xff; 4]);
//! let mut mask = [0; 4];
//! space.read(0x10, &mut mask);
//! assert_eq!(u32::from_le_bytes(mask), 0xffff_f000);
//! space.write(0x10, &0xe000_0000u32.to_le_bytes());
//! assert_eq!(space.bar(0), None);
//! space.write(0x04, &[0x02]);
//! assert_eq!(space.bar(0), Some(0xe000_0000));
//!
//! let list: Result<Vec<_>, _> = capabilities(space.bytes()).collect();
//! assert_eq!(list.unwrap(), [(capability::MSI, 0x40)]);
//! ```
#![no_std]

extern crate alloc;

mod function;
mod list;
mod msix;
pub mod register;
mod space;

pub use function::{Builder, ConfigSpace, Header};
pub use list::{BadList, Capabilities, capabilities, capability};
pub use msix::{MsiMessage, MsixLayout, MsixTable, read_pending_bits};
pub use space::{Space, touches};

/// Bytes of a conventional function's configuration space.
pub const CONVENTIONAL_BYTES: usize = 256;
/// Bytes of a PCI Express function's configuration space.
pub const EXPRESS_BYTES: usize = 4096;

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
