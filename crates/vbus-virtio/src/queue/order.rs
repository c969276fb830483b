// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The buffers in flight of a queue with IN_ORDER. A device may complete them in any order. They go
//! back to the driver in the order in which the queue gave them out, and a run of them by one used
//! element (VIRTIO 1.3, 2.7.9 and 2.8.9).

/// A buffer that the device has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Complete {
    pub(super) id: u16,
    pub(super) slots: u16,
    /// The entry in the region of the buffers in flight.
    pub(super) entry: u16,
    /// The bytes that the device wrote.
    pub(super) written: u32,
    /// These are all bytes that it might write.
    pub(super) whole: bool,
}

/// A buffer that goes back to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gone {
    pub(super) id: u16,
    /// The entry in the region of the buffers in flight.
    pub(super) entry: u16,
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

/// The buffers in flight, by their sequence numbers.
#[derive(Debug)]
pub(super) struct Order {
    /// Those that are complete and wait for an earlier one. A buffer has the place of its sequence
    /// number modulo the length, which is a power of two and at least the queue's size.
    complete: Box<[Option<Complete>]>,
    /// The sequence number of the oldest, and that of the next.
    first: u16,
    next: u16,
    /// Those that are complete and were not written to the ring.
    run: Option<Run>,
}

impl Order {
    pub(super) fn new(size: u16) -> Order {
        let complete = vec![None; usize::from(size).next_power_of_two()].into();
        Order { complete, first: 0, next: 0, run: None }
    }

    /// The queue has given out a buffer, with the next sequence number.
    #[inline]
    pub(super) fn take(&mut self) {
        self.next = self.next.wrapping_add(1);
    }

    /// Forgets the newest.
    pub(super) fn put_back(&mut self) {
        self.next = self.next.wrapping_sub(1);
    }

    #[inline]
    fn place(&mut self, sequence: u16) -> Option<&mut Option<Complete>> {
        let at = usize::from(sequence) & (self.complete.len() - 1);
        self.complete.get_mut(at)
    }

    /// The buffer with sequence number `sequence` is complete. If it is the oldest one, it is moved
    /// to the run, as by [`advance`](Self::advance).
    #[inline]
    pub(super) fn complete(
        &mut self,
        sequence: u16,
        complete: Complete,
    ) -> Option<(Gone, Option<Run>)> {
        let age = sequence.wrapping_sub(self.first);
        if age >= self.next.wrapping_sub(self.first) {
            return None;
        }
        if age == 0 {
            return Some(self.append(complete));
        }
        *self.place(sequence)? = Some(complete);
        None
    }

    /// Moves the oldest buffer to the run, if it is complete. Returns which it was, and the run
    /// before it if the buffer begins another one.
    #[inline]
    pub(super) fn advance(&mut self) -> Option<(Gone, Option<Run>)> {
        let oldest = self.place(self.first)?.take()?;
        Some(self.append(oldest))
    }

    #[inline]
    fn append(&mut self, oldest: Complete) -> (Gone, Option<Run>) {
        let Complete { id, slots, entry, written, whole } = oldest;
        self.first = self.first.wrapping_add(1);
        let (before, former) = match self.run {
            Some(run) if run.open => ((run.buffers, run.slots), None),
            former => ((0, 0), former),
        };
        // All of them were in flight at once, so the sums are at most the queue's size.
        let (buffers, slots) = (before.0 + 1, before.1 + slots);
        self.run = Some(Run { id, written, buffers, slots, open: whole });
        (Gone { id, entry }, former)
    }

    /// The run, which ends.
    pub(super) fn end_run(&mut self) -> Option<Run> {
        self.run.take()
    }

    /// Whether there is a run.
    pub(super) fn has_run(&self) -> bool {
        self.run.is_some()
    }

    /// Those that are complete and wait for an earlier one, oldest first, with their places among
    /// those in flight.
    pub(super) fn waiting(&self) -> impl Iterator<Item = (usize, &Complete)> {
        (0..self.next.wrapping_sub(self.first)).filter_map(|age| {
            let at = usize::from(self.first.wrapping_add(age)) & (self.complete.len() - 1);
            Some((usize::from(age), self.complete.get(at)?.as_ref()?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_goes_on_while_its_buffers_are_wholly_written() {
        let mut order = Order::new(3);
        (0..4).for_each(|_| order.take());
        let complete =
            |id, written, whole| Complete { id, slots: 2, entry: id + 1, written, whole };
        let gone = |id| Gone { id, entry: id + 1 };
        assert_eq!(order.complete(1, complete(5, 100, true)), None, "the first is not complete");
        assert_eq!(order.advance(), None);
        assert_eq!(order.waiting().collect::<Vec<_>>(), [(1, &complete(5, 100, true))]);
        assert_eq!(order.complete(2, complete(3, 60, false)), None);
        assert_eq!(order.complete(4, complete(9, 0, true)), None);
        assert_eq!(order.complete(0, complete(7, 0, true)), Some((gone(7), None)));
        assert_eq!(order.advance(), Some((gone(5), None)));
        assert_eq!(order.advance(), Some((gone(3), None)));
        assert_eq!(order.advance(), None);
        let run = Run { id: 3, written: 60, buffers: 3, slots: 6, open: false };
        let last = order.complete(3, complete(1, 0, true));
        assert_eq!(last, Some((gone(1), Some(run))), "60 bytes must be told");
        let run = Run { id: 1, written: 0, buffers: 1, slots: 2, open: true };
        assert_eq!(order.end_run(), Some(run));
        assert!(!order.has_run() && order.waiting().next().is_none());
        assert_eq!(order.advance(), None, "the fifth was not in flight");
    }
}
