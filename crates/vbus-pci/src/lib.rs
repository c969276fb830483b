// SPDX-License-Identifier: Apache-2.0 OR MIT
//! PCI functions that a connector serves. One kind of function is a device of vbus.
//!
//! [`PciFunction`] is a function of any kind. It has a configuration space
//! ([`vbus_pci_config::ConfigSpace`]), interrupts ([`Interrupts`]: INTx, MSI, MSI-X, as writes of
//! eventfds), and a [`BarHandler`] for each BAR.
//!
//! [`RegisterBlock`] is the handler that makes such a function a device of vbus. It has registers
//! and doorbells in BAR0. [`device_function`] makes the whole function. `spec/pci.md` says what a
//! driver finds.
//!
//! ```
//! use std::sync::Arc;
//! use vbus_core::shm::abi::{bar0, reg};
//! use vbus_core::{Bus, Connection, Device, Executor, Identity, Open, ErrorCode, Tuning};
//! use vbus_pci::{Options, device_function, region};
//!
//! /// A device that does nothing, for whoever opens it.
//! struct Nothing;
//!
//! struct Use;
//!
//! impl Connection for Use {
//!     fn region_added(&mut self, _: vbus_core::Region) -> Result<(), ErrorCode> {
//!         Err(ErrorCode::BAD_ARGUMENT)
//!     }
//! }
//!
//! impl Device for Nothing {
//!     fn identity(&self) -> Identity {
//!         Identity::user("nothing")
//!     }
//!     fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
//!         Ok(Box::new(Use))
//!     }
//! }
//!
//! let bus = Bus::new(Executor::start(Tuning::default())?, Vec::new());
//! let endpoint = bus.add("nothing0", Arc::new(Nothing)).unwrap();
//! let mut function = device_function(endpoint, Options::default());
//!
//! // A driver's first looks: vendor and device in the configuration space, then the magic number in BAR 0.
//! let mut word = [0; 4];
//! function.read(region::CONFIG, 0, &mut word);
//! assert_eq!(u32::from_le_bytes(word), 0x10f5_1af4);
//! function.read(region::BAR0, bar0::REGISTERS + reg::MAGIC, &mut word);
//! assert_eq!(&word, b"vbus");
//! # Ok::<(), std::io::Error>(())
//! ```

mod after_reset;
mod function;
mod interrupts;
mod mask_event;
mod own_function;
mod register_block;
mod saved;

pub use function::{BarHandler, IoEventFd, PciFunction, REGION_COUNT, region};
pub use interrupts::{INDEX_COUNT, Interrupts, IrqError, IrqIndex};
pub use own_function::OwnFunction;
pub use register_block::{RegisterBlock, device_function};
pub use saved::{FunctionState, Peer};
pub use vbus_pci_config;

/// Optional parts of a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// MSI-X beside MSI and INTx, with as many vectors as the device can use. It is off by default,
    /// because QEMU 11.1 aborts when a vfio-user device with MSI-X is unplugged.
    pub msix: bool,
    /// A PCI Express capability and 4096 bytes of configuration space. It is off by default,
    /// because QEMU's root ports also take functions without it, even while the machine runs.
    pub express: bool,
}

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
