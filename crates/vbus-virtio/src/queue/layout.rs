// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a queue is, and which of its features the driver accepted.

use serde::{Deserialize, Serialize};

/// The most descriptors of a queue.
pub const SIZE_MAX: u16 = 32_768;

/// The most parts of a chain, those of an indirect table included.
pub const PARTS_MAX: usize = 1024;

/// Bytes of a descriptor, in either format and in indirect tables.
pub(super) const DESCRIPTOR_BYTES: usize = 16;

/// Feature bits that concern queues (VIRTIO 1.3, section 6).
pub mod feature {
    /// A descriptor may refer to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Both ends say at which index they want the next notification.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The driver follows VIRTIO 1.0 or later. A queue needs it: there are no legacy layouts here.
    pub const VERSION_1: u64 = 1 << 32;
    /// The queues are packed.
    pub const RING_PACKED: u64 = 1 << 34;
    /// The device returns buffers in the order in which the driver made them available.
    pub const IN_ORDER: u64 = 1 << 35;
    /// The driver can reset a queue alone.
    pub const RING_RESET: u64 = 1 << 40;

    /// All that [`Queue`](super::super::Queue) can do: what a device may offer.
    pub const ALL: u64 =
        INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_PACKED | IN_ORDER | RING_RESET;
}

/// The format of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    /// VIRTIO 1.3, section 2.7: a descriptor table, an available ring and a used ring.
    Split,
    /// VIRTIO 1.3, section 2.8: one descriptor ring, and two event suppression structures.
    Packed,
}

impl Format {
    /// The format for the feature bits that the driver accepted.
    pub fn of(features: u64) -> Format {
        if features & feature::RING_PACKED != 0 { Format::Packed } else { Format::Split }
    }
}

/// The features of a queue, of those that the driver accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// [`feature::EVENT_IDX`].
    pub event_idx: bool,
    /// [`feature::INDIRECT_DESC`].
    pub indirect: bool,
    /// [`feature::IN_ORDER`].
    pub in_order: bool,
}

impl RingFeatures {
    /// Those of the feature bits that the driver accepted.
    pub fn of(features: u64) -> RingFeatures {
        RingFeatures {
            event_idx: features & feature::EVENT_IDX != 0,
            indirect: features & feature::INDIRECT_DESC != 0,
            in_order: features & feature::IN_ORDER != 0,
        }
    }
}

/// What is wrong with a [`Layout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadLayout {
    /// The size is not in 1..=[`SIZE_MAX`], or it is that of a split queue and no power of two.
    #[error("a queue cannot have {0} descriptors")]
    Size(u16),
    /// An area's address is not a multiple of its alignment.
    #[error("the queue's {area} at {addr:#x} is not aligned to {align}")]
    Alignment {
        /// Which area.
        area: &'static str,
        /// Its address.
        addr: u64,
        /// What the address must be a multiple of.
        align: u64,
    },
    /// An area goes beyond the end of the address space.
    #[error("the queue's {area} at {addr:#x} goes beyond the end of the address space")]
    Range {
        /// Which area.
        area: &'static str,
        /// Its address.
        addr: u64,
    },
}

/// Where a queue is in the driver's memory, and how large it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Split or packed.
    pub format: Format,
    /// Descriptors: 1..=[`SIZE_MAX`], a power of two if the queue is split.
    pub size: u16,
    /// Guest address of the descriptor area, aligned to 16: the descriptor table (split) or the
    /// descriptor ring (packed).
    pub descriptors: u64,
    /// Guest address of the driver area: the available ring, aligned to 2 (split), or the driver
    /// event suppression structure, aligned to 4 (packed).
    pub driver_area: u64,
    /// Guest address of the device area, aligned to 4: the used ring (split) or the device event
    /// suppression structure (packed).
    pub device_area: u64,
}

/// An area of a queue: where it is, and what the log calls it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) name: &'static str,
    pub(super) addr: u64,
    /// Bytes.
    pub(super) len: u64,
    align: u64,
}

impl Layout {
    /// The three areas: descriptors, driver area, device area.
    pub(super) fn places(&self) -> [Place; 3] {
        let size = u64::from(self.size);
        let place = |name, addr, len, align| Place { name, addr, len, align };
        match self.format {
            Format::Split => [
                place("descriptor table", self.descriptors, 16 * size, 16),
                place("available ring", self.driver_area, 6 + 2 * size, 2),
                place("used ring", self.device_area, 6 + 8 * size, 4),
            ],
            Format::Packed => [
                place("descriptor ring", self.descriptors, 16 * size, 16),
                place("driver event suppression", self.driver_area, 4, 4),
                place("device event suppression", self.device_area, 4, 4),
            ],
        }
    }

    /// The guest address ranges (address, bytes) of the descriptor area, the driver area and the
    /// device area: what must stay mapped while the queue works.
    pub fn ranges(&self) -> [(u64, u64); 3] {
        self.places().map(|place| (place.addr, place.len))
    }

    pub(super) fn check(&self) -> Result<(), BadLayout> {
        let whole = self.format == Format::Packed || self.size.is_power_of_two();
        if !(1..=SIZE_MAX).contains(&self.size) || !whole {
            return Err(BadLayout::Size(self.size));
        }
        for Place { name: area, addr, len, align } in self.places() {
            if addr % align != 0 {
                return Err(BadLayout::Alignment { area, addr, align });
            }
            if addr.checked_add(len).is_none() {
                return Err(BadLayout::Range { area, addr });
            }
        }
        Ok(())
    }
}
