// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Functions on the PCI bus of this Linux machine. A process drives them from user space with the
//! means of a stock kernel: sysfs, `uio_pci_generic`, huge pages.

mod bar;
mod hal;
mod huge;
mod port;
mod sysfs;
mod uevent;
mod uio;

pub use sysfs::PciSource;
