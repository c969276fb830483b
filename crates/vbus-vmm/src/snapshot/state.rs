// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The state of the devices of this program, and the moment at which the machine was stopped.

use serde::{Deserialize, Serialize};

use crate::ioapic::SavedIoApic;
use crate::pci::SavedPci;
use crate::power::Registers;
use crate::serial::SavedUart;

/// The state, as the section `Devices` has it in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DevicesState {
    /// KVM's clock of the guest, in nanoseconds.
    pub(crate) clock_ns: u64,
    /// The time of the host since 1970, in nanoseconds.
    pub(crate) stopped_at_ns: u64,
    /// The power management registers.
    pub(crate) power: Registers,
    /// The serial ports.
    pub(crate) serial: Vec<SavedUart>,
    /// The I/O APIC, if it is in this program.
    pub(crate) io_apic: Option<SavedIoApic>,
    /// PCI.
    pub(crate) pci: SavedPci,
}
