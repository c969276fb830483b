// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The PCI hierarchy as the guest sees it: the host bridge and the slots behind it.

use std::sync::{Arc, Mutex};

use vbus_kvm::Routes;
use vbus_pci_config::register::{COMMAND, COMMAND_MASTER, COMMAND_MEMORY, REVISION, VENDOR};
use vbus_pci_config::{CONVENTIONAL_BYTES, Space};

use super::function::Function;
use super::slot::Slot;
use crate::lock::lock;

/// Vendor and device id of the host bridge, as QEMU's generic one has them.
const HOST_BRIDGE_ID: u32 = 0x0008_1b36;
/// The class code of a host bridge, above the revision.
const HOST_BRIDGE_CLASS: u32 = 0x0600_0000;

/// The host bridge and the slots.
pub(super) struct Hierarchy {
    host_bridge: Mutex<Space>,
    /// By device number on bus 0, from 1 on.
    pub(super) slots: Vec<Slot>,
}

/// The address of a register in configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConfigAddress {
    pub(super) bus: u8,
    pub(super) device: u8,
    pub(super) function: u8,
    pub(super) register: usize,
}

impl Hierarchy {
    /// A host bridge with `ports` root ports.
    pub(super) fn new(ports: u8, routes: &Arc<Routes>) -> Hierarchy {
        let slots = (1..=ports).map(|number| Slot::new(number, routes.clone())).collect();
        Hierarchy { host_bridge: Mutex::new(host_bridge()), slots }
    }

    /// Puts everything into the state after power-on.
    pub(super) fn reset(&self) {
        *lock(&self.host_bridge) = host_bridge();
        self.slots.iter().for_each(Slot::reset);
    }

    /// The configuration space of the host bridge.
    pub(super) fn save_host_bridge(&self) -> Vec<u8> {
        lock(&self.host_bridge).bytes().to_vec()
    }

    /// Gives the host bridge a saved configuration space. Returns false if it is that of another
    /// bridge.
    pub(super) fn restore_host_bridge(&self, bytes: &[u8]) -> bool {
        lock(&self.host_bridge).restore(bytes)
    }

    /// Reads configuration space. `data` holds all ones before; an address without a function
    /// leaves it so. Functions other than 0 do not exist.
    pub(super) fn read_config(&self, address: ConfigAddress, data: &mut [u8]) {
        let ConfigAddress { bus, device, function, register } = address;
        match (bus, device, function) {
            (0, 0, 0) => lock(&self.host_bridge).read(register, data),
            (0, device, 0) => {
                if let Some(slot) = self.slots.get(usize::from(device) - 1) {
                    slot.read_port(register, data);
                }
            }
            (1.., 0, 0) => {
                if let Some((_, function)) = self.on_bus(bus) {
                    function.read_config(register, data);
                }
            }
            _ => {}
        }
    }

    /// Writes configuration space.
    pub(super) fn write_config(&self, address: ConfigAddress, data: &[u8]) {
        let ConfigAddress { bus, device, function, register } = address;
        match (bus, device, function) {
            (0, 0, 0) => lock(&self.host_bridge).write(register, data),
            (0, device, 0) => {
                if let Some(slot) = self.slots.get(usize::from(device) - 1) {
                    slot.write_port(register, data);
                }
            }
            (1.., 0, 0) => {
                if let Some((slot, function)) = self.on_bus(bus) {
                    slot.write_function(&function, register, data);
                }
            }
            _ => {}
        }
    }

    /// The function on a bus. If several root ports pass accesses to the bus on, the first decides.
    fn on_bus(&self, bus: u8) -> Option<(&Slot, Arc<Function>)> {
        let behind = |slot| Slot::behind(slot, bus).map(|function| (slot, function));
        let (slot, function) = self.slots.iter().find_map(behind)?;
        Some((slot, function?))
    }

    /// The function whose BAR0 has the `len` addresses from `address` on, and the offset in BAR0.
    pub(super) fn at(&self, address: u64, len: usize) -> Option<(Arc<Function>, u64)> {
        self.slots.iter().find_map(|slot| slot.at(address, len))
    }
}

/// The configuration space of the host bridge: its identity, and nothing else.
fn host_bridge() -> Space {
    let mut space = Space::new(CONVENTIONAL_BYTES);
    space.set32(VENDOR, HOST_BRIDGE_ID);
    space.allow(COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER).to_le_bytes());
    space.set32(REVISION, HOST_BRIDGE_CLASS);
    space
}
