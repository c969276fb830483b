// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The receive half of a queue pair. It belongs to the NAPI poll.
//!
//! Frames come into pages of a pool, which stay mapped. The frame's headers are copied out of
//! memory that the device can still write, and checked there. The rest of the frame goes up in its
//! pages. A short frame is copied as a whole, and its page goes to the device again.
#![allow(
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    reason = "lengths of a frame, and indexes that are checked where they are made"
)]
#![allow(unsafe_code, reason = "memory that the device writes")]

use core::ptr::{self, NonNull};

use vbus_driver::Error;
use vbus_driver::shm::signal::Armed;
use vbus_driver::venet::{
    CHAIN_MAX, Gso, HASH_HEADER_BYTES, Header, RxRing, hash_kind, header_length,
};
use vbus_shm::{copy, raw};

use super::ffi::{self, Handle};
use super::pair::Pair;
use super::stats::RxStats;
use crate::hal::KernelHal;
use crate::kernel::{KVec, dma};

/// Bytes of a page.
const PAGE: u32 = dma::PAGE as u32;
/// A frame of up to so many bytes is copied as a whole.
const COPY_MAX: usize = 256;
/// So many bytes of a frame's page are copied before they are looked at: the header, and the
/// longest headers of a frame.
const LOOK: usize = 160;
/// The place of a frame's checksum, and the headers of a frame that is to be cut, end within so
/// many bytes, or the frame is invalid. It may be behind what is looked at first: IPv6 may have
/// long options.
const CHECKSUM_END: usize = 512;
/// The bytes of the longest header of TCP.
const TCP_MOST: usize = 60;
/// So many bytes of them are enough for the header before a frame: whole words.
const HEADER: usize = HASH_HEADER_BYTES.next_multiple_of(8);
/// Where the device begins in a page when programs of XDP run: the kernel lets them grow a frame to
/// its front.
const XDP_HEADROOM: u32 = 256;
/// What the kernel keeps at the end of a page in which it builds a frame. The shim lets no program
/// run where it is more.
const XDP_TAILROOM: u32 = ffi::XDP_TAILROOM;
/// Bytes that the device writes into a page when programs of XDP run.
pub const XDP_BUFFER: u32 = PAGE - XDP_HEADROOM - XDP_TAILROOM;
/// Pages are given to the device by so many at a time.
const BATCH: u32 = 32;
/// The most fragments of a frame of the stack, in every kernel.
const FRAGS_MAX: usize = 17;
/// The device may announce frames so often that are not there.
const VAIN_MAX: u32 = 1000;

const NO_PAGE: ffi::Page = ffi::Page { memory: ptr::null_mut(), address: 0 };
const NO_PIECE: ffi::RxPiece = ffi::RxPiece { memory: ptr::null_mut(), offset: 0, bytes: 0 };

/// What became of a frame that a program has seen.
enum Verdict {
    /// Its page is the driver's again.
    Dropped,
    /// Its page belongs to somebody else.
    Gone,
}

/// Why the stack does not get a frame.
enum Refused {
    /// The frame breaks a rule.
    Invalid,
    NoMemory,
}

/// How a poll ended.
#[derive(Default)]
pub struct Polled {
    /// Frames that came.
    pub frames: u32,
    /// Frames were redirected.
    pub redirected: bool,
    /// Frames were put into the transmit ring, and not posted.
    pub sent: bool,
}

/// The receive half.
pub struct RxQueue {
    ring: RxRing<KernelHal>,
    shim: Handle,
    group: Handle,
    index: u8,
    /// The offloads that frames may leave to the driver (`F_RX_`).
    offloads: u64,
    with_hash: bool,
    xdp: bool,
    /// The pages that the device has, by their number.
    pages: KVec<ffi::Page>,
    oldest: u32,
    newest: u32,
    fault: Option<Error>,
    /// How often in a row the device has announced frames that were not there.
    vain: u32,
}

// SAFETY: it belongs to one thread at a time, and its handles may be used in any.
unsafe impl Send for RxQueue {}

/// How a queue receives.
pub struct Mode {
    /// The offloads that were accepted (`F_RX_`).
    pub offloads: u64,
    /// Whether the header before a frame has its hash.
    pub with_hash: bool,
    /// Whether programs of XDP run.
    pub xdp: bool,
}

impl Mode {
    /// Bytes of each buffer.
    pub fn buffer_bytes(&self) -> u32 {
        if self.xdp { XDP_BUFFER } else { PAGE }
    }
}

impl RxQueue {
    /// A queue whose device has no pages yet. The caller may sleep.
    pub fn new(
        ring: RxRing<KernelHal>,
        mode: &Mode,
        index: u16,
        (shim, group): (Handle, Handle),
    ) -> Result<Self, Error> {
        let entries = ring.space() as usize;
        Ok(RxQueue {
            ring,
            shim,
            group,
            index: u8::try_from(index).unwrap_or_default(),
            offloads: mode.offloads,
            with_hash: mode.with_hash,
            xdp: mode.xdp,
            pages: KVec::from_fn::<Error>(entries, |_| Ok(NO_PAGE))?,
            oldest: 0,
            newest: 0,
            fault: None,
            vain: 0,
        })
    }

    /// How the device broke the protocol, if it did.
    pub fn fault(&self) -> Option<Error> {
        self.fault
    }

    /// Gives the device as many pages as it has room for. In NAPI, or while it is disabled. False:
    /// the device has none at all, because there is no memory.
    pub fn fill(&mut self, stats: &RxStats) -> bool {
        let mut pages = [NO_PAGE; BATCH as usize];
        loop {
            let room = self.ring.space().min(BATCH);
            if room == 0 {
                break;
            }
            // SAFETY: the handle is this queue's, and there is room for so many.
            let count = unsafe { ffi::shim_rx_pages(self.shim, room, pages.as_mut_ptr()) };
            let mut given = true;
            for page in pages.iter().take(count as usize) {
                given &= self.give(*page);
            }
            if count < room || !given {
                break;
            }
        }
        self.post(stats);
        self.ring.in_flight() != 0
    }

    /// Lets the device see the pages that it was given.
    fn post(&mut self, stats: &RxStats) {
        if self.ring.post() {
            stats.kicks.add(1);
        }
    }

    /// Receives up to `budget` frames of `pair`, whose receive half this is, and gives them to the
    /// stack.
    pub fn poll(&mut self, budget: u32, pair: &Pair) -> Polled {
        let mut polled = Polled::default();
        let stats = &pair.rx_stats;
        stats.polls.add(1);
        let mut bytes = 0;
        while polled.frames < budget && self.fault.is_none() {
            let pieces = match self.ring.receive() {
                Ok(Some(pieces)) => pieces,
                Ok(None) => break,
                Err(error) => {
                    self.fault = Some(error);
                    break;
                }
            };
            polled.frames += 1;
            bytes += pieces.iter().map(|bytes| u64::from(*bytes)).sum::<u64>();
            // Most frames have one piece, and then there is not much to fill with zeros.
            if let [one] = *pieces {
                self.frame::<1>(&[one], pair, &mut polled);
            } else {
                let mut lengths = [0; CHAIN_MAX];
                let count = pieces.len();
                for (to, from) in lengths.iter_mut().zip(pieces) {
                    *to = *from;
                }
                self.frame::<CHAIN_MAX>(&lengths[..count], pair, &mut polled);
            }
        }
        if polled.frames != 0 {
            self.vain = 0;
            let headers = self.ring.header_bytes() as u64 * u64::from(polled.frames);
            stats.frames.add(u64::from(polled.frames));
            stats.bytes.add(bytes.saturating_sub(headers));
        }
        // After a fault the ring may count buffers as free whose pages are still in `pages`.
        if self.fault.is_some() {
            return polled;
        }
        if self.ring.space() >= BATCH || polled.frames < budget && self.ring.space() != 0 {
            if !self.fill(stats) {
                // Without pages no interrupt comes.
                // SAFETY: the handle is this group's.
                unsafe { ffi::shim_group_later(self.group, 20) };
            }
        } else if polled.frames != 0 {
            // The device may wait for pages that it was given again.
            self.post(stats);
        }
        polled
    }

    /// Asks for an interrupt by the next frame. True: one has come already.
    pub fn arm(&mut self, stats: &RxStats) -> bool {
        if self.fault.is_some() {
            return false;
        }
        stats.arms.add(1);
        if self.ring.arm(0) == Armed::Waiting {
            self.vain = 0;
            return false;
        }
        self.vain += 1;
        if self.vain > VAIN_MAX {
            self.fault = Some(Error::Corrupt("frames that are announced and not there"));
        }
        true
    }

    /// Frees the pages that the device has had, and does not access any more.
    pub fn release(mut self) {
        while self.oldest != self.newest {
            let page = self.take_page();
            self.put(page, false);
        }
    }

    /// Receives the frame in the oldest pages, `N` at most.
    fn frame<const N: usize>(&mut self, lengths: &[u32], pair: &Pair, polled: &mut Polled) {
        let stats = &pair.rx_stats;
        let begin = if self.xdp { XDP_HEADROOM } else { 0 };
        let mut pieces = [NO_PIECE; N];
        let mut pages = [NO_PAGE; N];
        for ((piece, page), bytes) in pieces.iter_mut().zip(&mut pages).zip(lengths) {
            *page = self.take_page();
            *piece = ffi::RxPiece { memory: page.memory, offset: begin, bytes: *bytes };
        }
        let pages = pages.get(..lengths.len()).unwrap_or_default();
        let pieces = pieces.get_mut(..lengths.len()).unwrap_or_default();
        // SAFETY: the pages are this queue's.
        unsafe { ffi::shim_rx_sync(self.shim, pieces.as_ptr(), pieces.len() as u32) };

        let header_bytes = self.ring.header_bytes();
        let total = lengths.iter().map(|bytes| *bytes as usize).sum::<usize>() - header_bytes;
        let Some(first) = pieces.first_mut() else { return };
        // What is looked at is copied before, since the device may write the page again.
        let mut look = [0u8; LOOK];
        let seen = LOOK.min(first.bytes as usize);
        load(first, &mut look[..HEADER]);
        let header = look.first_chunk::<HASH_HEADER_BYTES>().ok_or(());
        let header = header.and_then(|header| {
            Header::parse(header, self.with_hash, total, self.offloads).map_err(|_| ())
        });
        let (Ok(header), true) = (header, first.bytes as usize >= header_bytes + 14) else {
            stats.invalid.add(1);
            self.give_again(pages);
            return;
        };
        first.offset += header_bytes as u32;
        first.bytes -= header_bytes as u32;

        if self.xdp {
            self.with_program(&header, (pieces, pages), pair, polled);
            return;
        }
        if total <= COPY_MAX && header.segments.is_none() && pages.len() == 1 {
            let delivered = self.copied(&header, first, stats);
            stats.alloc_failed.add(u64::from(!delivered));
            self.give_again(pages);
            return;
        }
        let rest = ffi::RxPiece { offset: begin + HEADER as u32, ..*first };
        load(&rest, &mut look[HEADER..seen.next_multiple_of(8).max(HEADER)]);
        let seen = look.get(header_bytes..seen).unwrap_or_default();
        let built = if is_long(&header, seen.len()) {
            self.build_long(header_bytes, &header, *first, pages.len())
        } else {
            self.build(seen, &header, *first, pages.len())
        };
        let (skb, headers) = match built {
            Ok(built) => built,
            Err(refused) => {
                match refused {
                    Refused::Invalid => stats.invalid.add(1),
                    Refused::NoMemory => stats.alloc_failed.add(1),
                }
                self.give_again(pages);
                return;
            }
        };
        let mut rest = &mut *pieces;
        if let Some(first) = rest.first_mut() {
            first.offset += headers as u32;
            first.bytes -= headers as u32;
            if first.bytes == 0 {
                // All of it was copied.
                self.give_again(pages.get(..1).unwrap_or_default());
                rest = rest.get_mut(1..).unwrap_or_default();
            }
        }
        self.deliver(skb, &header, rest, stats);
    }

    /// Makes a frame of the stack with the headers of a frame, and returns it with their bytes.
    /// `seen` is a copy of the frame's first bytes, `first` its first piece of `pieces`.
    #[inline]
    fn build(
        &self,
        seen: &[u8],
        header: &Header,
        first: ffi::RxPiece,
        pieces: usize,
    ) -> Result<(Handle, usize), Refused> {
        let headers = header_length(seen, header).map(|length| match header.csum {
            // The place of the checksum has to be in the copy.
            Some((start, offset)) => length.max(usize::from(start) + usize::from(offset) + 2),
            None => length,
        });
        let most = CHECKSUM_END.min(first.bytes as usize);
        let headers = headers.filter(|length| (14..=most).contains(length));
        let headers = headers.ok_or(Refused::Invalid)?;
        if pieces - usize::from(headers == first.bytes as usize) > FRAGS_MAX {
            return Err(Refused::Invalid);
        }
        let copy = if headers <= seen.len() {
            seen.as_ptr()
        } else {
            // The place of the checksum is behind what was looked at.
            // SAFETY: the piece is in its page.
            unsafe { first.memory.add(first.offset as usize) }
        };
        // SAFETY: the bytes are those of `seen`, or of the first piece, which has as many.
        let skb = unsafe { ffi::shim_rx_skb(self.group, copy, headers as u32) };
        if skb.is_null() { Err(Refused::NoMemory) } else { Ok((skb, headers)) }
    }

    /// The same for a frame that is to be cut and whose headers may be longer than what is looked
    /// at first. `header_bytes` are before the first piece.
    #[cold]
    #[inline(never)]
    fn build_long(
        &self,
        header_bytes: usize,
        header: &Header,
        first: ffi::RxPiece,
        pieces: usize,
    ) -> Result<(Handle, usize), Refused> {
        let mut look = [0u8; HEADER + CHECKSUM_END];
        let whole = ffi::RxPiece { offset: first.offset - header_bytes as u32, ..first };
        let seen = look.len().min(header_bytes + first.bytes as usize);
        load(&whole, &mut look[..seen.next_multiple_of(8)]);
        let seen = look.get(header_bytes..seen).unwrap_or_default();
        self.build(seen, header, first, pieces)
    }

    /// Gives a short frame to the stack as a copy.
    fn copied(&self, header: &Header, piece: &ffi::RxPiece, stats: &RxStats) -> bool {
        // SAFETY: the piece is in its page, which is this queue's.
        let skb = unsafe {
            let data = piece.memory.add(piece.offset as usize);
            ffi::shim_rx_skb(self.group, data, piece.bytes)
        };
        if skb.is_null() {
            return false;
        }
        self.deliver(skb, header, &[], stats);
        true
    }

    fn deliver(&self, skb: Handle, header: &Header, pieces: &[ffi::RxPiece], stats: &RxStats) {
        let mut frame = ffi::RxFrame { index: self.index, ..ffi::RxFrame::default() };
        if let Some((start, offset)) = header.csum {
            (frame.partial, frame.csum_start, frame.csum_offset) = (true, start, offset);
        }
        frame.verified = header.verified;
        if let Some(segments) = header.segments {
            (frame.gso_size, frame.cwr) = (segments.size, segments.cwr);
            frame.gso = match segments.kind {
                Gso::Tcp4 => ffi::GSO_TCP4,
                Gso::Tcp6 => ffi::GSO_TCP6,
                Gso::Udp => ffi::GSO_UDP,
            };
        }
        if let Some(hash) = header.hash {
            let by_addresses = hash.kind & (hash_kind::IPV4 | hash_kind::IPV6) != 0;
            (frame.hash, frame.hashed) = (hash.value, if by_addresses { 1 } else { 2 });
        }
        // SAFETY: the frame and its pages are this queue's, and go to the stack.
        let valid = unsafe {
            let count = pieces.len() as u32;
            ffi::shim_rx_deliver(self.group, skb, &raw const frame, pieces.as_ptr(), count)
        };
        stats.invalid.add(u64::from(!valid));
    }

    /// Lets the program look at a frame.
    fn with_program(
        &mut self,
        header: &Header,
        (pieces, pages): (&[ffi::RxPiece], &[ffi::Page]),
        pair: &Pair,
        polled: &mut Polled,
    ) {
        let stats = &pair.rx_stats;
        let ([piece], [page]) = (pieces, pages) else {
            // The MTU is so small that frames have one piece.
            stats.invalid.add(1);
            self.give_again(pages);
            return;
        };
        // SAFETY: the piece is in its page, which is this queue's.
        let verdict =
            unsafe { ffi::shim_xdp_run(self.shim, piece.memory, piece.offset, piece.bytes) };
        let fate = match verdict {
            ffi::XDP_PASS => self.pass(header, stats),
            ffi::XDP_TX => self.back(pair, polled),
            // SAFETY: the program has just seen the frame.
            ffi::XDP_REDIRECT => match unsafe { ffi::shim_xdp_redirect(self.shim) } {
                0 => {
                    polled.redirected = true;
                    stats.xdp_redirected.add(1);
                    Verdict::Gone
                }
                _ => Verdict::Dropped,
            },
            _ => Verdict::Dropped,
        };
        if let Verdict::Dropped = fate {
            if verdict != ffi::XDP_PASS {
                stats.xdp_dropped.add(1);
            }
            // SAFETY: the page is this queue's.
            unsafe { ffi::shim_rx_sync_device(self.shim, page.memory) };
            self.give_again(&[*page]);
        }
    }

    /// Gives a frame to the stack that the program has passed, in its page.
    fn pass(&self, header: &Header, stats: &RxStats) -> Verdict {
        // SAFETY: the program has just seen the frame.
        let skb = unsafe { ffi::shim_rx_skb_in_place(self.shim) };
        if skb.is_null() {
            stats.alloc_failed.add(1);
            return Verdict::Dropped;
        }
        // The program may have changed the frame: only what does not depend on its bytes is left.
        let header = Header { csum: None, segments: None, verified: false, ..*header };
        self.deliver(skb, &header, &[], stats);
        Verdict::Gone
    }

    /// Puts the frame that the program has sent back into the transmit ring.
    fn back(&self, pair: &Pair, polled: &mut Polled) -> Verdict {
        let mut piece = ffi::Piece::default();
        // SAFETY: the program has just seen the frame.
        let frame = unsafe { ffi::shim_xdp_frame(self.shim, &raw mut piece) };
        if frame.is_null() {
            return Verdict::Dropped;
        }
        if pair.with_tx(|tx| tx.send_xdp_page(frame, piece, &pair.tx_stats)) == Some(true) {
            pair.rx_stats.xdp_tx.add(1);
            polled.sent = true;
        } else {
            pair.rx_stats.xdp_dropped.add(1);
            // SAFETY: the frame is this queue's. Its page goes back to the pool.
            unsafe { ffi::shim_xdp_free(frame, 1) };
        }
        Verdict::Gone
    }

    /// Gives a page to the device. False: there is no room, and the page is free.
    fn give(&mut self, page: ffi::Page) -> bool {
        let begin = if self.xdp { XDP_HEADROOM } else { 0 };
        let is_full = self.newest.wrapping_sub(self.oldest) as usize >= self.pages.len();
        // SAFETY: the page is this queue's, stays mapped, and is in `pages` until the device has
        // returned it or the connection is closed.
        if is_full || unsafe { self.ring.give(page.address + u64::from(begin)) }.is_err() {
            self.put(page, true);
            return false;
        }
        let index = self.index_of(self.newest);
        if let Some(place) = self.pages.get_mut(index) {
            *place = page;
        }
        self.newest = self.newest.wrapping_add(1);
        true
    }

    /// Gives pages to the device again whose bytes nobody needs.
    fn give_again(&mut self, pages: &[ffi::Page]) {
        for page in pages {
            self.give(*page);
        }
    }

    /// Takes the oldest page that the device has had.
    fn take_page(&mut self) -> ffi::Page {
        let page = self.pages.get(self.index_of(self.oldest)).copied().unwrap_or(NO_PAGE);
        self.oldest = self.oldest.wrapping_add(1);
        page
    }

    fn put(&self, page: ffi::Page, napi: bool) {
        if !page.memory.is_null() {
            // SAFETY: the page is this queue's, and the device does not have it.
            unsafe { ffi::shim_rx_page_put(self.shim, page.memory, napi) };
        }
    }

    /// The index of the page of this number. There are as many places as entries, a power of two.
    fn index_of(&self, number: u32) -> usize {
        number as usize & (self.pages.len() - 1)
    }
}

/// Whether the headers of a frame that is to be cut may end behind the first `seen` bytes of it.
fn is_long(header: &Header, seen: usize) -> bool {
    let end = header.csum.map_or(0, |(start, _)| usize::from(start) + TCP_MOST);
    header.segments.is_some() && end > seen
}

/// Copies the first bytes of a piece, whose place is a multiple of 8.
fn load(piece: &ffi::RxPiece, out: &mut [u8]) {
    let Some(memory) = NonNull::new(piece.memory) else { return };
    // SAFETY: the page is this queue's and stays; only the device writes it.
    let words = unsafe { raw::words(memory.add(piece.offset as usize), out.len()) };
    copy::load(words.unwrap_or_default(), out);
}
