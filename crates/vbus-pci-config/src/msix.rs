// SPDX-License-Identifier: Apache-2.0 OR MIT
//! MSI-X: the location of table and pending bits, and the message that the driver has written for
//! each vector.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

const ENTRY: usize = 16;
const CONTROL: usize = 12;

/// One message interrupt, as the driver has set it up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// The address that the function writes to.
    pub address: u64,
    /// The value that the function writes.
    pub data: u32,
    /// The function holds the message back.
    pub masked: bool,
}

/// The location of the table and the pending bits of MSI-X.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// Number of vectors, 1 to 2048.
    pub vectors: u16,
    /// The BAR that the table lies in.
    pub table_bar: u8,
    /// Offset of the table there, a multiple of 8.
    pub table: u32,
    /// The BAR that the pending bits lie in.
    pub pending_bar: u8,
    /// Offset of the pending bits there, a multiple of 8.
    pub pending: u32,
}

impl MsixLayout {
    /// Parses the first 12 bytes of a capability. It does not check the locations against the BARs.
    pub fn parse(bytes: &[u8; 12]) -> MsixLayout {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let (table, pending) = (word(4), word(8));
        MsixLayout {
            vectors: (u16::from_le_bytes([bytes[2], bytes[3]]) & 0x7ff) + 1,
            table_bar: (table & 7) as u8,
            table: table & !7,
            pending_bar: (pending & 7) as u8,
            pending: pending & !7,
        }
    }

    /// The bytes of the table, in [`table_bar`](Self::table_bar).
    pub fn table_range(&self) -> Range<u64> {
        let start = u64::from(self.table);
        start..start + u64::from(self.vectors) * ENTRY as u64
    }

    /// The bytes of the pending bits, in [`pending_bar`](Self::pending_bar).
    pub fn pending_range(&self) -> Range<u64> {
        let start = u64::from(self.pending);
        start..start + u64::from(self.vectors).div_ceil(64) * 8
    }
}

/// Reads pending bits into `data`, from byte `offset` of the structure on. `is_pending` says for a
/// vector whether the function holds its message back. An access has 4 or 8 aligned bytes; any
/// other access reads zeros.
pub fn read_pending_bits(offset: usize, data: &mut [u8], is_pending: impl Fn(usize) -> bool) {
    data.fill(0);
    if !aligned(offset, data.len()) {
        return;
    }
    for (at, byte) in (offset..).zip(data) {
        *byte = (0..8).fold(0, |byte, bit| byte | u8::from(is_pending(at * 8 + bit)) << bit);
    }
}

fn aligned(offset: usize, len: usize) -> bool {
    matches!(len, 4 | 8) && offset % len == 0
}

/// The table, as the driver has written it.
#[derive(Clone, Debug)]
pub struct MsixTable {
    bytes: Vec<u8>,
}

impl MsixTable {
    /// Makes a table in its state after power-on: all vectors are masked.
    pub fn new(vectors: u16) -> MsixTable {
        let mut bytes = vec![0; usize::from(vectors) * ENTRY];
        bytes.chunks_exact_mut(ENTRY).for_each(|entry| entry[CONTROL] = 1);
        MsixTable { bytes }
    }

    /// Sets the table to its state after power-on.
    pub fn reset(&mut self) {
        *self = MsixTable::new(u16::try_from(self.vectors()).unwrap_or(0));
    }

    /// All bytes, as the driver reads them.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes over the bytes of a table with as many vectors. Returns false, and changes nothing, if
    /// a driver cannot have made them.
    pub fn restore(&mut self, bytes: &[u8]) -> bool {
        let mut table = self.clone();
        for (number, eight) in bytes.chunks(8).enumerate() {
            table.write(number * 8, eight);
        }
        let fits = table.bytes == bytes;
        if fits {
            *self = table;
        }
        fits
    }

    /// Number of vectors.
    pub fn vectors(&self) -> usize {
        self.bytes.len() / ENTRY
    }

    /// Reads 4 or 8 aligned bytes. Other accesses read zeros, and so do bytes beyond the table.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        if let Some(bytes) = self.range(offset, data.len()).and_then(|range| self.bytes.get(range))
        {
            data.copy_from_slice(bytes);
        }
    }

    /// Writes 4 or 8 aligned bytes. Other writes are ignored. Returns the vector that the write may
    /// have changed.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Option<usize> {
        let range = self.range(offset, data.len())?;
        self.bytes.get_mut(range)?.copy_from_slice(data);
        let entry = offset / ENTRY;
        // The control word has one defined bit. The two lowest bits of the address are zero.
        self.bytes[entry * ENTRY] &= !3;
        let control = entry * ENTRY + CONTROL;
        self.bytes[control] &= 1;
        self.bytes[control + 1..control + 4].fill(0);
        Some(entry)
    }

    fn range(&self, offset: usize, len: usize) -> Option<Range<usize>> {
        let aligned = aligned(offset, len);
        let end = offset.checked_add(len).filter(|end| aligned && *end <= self.bytes.len())?;
        Some(offset..end)
    }

    /// The message of vector `index`.
    ///
    /// # Panics
    /// If `index` is not below [`vectors`](Self::vectors).
    pub fn message(&self, index: usize) -> MsiMessage {
        let entry = &self.bytes[index * ENTRY..(index + 1) * ENTRY];
        let word = |at: usize| {
            u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
        };
        MsiMessage {
            address: u64::from(word(4)) << 32 | u64::from(word(0)),
            data: word(8),
            masked: entry[CONTROL] & 1 != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_bits() {
        let mut data = [9; 8];
        read_pending_bits(0, &mut data, |vector| matches!(vector, 0 | 9 | 63));
        assert_eq!(data, [1, 2, 0, 0, 0, 0, 0, 0x80]);
        read_pending_bits(8, &mut data[..4], |vector| vector == 64 + 31);
        assert_eq!(data[..4], [0, 0, 0, 0x80]);
        read_pending_bits(2, &mut data[..4], |_| true);
        assert_eq!(data[..4], [0; 4]);
    }

    #[test]
    fn a_layout_is_parsed_and_knows_its_ends() {
        let bytes = [0x11, 0, 0x40, 0xf8, 2, 0x20, 0, 0, 5, 0x30, 0, 0];
        let layout = MsixLayout::parse(&bytes);
        let expected = MsixLayout {
            vectors: 65,
            table_bar: 2,
            table: 0x2000,
            pending_bar: 5,
            pending: 0x3000,
        };
        assert_eq!(layout, expected);
        assert_eq!(layout.table_range(), 0x2000..0x2410);
        assert_eq!(layout.pending_range(), 0x3000..0x3010);
    }

    #[test]
    fn entries() {
        let mut table = MsixTable::new(3);
        assert_eq!(table.message(2), MsiMessage { address: 0, data: 0, masked: true });
        assert_eq!(table.write(32, &0x0000_0005_fee0_1003u64.to_le_bytes()), Some(2));
        assert_eq!(table.write(40, &[0x31, 0, 0, 0]), Some(2));
        assert_eq!(table.write(44, &[0xfe, 0xff, 0xff, 0xff]), Some(2));
        assert_eq!(
            table.message(2),
            MsiMessage { address: 0x5_fee0_1000, data: 0x31, masked: false }
        );
        let mut data = [9; 8];
        table.read(40, &mut data);
        assert_eq!(data, [0x31, 0, 0, 0, 0, 0, 0, 0]);
        table.reset();
        assert_eq!(table.message(2), MsiMessage { address: 0, data: 0, masked: true });
    }

    #[test]
    fn a_table_takes_over_what_a_driver_can_have_written() {
        let mut table = MsixTable::new(2);
        table.write(16, &0xfee0_1000u64.to_le_bytes());
        let written = table.bytes().to_vec();
        let mut other = MsixTable::new(2);
        let mut reserved = written.clone();
        reserved[13] = 1;
        assert!(!other.restore(&reserved) && !other.restore(&written[..24]));
        assert!(!other.restore(&[&written[..], &[0; 16]].concat()));
        assert_eq!(other.bytes(), MsixTable::new(2).bytes());
        assert!(other.restore(&written));
        assert_eq!(other.message(1).address, 0xfee0_1000);
    }

    #[test]
    fn what_is_not_aligned_or_not_there() {
        let mut table = MsixTable::new(1);
        for (offset, len) in
            [(0, 1), (2, 4), (4, 8), (16, 4), (12, 8), (usize::MAX - 3, 4), (8, 16)]
        {
            assert_eq!(table.write(offset, &vec![0xff; len]), None, "{len} at {offset}");
            let mut data = vec![9; len];
            table.read(offset, &mut data);
            assert!(data.iter().all(|b| *b == 0));
        }
        assert_eq!(table.message(0), MsiMessage { address: 0, data: 0, masked: true });
    }
}
