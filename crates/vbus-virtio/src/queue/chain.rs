// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A chain: the device's private copy of a buffer's descriptors, checked.

use serde::{Deserialize, Serialize};

use super::layout::PARTS_MAX;
use super::violation::Violation;

/// A descriptor's buffer or a part of one: a range of guest addresses. The range does not wrap
/// around, and it is not empty. Nothing else is known of it. A device asks its
/// [view](vbus_core::View) for the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Guest address.
    pub addr: u64,
    /// Bytes, at least 1.
    pub len: u32,
}

/// What the queue must know to return a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// The number of the queue object that gave the chain out.
    pub(super) queue: u32,
    /// Split: the number of the first descriptor. Packed: the buffer id.
    pub(super) id: u16,
    /// Descriptors in the ring of a packed queue. 1 for a split queue.
    pub(super) slots: u16,
    /// How many chains the queue gave out before, modulo 2^16.
    pub(super) sequence: u16,
    /// Its entry in the region of the buffers in flight, if the queue has one.
    pub(super) entry: u16,
}

/// A chain that a queue gave out, or room for one. The parts are a private copy, which the driver
/// cannot change. Use one object again and again: it allocates only when a chain has more parts
/// than any before.
#[derive(Debug, Default)]
pub struct Chain {
    pub(super) head: Option<Head>,
    parts: Vec<Part>,
    /// How many of `parts` are for reading, and their bytes.
    readable: usize,
    readable_bytes: u32,
    /// Bytes of all parts.
    total: u32,
}

impl Chain {
    /// Room for a chain.
    pub const fn new() -> Chain {
        Chain { head: None, parts: Vec::new(), readable: 0, readable_bytes: 0, total: 0 }
    }

    /// Whether the chain is one that a queue gave out and that was not returned yet.
    pub fn is_taken(&self) -> bool {
        self.head.is_some()
    }

    /// The id by which the driver knows the chain: the number of its first descriptor (split) or
    /// its buffer id (packed). `None`: the chain is not taken.
    pub fn id(&self) -> Option<u16> {
        self.head.map(|head| head.id)
    }

    /// The parts that the device may read, in order.
    pub fn readable(&self) -> &[Part] {
        &self.parts[..self.readable]
    }

    /// The parts that the device may write, in order.
    pub fn writable(&self) -> &[Part] {
        &self.parts[self.readable..]
    }

    /// Bytes of the readable parts.
    pub fn readable_bytes(&self) -> u32 {
        self.readable_bytes
    }

    /// Bytes of the writable parts.
    pub fn writable_bytes(&self) -> u32 {
        self.total - self.readable_bytes
    }

    /// A chain that was given out before, with these parts, of which `readable` are for reading.
    pub(super) fn of(head: Head, parts: &[Part], readable: usize) -> Result<Chain, Violation> {
        let mut chain = Chain { head: Some(head), ..Chain::new() };
        for (at, part) in parts.iter().enumerate() {
            chain.push(part.addr, part.len, at >= readable)?;
        }
        Ok(chain)
    }

    pub(super) fn clear(&mut self) {
        self.head = None;
        self.parts.clear();
        (self.readable, self.readable_bytes, self.total) = (0, 0, 0);
    }

    /// Appends a descriptor's range, if it may follow what is there.
    pub(super) fn push(&mut self, addr: u64, len: u32, write: bool) -> Result<(), Violation> {
        if len == 0 {
            return Err(Violation::Empty);
        }
        if addr.checked_add(len.into()).is_none() {
            return Err(Violation::Range { addr, len });
        }
        if self.parts.len() == PARTS_MAX {
            return Err(Violation::Parts);
        }
        if !write && self.readable < self.parts.len() {
            return Err(Violation::ReadableAfterWritable);
        }
        self.total = self.total.checked_add(len).ok_or(Violation::Total)?;
        if !write {
            self.readable += 1;
            self.readable_bytes = self.total;
        }
        self.parts.push(Part { addr, len });
        Ok(())
    }
}
