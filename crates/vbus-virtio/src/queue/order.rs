// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The buffers in flight of a queue with IN_ORDER. A device may complete them in any order. They go
//! back to the driver in the order in which the queue gave them out, and a run of them by one used
//! element (VIRTIO 1.3, 2.7.9 and 2.8.9).

use std::collections::VecDeque;

/// A buffer in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) id: u16,
    pub(super) slots: u16,
    /// Bytes that the device may write. `None`: nobody knows, because another queue object has
    /// completed the buffer.
    pub(super) writable: Option<u32>,
    /// The bytes that the device wrote, once it has completed the buffer.
    pub(super) written: Option<u32>,
}

/// Complete buffers that go back by one used element: that of the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The last buffer's.
    pub(super) id: u16,
    /// The last buffer's.
    pub(super) written: u32,
    pub(super) buffers: u16,
    /// Descriptors of all of them in the ring of a packed queue.
    pub(super) slots: u16,
    /// The device has written all that it may of the last buffer. The driver assumes this of all
    /// but the last one of a run, so only then can another one follow.
    pub(super) open: bool,
}

/// The buffers in flight, oldest first.
#[derive(Debug)]
pub(super) struct Order {
    taken: VecDeque<Taken>,
    /// The sequence number of the oldest.
    first: u16,
    /// Those that are complete and were not written to the ring.
    run: Option<Run>,
}

impl Order {
    pub(super) fn new(size: u16) -> Order {
        Order { taken: VecDeque::with_capacity(size.into()), first: 0, run: None }
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

    /// Moves the oldest buffer to the run, if it is complete. Returns its id, and the run before it
    /// if the buffer begins another one.
    pub(super) fn advance(&mut self) -> Option<(u16, Option<Run>)> {
        let Taken { id, slots, writable, written } = *self.taken.front()?;
        let written = written?;
        self.taken.pop_front();
        self.first = self.first.wrapping_add(1);
        let open = Some(written) == writable;
        let (before, former) = match self.run {
            Some(run) if run.open => (run, None),
            former => (Run { id, written, buffers: 0, slots: 0, open }, former),
        };
        // All of them were in flight at once, so the sums are at most the queue's size.
        let (buffers, slots) = (before.buffers + 1, before.slots + slots);
        self.run = Some(Run { id, written, buffers, slots, open });
        Some((id, former))
    }

    /// The run, which ends.
    pub(super) fn end_run(&mut self) -> Option<Run> {
        self.run.take()
    }

    /// Whether there is a run.
    pub(super) fn has_run(&self) -> bool {
        self.run.is_some()
    }

    /// All that are in flight, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Taken> {
        self.taken.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_goes_on_while_its_buffers_are_wholly_written() {
        let mut order = Order::new(8);
        for (id, writable) in [(7, 0), (5, 100), (3, 100), (1, 0)] {
            order.take(Taken { id, slots: 2, writable: Some(writable), written: None });
        }
        order.complete(1, 100);
        assert_eq!(order.advance(), None, "the first is not complete");
        order.complete(0, 0);
        order.complete(2, 60);
        assert_eq!(order.advance(), Some((7, None)));
        assert_eq!(order.advance(), Some((5, None)));
        assert_eq!(order.advance(), Some((3, None)));
        assert_eq!(order.advance(), None);
        order.complete(3, 0);
        let run = Run { id: 3, written: 60, buffers: 3, slots: 6, open: false };
        assert_eq!(order.advance(), Some((1, Some(run))), "60 bytes must be told");
        let run = Run { id: 1, written: 0, buffers: 1, slots: 2, open: true };
        assert_eq!(order.end_run(), Some(run));
        assert!(!order.has_run() && order.iter().next().is_none());
    }
}
