//! A vbus device as a PCI function: configuration space, capabilities, BAR0 with the register
//! block, interrupts.
//!
//! [`PciFunction`] is all of it, for a connector to serve: it turns accesses to regions into
//! operations of the device's [`Endpoint`](vbus_core::Endpoint), and the device's interrupts into
//! writes of the eventfds that the connector was given. What the driver sees is specified in
//! `spec/pci.md`.
//!
//! ```
//! use std::sync::Arc;
//! use vbus_core::shm::abi::{bar0, reg};
//! use vbus_core::{Bus, Connection, Device, Executor, Identity, Open, ErrorCode, Trust, Tuning};
//! use vbus_pci::{Options, PciFunction, region};
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
//! let bus = Bus::new(Executor::start(Tuning::default())?, Vec::new(), Trust::Sealed);
//! let endpoint = bus.add("nothing0", Arc::new(Nothing)).unwrap();
//! let mut function = PciFunction::new(endpoint, Options::default());
//!
//! // A driver's first looks: vendor and device in the configuration space, then the magic number in BAR 0.
//! let mut word = [0; 4];
//! function.read(region::CONFIG, 0, &mut word);
//! assert_eq!(u32::from_le_bytes(word), 0x10f5_1af4);
//! function.read(region::BAR0, bar0::REGISTERS + reg::MAGIC, &mut word);
//! assert_eq!(&word, b"vbus");
//! # Ok::<(), std::io::Error>(())
//! ```

mod config;
mod function;
mod interrupts;
mod mask_event;
mod registers;

pub use function::{DoorbellFd, PciFunction, REGION_COUNT, region};
pub use interrupts::{INDEX_COUNT, IrqError, IrqIndex};

/// What a function has beyond what every function has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// An MSI-X capability with a vector for each that the device can use, beside MSI and INTx.
    /// QEMU 11.1 aborts when a vfio-user device with MSI-X is unplugged, so it is off unless asked
    /// for.
    pub msix: bool,
    /// A PCI Express capability and 4096 bytes of configuration space. QEMU's root ports take
    /// functions without it, also while the machine runs, so it is off unless asked for.
    pub express: bool,
}
