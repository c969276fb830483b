// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The components of a machine that control clients reach while it runs.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use serde_json::Value;

use crate::counters::VcpuCounters;
use crate::cpus::Cpus;
use crate::events::EventSender;
use crate::irqchip::IrqChip;
use crate::marks::Marks;
use crate::memory::Ram;
use crate::pci::PciRoot;
use crate::power::Power;
use crate::serial::SerialPort;
use crate::snapshot::description::Description;

/// The components.
pub struct Components {
    /// The virtual CPUs.
    pub cpus: Cpus,
    /// The counters of the virtual CPUs, by number.
    pub counters: Arc<[VcpuCounters]>,
    /// The guest's memory.
    pub ram: Ram,
    /// The interrupt controllers.
    pub irqchip: Arc<IrqChip>,
    /// The serial ports.
    pub serial: Vec<Arc<SerialPort>>,
    /// PCI with its devices.
    pub pci: Arc<PciRoot>,
    /// The power button and the power management registers.
    pub power: Arc<Power>,
    /// The marks that the guest has set, if it may set any (`--marks`).
    pub marks: Option<Arc<Marks>>,
    /// Sends events to the main thread.
    pub events: EventSender,
    /// The answer to the control request `info`, which never changes.
    pub info: Value,
    /// The description of the machine without its devices, if it is saved.
    pub(crate) description: Description,
}

impl Components {
    /// KVM's virtual machine.
    pub fn vm(&self) -> &VmFd {
        self.irqchip.routes().vm()
    }
}
