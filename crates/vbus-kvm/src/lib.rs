//! The KVM connector of vbus: doorbells that end as an eventfd in the kernel, and interrupts that
//! begin as one.
//!
//! A device of the bus gives its VMM one eventfd for each doorbell and takes one for each interrupt
//! (over vfio-user: `DEVICE_GET_REGION_IO_FDS`, `DEVICE_SET_IRQS`). This crate joins them to a
//! virtual machine of KVM, so that neither passes through the VMM's process. It is for any VMM that
//! uses [`kvm_ioctls`], and knows nothing of PCI, of vfio-user or of the VMM's own structure:
//!
//! - [`Kinds`]: what this KVM can do;
//! - [`Doorbells`]: all doorbells of one function, as [`Kind::Mmio`], [`Kind::Pio`] and
//!   [`Kind::Hypercall`] at once, each at a [`Place`] that can change, as that of a BAR does;
//! - [`Routes`]: the virtual machine's table of interrupt routes, which KVM takes only as a whole,
//!   and which therefore has one owner;
//! - [`Message`]: an interrupt that is a message (MSI, a vector of MSI-X, or one that KVM's SynIC
//!   takes): given a route, masked and unmasked at run time, without losing an event;
//! - [`Level`]: an interrupt that is a level on a pin (INTx);
//! - [`offer_hypercalls`]: the CPUID that goes with hypercalls and synthetic interrupts;
//! - [`Stats`]: KVM's own count of exits, by kind, for a test that no exit is left on the fast
//!   path.
//!
//! What the guest does on its end is in `spec/pci.md`, "Doorbell kinds".
//!
//! A function with one doorbell and one interrupt, and a loop between them inside the kernel,
//! without a thread of anybody's:
//!
//! ```no_run
//! use std::sync::Arc;
//! use kvm_ioctls::Kvm;
//! use vbus_kvm::{Chip, Doorbells, Kind, Kinds, Message, Place, Route, Routes};
//!
//! let kvm = Kvm::new()?;
//! let kinds = Kinds::probe(&kvm);
//! let vm = Arc::new(kvm.create_vm()?);
//! vm.create_irq_chip()?;
//! let routes = Routes::new(vm.clone(), Chip::Kernel)?;
//!
//! // The guest has written this address and this data into its MSI capability.
//! let mut interrupt = Message::new(routes)?;
//! interrupt.set(Route::Msi { address: 0xfee0_0000, data: 0x31 })?;
//! interrupt.unmask()?;
//!
//! // Normally the device's; here each ring of doorbell 0 is an interrupt at once.
//! let eventfd = interrupt.eventfd().try_clone_to_owned()?;
//! let mut doorbells = Doorbells::new(vm, vec![(0, eventfd)])?;
//! for (kind, place) in [
//!     // BAR0 lies at 0xe0000000, and its doorbells from 0x1000 on.
//!     (Kind::Mmio, Place { base: 0xe000_1000, stride: 4 }),
//!     (Kind::Pio, Place { base: 0xc000, stride: 1 }),
//!     (Kind::Hypercall, Place { base: 0x1000, stride: 1 }),
//! ] {
//!     if kinds.has(kind) {
//!         doorbells.place(kind, Some(place))?;
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod cpuid;
mod doorbells;
mod error;
mod kinds;
mod level;
mod message;
mod routes;
mod stats;
mod sys;

pub use cpuid::offer_hypercalls;
pub use doorbells::{Doorbells, Kind, Place};
pub use error::Error;
pub use kinds::Kinds;
pub use level::Level;
pub use message::Message;
pub use routes::{Chip, Route, Routes, SINTS, Sints};
pub use stats::{Stats, Values};
