// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The receive queue.

use vbus_shm::abi::venet::{CHAIN_MAX, FRAME_MAX, HASH_HEADER_BYTES, HEADER_BYTES};
use vbus_shm::ring::{Entry, NEXT};
use vbus_shm::signal::Armed;

use super::{RING_MAX, Ring};
use crate::{Dma, Error, Hal};

/// Receives frames into buffers that the driver gives by their addresses. The buffers come back in
/// the order in which the driver gave them. So the driver keeps them in a queue of its own, and
/// this value needs no memory for each buffer.
///
/// For a driver without memory of its own there is [`Rx`].
#[derive(Debug)]
pub struct RxRing<H: Hal> {
    pub(super) q: u16,
    pub(super) ring: Ring<H>,
    buffer_bytes: u32,
    header_bytes: usize,
    /// The lengths of the pieces of the frame that is incomplete, or that was returned last.
    pieces: [u32; CHAIN_MAX],
    count: usize,
    bytes: usize,
    whole: bool,
}

impl<H: Hal> RxRing<H> {
    pub(super) fn new(q: u16, ring: Ring<H>, buffer_bytes: u32, hash: bool) -> Self {
        RxRing {
            q,
            ring,
            buffer_bytes,
            header_bytes: if hash { HASH_HEADER_BYTES } else { HEADER_BYTES },
            pieces: [0; CHAIN_MAX],
            count: 0,
            bytes: 0,
            whole: false,
        }
    }

    /// Bytes of each buffer.
    pub fn buffer_bytes(&self) -> u32 {
        self.buffer_bytes
    }

    /// Bytes of the header before each frame.
    pub fn header_bytes(&self) -> usize {
        self.header_bytes
    }

    /// How many more buffers the ring has room for. Buffers of a frame that has come in part count
    /// as those of the device.
    pub fn space(&self) -> u32 {
        self.ring.end.space().saturating_sub(self.incomplete())
    }

    /// How many buffers the device has, those of a frame that has come in part among them.
    pub fn in_flight(&self) -> u32 {
        self.ring.end.in_flight() + self.incomplete()
    }

    /// Gives the [`buffer_bytes`](Self::buffer_bytes) at the device's address `addr` to the device.
    /// It sees them after [`post`](Self::post) at the latest.
    ///
    /// # Errors
    /// The ring has no room.
    ///
    /// # Safety
    /// The memory at `addr` is the driver's, and nothing else uses it or frees it, until
    /// [`receive`](Self::receive) has returned the buffer, the queue's region has been dropped, or
    /// the connection has been closed. The device writes it until then.
    #[allow(unsafe_code, reason = "only the caller knows what is at the address")]
    #[inline]
    pub unsafe fn give(&mut self, addr: u64) -> Result<(), Error> {
        self.submit(addr, 0)
    }

    /// The buffers of the frame that has come in part: at most [`CHAIN_MAX`].
    #[allow(clippy::cast_possible_truncation, reason = "at most CHAIN_MAX")]
    fn incomplete(&self) -> u32 {
        if self.whole { 0 } else { self.count as u32 }
    }

    #[inline(always)]
    fn submit(&mut self, addr: u64, id: u16) -> Result<(), Error> {
        let entry = Entry { addr, len: self.buffer_bytes, id, flags: 0 };
        self.ring
            .end
            .submit(entry)
            .map_err(|_| Error::Unsupported("more receive buffers than entries"))
    }

    /// Makes the given buffers visible, and wakes the device if it waits for buffers. Returns
    /// whether it rang the doorbell.
    #[inline]
    pub fn post(&mut self) -> bool {
        self.ring.bell.kick(self.ring.end.post())
    }

    /// The lengths of the pieces of the next frame, header first. The frame is in as many of the
    /// oldest buffers, each filled from its beginning. These buffers belong to the driver from now
    /// on.
    ///
    /// # Errors
    /// The device broke the protocol: it returned more buffers than it has, more bytes than a
    /// buffer has, or too large a frame. The driver then takes the queue away, because it does not
    /// know any more which buffers the device has.
    #[inline]
    pub fn receive(&mut self) -> Result<Option<&[u32]>, Error> {
        if self.whole {
            (self.whole, self.count, self.bytes) = (false, 0, 0);
        }
        while !self.whole {
            let back = self
                .ring
                .end
                .reap()
                .map_err(|_| Error::Corrupt("more receive buffers returned than given"))?;
            let Some(entry) = back else { return Ok(None) };
            if entry.len > self.buffer_bytes || entry.len == 0 {
                return Err(Error::Corrupt("bad length of a received piece"));
            }
            let slot = self
                .pieces
                .get_mut(self.count)
                .ok_or(Error::Corrupt("a received frame in too many pieces"))?;
            *slot = entry.len;
            self.count += 1;
            self.bytes += entry.len as usize;
            self.whole = entry.flags & NEXT == 0;
        }
        if self.bytes <= self.header_bytes
            || self.bytes - self.header_bytes > FRAME_MAX - HEADER_BYTES
        {
            return Err(Error::Corrupt("bad length of a received frame"));
        }
        Ok(Some(&self.pieces[..self.count]))
    }

    /// Asks for an interrupt when `after` + 1 more pieces have come than were received.
    pub fn arm(&mut self, after: u32) -> Armed {
        self.ring.end.arm(after)
    }

    /// Asks for no interrupt.
    pub fn disarm(&mut self) {
        self.ring.end.disarm();
    }
}

/// Part of a received frame: the first `len` bytes of buffer `id`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// The driver's id of the buffer.
    pub id: u16,
    /// Bytes in it.
    pub len: u32,
}

/// Receives frames into buffers that the NIC has made, in any order that the driver likes.
#[derive(Debug)]
pub struct Rx<H: Hal> {
    ring: RxRing<H>,
    /// The buffers, in the order of their ids. The function keeps them too, so that this value may
    /// be dropped while the device has them.
    buffers: H::Dma,
    /// A bit for each buffer that the device has.
    with_device: [u64; RING_MAX as usize / 64],
    /// The ids of the buffers that the device has, in the order of [`give`](Self::give). The buffer
    /// that comes back next is at `oldest`.
    order: [u16; RING_MAX as usize],
    oldest: usize,
    /// The pieces of the frame that was returned last.
    pieces: [Received; CHAIN_MAX],
}

impl<H: Hal> From<Rx<H>> for RxRing<H> {
    /// The ring alone, to take it away from the device.
    fn from(rx: Rx<H>) -> Self {
        rx.ring
    }
}

impl<H: Hal> Rx<H> {
    pub(super) fn new(ring: RxRing<H>, buffers: H::Dma) -> Self {
        Rx {
            ring,
            buffers,
            with_device: Default::default(),
            order: [0; RING_MAX as usize],
            oldest: 0,
            pieces: [Received::default(); CHAIN_MAX],
        }
    }

    /// Bytes of each buffer.
    pub fn buffer_bytes(&self) -> u32 {
        self.ring.buffer_bytes
    }

    /// Bytes of the header before each frame.
    pub fn header_bytes(&self) -> usize {
        self.ring.header_bytes
    }

    /// How many more buffers the ring has room for.
    pub fn space(&self) -> u32 {
        self.ring.space()
    }

    /// The memory of the buffers. Buffer `id` begins at byte `id * buffer_bytes`.
    pub fn buffers(&self) -> &H::Dma {
        &self.buffers
    }

    /// Gives buffer `id` to the device. `id` must be below the number of entries of the ring, and
    /// the device must not have that buffer. The device sees the buffer after
    /// [`post`](Self::post) at the latest.
    pub fn give(&mut self, id: u16) -> Result<(), Error> {
        let bytes = self.ring.buffer_bytes as usize;
        let at = usize::from(id) * bytes;
        let (word, bit) = word_and_bit(id);
        let free = self.with_device.get_mut(word).filter(|bits| **bits & bit == 0);
        let entries = self.ring.ring.end.layout().entries();
        let is_buffer = u32::from(id) < entries && self.buffers.is_run(at, bytes);
        let Some(bits) = free.filter(|_| is_buffer) else {
            return Err(Error::Unsupported("a receive buffer of that number"));
        };
        let slot = (self.oldest + self.ring.in_flight() as usize) % self.order.len();
        // There are as many ids as entries, so there is room.
        self.ring.submit(self.buffers.address(at), id)?;
        *bits |= bit;
        self.order[slot] = id;
        Ok(())
    }

    /// Makes the given buffers visible, and wakes the device if it waits for buffers. Returns
    /// whether it rang the doorbell.
    pub fn post(&mut self) -> bool {
        self.ring.post()
    }

    /// The next frame, in pieces, header first. The buffers belong to the driver from now on. It
    /// may [`give`](Self::give) them again at any time, also after the next call.
    ///
    /// # Errors
    /// As of [`RxRing::receive`].
    pub fn receive(&mut self) -> Result<Option<&[Received]>, Error> {
        let Some(lengths) = self.ring.receive()? else { return Ok(None) };
        for (piece, &len) in self.pieces.iter_mut().zip(lengths) {
            let id = self.order[self.oldest];
            self.oldest = (self.oldest + 1) % self.order.len();
            let (word, bit) = word_and_bit(id);
            self.with_device[word] &= !bit;
            *piece = Received { id, len };
        }
        Ok(Some(&self.pieces[..lengths.len()]))
    }

    /// Asks for an interrupt when `after` + 1 more pieces have come than were received.
    pub fn arm(&mut self, after: u32) -> Armed {
        self.ring.arm(after)
    }

    /// Asks for no interrupt.
    pub fn disarm(&mut self) {
        self.ring.disarm();
    }
}

/// Word and bit of buffer `id`.
fn word_and_bit(id: u16) -> (usize, u64) {
    (usize::from(id) / 64, 1 << (id % 64))
}
