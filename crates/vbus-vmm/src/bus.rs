//! Which device answers to an access of the guest that came to user space.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Something that answers to addresses or ports. An access may come from any virtual CPU's thread,
/// several at a time.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` (1 to 8) bytes at `offset` from where the device begins. `data` holds all
    /// ones before.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data.len()` (1 to 8) bytes at `offset` from where the device begins.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The devices of one space, memory or ports, each with a range of its own.
#[derive(Default)]
pub struct Bus {
    /// By first address: length and device.
    ranges: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Gives `device` the `len` addresses from `start` on.
    ///
    /// # Panics
    /// If some of them are another's: the layout is wrong.
    pub fn add(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) {
        let before = self.ranges.range(..start + len).next_back();
        assert!(
            before.is_none_or(|(at, (bytes, _))| at + bytes <= start),
            "two devices at {start:#x}"
        );
        self.ranges.insert(start, (len, device));
    }

    /// Reads; what nobody answers to reads as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address) {
            device.read(offset, data);
        }
    }

    /// Writes; what nobody answers to is lost.
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
