// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Split queues (VIRTIO 1.3, section 2.7).
//!
//! Indexes of the rings count without end, modulo 2^16. An index modulo the queue's size is the
//! place in the ring.

use vbus_core::shm::signal::Armed;

use super::chain::{Chain, Head};
use super::event::need_event;
use super::indirect;
use super::layout::{DESCRIPTOR_BYTES, Format, RingFeatures};
use super::memory::{Area, Areas, Descriptor, Edge, Fence, Tables};
use super::state::Position;
use super::violation::Violation;

/// Offsets within the available ring and the used ring.
pub(super) const FLAGS: usize = 0;
pub(super) const INDEX: usize = 2;
pub(super) const RING: usize = 4;
/// Bytes of an element of the available ring, and of the used ring.
pub(super) const AVAILABLE_BYTES: usize = 2;
pub(super) const USED_BYTES: usize = 8;
/// The flag of the available ring: no interrupts please. The flag of the used ring: no kicks
/// please.
pub(super) const NO_NOTIFICATION: u16 = 1;

/// The device end of a split queue.
#[derive(Debug)]
pub(super) struct Split {
    size: u16,
    features: RingFeatures,
    /// The index of the buffer that is taken next.
    next: u16,
    /// The driver's index as it was seen last. What lies before it can be taken.
    seen: u16,
    /// The head at `next`, if it was read already.
    fetched: Option<u16>,
    /// The index at which the next used buffer is written.
    used: u16,
    /// The used index as the driver sees it.
    published: u16,
    /// How many used buffers were published since the last decision about an interrupt, up to
    /// 2^16 - 1. `None`: nobody knows.
    since: Option<u16>,
    /// The heads in flight, one bit each.
    in_flight: Box<[u64]>,
}

impl Split {
    /// A queue that goes on at `at`. `is_new`: there was nothing before, so no interrupt is owed.
    pub(super) fn new(size: u16, features: RingFeatures, at: Position, is_new: bool) -> Split {
        Split {
            size,
            features,
            next: at.available,
            seen: at.available,
            fetched: None,
            used: at.used,
            published: at.used,
            since: is_new.then_some(0),
            in_flight: vec![0; usize::from(size).div_ceil(64)].into(),
        }
    }

    pub(super) fn position(&self) -> Position {
        Position { available: self.next, used: self.used, available_wrap: false, used_wrap: false }
    }

    /// Marks a head as in flight or not. Returns whether it was in flight.
    pub(super) fn mark(&mut self, head: u16, in_flight: bool) -> bool {
        let bit = 1 << (head % 64);
        let Some(word) = self.in_flight.get_mut(usize::from(head / 64)) else { return false };
        let before = *word & bit != 0;
        *word = if in_flight { *word | bit } else { *word & !bit };
        before
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    fn head<A: Area>(&self, areas: &Areas<A>, index: u16) -> u16 {
        areas.driver.load16(RING + self.slot(index) * AVAILABLE_BYTES)
    }

    /// Looks at the driver's index. Returns how many buffers can be taken.
    fn look<A: Area>(&mut self, areas: &Areas<A>) -> Result<u16, Violation> {
        // Pairs with the driver's store of the index: the ring and the descriptors are visible.
        let index = areas.driver.observe16(INDEX, Edge::Available);
        let in_flight = self.next.wrapping_sub(self.published);
        let pending = index.wrapping_sub(self.next);
        if pending > self.size.saturating_sub(in_flight) {
            let (used, size) = (self.published, self.size);
            return Err(Violation::Index { index, used, size });
        }
        self.seen = index;
        Ok(pending)
    }

    /// Takes the next buffer: copies its descriptors to `chain`, once each, and checks them.
    #[inline]
    pub(super) fn take<A: Area>(
        &mut self,
        areas: &Areas<A>,
        tables: &impl Tables,
        chain: &mut Chain,
    ) -> Result<Option<(u16, u16)>, Violation> {
        if self.next == self.seen && self.look(areas)? == 0 {
            return Ok(None);
        }
        let head = self.fetched.take().unwrap_or_else(|| self.head(areas, self.next));
        self.check(head)?;
        let after = self.next.wrapping_add(1);
        if after != self.seen {
            let next = self.head(areas, after);
            self.fetched = Some(next);
            if next < self.size {
                areas.descriptors.prefetch(usize::from(next) * DESCRIPTOR_BYTES);
            }
        }
        if let Err(violation) = self.walk(areas, tables, chain, head) {
            // The queue may look at this buffer again.
            self.fetched = None;
            return Err(violation);
        }
        if self.mark(head, true) {
            return Err(Violation::InFlight(head));
        }
        self.next = after;
        Ok(Some((head, 1)))
    }

    fn check(&self, number: u16) -> Result<(), Violation> {
        let size = u32::from(self.size);
        if number < self.size { Ok(()) } else { Err(Violation::Descriptor { number, size }) }
    }

    /// Copies the descriptors from `head` on to `chain`, once each, and checks them.
    pub(super) fn walk<A: Area>(
        &self,
        areas: &Areas<A>,
        tables: &impl Tables,
        chain: &mut Chain,
        head: u16,
    ) -> Result<(), Violation> {
        let mut number = head;
        self.check(head)?;
        for _ in 0..self.size {
            let at = usize::from(number) * DESCRIPTOR_BYTES;
            let words = [at, at + 8].map(|at| areas.descriptors.load64(at));
            let descriptor = Descriptor::of(words);
            if descriptor.has(Descriptor::INDIRECT) {
                let negotiated = self.features.indirect;
                return indirect::append(chain, descriptor, Format::Split, negotiated, tables);
            }
            chain.push(descriptor.addr, descriptor.len, descriptor.has(Descriptor::WRITE))?;
            if !descriptor.has(Descriptor::NEXT) {
                return Ok(());
            }
            number = descriptor.next;
            self.check(number)?;
        }
        Err(Violation::Loop(self.size.into()))
    }

    /// Takes back the buffer that was taken last.
    pub(super) fn put_back(&mut self, head: Head) {
        self.mark(head.id, false);
        self.fetched = None;
        self.next = self.next.wrapping_sub(1);
    }

    /// Writes a used element, for so many `buffers`: more than one with IN_ORDER only. The driver
    /// sees it after [`publish`](Self::publish).
    #[inline]
    pub(super) fn put_used<A: Area>(
        &mut self,
        areas: &Areas<A>,
        id: u16,
        buffers: u16,
        written: u32,
    ) {
        let at = RING + self.slot(self.used) * USED_BYTES;
        areas.device.store32(at, id.into());
        areas.device.store32(at + 4, written);
        self.used = self.used.wrapping_add(buffers);
    }

    /// Lets the driver see the used buffers.
    #[inline]
    pub(super) fn publish<A: Area>(&mut self, areas: &Areas<A>) {
        if self.used != self.published {
            // Pairs with the driver's load of the index: the ring and the buffers are visible.
            areas.device.publish16(INDEX, self.used, Edge::Used);
            let count = self.used.wrapping_sub(self.published);
            self.since = self.since.map(|since| since.saturating_add(count));
            self.published = self.used;
        }
    }

    /// Whether all used buffers are published.
    pub(super) fn is_published(&self) -> bool {
        self.used == self.published
    }

    /// Whether the driver wants an interrupt for what was published since the last call.
    #[inline]
    pub(super) fn notification<A: Area>(&mut self, areas: &Areas<A>) -> bool {
        if self.since == Some(0) {
            return false;
        }
        // Pairs with the driver's fence between its request for interrupts and its last look for
        // used buffers.
        A::fence(Fence::Notify);
        let Some(since) = self.since.replace(0) else { return true };
        if self.features.event_idx {
            let at = RING + usize::from(self.size) * AVAILABLE_BYTES;
            need_event(areas.driver.load16(at), self.published, since)
        } else {
            areas.driver.load16(FLAGS) & NO_NOTIFICATION == 0
        }
    }

    /// Asks for a kick with the next available buffer. [`Armed::Missed`]: there is one already.
    pub(super) fn arm<A: Area>(&mut self, areas: &Areas<A>) -> Armed {
        if self.next != self.seen {
            return Armed::Missed;
        }
        if self.features.event_idx {
            let at = RING + usize::from(self.size) * USED_BYTES;
            areas.device.store16(at, self.next);
        } else {
            areas.device.store16(FLAGS, 0);
        }
        // Pairs with the driver's fence between its index and its look at what the device wants.
        A::fence(Fence::Arm);
        let index = areas.driver.observe16(INDEX, Edge::Available);
        if index == self.next { Armed::Waiting } else { Armed::Missed }
    }

    /// Asks for no kicks. With EVENT_IDX there is nothing to do: after one kick there is none until
    /// the queue arms again.
    pub(super) fn disarm<A: Area>(&mut self, areas: &Areas<A>) {
        if !self.features.event_idx {
            areas.device.store16(FLAGS, NO_NOTIFICATION);
        }
    }
}
