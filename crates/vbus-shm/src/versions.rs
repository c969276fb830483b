// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Versions of the ABI: those that an end speaks, and the one that both ends speak.

use core::fmt;

use super::abi::{ABI_HIGHEST, ABI_LOWEST};

/// A range of versions of the ABI that an end speaks, both bounds included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The lowest.
    pub lowest: u16,
    /// The highest.
    pub highest: u16,
}

impl Versions {
    /// The versions that this code speaks.
    pub const SUPPORTED: Versions = Versions { lowest: ABI_LOWEST, highest: ABI_HIGHEST };

    /// The range that a register holds: the lowest in bits 0..16, the highest in 16..32.
    pub fn from_register(value: u32) -> Versions {
        Versions { lowest: (value & 0xffff) as u16, highest: (value >> 16) as u16 }
    }

    /// The register that holds the range.
    pub fn register(self) -> u32 {
        u32::from(self.lowest) | u32::from(self.highest) << 16
    }

    /// The highest version that is in both ranges.
    pub fn common(self, other: Versions) -> Option<u16> {
        let (lowest, highest) = (self.lowest.max(other.lowest), self.highest.min(other.highest));
        (lowest <= highest).then_some(highest)
    }

    /// Whether the range has this version.
    pub fn contains(self, version: u16) -> bool {
        (self.lowest..=self.highest).contains(&version)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.highest.checked_sub(self.lowest) {
            Some(0) => write!(f, "version {}", self.lowest),
            _ => write!(f, "versions {} to {}", self.lowest, self.highest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_common_version_is_taken() {
        let range = |lowest, highest| Versions { lowest, highest };
        for (a, b, common) in [
            (range(1, 2), range(1, 1), Some(1)),
            (range(1, 2), range(2, 2), Some(2)),
            (range(1, 2), range(1, 9), Some(2)),
            (range(1, 2), range(3, 4), None),
            (range(0, u16::MAX), range(5, 7), Some(7)),
            (range(2, 1), range(0, u16::MAX), None),
        ] {
            assert_eq!((a.common(b), b.common(a)), (common, common), "{a} and {b}");
        }
        assert_eq!(Versions::from_register(range(3, 0x1234).register()), range(3, 0x1234));
    }
}
