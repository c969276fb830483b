// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The transmit half of a queue pair. It belongs to whoever holds the queue's transmit lock.
//!
//! Small frames are copied into memory that the device always reaches: the smallest behind their
//! header into a slot, larger ones into a memory that is a FIFO ([`Copies`]). They need no map, and
//! the stack has each back at once, so the socket of the sender has room again. Everything else is
//! mapped where it is, and unmapped when the device has returned it. The device does not interrupt
//! for that, unless the queue waits for room or much is under way. So every call of the stack, and
//! every poll, looks what has come back.
//!
//! The administrator says what is small (`ethtool --set-tunable ... tx-copybreak`). Behind an IOMMU
//! that translates, every frame is at first, because there a map costs more than a copy: a virtual
//! machine's IOMMU tells the device of each map and of its end. The queue then waits for room in
//! the FIFO. Without such an IOMMU a frame that finds no room is mapped.
#![allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "lengths of a frame, and indexes that are checked where they are made"
)]
#![allow(unsafe_code, reason = "memory that the device reads")]

use core::ffi::c_int;
use core::ptr;

use vbus_driver::shm::signal::Armed;
use vbus_driver::venet::{
    CHAIN_MAX, FRAME_MAX, Fifo, Gso, HEADER_BYTES, Header, Piece, Segments, Tx,
};
use vbus_driver::{Dma as _, Error, Hal as _, Memory as _};
use vbus_shm::copy;
use vbus_shm::sync::{Ordering, Word};

use super::ffi::{self, Handle};
use super::stats::TxStats;
use crate::hal::{Dma, KernelHal};
use crate::kernel::KVec;

/// Bytes of the memory for the header of a frame, and for its linear part if that is short.
const SLOT: usize = 256;
/// Where in a slot the header begins: the frame behind it then begins with a word.
const HEADER_AT: usize = 16 - HEADER_BYTES;
/// The longest linear part that is copied into a slot.
const COPY_MAX: usize = SLOT - HEADER_AT - HEADER_BYTES;
/// The stack is stopped if there is not room for one more of the largest frame.
const ROOM: u32 = CHAIN_MAX as u32;
/// From so many entries on, a call of the stack looks for what has come back.
const RECLAIM_FROM: u32 = 32;
/// From so many entries under way on, the device interrupts when half of them have come back, so
/// that whoever waits for their memory does not wait for the timer.
const ARM_FROM: u32 = 64;

/// Frames of at most so many bytes are copied before somebody sets another number, unless an IOMMU
/// translates. A copy of more costs more than a map.
pub const COPYBREAK: u32 = 2048;
/// No frame has more bytes.
pub const COPYBREAK_MAX: u32 = (FRAME_MAX - HEADER_BYTES) as u32;

/// The most bytes of the memory for copies. If it is in one piece, one entry of the IOMMU's tables
/// and of the processor's is for all of it.
const COPIES: usize = 2 << 20;
/// The fewest bytes, if an IOMMU translates: room for three of the largest frames.
const COPIES_MIN: usize = COPIES / 8;
/// The fewest bytes otherwise: room for the copies of the smallest ring.
const COPIES_MIN_FLAT: usize = 128 << 10;
/// Bytes that a header needs before a copy: it begins as in a slot.
const IN_FRONT: u32 = (HEADER_AT + HEADER_BYTES) as u32;
const _: () = assert!(COPIES_MIN > 3 * ((IN_FRONT + COPYBREAK_MAX) as usize + 64));

/// What a frame under way is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Copied: there is nothing to free.
    Copied,
    /// A copied frame of XDP, of which the stack does not know.
    XdpCopied,
    /// A frame of the stack.
    Skb,
    /// A frame of XDP, mapped by this queue.
    Xdp,
    /// A frame of XDP in a page of the receive queue, which stays mapped.
    XdpPage,
}

/// A frame under way.
#[derive(Clone, Copy)]
struct Sent {
    frame: Handle,
    /// As the stack counts them.
    bytes: u32,
    /// Bytes of [`Copies`].
    held: u32,
    pieces: u8,
    /// The first of its pieces that is mapped.
    first_mapped: u8,
    kind: Kind,
}

const NOTHING: Sent = Sent {
    frame: ptr::null_mut(),
    bytes: 0,
    held: 0,
    pieces: 0,
    first_mapped: 0,
    kind: Kind::Copied,
};

/// Memory for copies of frames that are too large for a slot. The device always reaches it, and it
/// is contiguous for the device.
struct Copies {
    memory: Dma,
    fifo: Fifo,
}

impl Copies {
    /// For a ring of `entries` entries. None: there is no memory, and frames are mapped.
    fn new(hal: &KernelHal, entries: usize) -> Option<Self> {
        let (mut bytes, least) = if hal.pci().is_translated() {
            (COPIES, COPIES_MIN)
        } else {
            // The kernel rounds up to a power of two anyway.
            let all = entries.saturating_mul(COPYBREAK as usize).next_power_of_two();
            (all.clamp(COPIES_MIN_FLAT, COPIES), COPIES_MIN_FLAT)
        };
        while bytes >= least {
            if let Ok(memory) = hal.alloc(bytes) {
                if memory.page_shift() == 0 {
                    return Some(Copies { memory, fifo: Fifo::new(bytes as u32) });
                }
            }
            bytes /= 2;
        }
        None
    }
}

/// The transmit half.
pub struct TxQueue {
    ring: Tx<KernelHal>,
    shim: Handle,
    slots: Dma,
    copies: Option<Copies>,
    /// An IOMMU translates: frames wait for room in [`Copies`] rather than be mapped.
    is_translated: bool,
    /// Frames of at most so many bytes are copied.
    copybreak: u32,
    /// The frames under way, by their number.
    frames: KVec<Sent>,
    oldest: u32,
    newest: u32,
    /// The mapped pieces under way, by the position in the ring.
    maps: KVec<ffi::Piece>,
    submitted: u32,
    freed: u32,
    /// Pieces that have come back of a frame that has not come back as a whole.
    returned: u32,
    /// The position whose return interrupts.
    armed: Option<u32>,
    /// The device broke the protocol: nothing is sent any more.
    fault: Option<Error>,
}

// SAFETY: it belongs to the holder of a lock, and its handles may be used in any thread.
unsafe impl Send for TxQueue {}

impl TxQueue {
    /// A queue with nothing under way, which copies frames of at most `copybreak` bytes. The caller
    /// may sleep.
    pub fn new(
        ring: Tx<KernelHal>,
        hal: &KernelHal,
        copybreak: u32,
        shim: Handle,
    ) -> Result<Self, Error> {
        let entries = ring.space() as usize;
        Ok(TxQueue {
            ring,
            shim,
            slots: hal.alloc(entries * SLOT)?,
            copies: Copies::new(hal, entries),
            is_translated: hal.pci().is_translated(),
            copybreak,
            frames: KVec::from_fn::<Error>(entries, |_| Ok(NOTHING))?,
            oldest: 0,
            newest: 0,
            maps: KVec::from_fn::<Error>(entries, |_| Ok(ffi::Piece::default()))?,
            submitted: 0,
            freed: 0,
            returned: 0,
            armed: None,
            fault: None,
        })
    }

    /// Frames or pieces are under way.
    pub fn is_busy(&self) -> bool {
        self.oldest != self.newest
    }

    /// From now on frames of at most so many bytes are copied.
    pub fn set_copybreak(&mut self, bytes: u32) {
        self.copybreak = bytes;
    }

    /// How the device broke the protocol, if it did.
    pub fn fault(&self) -> Option<Error> {
        self.fault
    }

    /// Sends a frame of the stack. False: there is no room, and the stack keeps the frame.
    pub fn xmit(&mut self, frame: &mut ffi::TxFrame, stats: &TxStats) -> bool {
        let is_filling = self.copies.as_ref().is_some_and(|copies| copies.fifo.is_filling());
        if self.ring.in_flight() >= RECLAIM_FROM || is_filling {
            self.reclaim(stats, 0);
        }
        if self.fault.is_some() {
            self.drop_frame(frame, stats);
            return true;
        }
        if !self.has_room(1) {
            self.stop(stats);
            return false;
        }
        // Not before: a frame that the stack keeps comes again.
        // SAFETY: the frame is the stack's, which has given it to this queue.
        unsafe { ffi::shim_tx_timestamp(frame.skb) };
        if self.submit_copied(frame) {
            self.sent(frame, stats);
            stats.copied.add(1);
            // SAFETY: nothing refers to the frame any more.
            unsafe { ffi::shim_tx_free(frame.skb, 0) };
            return true;
        }
        if usize::from(frame.frags) + 2 > CHAIN_MAX {
            // SAFETY: the frame is the stack's, which has given it to this queue.
            if unsafe { ffi::shim_tx_linearize(frame.skb, frame) } != 0 {
                self.drop_last(frame, stats);
                return true;
            }
        }
        let header = header_of(frame).bytes();
        let mut pieces = [Piece::default(); CHAIN_MAX];
        let mut maps = [ffi::Piece::default(); ffi::PIECES_MAX];
        let linear = frame.linear as usize;
        // SAFETY: the stack's linear part has that many bytes, and nobody else changes them now.
        let data = unsafe { core::slice::from_raw_parts(frame.data, linear) };

        // With frags behind it, a short linear part of headers needs no map of its own.
        let copied = linear <= COPY_MAX && frame.frags > 0;
        let in_front = !copied && usize::from(frame.headroom) >= HEADER_BYTES;
        let mut first = 1;
        if in_front {
            first = 0;
            // SAFETY: the frame has this headroom, and it is this frame's alone.
            unsafe {
                let place = frame.data.cast_mut().sub(HEADER_BYTES);
                ptr::copy_nonoverlapping(header.as_ptr(), place, HEADER_BYTES);
            }
        } else {
            self.write_slot(&header, if copied { data } else { &[] });
            let behind = if copied { frame.linear } else { 0 };
            pieces[0] = Piece { addr: self.slot_address(), len: HEADER_BYTES as u32 + behind };
        }
        let headroom = if in_front { HEADER_BYTES as u32 } else { 0 };
        // SAFETY: the frame is as above, and there is room for all of its pieces.
        let mapped =
            unsafe { ffi::shim_tx_map(self.shim, frame.skb, !copied, headroom, maps.as_mut_ptr()) };
        let count = match usize::try_from(mapped) {
            Ok(count) if first + count <= CHAIN_MAX => count,
            mapped => {
                self.unmap(&maps[..mapped.unwrap_or(0)]);
                self.drop_last(frame, stats);
                return true;
            }
        };
        for (piece, map) in pieces[first..].iter_mut().zip(&maps[..count]) {
            *piece = Piece { addr: map.address, len: map.bytes };
        }
        let total = first + count;
        if !matches!(self.ring.submit(&pieces[..total]), Ok(true)) {
            // A frame of a strange shape: the stack does not make such.
            self.unmap(&maps[..count]);
            self.drop_last(frame, stats);
            return true;
        }
        self.note(frame.skb, frame.bytes, total, first, &maps[..count], Kind::Skb);
        self.sent(frame, stats);
        stats.mapped.add(1);
        true
    }

    /// Submits a copy of a frame of the stack, if it is small. False: nothing was submitted.
    fn submit_copied(&mut self, frame: &ffi::TxFrame) -> bool {
        if frame.bytes > self.copybreak {
            return false;
        }
        let header = header_of(frame).bytes();
        if frame.frags == 0 && frame.linear as usize <= COPY_MAX {
            return self.submit_short(frame, &header);
        }
        self.submit_copy(&header, frame.bytes, Kind::Copied, |to| {
            // SAFETY: the frame is the stack's, which has given it to this queue, and `to` has room
            // for all of its bytes.
            unsafe { ffi::shim_tx_copy(frame.skb, to, frame.bytes) == 0 }
        })
    }

    /// Submits a copy of a frame of the stack that fits into a slot. False: nothing was submitted.
    fn submit_short(&mut self, frame: &ffi::TxFrame, header: &[u8; HEADER_BYTES]) -> bool {
        // SAFETY: the stack's linear part has that many bytes, and nobody else changes them now.
        let data = unsafe { core::slice::from_raw_parts(frame.data, frame.linear as usize) };
        self.write_slot(header, data);
        let len = HEADER_BYTES as u32 + frame.linear;
        let piece = Piece { addr: self.slot_address(), len };
        if !matches!(self.ring.submit(&[piece]), Ok(true)) {
            return false;
        }
        self.note(ptr::null_mut(), frame.bytes, 1, 1, &[], Kind::Copied);
        true
    }

    /// Submits a copy of a frame of `bytes` bytes, which `fill` writes. `fill` may fail. False:
    /// nothing was submitted.
    fn submit_copy(
        &mut self,
        header: &[u8; HEADER_BYTES],
        bytes: u32,
        kind: Kind,
        fill: impl FnOnce(*mut u8) -> bool,
    ) -> bool {
        let Some(Copies { memory, fifo }) = &mut self.copies else { return false };
        let needed = (bytes <= COPYBREAK_MAX).then_some(IN_FRONT + bytes);
        let Some(place) = needed.and_then(|needed| fifo.find(needed)) else { return false };
        let at = place.offset as usize;
        let Some(words) = memory.words().get(at / 8..) else { return false };
        let Some(rest) = write_header(words, header) else { return false };
        // Words may be changed behind a shared reference, and only this queue does that here.
        let to = rest.as_ptr().cast::<u8>().cast_mut();
        if !fill(to) {
            return false;
        }
        let len = HEADER_BYTES as u32 + bytes;
        let piece = Piece { addr: memory.address(at + HEADER_AT), len };
        if !matches!(self.ring.submit(&[piece]), Ok(true)) {
            return false;
        }
        fifo.take(place);
        let counted = if kind == Kind::Copied { bytes } else { 0 };
        self.note_held(ptr::null_mut(), counted, place.held, (1, 1), kind);
        true
    }

    /// Counts a frame that was submitted, and wakes the device or stops the stack if need be.
    fn sent(&mut self, frame: &ffi::TxFrame, stats: &TxStats) {
        stats.frames.add(1);
        stats.bytes.add(u64::from(frame.bytes));
        // SAFETY: the handle is this queue's.
        let flags = unsafe { ffi::shim_tx_sent(self.shim, frame.bytes, frame.more) };
        let full = !self.has_room(1);
        if flags & ffi::TX_POST != 0 || full {
            self.post(stats);
        }
        let much = self.ring.in_flight() >= ARM_FROM && self.armed.is_none();
        if full {
            self.stop(stats);
        } else if flags & ffi::TX_STOPPED != 0 || much {
            self.arm_half(stats);
        }
    }

    /// Sends a frame of XDP from elsewhere, without making it visible. False: there is no room, or
    /// the frame is in several pieces, and the caller keeps it.
    pub fn send_xdp(&mut self, frame: Handle, stats: &TxStats) -> bool {
        if self.is_translated && self.copies.is_some() {
            return self.send_xdp_copy(frame, stats);
        }
        let mut piece = ffi::Piece::default();
        // SAFETY: the frame is the caller's until it is taken.
        if unsafe { ffi::shim_xdp_map(self.shim, frame, &raw mut piece) } != 0 {
            return false;
        }
        let is_sent = self.submit_xdp(frame, piece, Kind::Xdp, stats);
        if is_sent {
            stats.mapped.add(1);
        } else {
            self.unmap(&[piece]);
        }
        is_sent
    }

    /// The same by way of [`Copies`].
    fn send_xdp_copy(&mut self, frame: Handle, stats: &TxStats) -> bool {
        if self.fault.is_some() || !self.has_room(1) {
            return false;
        }
        // SAFETY: the frame is the caller's until it is taken.
        let bytes = unsafe { ffi::shim_xdp_bytes(frame) };
        let is_sent = bytes != 0
            && self.submit_copy(&[0; HEADER_BYTES], bytes, Kind::XdpCopied, |to| {
                // SAFETY: the frame is in one piece, and `to` has room for its bytes.
                unsafe { ffi::shim_xdp_copy(frame, to) };
                true
            });
        if is_sent {
            stats.copied.add(1);
            stats.xdp.add(1);
            stats.xdp_bytes.add(u64::from(bytes));
            // Its page belongs to another pool, whose poll may run now.
            // SAFETY: nothing refers to the frame any more.
            unsafe { ffi::shim_xdp_free(frame, 0) };
        }
        is_sent
    }

    /// Sends a frame of XDP in a page of the receive queue, which stays mapped, without making it
    /// visible. False: there is no room, or the piece is invalid, and the caller keeps the frame.
    pub fn send_xdp_page(&mut self, frame: Handle, piece: ffi::Piece, stats: &TxStats) -> bool {
        self.submit_xdp(frame, piece, Kind::XdpPage, stats)
    }

    fn submit_xdp(
        &mut self,
        frame: Handle,
        piece: ffi::Piece,
        kind: Kind,
        stats: &TxStats,
    ) -> bool {
        if self.fault.is_some() || self.ring.space() < ROOM {
            return false;
        }
        self.write_slot(&[0; HEADER_BYTES], &[]);
        let pieces = [
            Piece { addr: self.slot_address(), len: HEADER_BYTES as u32 },
            Piece { addr: piece.address, len: piece.bytes },
        ];
        if !matches!(self.ring.submit(&pieces), Ok(true)) {
            return false;
        }
        self.note(frame, 0, 2, 1, &[piece], kind);
        stats.xdp.add(1);
        stats.xdp_bytes.add(u64::from(piece.bytes));
        true
    }

    /// Makes what was sent visible to the device.
    pub fn post(&mut self, stats: &TxStats) {
        stats.posts.add(1);
        if self.ring.post() {
            stats.kicks.add(1);
        }
    }

    /// Frees what has come back, and lets the stack send again. `budget` is that of a NAPI poll, 0
    /// elsewhere.
    pub fn reclaim(&mut self, stats: &TxStats, budget: c_int) {
        let count = match self.ring.reclaim() {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) => {
                self.fault = Some(error);
                return;
            }
        };
        self.returned = self.returned.wrapping_add(count);
        let (mut frames, mut bytes) = (0u32, 0u32);
        while self.oldest != self.newest {
            let Some(sent) = self.frames.get(self.frame_index(self.oldest)).copied() else { break };
            if u32::from(sent.pieces) > self.returned {
                break;
            }
            self.returned -= u32::from(sent.pieces);
            self.free(&sent, budget);
            if let Some(copies) = &mut self.copies {
                copies.fifo.give_back(sent.held);
            }
            self.freed = self.freed.wrapping_add(u32::from(sent.pieces));
            self.oldest = self.oldest.wrapping_add(1);
            if matches!(sent.kind, Kind::Copied | Kind::Skb) {
                frames += 1;
                bytes = bytes.wrapping_add(sent.bytes);
            }
        }
        if self.armed.is_some_and(|at| self.freed.wrapping_sub(at) as i32 > 0) {
            self.armed = None;
        }
        // SAFETY: the handle is this queue's.
        let (waits, is_stopped) = unsafe {
            let waits = ffi::shim_tx_completed(self.shim, frames, bytes);
            (waits, waits && ffi::shim_tx_is_stopped(self.shim))
        };
        // A small ring never has so much room.
        let has_room = self.has_room(2) || !self.is_busy();
        if is_stopped && has_room {
            stats.wakes.add(1);
            // SAFETY: as above.
            unsafe { ffi::shim_tx_wake(self.shim) };
        } else if waits && self.armed.is_none() && self.is_busy() {
            // The stack waits for more of them. If they have come meanwhile, the timer looks.
            let _ = self.arm(stats);
        }
    }

    /// Frees all frames under way, whose memory the device does not access any more.
    pub fn release(mut self) {
        while self.oldest != self.newest {
            if let Some(sent) = self.frames.get(self.frame_index(self.oldest)).copied() {
                self.free(&sent, 0);
                self.freed = self.freed.wrapping_add(u32::from(sent.pieces));
            }
            self.oldest = self.oldest.wrapping_add(1);
        }
    }

    /// Stops the stack until there is room.
    fn stop(&mut self, stats: &TxStats) {
        stats.stops.add(1);
        // SAFETY: the handle is this queue's.
        unsafe { ffi::shim_tx_stop(self.shim) };
        self.arm_half(stats);
    }

    /// Asks for an interrupt when half of what is under way has come back.
    fn arm_half(&mut self, stats: &TxStats) {
        if self.arm(stats) == Armed::Missed {
            self.armed = None;
            self.reclaim(stats, 0);
        }
    }

    fn arm(&mut self, stats: &TxStats) -> Armed {
        stats.arms.add(1);
        let after = self.ring.in_flight() / 2;
        // The ring counts what it has reclaimed.
        let reclaimed = self.submitted.wrapping_sub(self.ring.in_flight());
        self.armed = Some(reclaimed.wrapping_add(after));
        self.ring.arm(after)
    }

    /// Notes a frame that was submitted.
    fn note(
        &mut self,
        frame: Handle,
        bytes: u32,
        pieces: usize,
        first: usize,
        maps: &[ffi::Piece],
        kind: Kind,
    ) {
        for (at, map) in maps.iter().enumerate() {
            let index = self.piece_index(self.submitted.wrapping_add((first + at) as u32));
            if let Some(place) = self.maps.get_mut(index) {
                *place = *map;
            }
        }
        // Both are at most CHAIN_MAX.
        self.note_held(frame, bytes, 0, (pieces as u8, first as u8), kind);
    }

    /// Notes a frame whose maps are noted, with the bytes of [`Copies`] that it holds; of its
    /// pieces, their number and the first that is mapped.
    fn note_held(&mut self, frame: Handle, bytes: u32, held: u32, pieces: (u8, u8), kind: Kind) {
        let index = self.frame_index(self.newest);
        let (pieces, first_mapped) = pieces;
        if let Some(place) = self.frames.get_mut(index) {
            *place = Sent { frame, bytes, held, pieces, first_mapped, kind };
        }
        self.newest = self.newest.wrapping_add(1);
        self.submitted = self.submitted.wrapping_add(u32::from(pieces));
    }

    /// Frees a frame, the oldest under way.
    fn free(&self, sent: &Sent, budget: c_int) {
        if matches!(sent.kind, Kind::Skb | Kind::Xdp) {
            let first = self.freed.wrapping_add(u32::from(sent.first_mapped));
            let count = u32::from(sent.pieces - sent.first_mapped);
            let index = self.piece_index(first);
            let until_end = (self.maps.len() - index).min(count as usize);
            self.unmap(self.maps.get(index..index + until_end).unwrap_or_default());
            self.unmap(self.maps.get(..count as usize - until_end).unwrap_or_default());
        }
        match sent.kind {
            Kind::Copied | Kind::XdpCopied => {}
            // SAFETY: the frame was this queue's, and nothing refers to it any more.
            Kind::Skb => unsafe { ffi::shim_tx_free(sent.frame, budget) },
            // Its page belongs to the pool of another queue, whose poll may run now.
            // SAFETY: as above.
            Kind::Xdp => unsafe { ffi::shim_xdp_free(sent.frame, 0) },
            // SAFETY: as above.
            Kind::XdpPage => unsafe { ffi::shim_xdp_free(sent.frame, budget) },
        }
    }

    fn unmap(&self, maps: &[ffi::Piece]) {
        if !maps.is_empty() {
            // SAFETY: they were mapped by this queue, and the device does not have them.
            unsafe { ffi::shim_tx_unmap(self.shim, maps.as_ptr(), maps.len() as u32) };
        }
    }

    /// Drops a frame, which may be the last of a batch: those before it wait to be posted.
    #[cold]
    fn drop_last(&mut self, frame: &ffi::TxFrame, stats: &TxStats) {
        self.drop_frame(frame, stats);
        if !frame.more {
            self.post(stats);
        }
    }

    fn drop_frame(&self, frame: &ffi::TxFrame, stats: &TxStats) {
        stats.dropped.add(1);
        // SAFETY: the stack has given the frame to this queue, and the device does not have it.
        unsafe { ffi::shim_tx_drop(frame.skb) };
    }

    /// The index of the frame of this number. There are as many places as entries, a power of two.
    fn frame_index(&self, number: u32) -> usize {
        number as usize & (self.frames.len() - 1)
    }

    fn piece_index(&self, position: u32) -> usize {
        position as usize & (self.maps.len() - 1)
    }

    /// Whether there is room for so many of the largest frames.
    fn has_room(&self, frames: u32) -> bool {
        self.ring.space() >= frames * ROOM
            && (!self.is_translated || self.has_room_for_copies(frames))
    }

    /// Whether there is room for copies of so many of the largest frames that are copied.
    fn has_room_for_copies(&self, frames: u32) -> bool {
        let bytes = frames * (IN_FRONT + self.copybreak);
        self.copies.as_ref().is_none_or(|copies| copies.fifo.find(bytes).is_some())
    }

    /// The device's address of the header in the slot of the next piece.
    fn slot_address(&self) -> u64 {
        self.slots.address(self.piece_index(self.submitted) * SLOT + HEADER_AT)
    }

    /// Writes header and linear part into the slot of the next piece.
    fn write_slot(&self, header: &[u8; HEADER_BYTES], linear: &[u8]) {
        let words = SLOT / 8;
        let at = self.piece_index(self.submitted) * words;
        let slot = self.slots.words().get(at..at + words).unwrap_or_default();
        let Some(rest) = write_header(slot, header) else { return };
        let used = linear.len().div_ceil(8);
        copy::store(rest.get(..used).unwrap_or_default(), linear);
    }
}

/// Writes a header, which begins [`HEADER_AT`] bytes into the words, and returns those behind it.
fn write_header<'a>(words: &'a [Word], header: &[u8; HEADER_BYTES]) -> Option<&'a [Word]> {
    let [first, second, rest @ ..] = words else { return None };
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *header;
    first.store(u64::from_le_bytes([0, 0, 0, 0, a, b, c, d]), Ordering::Relaxed);
    second.store(u64::from_le_bytes([e, f, g, h, i, j, k, l]), Ordering::Relaxed);
    Some(rest)
}

/// The header before a frame of the stack.
fn header_of(frame: &ffi::TxFrame) -> Header {
    let kind = match frame.gso {
        ffi::GSO_TCP4 => Some(Gso::Tcp4),
        ffi::GSO_TCP6 => Some(Gso::Tcp6),
        ffi::GSO_UDP => Some(Gso::Udp),
        _ => None,
    };
    Header {
        csum: frame.partial.then_some((frame.csum_start, frame.csum_offset)),
        verified: false,
        segments: kind.map(|kind| Segments { kind, size: frame.gso_size, cwr: frame.cwr }),
        length: frame.headers,
        hash: None,
    }
}
