// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The offloads of one direction.

use std::fmt;
use std::ops::{BitAnd, BitOr};

/// A set of offloads. An offload is work that a sender may leave to the receiver of its frames:
/// checksums, and cutting large segments into frames.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads(u32);

impl Offloads {
    /// No offloads.
    pub const NONE: Offloads = Offloads(0);
    /// TCP and UDP checksums.
    pub const CSUM: Offloads = Offloads(1 << 0);
    /// TCP segmentation over IPv4. Needs [`CSUM`](Self::CSUM).
    pub const TSO4: Offloads = Offloads(1 << 1);
    /// TCP segmentation over IPv6. Needs [`CSUM`](Self::CSUM).
    pub const TSO6: Offloads = Offloads(1 << 2);
    /// TCP segmentation of segments with the CWR flag. Needs [`TSO4`](Self::TSO4) or
    /// [`TSO6`](Self::TSO6).
    pub const ECN: Offloads = Offloads(1 << 3);
    /// UDP segmentation over IPv4 and IPv6. Needs [`CSUM`](Self::CSUM).
    pub const USO: Offloads = Offloads(1 << 4);
    /// All TCP segmentation.
    pub const TSO: Offloads = Offloads(Self::TSO4.0 | Self::TSO6.0 | Self::ECN.0);
    /// All of them.
    pub const ALL: Offloads = Offloads(Self::CSUM.0 | Self::TSO.0 | Self::USO.0);

    /// The set given by bits 0 to 4 (checksums, TSO4, TSO6, ECN, USO). Higher bits are ignored.
    pub const fn from_bits(bits: u64) -> Offloads {
        // At most 0x1f.
        #[allow(clippy::cast_possible_truncation)]
        Offloads((bits & Self::ALL.0 as u64) as u32)
    }

    /// The bits of the set, as in [`from_bits`](Self::from_bits).
    pub const fn bits(self) -> u64 {
        self.0 as u64
    }

    /// Whether all of `others` are in the set.
    pub const fn contains(self, others: Offloads) -> bool {
        others.0 & !self.0 == 0
    }

    /// Whether the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl BitOr for Offloads {
    type Output = Offloads;

    fn bitor(self, other: Offloads) -> Offloads {
        Offloads(self.0 | other.0)
    }
}

impl BitAnd for Offloads {
    type Output = Offloads;

    fn bitand(self, other: Offloads) -> Offloads {
        Offloads(self.0 & other.0)
    }
}

impl fmt::Debug for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = ["CSUM", "TSO4", "TSO6", "ECN", "USO"];
        let present = names.iter().enumerate().filter(|(bit, _)| self.0 >> bit & 1 != 0);
        f.debug_set().entries(present.map(|(_, name)| *name)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::Offloads;

    #[test]
    fn sets_are_bits() {
        assert_eq!(Offloads::from_bits(u64::MAX), Offloads::ALL);
        assert_eq!(Offloads::ALL.bits(), 0x1f);
        let set = Offloads::CSUM | Offloads::USO;
        assert!(set.contains(Offloads::USO) && !set.contains(Offloads::TSO4 | Offloads::USO));
        assert!((set & Offloads::TSO).is_empty());
        assert_eq!(format!("{set:?}"), r#"{"CSUM", "USO"}"#);
    }
}
