// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kinds of doorbell that a function offers, and their addresses.

use core::fmt;

use vbus_shm::abi::{bar0, capability};

const PORT_MAX: u64 = 0xffff;

/// A kind of doorbell that a function offers: a record of its PCI capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// [`capability::KIND_MMIO`] etc.
    pub kind: u8,
    /// Distance from one doorbell to the next, in the unit of `base`.
    pub stride: u16,
    /// Address of doorbell 0: an offset in BAR 0, an I/O port, or a connection number.
    pub base: u32,
}

impl Doorbell {
    /// The address of doorbell `handle`, in the unit of `base`.
    pub fn offset(&self, handle: u32) -> u64 {
        u64::from(self.base) + u64::from(self.stride) * u64::from(handle)
    }

    /// The name of the kind.
    pub fn name(&self) -> &'static str {
        match self.kind {
            capability::KIND_MMIO => "mmio",
            capability::KIND_PIO => "pio",
            capability::KIND_HYPERCALL => "hypercall",
            _ => "unknown",
        }
    }

    /// Whether the record is a doorbell of a kind that this crate knows, with a valid address for
    /// each of `regions` handles.
    pub(crate) fn is_sound(&self, regions: u32) -> bool {
        let last = self.offset(regions.saturating_sub(1));
        self.stride > 0
            && match self.kind {
                capability::KIND_MMIO => {
                    let end = self.offset(bar0::DOORBELL_COUNT);
                    self.base % 4 == 0 && self.stride % 4 == 0 && end <= bar0::SIZE
                }
                capability::KIND_PIO => last <= PORT_MAX,
                capability::KIND_HYPERCALL => last <= u64::from(capability::CONNECTION_MAX),
                _ => false,
            }
    }
}

impl fmt::Display for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
