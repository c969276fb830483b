// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The buffers in flight of a queue with IN_ORDER. A device may complete them in any order. They go
//! back to the driver in the order in which the queue gave them out.

use std::collections::VecDeque;

/// A buffer in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) id: u16,
    pub(super) slots: u16,
    /// The bytes that the device wrote, once it has completed the buffer.
    pub(super) written: Option<u32>,
}

/// The buffers in flight, oldest first.
#[derive(Debug)]
pub(super) struct Order {
    taken: VecDeque<Taken>,
    /// The sequence number of the oldest.
    first: u16,
}

impl Order {
    pub(super) fn new(size: u16) -> Order {
        Order { taken: VecDeque::with_capacity(size.into()), first: 0 }
    }

    pub(super) fn take(&mut self, taken: Taken) {
        self.taken.push_back(taken);
    }

    /// Forgets the newest.
    pub(super) fn put_back(&mut self) {
        self.taken.pop_back();
    }

    /// The buffer with sequence number `sequence` is complete.
    pub(super) fn complete(&mut self, sequence: u16, written: u32) {
        let index = usize::from(sequence.wrapping_sub(self.first));
        if let Some(taken) = self.taken.get_mut(index) {
            taken.written = Some(written);
        }
    }

    /// Removes the oldest buffer if it is complete.
    pub(super) fn pop(&mut self) -> Option<(Taken, u32)> {
        let oldest = *self.taken.front()?;
        let written = oldest.written?;
        self.taken.pop_front();
        self.first = self.first.wrapping_add(1);
        Some((oldest, written))
    }

    /// All of them, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Taken> {
        self.taken.iter()
    }
}
