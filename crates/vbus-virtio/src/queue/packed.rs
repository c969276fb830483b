// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Packed queues (VIRTIO 1.3, section 2.8).
//!
//! One ring has available and used descriptors. Each end counts its laps modulo 2, by a wrap
//! counter. A descriptor is available if its flag AVAIL is the wrap counter and its flag USED is
//! not; it is used if both are. A used descriptor takes the place of as many as its buffer had.

use vbus_core::shm::signal::Armed;

use super::chain::{Chain, Head};
use super::indirect;
use super::inflight::Taken;
use super::layout::{DESCRIPTOR_BYTES, Format, RingFeatures};
use super::memory::{Area, Areas, Descriptor, Edge, Fence, Tables};
use super::state::Position;
use super::violation::Violation;

/// Offsets within a descriptor.
pub(super) const LEN: usize = 8;
pub(super) const ID: usize = 12;
pub(super) const FLAGS: usize = 14;

pub(super) const AVAIL: u16 = 1 << 7;
pub(super) const USED: u16 = 1 << 15;

/// The flags of an event suppression structure, in bits 16..18 of its word. Bits 0..15 are the
/// place of a descriptor, and bit 15 the wrap counter there.
pub(super) mod event {
    pub const ENABLE: u32 = 0;
    pub const DISABLE: u32 = 1;
    pub const DESCRIPTOR: u32 = 2;
}

/// A place in the ring, and the wrap counter there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cursor {
    slot: u16,
    wrap: bool,
}

impl Cursor {
    pub(super) fn new(slot: u16, wrap: bool) -> Cursor {
        Cursor { slot, wrap }
    }

    /// The place and the wrap counter.
    pub(super) fn parts(self) -> (u16, bool) {
        (self.slot, self.wrap)
    }

    /// Whether a buffer is available here.
    #[inline]
    pub(super) fn is_available<A: Area>(self, areas: &Areas<A>) -> bool {
        self.look(areas).is_some()
    }

    /// Makes the descriptor here look as one that is available, if it looks used.
    pub(super) fn undo_used<A: Area>(self, areas: &Areas<A>) {
        let flags = areas.descriptors.load16(self.at() + FLAGS);
        if (flags & AVAIL != 0) == self.wrap && (flags & USED != 0) == self.wrap {
            areas.descriptors.store16(self.at() + FLAGS, if self.wrap { AVAIL } else { USED });
        }
    }

    /// The flags of the descriptor here, if it is available.
    #[inline]
    fn look<A: Area>(self, areas: &Areas<A>) -> Option<u16> {
        // Pairs with the driver's store of the flags: the buffer and all its descriptors are
        // visible.
        let flags = areas.descriptors.observe16(self.at() + FLAGS, Edge::Available);
        let available = (flags & AVAIL != 0) == self.wrap && (flags & USED != 0) != self.wrap;
        available.then_some(flags)
    }

    pub(super) fn forward(self, slots: u16, size: u16) -> Cursor {
        // Both are at most 2^15.
        let slot = self.slot + slots;
        let (slot, wrap) = if slot >= size { (slot - size, !self.wrap) } else { (slot, self.wrap) };
        Cursor { slot, wrap }
    }

    fn back(self, slots: u16, size: u16) -> Cursor {
        match self.slot.checked_sub(slots) {
            Some(slot) => Cursor { slot, wrap: self.wrap },
            None => Cursor { slot: self.slot + (size - slots), wrap: !self.wrap },
        }
    }

    /// How many descriptors lie from `event` to this place: 1 to those of two laps, after which
    /// both are the same again. The driver may name any place.
    fn after(self, event: Cursor, size: u16) -> u32 {
        let lap = u32::from(size);
        let place = |at: Cursor| u32::from(at.slot) + if at.wrap { lap } else { 0 };
        (place(self) + 2 * lap - 1 - place(event) % (2 * lap)) % (2 * lap) + 1
    }

    fn at(self) -> usize {
        usize::from(self.slot) * DESCRIPTOR_BYTES
    }

    /// The place and the wrap counter as an event suppression structure has them.
    fn packed(self) -> u16 {
        self.slot | u16::from(self.wrap) << 15
    }
}

/// The device end of a packed queue.
#[derive(Debug)]
pub(super) struct Packed {
    size: u16,
    features: RingFeatures,
    /// Where the next available buffer is taken.
    next: Cursor,
    /// Where the next used buffer is written.
    used: Cursor,
    /// Descriptors of the ring that were taken and whose use is not published.
    in_flight: u16,
    /// Descriptors of the ring that are used and not published.
    unpublished: u16,
    /// Where the first used buffer is that is not published, and its flags: they come last.
    first: Option<(usize, u16)>,
    /// Used descriptors that were published since the last decision about an interrupt, up to
    /// 2^16 - 1. `None`: nobody knows.
    since: Option<u16>,
    /// The descriptors of the buffer that was taken last, if somebody wants to know them.
    taken: Option<Vec<Taken>>,
}

impl Packed {
    /// A queue that goes on at `at`. `is_new`: there was nothing before, so no interrupt is owed.
    pub(super) fn new(size: u16, features: RingFeatures, at: Position, is_new: bool) -> Packed {
        Packed {
            size,
            features,
            next: Cursor { slot: at.available, wrap: at.available_wrap },
            used: Cursor { slot: at.used, wrap: at.used_wrap },
            in_flight: at.packed_in_flight(size),
            unpublished: 0,
            first: None,
            since: is_new.then_some(0),
            taken: None,
        }
    }

    /// Keeps the descriptors of each buffer that is taken, for [`taken`](Self::taken).
    pub(super) fn keep_taken(&mut self) {
        self.taken = Some(Vec::new());
    }

    /// The descriptors of the buffer that was taken last, as they were read.
    pub(super) fn taken(&self) -> &[Taken] {
        self.taken.as_deref().unwrap_or_default()
    }

    pub(super) fn position(&self) -> Position {
        Position {
            available: self.next.slot,
            used: self.used.slot,
            available_wrap: self.next.wrap,
            used_wrap: self.used.wrap,
        }
    }

    /// The flags of the next descriptor, if it is available.
    #[inline]
    fn look<A: Area>(&self, areas: &Areas<A>) -> Option<u16> {
        self.next.look(areas)
    }

    /// Takes the next buffer: copies its descriptors to `chain`, once each, and checks them.
    #[inline]
    pub(super) fn take<A: Area>(
        &mut self,
        areas: &Areas<A>,
        tables: &impl Tables,
        chain: &mut Chain,
    ) -> Result<Option<(u16, u16)>, Violation> {
        let Some(mut flags) = self.look(areas) else { return Ok(None) };
        let mut at = self.next;
        let mut slots = 0;
        self.taken.as_mut().map(Vec::clear);
        let id = loop {
            if self.in_flight + slots >= self.size {
                return Err(Violation::Overfull);
            }
            slots += 1;
            let place = at.at();
            let descriptor = Descriptor {
                addr: areas.descriptors.load64(place),
                len: areas.descriptors.load32(place + LEN),
                flags,
                next: 0,
            };
            let id = areas.descriptors.load16(place + ID);
            if let Some(taken) = &mut self.taken {
                let Descriptor { addr, len, flags, .. } = descriptor;
                taken.push(Taken { addr, len, id, flags });
            }
            if descriptor.has(Descriptor::INDIRECT) {
                let negotiated = self.features.indirect;
                indirect::append(chain, descriptor, Format::Packed, negotiated, tables)?;
                break id;
            }
            chain.push(descriptor.addr, descriptor.len, descriptor.has(Descriptor::WRITE))?;
            if !descriptor.has(Descriptor::NEXT) {
                break id;
            }
            at = at.forward(1, self.size);
            flags = areas.descriptors.load16(at.at() + FLAGS);
        };
        self.next = self.next.forward(slots, self.size);
        self.in_flight += slots;
        Ok(Some((id, slots)))
    }

    /// Takes back the buffer that was taken last.
    pub(super) fn put_back(&mut self, head: Head) {
        self.next = self.next.back(head.slots, self.size);
        self.in_flight -= head.slots;
    }

    /// Writes a used descriptor in the place of `slots`: those of one buffer, or of several with
    /// IN_ORDER. The driver sees it after [`publish`](Self::publish).
    #[inline]
    pub(super) fn put_used<A: Area>(
        &mut self,
        areas: &Areas<A>,
        id: u16,
        slots: u16,
        written: u32,
    ) {
        let at = self.used.at();
        let lap = if self.used.wrap { AVAIL | USED } else { 0 };
        let flags = lap | if written > 0 { Descriptor::WRITE } else { 0 };
        areas.descriptors.store32(at + LEN, written);
        areas.descriptors.store16(at + ID, id);
        // The driver looks at no later one before it has seen the first one as used.
        if self.first.is_none() {
            self.first = Some((at, flags));
        } else {
            areas.descriptors.store16(at + FLAGS, flags);
        }
        self.used = self.used.forward(slots, self.size);
        self.unpublished += slots;
    }

    /// Lets the driver see the used buffers.
    #[inline]
    pub(super) fn publish<A: Area>(&mut self, areas: &Areas<A>) {
        if let Some((at, flags)) = self.first.take() {
            // Pairs with the driver's load of the flags: the other used descriptors and the buffers
            // are visible.
            areas.descriptors.publish16(at + FLAGS, flags, Edge::Used);
            self.in_flight -= self.unpublished;
            let all = |since: u16| since.saturating_add(self.unpublished);
            self.since = self.since.map(all);
            self.unpublished = 0;
        }
    }

    /// Whether all used buffers are published.
    pub(super) fn is_published(&self) -> bool {
        self.unpublished == 0
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
        let wanted = areas.driver.load32(0);
        match wanted >> 16 & 3 {
            event::DISABLE => false,
            event::DESCRIPTOR if self.features.event_idx => {
                let [low, high, ..] = wanted.to_le_bytes();
                let place = u16::from_le_bytes([low, high]);
                let event = Cursor { slot: place & !(1 << 15), wrap: place >> 15 != 0 };
                let new = self.used.back(self.unpublished, self.size);
                since == u16::MAX || new.after(event, self.size) <= since.into()
            }
            _ => true,
        }
    }

    /// Asks for a kick with the next available buffer. [`Armed::Missed`]: there is one already.
    pub(super) fn arm<A: Area>(&mut self, areas: &Areas<A>) -> Armed {
        let wanted = if self.features.event_idx {
            u32::from(self.next.packed()) | event::DESCRIPTOR << 16
        } else {
            event::ENABLE << 16
        };
        areas.device.store32(0, wanted);
        // Pairs with the driver's fence between its flags and its look at what the device wants.
        A::fence(Fence::Arm);
        if self.look(areas).is_some() { Armed::Missed } else { Armed::Waiting }
    }

    /// Asks for no kicks.
    pub(super) fn disarm<A: Area>(&mut self, areas: &Areas<A>) {
        areas.device.store32(0, event::DISABLE << 16);
    }
}
