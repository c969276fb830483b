// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A transmit ring. It checks each frame of the driver.

use std::sync::Arc;
use std::time::Instant;

use vbus_core::ErrorCode;
use vbus_core::memory::{DriverSlice, View};
use vbus_tap::{HEADER_BYTES, Offloads};

use super::coalesce::{Held, Setting};
use super::ring::TxRing;
use crate::frame::{Body, CHAIN_MAX, ETH_BYTES, FRAME_MAX, Header, Packet};

/// The transmit ring of a queue pair, with the frame that waits.
pub struct TxQueue<T> {
    pub(super) ring: T,
    /// Bytes of the header before each frame, at least [`HEADER_BYTES`].
    header_bytes: usize,
    coalesce: Arc<Setting>,
    held: Held,
    /// The checked header and the Ethernet header of the frame that the ring holds.
    head: Option<(Header, [u8; ETH_BYTES])>,
    /// Units of work that the frame cost beyond those of sending it.
    extra: u32,
    /// A copy of a body that lies in more parts than a back end takes. Empty otherwise.
    gathered: Vec<u8>,
}

/// What the transmit ring holds next.
pub(super) enum Next {
    /// No complete frame.
    Nothing,
    /// A frame.
    Frame(Header, [u8; ETH_BYTES]),
    /// A frame that is shorter than an Ethernet header.
    Short,
    /// A frame with a wrong header.
    BadHeader,
    /// A frame, or a frame with segments, that is longer than the MTU allows.
    TooLong,
}

/// The longest header before a frame: with a hash, which means nothing in a frame from the driver.
const HEADER_MAX: usize = HEADER_BYTES + 8;

impl<T: TxRing> TxQueue<T> {
    /// The queue of `ring`. A header of `header_bytes` bytes precedes each frame: 12, or 20 with
    /// the fields of a hash. `coalesce` may hold interrupts back.
    pub fn new(ring: T, header_bytes: usize, coalesce: Arc<Setting>) -> TxQueue<T> {
        let header_bytes = header_bytes.clamp(HEADER_BYTES, HEADER_MAX);
        TxQueue {
            ring,
            header_bytes,
            coalesce,
            held: Held::default(),
            head: None,
            extra: 0,
            gathered: Vec::new(),
        }
    }

    /// Returns the next frame of the ring, or the frame that had to wait. `parts` gets the bytes
    /// after its Ethernet header. `offloads` are those that the driver may use.
    pub(super) fn next<'v>(
        &mut self,
        view: &'v View<'_>,
        parts: &mut Vec<DriverSlice<'v>>,
        offloads: Offloads,
        mtu: usize,
    ) -> Result<Next, ErrorCode> {
        self.extra = 0;
        let Some(bytes) = self.ring.take(view)? else { return Ok(Next::Nothing) };
        if bytes > self.header_bytes + FRAME_MAX - HEADER_BYTES {
            return Ok(Next::TooLong);
        }
        let mut head = [0; HEADER_MAX + ETH_BYTES];
        let head = &mut head[..self.header_bytes + ETH_BYTES];
        let mut at = 0;
        self.ring.slices(view, |slice| {
            let (front, rest) = slice.split_at(head.len() - at);
            at += front.copy_to(&mut head[at..]);
            if !rest.is_empty() {
                parts.push(rest);
            }
        })?;
        // Each part is looked up and copied by itself. The first ones come with the frame.
        self.extra = u32::try_from(parts.len().saturating_sub(1) / CHAIN_MAX).unwrap_or(u32::MAX);
        if at < head.len() {
            return Ok(Next::Short);
        }
        self.gathered.clear();
        if parts.len() > CHAIN_MAX {
            self.gathered.resize(parts.iter().map(DriverSlice::len).sum(), 0);
            let mut at = 0;
            for part in parts.drain(..) {
                at += part.copy_to(&mut self.gathered[at..]);
            }
        }
        // The device reads and checks the header once. A frame that waits keeps the checked header,
        // whatever the driver writes later.
        if let Some((header, eth)) = self.head {
            return Ok(Next::Frame(header, eth));
        }
        let (mut front, mut eth) = ([0; HEADER_BYTES], [0; ETH_BYTES]);
        front.copy_from_slice(&head[..HEADER_BYTES]);
        eth.copy_from_slice(&head[self.header_bytes..]);
        let mut header = Header::parse(&front);
        if !header.check(bytes.saturating_sub(self.header_bytes), offloads) {
            return Ok(Next::BadHeader);
        }
        if !Packet::new(header, eth, self.body(parts)).fits_mtu(mtu) {
            return Ok(Next::TooLong);
        }
        self.head = Some((header, eth));
        Ok(Next::Frame(header, eth))
    }

    /// The body of the frame that [`next`](Self::next) returned, with its `parts`.
    pub(super) fn body<'b>(&'b self, parts: &'b [DriverSlice<'b>]) -> Body<'b> {
        if self.gathered.is_empty() { Body::Driver(parts) } else { Body::Bytes(&self.gathered) }
    }

    /// Units of work for the parts of the frame that [`next`](Self::next) returned, beyond those
    /// of any frame.
    pub(super) fn extra(&self) -> u32 {
        self.extra
    }

    /// Makes the returns of `frames` frames visible.
    pub(super) fn post(&mut self, frames: u32) {
        let wanted = self.ring.post();
        self.held.posted(wanted, frames.into(), &self.coalesce, &self.ring);
    }

    /// Sends the interrupt that is held back, if it is due.
    pub(super) fn poll_held(&mut self) {
        self.held.poll(&self.coalesce, &self.ring);
    }

    /// When [`poll_held`](Self::poll_held) must be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.held.deadline()
    }

    /// The frame was sent or dropped: returns its buffers to the driver.
    pub(super) fn done(&mut self, view: &View<'_>) -> Result<(), ErrorCode> {
        self.head = None;
        self.ring.done(view)
    }
}
