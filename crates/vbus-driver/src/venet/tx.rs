// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The transmit queue.

use vbus_shm::abi::venet::{CHAIN_MAX, FRAME_MAX, HEADER_BYTES};
use vbus_shm::ring::{Entry, NEXT};
use vbus_shm::signal::Armed;

use super::Ring;
use crate::{Error, Hal};

/// Contiguous bytes, by the device's addresses, that hold part of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Its address.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
}

/// Sends frames. The device sends frames, and returns their memory, in the order of
/// [`submit`](Self::submit).
#[derive(Debug)]
pub struct Tx<H: Hal> {
    pub(super) q: u16,
    pub(super) ring: Ring<H>,
}

impl<H: Hal> Tx<H> {
    pub(super) fn new(q: u16, ring: Ring<H>) -> Self {
        Tx { q, ring }
    }

    /// How many pieces can be submitted now. [`reclaim`](Self::reclaim) makes more room.
    pub fn space(&self) -> u32 {
        self.ring.end.space()
    }

    /// Pieces that have been submitted and not reclaimed.
    pub fn in_flight(&self) -> u32 {
        self.ring.end.in_flight()
    }

    /// Submits a frame with its header, in 1..=[`CHAIN_MAX`] pieces of 1 byte or more,
    /// [`FRAME_MAX`] bytes at most. The bytes must not change until the pieces are reclaimed.
    /// Returns false and does nothing if the ring has no room for the pieces now. A device that
    /// polls may send the frame at once. [`post`](Self::post) wakes a device that sleeps.
    pub fn submit(&mut self, pieces: &[Piece]) -> Result<bool, Error> {
        let bytes: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
        let empty = pieces.iter().any(|piece| piece.len == 0);
        if empty
            || pieces.len() > CHAIN_MAX
            || !(HEADER_BYTES as u64 + 1..=FRAME_MAX as u64).contains(&bytes)
        {
            return Err(Error::Unsupported("a frame of that shape"));
        }
        let last = pieces.len() - 1;
        let entries = pieces.iter().enumerate().map(|(i, piece)| {
            let flags = if i == last { 0 } else { NEXT };
            Entry { addr: piece.addr, len: piece.len, id: 0, flags }
        });
        Ok(self.ring.end.submit_all(entries).is_ok())
    }

    /// Makes submitted frames visible, and wakes the device if it sleeps. Returns whether it rang
    /// the doorbell. Call it once for several frames.
    pub fn post(&mut self) -> bool {
        self.ring.bell.kick(self.ring.end.post())
    }

    /// How many pieces came back since the last call, the oldest first. It reads shared memory:
    /// call it when there is little room left.
    pub fn reclaim(&mut self) -> Result<u32, Error> {
        self.ring
            .end
            .reap_count(u32::MAX)
            .map_err(|_| Error::Corrupt("more transmit entries returned than submitted"))
    }

    /// Asks for an interrupt when `after` + 1 more pieces have come back than were reclaimed.
    /// Without this call no interrupt comes.
    pub fn arm(&mut self, after: u32) -> Armed {
        self.ring.end.arm(after)
    }

    /// Asks for no interrupt.
    pub fn disarm(&mut self) {
        self.ring.end.disarm();
    }
}
