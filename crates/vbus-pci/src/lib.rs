//! A vbus device as a PCI function: configuration space, capabilities, BAR0 with the register block, interrupts.
//!
//! [`PciFunction`] is all of it, for a connector to serve: it turns accesses to regions into operations of the device's
//! [`Endpoint`](vbus_core::Endpoint), and the device's interrupts into writes of the eventfds that the connector was given. What the driver
//! sees is specified in `spec/pci.md`.

mod config;
mod function;
mod interrupts;
mod registers;
mod unmask;

pub use function::{DoorbellFd, PciFunction, REGION_COUNT, region};
pub use interrupts::{INDEX_COUNT, IrqError, IrqIndex};

/// What a function has beyond what every function has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// An MSI-X capability with a vector for each that the device can use, beside MSI and INTx. QEMU 11.1 aborts when a vfio-user device
    /// with MSI-X is unplugged, so it is off unless asked for.
    pub msix: bool,
    /// A PCI Express capability and 4096 bytes of configuration space. QEMU's root ports take functions without it, also while the machine
    /// runs, so it is off unless asked for.
    pub express: bool,
}
