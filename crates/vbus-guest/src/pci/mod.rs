//! Functions on the PCI bus of this Linux machine, driven from user space with what a stock kernel
//! has: sysfs, `uio_pci_generic`, huge pages.

mod bar;
mod hal;
mod huge;
mod port;
mod sysfs;
mod uevent;
mod uio;

pub use sysfs::PciSource;
