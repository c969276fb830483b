//! The MSI-X table: which message each vector sends, as the guest has written it.

use std::ops::Range;

use super::config::Vector;

const ENTRY: usize = 16;
const CONTROL: usize = 12;

/// The table, in the memory of BAR0 that the VMM keeps for itself.
pub(super) struct Table {
    bytes: Vec<u8>,
}

impl Table {
    /// All vectors masked, as after power-on.
    pub(super) fn new(vectors: u16) -> Table {
        let mut bytes = vec![0; usize::from(vectors) * ENTRY];
        bytes.chunks_exact_mut(ENTRY).for_each(|entry| entry[CONTROL] = 1);
        Table { bytes }
    }

    pub(super) fn reset(&mut self) {
        *self = Table::new(u16::try_from(self.vectors()).unwrap_or(0));
    }

    pub(super) fn vectors(&self) -> usize {
        self.bytes.len() / ENTRY
    }

    /// Reads 4 or 8 aligned bytes; others are zero, as are those that are not there.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        if let Some(bytes) = self.range(offset, data.len()).and_then(|range| self.bytes.get(range))
        {
            data.copy_from_slice(bytes);
        }
    }

    /// Writes 4 or 8 aligned bytes, other writes are lost. The vector that may have changed by it.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> Option<usize> {
        let range = self.range(offset, data.len())?;
        self.bytes.get_mut(range)?.copy_from_slice(data);
        let entry = offset / ENTRY;
        // Of the control word one bit is defined, and the two lowest of the address are zero.
        self.bytes[entry * ENTRY] &= !3;
        let control = entry * ENTRY + CONTROL;
        self.bytes[control] &= 1;
        self.bytes[control + 1..control + 4].fill(0);
        Some(entry)
    }

    fn range(&self, offset: usize, len: usize) -> Option<Range<usize>> {
        let aligned = matches!(len, 4 | 8) && offset % len == 0;
        let end = offset.checked_add(len).filter(|end| aligned && *end <= self.bytes.len())?;
        Some(offset..end)
    }

    /// What vector `index`, below [`vectors`](Self::vectors), sends.
    pub(super) fn vector(&self, index: usize) -> Vector {
        let entry = &self.bytes[index * ENTRY..(index + 1) * ENTRY];
        let word = |at: usize| {
            u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
        };
        Vector {
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
    fn entries() {
        let mut table = Table::new(3);
        assert_eq!(table.vector(2), Vector { address: 0, data: 0, masked: true });
        assert_eq!(table.write(32, &0x0000_0005_fee0_1003u64.to_le_bytes()), Some(2));
        assert_eq!(table.write(40, &[0x31, 0, 0, 0]), Some(2));
        assert_eq!(table.write(44, &[0xfe, 0xff, 0xff, 0xff]), Some(2));
        assert_eq!(table.vector(2), Vector { address: 0x5_fee0_1000, data: 0x31, masked: false });
        let mut data = [9; 8];
        table.read(40, &mut data);
        assert_eq!(data, [0x31, 0, 0, 0, 0, 0, 0, 0]);
        table.reset();
        assert_eq!(table.vector(2), Vector { address: 0, data: 0, masked: true });
    }

    #[test]
    fn what_is_not_aligned_or_not_there() {
        let mut table = Table::new(1);
        for (offset, len) in
            [(0, 1), (2, 4), (4, 8), (16, 4), (12, 8), (usize::MAX - 3, 4), (8, 16)]
        {
            assert_eq!(table.write(offset, &vec![0xff; len]), None, "{len} at {offset}");
            let mut data = vec![9; len];
            table.read(offset, &mut data);
            assert!(data.iter().all(|b| *b == 0));
        }
        assert_eq!(table.vector(0), Vector { address: 0, data: 0, masked: true });
    }
}
