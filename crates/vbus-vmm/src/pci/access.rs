//! Where accesses of the guest come in: configuration space by memory (ECAM) and by ports (CF8),
//! and the BARs.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{PciRoot, lock};
use crate::bus::BusDevice;
use crate::layout;

/// A place in configuration space. Functions other than 0 do not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    bus: u8,
    device: u8,
    function: u8,
    register: usize,
}

impl Place {
    /// Of an offset in the ECAM.
    fn of_ecam(offset: u64) -> Place {
        let bits = |shift: u32, mask: u64| u8::try_from(offset >> shift & mask).unwrap_or(u8::MAX);
        let register = usize::try_from(offset & 0xfff).unwrap_or(0);
        Place { bus: bits(20, 0xff), device: bits(15, 31), function: bits(12, 7), register }
    }

    /// Of the address register of CF8, and the port, from 0 to 3, of the data register.
    fn of_ports(address: u32, port: u64) -> Option<Place> {
        let enabled = address & 1 << 31 != 0;
        let ecam = u64::from(address >> 8 & 0xffff) << 12 | u64::from(address & 0xfc) | port;
        enabled.then(|| Place::of_ecam(ecam))
    }
}

impl PciRoot {
    /// `data` holds all ones, as what is not there reads.
    fn read_config(&self, place: Place, data: &mut [u8]) {
        let Place { bus, device, function, register } = place;
        match (bus, device, function) {
            (0, 0, 0) => lock(&self.host_bridge).read(register, data),
            (0, device, 0) => {
                if let Some(slot) = self.slots.get(usize::from(device) - 1) {
                    slot.read_port(register, data);
                }
            }
            (1.., 0, 0) => {
                if let Some(function) =
                    self.slots.iter().find_map(|slot| slot.behind(bus)).flatten()
                {
                    function.read_config(register, data);
                }
            }
            _ => {}
        }
    }

    fn write_config(&self, place: Place, data: &[u8]) {
        let Place { bus, device, function, register } = place;
        match (bus, device, function) {
            (0, 0, 0) => lock(&self.host_bridge).write(register, data),
            (0, device, 0) => {
                if let Some(slot) = self.slots.get(usize::from(device) - 1) {
                    slot.write_port(register, data);
                }
            }
            (1.., 0, 0) => {
                let found = self
                    .slots
                    .iter()
                    .find_map(|slot| slot.behind(bus).map(|function| (slot, function)));
                if let Some((slot, Some(function))) = found {
                    slot.write_function(&function, register, data);
                }
            }
            _ => {}
        }
    }
}

/// Configuration space by memory.
pub(super) struct Ecam(pub(super) Arc<PciRoot>);

/// Whether an access stays within one function's 4 KiB.
fn stays(offset: u64, len: usize) -> bool {
    (offset & 0xfff) + len as u64 <= 0x1000
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if stays(offset, data.len()) {
            self.0.read_config(Place::of_ecam(offset), data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if stays(offset, data.len()) {
            self.0.write_config(Place::of_ecam(offset), data);
        }
    }
}

/// Configuration space by ports: the address register, and 4 bytes of data.
pub(super) struct ConfigPorts(pub(super) Arc<PciRoot>);

impl ConfigPorts {
    fn place(&self, offset: u64, len: usize) -> Option<Place> {
        let port = offset.checked_sub(4).filter(|port| port + len as u64 <= 4)?;
        Place::of_ports(self.0.address.load(Ordering::Relaxed), port)
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset < 4 {
            let address = self.0.address.load(Ordering::Relaxed).to_le_bytes();
            for (at, byte) in (offset..4).zip(data) {
                *byte = address[usize::try_from(at).unwrap_or(0)];
            }
        } else if let Some(place) = self.place(offset, data.len()) {
            self.0.read_config(place, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // The address register takes only all of its bytes at once: others are for ports that a PC
        // has at the same place.
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            self.0.address.store(u32::from_le_bytes(address) & 0x80ff_fffc, Ordering::Relaxed);
        } else if let Some(place) = self.place(offset, data.len()) {
            self.0.write_config(place, data);
        }
    }
}

/// The memory that BARs are put in.
pub(super) struct Window(pub(super) Arc<PciRoot>);

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let address = layout::PCI_WINDOW + offset;
        if let Some((function, offset)) =
            self.0.slots.iter().find_map(|slot| slot.at(address, data.len()))
        {
            function.read_bar(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let address = layout::PCI_WINDOW + offset;
        if let Some((function, offset)) =
            self.0.slots.iter().find_map(|slot| slot.at(address, data.len()))
        {
            function.write_bar(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let place = Place { bus: 3, device: 31, function: 7, register: 0x104 };
        assert_eq!(Place::of_ecam(3 << 20 | 31 << 15 | 7 << 12 | 0x104), place);
        let place = Place { register: 0x7f, ..place };
        assert_eq!(Place::of_ports(1 << 31 | 3 << 16 | 31 << 11 | 7 << 8 | 0x7c, 3), Some(place));
        assert_eq!(Place::of_ports(3 << 16, 0), None);
        assert!(stays(0x1ff8, 8) && !stays(0x1ff9, 8));
    }
}
