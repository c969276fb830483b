//! Bytes of a configuration space, and which of their bits the guest may change.

/// A configuration space. What is not said to be writable stays as it is, whatever the guest does.
#[derive(Clone)]
pub(super) struct Space {
    bytes: Vec<u8>,
    /// Bits that take the value written.
    writable: Vec<u8>,
    /// Bits that are cleared by writing 1.
    clearable: Vec<u8>,
}

impl Space {
    /// All zeros, read-only.
    pub(super) fn new(bytes: usize) -> Space {
        Space::from_bytes(vec![0; bytes])
    }

    /// These bytes, read-only.
    pub(super) fn from_bytes(bytes: Vec<u8>) -> Space {
        Space { writable: vec![0; bytes.len()], clearable: vec![0; bytes.len()], bytes }
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    #[cfg(test)]
    pub(super) fn writable_bits(&self) -> &[u8] {
        &self.writable
    }

    pub(super) fn get8(&self, at: usize) -> u8 {
        self.bytes[at]
    }

    pub(super) fn get16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    pub(super) fn get32(&self, at: usize) -> u32 {
        u32::from(self.get16(at)) | u32::from(self.get16(at + 2)) << 16
    }

    pub(super) fn set(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    pub(super) fn set8(&mut self, at: usize, value: u8) {
        self.set(at, &[value]);
    }

    pub(super) fn set16(&mut self, at: usize, value: u16) {
        self.set(at, &value.to_le_bytes());
    }

    pub(super) fn set32(&mut self, at: usize, value: u32) {
        self.set(at, &value.to_le_bytes());
    }

    /// Sets or clears bits of a 16-bit register, for the device's own part.
    pub(super) fn assign16(&mut self, at: usize, bits: u16, on: bool) {
        let value = self.get16(at);
        self.set16(at, if on { value | bits } else { value & !bits });
    }

    /// Lets the guest write the bits of `mask` from `at` on.
    pub(super) fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Lets the guest clear the bits of `mask` at `at` by writing 1.
    pub(super) fn allow_clearing(&mut self, at: usize, mask: u16) {
        self.clearable[at..at + 2].copy_from_slice(&mask.to_le_bytes());
    }

    /// Reads for the guest; beyond the end there are zeros.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes for the guest: what it may.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            let Some(have) = self.bytes.get_mut(at) else { return };
            *have = (*have & !self.writable[at] | byte & self.writable[at])
                & !(byte & self.clearable[at]);
        }
    }
}

/// Whether an access of `len` bytes at `offset` touches any of the `bytes` from `at` on.
pub(super) fn touches(offset: usize, len: usize, at: usize, bytes: usize) -> bool {
    offset < at + bytes && at < offset.saturating_add(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_allowed_changes() {
        let mut space = Space::from_bytes(vec![0x11, 0x22, 0x33, 0x44]);
        space.allow(1, &[0xf0]);
        space.allow_clearing(2, 0x4401);
        space.write(0, &[0xff; 9]);
        assert_eq!(space.bytes(), [0x11, 0xf2, 0x32, 0x00]);
        let mut data = [9; 6];
        space.read(1, &mut data);
        assert_eq!(data, [0xf2, 0x32, 0, 0, 0, 0]);
        space.write(usize::MAX - 1, &[1, 2]);
    }

    #[test]
    fn touching() {
        assert!(touches(4, 4, 7, 2) && touches(4, 4, 4, 1) && touches(0, 8, 3, 1));
        assert!(!touches(4, 4, 8, 2) && !touches(4, 4, 2, 2));
    }
}
