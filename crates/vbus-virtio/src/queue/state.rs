// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A queue's state as plain values: what another process needs to go on with the queue.

use serde::{Deserialize, Serialize};

use super::chain::{Chain, Part};
use super::layout::{BadLayout, Format, Layout, RingFeatures};
use super::violation::Violation;

/// How far a queue is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Split: the index, modulo 2^16, of the buffer that the device takes next. Packed: the place
    /// in the ring.
    pub available: u16,
    /// Split: the index of the next used buffer. Packed: its place in the ring.
    pub used: u16,
    /// Packed: the wrap counter at `available`. False in a split queue.
    pub available_wrap: bool,
    /// Packed: the wrap counter at `used`. False in a split queue.
    pub used_wrap: bool,
}

impl Position {
    /// That of a fresh queue.
    pub fn start(format: Format) -> Position {
        let wrap = format == Format::Packed;
        Position { available: 0, used: 0, available_wrap: wrap, used_wrap: wrap }
    }

    /// The number that vhost-user's GET_VRING_BASE answers. A split queue has its available index
    /// in bits 0..16. A packed queue has the place and the wrap counter of the next available
    /// buffer in bits 0..15 and 15, and those of the next used one in bits 16..31 and 31.
    pub fn vring_base(&self, format: Format) -> u32 {
        let cursor = |slot: u16, wrap: bool| u32::from(slot) | u32::from(wrap) << 15;
        match format {
            Format::Split => self.available.into(),
            Format::Packed => {
                cursor(self.available, self.available_wrap)
                    | cursor(self.used, self.used_wrap) << 16
            }
        }
    }

    /// The position for the number of vhost-user's SET_VRING_BASE. A split queue has nothing in
    /// flight then: its used index is the available index.
    pub fn of_vring_base(format: Format, base: u32) -> Position {
        let [b0, b1, b2, b3] = base.to_le_bytes();
        let (low, high) = (u16::from_le_bytes([b0, b1]), u16::from_le_bytes([b2, b3]));
        match format {
            Format::Split => Position { available: low, used: low, ..Position::default() },
            Format::Packed => Position {
                available: low & 0x7fff,
                used: high & 0x7fff,
                available_wrap: low >> 15 != 0,
                used_wrap: high >> 15 != 0,
            },
        }
    }

    /// Descriptors of a packed queue's ring from `used` to `available`.
    pub(super) fn packed_in_flight(&self, size: u16) -> u16 {
        let lap = if self.available_wrap == self.used_wrap { 0 } else { size };
        self.available.wrapping_add(lap).wrapping_sub(self.used)
    }
}

/// A buffer in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InFlight {
    /// Split: the number of the first descriptor. Packed: the buffer id.
    pub id: u16,
    /// Packed: how many descriptors of the ring it has. 1 in a split queue.
    pub slots: u16,
    /// The parts, those for reading first. The descriptors of a packed queue may be overwritten
    /// while the buffer is in flight, so this copy is the only one.
    pub parts: Vec<Part>,
    /// How many of the parts are for reading.
    pub readable: usize,
    /// IN_ORDER: the device has completed the buffer, with this many bytes written, and the buffer
    /// waits for an earlier one. It has no parts then.
    pub written: Option<u32>,
}

impl InFlight {
    /// One whose descriptors `chain` has.
    pub(super) fn of(id: u16, slots: u16, chain: &Chain) -> InFlight {
        let parts = [chain.readable(), chain.writable()].concat();
        InFlight { id, slots, parts, readable: chain.readable().len(), written: None }
    }
}

/// All that another process needs to go on with a queue, beside its layout and features.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// How far the queue is.
    pub position: Position,
    /// The buffers in flight, in the order in which the queue gave them out.
    pub in_flight: Vec<InFlight>,
}

impl State {
    /// That of a fresh queue.
    pub fn start(format: Format) -> State {
        State::at(Position::start(format))
    }

    /// That of a queue with nothing in flight.
    pub fn at(position: Position) -> State {
        State { position, in_flight: Vec::new() }
    }

    /// Checks all but the parts of the buffers, and but the ids of a split queue.
    pub(super) fn check(&self, layout: &Layout, features: RingFeatures) -> Result<(), BadState> {
        let Position { available, used, available_wrap, used_wrap } = self.position;
        let size = layout.size;
        let slots = self.in_flight.iter().map(|one| usize::from(one.slots)).sum::<usize>();
        let (inside, between, room) = match layout.format {
            Format::Split => (
                !available_wrap && !used_wrap,
                available.wrapping_sub(used),
                self.in_flight.iter().all(|one| one.slots == 1 && one.id < size),
            ),
            Format::Packed => (
                available < size && used < size,
                self.position.packed_in_flight(size),
                self.in_flight.iter().all(|one| one.slots > 0),
            ),
        };
        if !inside || between > size {
            return Err(BadState::Position);
        }
        // The oldest one never waits for an earlier one.
        let waits = |at: usize| features.in_order && at > 0;
        let whole = |(at, one): (usize, &InFlight)| match one.written {
            Some(_) => waits(at) && one.parts.is_empty() && one.readable == 0,
            None => !one.parts.is_empty() && one.readable <= one.parts.len(),
        };
        if slots != usize::from(between) || !room || !self.in_flight.iter().enumerate().all(whole) {
            return Err(BadState::InFlight);
        }
        Ok(())
    }
}

/// Why a queue has no state to take out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsettled {
    /// The queue is retired.
    #[error("the queue is retired: {0}")]
    Retired(Violation),
    /// Used buffers are not published.
    #[error("used buffers are not published")]
    Unpublished,
    /// The chains are not those in flight.
    #[error("{held} chains were named, and {in_flight} are in flight")]
    Held {
        /// How many chains of this queue the caller named.
        held: usize,
        /// How many are in flight.
        in_flight: usize,
    },
}

/// What is wrong with a [`State`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadState {
    /// The layout itself is wrong.
    #[error(transparent)]
    Layout(#[from] BadLayout),
    /// A position is not within the queue.
    #[error("the position is not within the queue")]
    Position,
    /// The buffers in flight are not as many as lie between the two positions.
    #[error("the buffers in flight do not match the positions")]
    InFlight,
    /// The region of the buffers in flight makes no sense.
    #[error("the region of the buffers in flight makes no sense")]
    Region,
    /// A buffer in flight is wrong in itself.
    #[error("a buffer in flight is wrong: {0}")]
    Buffer(#[from] Violation),
}
