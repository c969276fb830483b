// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The KVM connector of vbus. It ends doorbells in eventfds, and lets eventfds raise interrupts,
//! inside the kernel.
//!
//! A device of the bus gives its VMM one eventfd for each doorbell, and takes one for each
//! interrupt (over vfio-user: `DEVICE_GET_REGION_IO_FDS`, `DEVICE_SET_IRQS`). This crate connects
//! them to a virtual machine of KVM, so that neither passes through the VMM's process. Any VMM that
//! uses [`kvm_ioctls`] can use it. The crate knows nothing of PCI, of vfio-user, or of the
//! structure of the VMM.
//!
//! - [`Capabilities`]: the features of this machine's KVM.
//! - [`Doorbells`]: all doorbells of one function. They can be [`DoorbellKind::Mmio`],
//!   [`DoorbellKind::Pio`] and [`DoorbellKind::Hypercall`] at the same time. Each kind has a
//!   [`DoorbellRange`], which can move as a BAR does.
//! - [`Routes`]: the virtual machine's table of interrupt routes. KVM takes only the whole table,
//!   so it has one owner.
//! - [`MsiIrqfd`]: a message-signalled interrupt (MSI, a vector of MSI-X, or a synthetic interrupt
//!   of KVM's SynIC). It can be routed, masked and unmasked at run time, and no event is lost.
//! - [`IntxIrqfd`]: a level-triggered interrupt on a pin (INTx).
//! - [`Signaller`] and [`take_signal`]: they signal and read an eventfd that a device also holds,
//!   and never block, whatever the device does with it.
//! - [`offer_hypercalls`]: the CPUID leaves that hypercalls and synthetic interrupts need.
//! - [`Stats`]: KVM's own counters of exits, by kind. Tests use them to show that the fast path has
//!   no exit.
//!
//! `spec/pci.md`, "Doorbell kinds", says what the guest does.
//!
//! The example is a function with one doorbell and one interrupt, and a loop between them inside
//! the kernel. No thread takes part.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use kvm_ioctls::Kvm;
//! use vbus_kvm::{
//!     Capabilities, DoorbellKind, DoorbellRange, Doorbells, IrqChip, MsiIrqfd, Route, Routes,
//! };
//!
//! let kvm = Kvm::new()?;
//! let capabilities = Capabilities::probe(&kvm);
//! let vm = Arc::new(kvm.create_vm()?);
//! vm.create_irq_chip()?;
//! let routes = Routes::new(vm.clone(), IrqChip::Kernel)?;
//!
//! // The guest has written this address and this data to its MSI capability.
//! let mut interrupt = MsiIrqfd::new(routes)?;
//! interrupt.set(Route::Msi { address: 0xfee0_0000, data: 0x31 })?;
//! interrupt.unmask()?;
//!
//! // The device normally has this eventfd. Here each ring of doorbell 0 raises an interrupt.
//! let eventfd = interrupt.eventfd().try_clone_to_owned()?;
//! let mut doorbells = Doorbells::new(vm, vec![(0, eventfd)])?;
//! for (kind, range) in [
//!     // BAR0 is at 0xe0000000, and its doorbells begin at offset 0x1000.
//!     (DoorbellKind::Mmio, DoorbellRange { base: 0xe000_1000, stride: 4 }),
//!     (DoorbellKind::Pio, DoorbellRange { base: 0xc000, stride: 1 }),
//!     (DoorbellKind::Hypercall, DoorbellRange { base: 0x1000, stride: 1 }),
//! ] {
//!     if capabilities.has(kind) {
//!         doorbells.set_range(kind, Some(range))?;
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod capabilities;
mod cpuid;
mod doorbells;
mod error;
mod intx_irqfd;
mod msi_irqfd;
mod routes;
mod stats;
mod sys;

pub use capabilities::Capabilities;
pub use cpuid::offer_hypercalls;
pub use doorbells::{DoorbellKind, DoorbellRange, Doorbells};
pub use error::Error;
pub use intx_irqfd::IntxIrqfd;
pub use msi_irqfd::MsiIrqfd;
pub use routes::{IrqChip, Route, Routes, SINTS, Sints};
pub use stats::{Stats, Values};
pub use vbus_eventfd::{Signaller, take_signal};

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
