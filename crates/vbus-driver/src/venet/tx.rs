//! The transmit queue.

use vbus_shm::abi::venet::{CHAIN_MAX, FRAME_MAX, HEADER_BYTES};
use vbus_shm::ring::{Entry, NEXT};
use vbus_shm::signal::Armed;

use super::Ring;
use crate::{Error, Hal};

/// A run of the device's addresses that holds part of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Its address.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
}

/// Sends frames. They are sent, and their memory comes back, in the order of
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

    /// Pieces that can be submitted now. Grows by [`reclaim`](Self::reclaim).
    pub fn space(&self) -> u32 {
        self.ring.end.space()
    }

    /// Pieces that have been submitted and not reclaimed.
    pub fn in_flight(&self) -> u32 {
        self.ring.end.in_flight()
    }

    /// Submits a frame with its header, in 1..=[`CHAIN_MAX`] pieces of 1 byte or more,
    /// [`FRAME_MAX`] bytes at most. They must stay as they are until they are reclaimed. False, and
    /// nothing has happened, if the ring has no room for them now. A device that polls may send the
    /// frame at once; one that sleeps is woken by [`post`](Self::post).
    pub fn submit(&mut self, pieces: &[Piece]) -> Result<bool, Error> {
        let bytes: u64 = pieces.iter().map(|piece| u64::from(piece.len)).sum();
        let empty = pieces.iter().any(|piece| piece.len == 0);
        if empty
            || pieces.len() > CHAIN_MAX
            || !(HEADER_BYTES as u64 + 1..=FRAME_MAX as u64).contains(&bytes)
        {
            return Err(Error::Unsupported("a frame of that shape"));
        }
        if (self.ring.end.space() as usize) < pieces.len() {
            return Ok(false);
        }
        let last = pieces.len() - 1;
        for (i, piece) in pieces.iter().enumerate() {
            let flags = if i == last { 0 } else { NEXT };
            // There is room, as checked.
            let _ = self.ring.end.submit(Entry { addr: piece.addr, len: piece.len, id: 0, flags });
        }
        Ok(true)
    }

    /// Makes what was submitted visible, and wakes the device if it sleeps. Returns whether it rang
    /// the doorbell. Best called once for several frames.
    pub fn post(&mut self) -> bool {
        self.ring.bell.kick(self.ring.end.post())
    }

    /// How many pieces came back since the last call, the oldest first. Costs a look at memory:
    /// best called when room gets scarce.
    pub fn reclaim(&mut self) -> Result<u32, Error> {
        self.ring
            .end
            .reap_count()
            .map_err(|_| Error::Corrupt("more transmit entries returned than submitted"))
    }

    /// Asks for an interrupt once `after` more pieces than those reclaimed have come back, and one
    /// more. Without this, none comes.
    pub fn arm(&mut self, after: u32) -> Armed {
        self.ring.end.arm(after)
    }

    /// Asks for none.
    pub fn disarm(&mut self) {
        self.ring.end.disarm();
    }
}
