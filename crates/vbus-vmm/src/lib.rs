// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The parts of `vbus-vmm`, a small virtual machine monitor on KVM for the devices of a vbus. It is
//! for reading, and for measuring the cost of doorbells and interrupts. `spec/vmm.md` describes the
//! machine, its sockets and its output.
//!
//! From the top down: [`machine`] puts all components together and handles the events of
//! [`events`]; `control` serves its clients. `cpus` runs the virtual CPUs (`vcpu`), whose exits end
//! at the devices of a [`bus`]: [`serial`], `power`, `marks`, [`ioapic`] and [`pci`]. [`boot`] and
//! [`acpi`] fill the guest's [`memory`] by the [`layout`] of the machine.
//!
//! The guest's memory and its layout, for example:
//!
//! ```
//! use vbus_vmm::layout;
//! use vbus_vmm::memory::Ram;
//!
//! let ram = Ram::new(4 << 30)?;
//! let regions = ram.regions();
//! assert_eq!((regions[0].base, regions[0].bytes), (0, layout::LOW_RAM_END));
//! assert_eq!((regions[1].base, regions[1].bytes), (layout::HIGH_RAM, 1 << 30));
//! # Ok::<(), anyhow::Error>(())
//! ```
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

pub mod acpi;
pub mod boot;
pub mod bus;
mod components;
mod control;
mod counters;
mod cpuid;
mod cpus;
mod dump;
pub mod events;
mod exits;
pub mod ioapic;
pub mod irqchip;
pub mod layout;
mod lock;
pub mod machine;
mod marks;
pub mod memory;
pub mod pci;
mod power;
pub mod seccomp;
pub mod serial;
pub mod snapshot;
mod socket;
pub mod terminal;
mod vcpu;
mod vcpu_gate;
mod vcpu_state;
