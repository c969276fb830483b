// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames that a back end reads into memory of this process, on their way to a receive queue.
//!
//! The kernel usually reads a frame into the driver's buffers. That is not possible if the receive
//! queue is known only when the frame has been read, if somebody must see the frame before the
//! driver can change it, or if the driver's buffers cannot hold the longest frame.

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vbus_core::io_vec::IoVecMut;
use vbus_tap::{HEADER_BYTES, Offloads};

use crate::frame::{Body, ETH_BYTES, FRAME_MAX, Hash, Header, Packet};
use crate::offload::{Plain, complete_dhcp};
use crate::sink::{Delivery, OnFull, Read, RxDrop, RxSink};

/// What is wrong with a saved frame.
const NO_FRAME: &str = "a frame that waits is none";

/// A frame in memory of this process.
#[derive(Default)]
pub(crate) struct ReadFrame {
    header: Header,
    eth: [u8; ETH_BYTES],
    /// The memory for the rest of a frame. Empty until the first frame.
    body: Vec<u8>,
    /// Bytes of the rest.
    len: usize,
}

impl ReadFrame {
    /// Reads the next frame, in place of the former one. Returns whether there was one. Fills in
    /// the checksum of a datagram of DHCP.
    pub fn read(&mut self, read: &mut Read<'_>) -> Result<bool, Errno> {
        const HEAD: usize = HEADER_BYTES + ETH_BYTES;
        let mut head = [0; HEAD];
        self.body.resize(FRAME_MAX, 0);
        let len = read(&mut [IoVecMut::new(&mut head), IoVecMut::new(&mut self.body)])?;
        let Some(rest) = len.checked_sub(HEAD) else { return Ok(false) };
        let (header, eth) = head.split_at(HEADER_BYTES);
        let mut front = [0; HEADER_BYTES];
        front.copy_from_slice(header);
        self.header = Header::parse(&front);
        self.eth.copy_from_slice(eth);
        self.len = rest.min(FRAME_MAX);
        complete_dhcp(&mut self.header, &self.eth, &mut self.body[..self.len]);
        Ok(true)
    }

    /// The header of 12 bytes, and the frame.
    pub fn save(&self) -> Vec<u8> {
        let body = self.body.get(..self.len).unwrap_or(&[]);
        [&self.header.bytes(0)[..], &self.eth, body].concat()
    }

    /// Takes over what [`save`](Self::save) returned.
    ///
    /// # Errors
    /// It is no frame.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        let parts = bytes.split_first_chunk::<HEADER_BYTES>();
        let parts = parts.and_then(|(head, frame)| Some((head, frame.split_first_chunk()?)));
        let (head, (eth, body)) =
            parts.filter(|(_, (_, body))| body.len() <= FRAME_MAX).ok_or(NO_FRAME)?;
        let header = Header::parse(head);
        // The kernel's headers pass this check, which clears what a driver may not say.
        if !header.clone().check(ETH_BYTES + body.len(), Offloads::ALL) {
            return Err(NO_FRAME.into());
        }
        (self.header, self.eth, self.len) = (header, *eth, body.len());
        self.body.resize(FRAME_MAX, 0);
        self.body[..body.len()].copy_from_slice(body);
        Ok(())
    }

    pub fn packet(&self) -> Packet<'_> {
        Packet::new(self.header, self.eth, Body::Bytes(self.body.get(..self.len).unwrap_or(&[])))
    }
}

/// Frames for a receive queue, one after another. A frame that finds too few buffers stays here.
#[derive(Default)]
pub(crate) struct Inbound {
    frame: ReadFrame,
    /// Whether the frame, or a piece of it, has not been delivered.
    is_held: bool,
    /// The plain frames of a frame that the driver cannot get as it is: the next one, and their
    /// number.
    cut: Option<(usize, usize)>,
    plain: Plain,
}

/// A frame that waits, as plain data (spec/state-format.md, "Back ends").
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct InboundState {
    /// The header of 12 bytes, and the frame.
    #[serde(with = "hex::serde")]
    bytes: Vec<u8>,
    /// The number of the next plain frame, if it is delivered in plain frames.
    next: Option<usize>,
}

/// How far a frame has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The receive queue has counted the frame, or each of its pieces.
    Done,
    /// The budget is used up.
    Part,
    /// The frame waits for buffers.
    Full,
}

impl Inbound {
    /// Whether a frame is here. Deliver it before the next [`read`](Self::read).
    pub fn is_held(&self) -> bool {
        self.is_held
    }

    pub fn packet(&self) -> Packet<'_> {
        self.frame.packet()
    }

    /// Reads the next frame. Returns whether there was one.
    pub fn read(&mut self, read: &mut Read<'_>) -> Result<bool, Errno> {
        self.cut = None;
        self.is_held = self.frame.read(read)?;
        Ok(self.is_held)
    }

    /// Delivers the frame by `deliver`, in pieces if the driver cannot get it as it is. Each
    /// delivery takes its units of work from `left`, which must not be 0.
    pub fn deliver(
        &mut self,
        sink: &mut dyn RxSink,
        (hash, on_full): (Option<Hash>, OnFull),
        left: &mut u32,
        mut deliver: impl FnMut(&mut dyn RxSink, &Packet<'_>, OnFull) -> Delivery,
    ) -> Step {
        let (mut next, count) = match self.cut {
            Some(cut) => cut,
            None => {
                *left = left.saturating_sub(1);
                let packet = Packet { hash, ..self.frame.packet() };
                match deliver(sink, &packet, on_full) {
                    Delivery::Delivered { units } => {
                        *left = left.saturating_sub(units - 1);
                        return self.done();
                    }
                    Delivery::Dropped => return self.done(),
                    Delivery::Full { .. } => return Step::Full,
                    Delivery::NeedsCut => {}
                }
                let Some(count) = self.plain.load(&packet) else {
                    sink.count_drop(RxDrop::BadFrame);
                    return self.done();
                };
                (0, count)
            }
        };
        while next < count {
            self.cut = Some((next, count));
            if *left == 0 {
                return Step::Part;
            }
            *left -= 1;
            match Packet::plain(self.plain.piece(next)) {
                Some(piece) => {
                    let piece = Packet { hash, ..piece };
                    match deliver(sink, &piece, on_full) {
                        Delivery::Full { .. } => return Step::Full,
                        Delivery::Delivered { units } => *left = left.saturating_sub(units - 1),
                        _ => {}
                    }
                }
                None => sink.count_drop(RxDrop::BadFrame),
            }
            next += 1;
        }
        self.done()
    }

    /// The frame that is here, as plain data.
    pub fn save(&self) -> Option<InboundState> {
        let next = self.cut.map(|(next, _)| next);
        self.is_held.then(|| InboundState { bytes: self.frame.save(), next })
    }

    /// Goes on from what [`save`](Self::save) returned.
    ///
    /// # Errors
    /// It is no frame.
    pub fn restore(&mut self, saved: Option<&InboundState>) -> Result<(), String> {
        let Some(InboundState { bytes, next }) = saved else { return Ok(()) };
        self.frame.restore(bytes)?;
        self.is_held = true;
        if let Some(next) = *next {
            let count = self.plain.load(&self.frame.packet()).filter(|count| next < *count);
            self.cut = Some((next, count.ok_or(NO_FRAME)?));
        }
        Ok(())
    }

    /// Forgets the frame: it was delivered, or has no receive queue.
    pub fn done(&mut self) -> Step {
        (self.is_held, self.cut) = (false, None);
        Step::Done
    }
}
