// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds the device for an access of the guest that came to user space.

use std::collections::BTreeMap;
use std::sync::Arc;

/// A device with addresses or ports. Threads of several virtual CPUs may access it at the same
/// time.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` (1 to 8) bytes at `offset` from the device's first address. `data` holds
    /// all ones before.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data.len()` (1 to 8) bytes at `offset` from the device's first address.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The devices of one address space, memory or ports. Each device has its own range.
#[derive(Default)]
pub struct Bus {
    /// Length and device, by first address.
    ranges: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Gives `device` the `len` addresses from `start` on.
    ///
    /// # Panics
    /// If another device has some of the addresses. The layout is wrong then.
    pub fn add(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) {
        let before = self.ranges.range(..start + len).next_back();
        assert!(
            before.is_none_or(|(at, (bytes, _))| at + bytes <= start),
            "two devices at {start:#x}"
        );
        self.ranges.insert(start, (len, device));
    }

    /// Reads for the guest. An address without a device reads as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address) {
            device.read(offset, data);
        }
    }

    /// Writes for the guest. A write to an address without a device is lost.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &dyn BusDevice)> {
        let (start, (len, device)) = self.ranges.range(..=address).next_back()?;
        (address - start < *len).then(|| (address - start, &**device))
    }
}
