// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The parts of the virtual machine that every function needs.

use std::sync::Arc;

use vbus_kvm::{Routes, Sints};

use crate::ioapic::IoApic;
use crate::memory::RamRegion;

/// The kinds of doorbells and interrupts that functions may use beside MMIO and MSI. KVM must have
/// them, and the user must want them.
#[derive(Clone, Copy, Debug)]
pub struct Backing {
    /// Doorbells in BAR0 end in the kernel. Otherwise they are messages to the server.
    pub mmio: bool,
    /// The guest may ring doorbells by ports.
    pub pio: bool,
    /// The guest may ring doorbells by hypercalls. Its CPUID must show the interface.
    pub hypercall: bool,
    /// The synthetic interrupts, if the virtual CPUs have a SynIC.
    pub sints: Option<Sints>,
}

/// The parts of the virtual machine that every function needs.
pub(super) struct Resources {
    pub(super) routes: Arc<Routes>,
    /// The I/O APIC, if it is in this process. INTx then passes through it.
    pub(super) io_apic: Option<Arc<IoApic>>,
    /// The guest's memory.
    pub(super) ram: Vec<RamRegion>,
    pub(super) backing: Backing,
    /// The number of root ports.
    pub(super) ports: u8,
}
