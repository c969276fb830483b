// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bytes of a configuration space, with a mask of the bits that a driver may change.

use alloc::vec;
use alloc::vec::Vec;

/// Bytes with write masks. The driver cannot change a bit unless [`allow`](Self::allow) or
/// [`allow_clearing`](Self::allow_clearing) has made it writable.
///
/// The methods that a device uses for itself (`get`, `set`, `allow`) panic beyond the end.
/// [`read`](Self::read) and [`write`](Self::write) take offsets from the driver and do not panic.
#[derive(Clone, Debug)]
pub struct Space {
    bytes: Vec<u8>,
    /// Bits that the driver can set and clear.
    writable: Vec<u8>,
    /// Bits that the driver clears by writing 1.
    clearable: Vec<u8>,
}

impl Space {
    /// Makes a space of `bytes` zeros, all read-only.
    pub fn new(bytes: usize) -> Space {
        Space::from_bytes(vec![0; bytes])
    }

    /// Makes a space with these bytes, all read-only.
    pub fn from_bytes(bytes: Vec<u8>) -> Space {
        Space { writable: vec![0; bytes.len()], clearable: vec![0; bytes.len()], bytes }
    }

    /// All bytes, as the driver reads them.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bits that the driver can set and clear.
    pub fn writable_bits(&self) -> &[u8] {
        &self.writable
    }

    /// The byte at `at`.
    pub fn get8(&self, at: usize) -> u8 {
        self.bytes[at]
    }

    /// The 16-bit register at `at`.
    pub fn get16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// The 32-bit register at `at`.
    pub fn get32(&self, at: usize) -> u32 {
        u32::from(self.get16(at)) | u32::from(self.get16(at + 2)) << 16
    }

    /// Sets the bytes from `at` on.
    pub fn set(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    /// Sets the byte at `at`.
    pub fn set8(&mut self, at: usize, value: u8) {
        self.set(at, &[value]);
    }

    /// Sets the 16-bit register at `at`.
    pub fn set16(&mut self, at: usize, value: u16) {
        self.set(at, &value.to_le_bytes());
    }

    /// Sets the 32-bit register at `at`.
    pub fn set32(&mut self, at: usize, value: u32) {
        self.set(at, &value.to_le_bytes());
    }

    /// Sets or clears bits of a 16-bit register, for the device's own part.
    pub fn assign16(&mut self, at: usize, bits: u16, on: bool) {
        let value = self.get16(at);
        self.set16(at, if on { value | bits } else { value & !bits });
    }

    /// Lets the driver write the bits of `mask` from `at` on.
    pub fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Lets the driver clear the bits of `mask` at `at` by writing 1.
    pub fn allow_clearing(&mut self, at: usize, mask: u16) {
        self.clearable[at..at + 2].copy_from_slice(&mask.to_le_bytes());
    }

    /// Takes over all bytes of a space with the same masks. Returns false, and changes nothing, if
    /// they differ from those here in a bit that the driver can neither write nor clear, or in
    /// number.
    pub fn restore(&mut self, bytes: &[u8]) -> bool {
        let masks = self.writable.iter().zip(&self.clearable);
        let same = |((have, new), (writable, clearable)): ((&u8, &u8), (&u8, &u8))| {
            (have ^ new) & !(writable | clearable) == 0
        };
        let fits =
            bytes.len() == self.bytes.len() && self.bytes.iter().zip(bytes).zip(masks).all(same);
        if fits {
            self.bytes.copy_from_slice(bytes);
        }
        fits
    }

    /// Reads for the driver. Bytes beyond the end are zero.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        for (byte, have) in data.iter_mut().zip(self.bytes.get(offset..).unwrap_or_default()) {
            *byte = *have;
        }
    }

    /// Writes for the driver. Only bits that the driver may write change. Bytes beyond the end are
    /// ignored.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            let Some(at) = offset.checked_add(i).filter(|at| *at < self.bytes.len()) else {
                return;
            };
            let have = self.bytes[at];
            self.bytes[at] = (have & !self.writable[at] | byte & self.writable[at])
                & !(byte & self.clearable[at]);
        }
    }
}

/// Whether an access of `len` bytes at `offset` touches any of the `bytes` from `at` on.
pub fn touches(offset: usize, len: usize, at: usize, bytes: usize) -> bool {
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

    /// All bytes that the driver may write over all bytes that are there, with all masks of two
    /// neighbouring bits.
    #[test]
    fn a_bit_changes_only_as_its_masks_say() {
        let masks = (0..=0xff_u8).filter(|mask| mask & !0b11 == 0);
        for (writable, clearable) in masks.clone().flat_map(|w| masks.clone().map(move |c| (w, c)))
        {
            for (have, byte) in (0..=0xff).flat_map(|have| (0..=0xff).map(move |b| (have, b))) {
                let mut space = Space::from_bytes(vec![have, 0]);
                space.allow(0, &[writable]);
                space.allow_clearing(0, clearable.into());
                space.write(0, &[byte]);
                let now = space.get8(0);
                for bit in (0..8).map(|bit| 1 << bit) {
                    let cleared = clearable & byte & bit != 0;
                    let source = if writable & bit != 0 { byte } else { have };
                    let expected = if cleared { 0 } else { source & bit };
                    assert_eq!(now & bit, expected, "{have:#x} {byte:#x} {writable:#x} {bit:#x}");
                }
            }
        }
    }

    /// All accesses of up to 9 bytes in and around a space of 6, and at the end of all offsets: an
    /// access is as many accesses of one byte, and nothing beyond the end is there.
    #[test]
    fn an_access_is_as_many_accesses_of_a_byte() {
        let mut space = Space::from_bytes((0x21..0x27).collect());
        space.allow(1, &[0x0f, 0xff, 0xf0, 0xff]);
        space.allow_clearing(4, 0x2424);
        let offsets = (0..=9).chain(usize::MAX - 9..=usize::MAX);
        for (offset, len) in offsets.flat_map(|offset| (0..=9).map(move |len| (offset, len))) {
            let data: Vec<u8> = (0..len).map(|i| 0x5a_u8.rotate_left(i)).collect();
            let (mut whole, mut single) = (space.clone(), space.clone());
            whole.write(offset, &data);
            for (i, byte) in data.iter().enumerate() {
                if let Some(at) = offset.checked_add(i) {
                    single.write(at, &[*byte]);
                }
            }
            assert_eq!(whole.bytes(), single.bytes(), "{offset:#x} {len}");
            let mut read = vec![0xee; data.len()];
            space.read(offset, &mut read);
            for (i, byte) in read.into_iter().enumerate() {
                let have = offset.checked_add(i).and_then(|at| space.bytes().get(at));
                assert_eq!(byte, have.copied().unwrap_or(0), "{offset:#x} {len}");
            }
        }
    }

    #[test]
    fn a_space_takes_over_what_a_driver_can_have_made() {
        let mut space = Space::from_bytes(vec![0x11, 0x22, 0x33, 0x44]);
        space.allow(1, &[0xf0]);
        space.allow_clearing(2, 0x4401);
        for wrong in [&[0x11, 0x22, 0x33][..], &[0x10, 0x22, 0x33, 0x44], &[0x11, 0x23, 0x33, 0x44]]
        {
            assert!(!space.restore(wrong));
            assert_eq!(space.bytes(), [0x11, 0x22, 0x33, 0x44]);
        }
        assert!(space.restore(&[0x11, 0xa2, 0x32, 0x00]));
        assert_eq!(space.bytes(), [0x11, 0xa2, 0x32, 0x00]);
    }

    #[test]
    fn touching() {
        assert!(touches(4, 4, 7, 2) && touches(4, 4, 4, 1) && touches(0, 8, 3, 1));
        assert!(!touches(4, 4, 8, 2) && !touches(4, 4, 2, 2));
    }
}
