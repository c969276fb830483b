// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The state of PCI, as a saved machine has it (`spec/vmm-snapshot.md`, "Devices").

use serde::{Deserialize, Serialize};

/// The state of all of PCI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedPci {
    /// The address register of the configuration ports.
    pub(super) config_address: u32,
    /// The configuration space of the host bridge.
    #[serde(with = "hex::serde")]
    pub(super) host_bridge: Vec<u8>,
    /// The slots, from slot 1 on.
    pub(super) slots: Vec<SavedSlot>,
}

/// The state of a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedSlot {
    pub(super) port: SavedPort,
    pub(super) function: Option<SavedFunction>,
}

/// The state of a root port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedPort {
    #[serde(with = "hex::serde")]
    pub(super) config: Vec<u8>,
    /// The guest has written Slot Control.
    pub(super) managed: bool,
    /// A hotplug interrupt is due and was sent.
    pub(super) interrupting: bool,
}

/// The state of a function, without what its server keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedFunction {
    /// The name of the device.
    pub(super) name: String,
    /// The size of BAR0 in bytes.
    pub(super) bar: u32,
    /// The most doorbells that the device can have.
    pub(super) doorbells: u32,
    #[serde(with = "hex::serde")]
    pub(super) config: Vec<u8>,
    /// The table of MSI-X.
    #[serde(with = "hex::serde")]
    pub(super) table: Vec<u8>,
    /// The interrupts that were signalled and not sent.
    pub(super) pending: SavedPending,
}

/// Interrupts that were signalled and not sent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedPending {
    pub(super) msi: bool,
    /// The numbers of the vectors of MSI-X.
    pub(super) msix: Vec<u16>,
}
