// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a driver did wrong.

use super::layout::PARTS_MAX;

/// The driver broke the rules of the queue. The queue is retired: it takes and returns nothing more
/// until it is made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The queue itself is in memory that the device cannot reach.
    #[error("the queue's {0} is not in memory that the device may access")]
    Unmapped(&'static str),
    /// A chain's buffer is in memory that the device cannot reach. The device finds this, and not
    /// the queue ([`Queue::retire`](super::Queue::retire)).
    #[error("a buffer is not in memory that the device may access")]
    Buffer,
    /// A split queue's index goes back, or runs ahead further than the queue is long.
    #[error("the available index {index} is not within {size} of the used index {used}")]
    Index {
        /// The driver's index.
        index: u16,
        /// The device's index.
        used: u16,
        /// Descriptors of the queue.
        size: u16,
    },
    /// A packed queue has more descriptors in flight than it is long.
    #[error("more descriptors are in flight than the queue has")]
    Overfull,
    /// A descriptor's number is not below the queue's size, or not below that of its table.
    #[error("descriptor {number} of {size}")]
    Descriptor {
        /// The number.
        number: u16,
        /// Descriptors of the queue or of the table.
        size: u32,
    },
    /// A chain that is still in flight was made available again.
    #[error("descriptor {0} was made available again while it is in flight")]
    InFlight(u16),
    /// A chain has more descriptors than its queue or its table: it is too long, or has a loop.
    #[error("a chain has more than {0} descriptors")]
    Loop(u32),
    /// A chain has more than [`PARTS_MAX`](super::PARTS_MAX) parts.
    #[error("a chain has more than {} parts", PARTS_MAX)]
    Parts,
    /// A chain has more bytes than 32 bits count.
    #[error("a chain has 4 GiB or more")]
    Total,
    /// A descriptor without bytes.
    #[error("a descriptor has no bytes")]
    Empty,
    /// Address + length is beyond the end of the address space.
    #[error("a descriptor's range {addr:#x}+{len:#x} wraps around")]
    Range {
        /// Guest address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// A readable descriptor follows a writable one.
    #[error("a readable descriptor follows a writable one")]
    ReadableAfterWritable,
    /// An indirect table without the feature INDIRECT_DESC.
    #[error("a descriptor is indirect, which was not negotiated")]
    IndirectNotNegotiated,
    /// A descriptor of an indirect table is itself indirect.
    #[error("a descriptor of an indirect table is indirect")]
    IndirectInIndirect,
    /// A descriptor is indirect and has a next one.
    #[error("an indirect descriptor has a next one")]
    IndirectNext,
    /// An indirect table is empty, has no whole number of descriptors, or has too many.
    #[error("an indirect table has {0} bytes")]
    IndirectLength(u32),
    /// An indirect table is in memory that the device cannot reach.
    #[error("an indirect table is not in memory that the device may access")]
    IndirectUnmapped,
}
