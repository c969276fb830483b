// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads the list of capabilities in the bytes of a configuration space.

use crate::register;

/// Ids of capabilities.
pub mod capability {
    /// Message-signalled interrupts.
    pub const MSI: u8 = 0x05;
    /// Vendor-specific.
    pub const VENDOR: u8 = 0x09;
    /// PCI Express.
    pub const EXPRESS: u8 = 0x10;
    /// Message-signalled interrupts with a table.
    pub const MSIX: u8 = 0x11;
}

/// The lowest offset that a capability can have.
const FIRST: usize = 0x40;
/// The end of the part of a configuration space that can hold capabilities.
const END: usize = 0x100;
/// The most capabilities that fit.
const COUNT_MAX: usize = (END - FIRST) / 4;

/// Why a list of capabilities cannot be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BadList {
    /// A capability at this offset, where none can be.
    Offset(usize),
    /// The list contains a loop.
    Endless,
}

impl core::fmt::Display for BadList {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            BadList::Offset(at) => write!(f, "a capability at {at:#x}"),
            BadList::Endless => f.write_str("a list of capabilities without an end"),
        }
    }
}

impl core::error::Error for BadList {}

/// Returns the id and the offset of each capability, in the order of the list. The bytes may be
/// hostile: the iterator ends after at most one error.
pub fn capabilities(bytes: &[u8]) -> Capabilities<'_> {
    let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
    let has = u16::from_le_bytes([byte(register::STATUS), byte(register::STATUS + 1)]);
    let next = if has & register::STATUS_CAPABILITIES != 0 {
        usize::from(byte(register::CAPABILITIES))
    } else {
        0
    };
    Capabilities { bytes, next, count: 0 }
}

/// See [`capabilities`].
#[derive(Clone, Debug)]
pub struct Capabilities<'a> {
    bytes: &'a [u8],
    /// The offset of the next capability. 0: the list has ended.
    next: usize,
    count: usize,
}

impl Iterator for Capabilities<'_> {
    type Item = Result<(u8, usize), BadList>;

    fn next(&mut self) -> Option<Self::Item> {
        let at = core::mem::take(&mut self.next);
        if at == 0 {
            return None;
        }
        if at < FIRST || at % 4 != 0 || at + 4 > self.bytes.len().min(END) {
            return Some(Err(BadList::Offset(at)));
        }
        self.count += 1;
        if self.count > COUNT_MAX {
            return Some(Err(BadList::Endless));
        }
        self.next = usize::from(self.bytes[at + 1]);
        Some(Ok((self.bytes[at], at)))
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    fn walk(bytes: &[u8]) -> Result<Vec<(u8, usize)>, BadList> {
        capabilities(bytes).collect()
    }

    #[test]
    fn a_walk_ends_whatever_the_bytes_are() {
        let mut bytes = [0; 256];
        bytes[register::CAPABILITIES] = 0x40;
        (bytes[0x40], bytes[0x41]) = (9, 0xfc);
        (bytes[0xfc], bytes[0xfd]) = (5, 0);
        assert_eq!(walk(&bytes), Ok(Vec::new()), "Status says that there is no list");
        bytes[register::STATUS] = 0x10;
        assert_eq!(walk(&bytes), Ok(Vec::from([(9, 0x40), (5, 0xfc)])));
        bytes[0xfd] = 0x40;
        assert_eq!(walk(&bytes), Err(BadList::Endless));
        for at in [0x3c, 0x42] {
            bytes[0xfd] = at;
            assert_eq!(walk(&bytes), Err(BadList::Offset(usize::from(at))));
        }
        assert_eq!(walk(&bytes[..0x40]), Err(BadList::Offset(0x40)));
        assert_eq!(walk(&[]), Ok(Vec::new()));
    }
}
