// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's accesses to PCI that come to user space: configuration space in memory (ECAM) and by
//! ports (CF8), BARs, and doorbells by port.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::doorbells;
use super::hierarchy::{ConfigAddress, Hierarchy};
use super::resources::Resources;
use crate::bus::{Bus, BusDevice};
use crate::layout;

impl ConfigAddress {
    /// The address of an offset in the ECAM.
    fn of_ecam(offset: u64) -> ConfigAddress {
        let bits = |shift: u32, mask: u64| u8::try_from(offset >> shift & mask).unwrap_or(u8::MAX);
        let register = usize::try_from(offset & 0xfff).unwrap_or(0);
        ConfigAddress { bus: bits(20, 0xff), device: bits(15, 31), function: bits(12, 7), register }
    }

    /// The address in the address register of CF8, for byte `port` (0 to 3) of the data register.
    fn of_ports(address: u32, port: u64) -> Option<ConfigAddress> {
        let enabled = address & 1 << 31 != 0;
        let ecam = u64::from(address >> 8 & 0xffff) << 12 | u64::from(address & 0xfc) | port;
        enabled.then(|| ConfigAddress::of_ecam(ecam))
    }
}

/// Gives PCI its addresses in memory.
pub(super) fn attach(hierarchy: &Arc<Hierarchy>, mmio: &mut Bus) {
    mmio.add(layout::ECAM, layout::ECAM_BYTES, Arc::new(Ecam(hierarchy.clone())));
    let window = Arc::new(Window(hierarchy.clone()));
    mmio.add(layout::PCI_WINDOW, layout::PCI_WINDOW_BYTES, window);
}

/// Configuration space in memory.
struct Ecam(Arc<Hierarchy>);

/// Whether an access stays within the 4 KiB of one function.
fn stays(offset: u64, len: usize) -> bool {
    (offset & 0xfff) + len as u64 <= 0x1000
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if stays(offset, data.len()) {
            self.0.read_config(ConfigAddress::of_ecam(offset), data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if stays(offset, data.len()) {
            self.0.write_config(ConfigAddress::of_ecam(offset), data);
        }
    }
}

/// The bits of the address register that can be set.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// Configuration space by ports: an address register, and 4 bytes of data.
pub(super) struct ConfigPorts {
    hierarchy: Arc<Hierarchy>,
    /// The address register, CF8.
    address: AtomicU32,
}

impl ConfigPorts {
    /// Makes the ports, which are [`layout::PCI_CONFIG_PORT`] and the seven after it.
    pub(super) fn new(hierarchy: &Arc<Hierarchy>) -> Arc<ConfigPorts> {
        Arc::new(ConfigPorts { hierarchy: hierarchy.clone(), address: AtomicU32::new(0) })
    }

    /// Puts the address register into the state after power-on.
    pub(super) fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
    }

    /// The address register.
    pub(super) fn address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// Sets the address register.
    pub(super) fn set_address(&self, address: u32) {
        self.address.store(address & ADDRESS_BITS, Ordering::Relaxed);
    }

    fn target(&self, offset: u64, len: usize) -> Option<ConfigAddress> {
        let port = offset.checked_sub(4).filter(|port| port + len as u64 <= 4)?;
        ConfigAddress::of_ports(self.address.load(Ordering::Relaxed), port)
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset < 4 {
            let address = self.address.load(Ordering::Relaxed).to_le_bytes();
            for (at, byte) in (offset..4).zip(data) {
                *byte = address[usize::try_from(at).unwrap_or(0)];
            }
        } else if let Some(target) = self.target(offset, data.len()) {
            self.hierarchy.read_config(target, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // The address register takes only writes of all 4 bytes. Narrower writes are for other
        // ports that a PC has at the same addresses.
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            self.set_address(u32::from_le_bytes(address));
        } else if let Some(target) = self.target(offset, data.len()) {
            self.hierarchy.write_config(target, data);
        }
    }
}

/// The memory into which the guest puts BARs.
struct Window(Arc<Hierarchy>);

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some((function, offset)) = self.0.at(layout::PCI_WINDOW + offset, data.len()) {
            function.read_bar(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, offset)) = self.0.at(layout::PCI_WINDOW + offset, data.len()) {
            function.write_bar(offset, data);
        }
    }
}

/// The ports of doorbells, for writes that come while KVM has no eventfd there. A write goes to the
/// server as a message.
pub(super) struct DoorbellPorts {
    hierarchy: Arc<Hierarchy>,
    /// The number of ports of each slot.
    per_slot: u64,
    /// The user wants doorbells by port.
    enabled: bool,
}

impl DoorbellPorts {
    /// Makes the ports, which are [`layout::DOORBELL_PORTS`] and those after it.
    pub(super) fn new(hierarchy: &Arc<Hierarchy>, resources: &Resources) -> Arc<DoorbellPorts> {
        Arc::new(DoorbellPorts {
            hierarchy: hierarchy.clone(),
            per_slot: doorbells::ports_per_slot(resources.ports).into(),
            enabled: resources.backing.pio,
        })
    }
}

impl BusDevice for DoorbellPorts {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, offset: u64, _data: &[u8]) {
        let number = offset % self.per_slot / u64::from(doorbells::PORT_STRIDE);
        let slot = usize::try_from(offset / self.per_slot).ok();
        let slot = slot.and_then(|slot| self.hierarchy.slots.get(slot));
        let function = slot.filter(|_| self.enabled).and_then(|slot| slot.reachable_function());
        if let (Some(function), Ok(number)) = (function, u32::try_from(number)) {
            function.ring(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_lead_to_the_same_register() {
        let address = ConfigAddress { bus: 3, device: 31, function: 7, register: 0x104 };
        assert_eq!(ConfigAddress::of_ecam(3 << 20 | 31 << 15 | 7 << 12 | 0x104), address);
        let address = ConfigAddress { register: 0x7f, ..address };
        let by_ports = 1 << 31 | 3 << 16 | 31 << 11 | 7 << 8 | 0x7c;
        assert_eq!(ConfigAddress::of_ports(by_ports, 3), Some(address));
        assert_eq!(ConfigAddress::of_ports(3 << 16, 0), None);
        assert!(stays(0x1ff8, 8) && !stays(0x1ff9, 8));
    }
}
