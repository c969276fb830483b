//! A receive ring: frames go from wherever they come into the buffers that the driver posted.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vbus_core::memory::{DriverSlice, View};
use vbus_core::shm::abi::venet::{CHAIN_MAX, HEADER_BYTES};
use vbus_core::shm::ring::{DeviceEnd, Entry, NEXT};
use vbus_core::shm::signal::Armed;
use vbus_core::{ErrorCode, Interrupt, MemoryContext, TaskHandle, Window};

use super::counters::PairCounters;
use super::frame::{Body, ETH_BYTES, Header, Mac, PIECES_MAX, Packet};
use super::patience::Patience;
use super::pcap::Capture;

/// The least bytes of a receive buffer: what is written in one piece (header and Ethernet header)
/// fits it.
pub const BUFFER_MIN: u32 = 64;

/// What became of a frame for the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is in the driver's buffers (and will be posted), or was dropped and counted for want of
    /// them.
    Done,
    /// There are too few buffers; try again when the driver has posted some, but not after this
    /// moment.
    Wait(Instant),
    /// It would need more buffers than may be chained.
    TooLong,
}

/// What came of reading a frame straight into the driver's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadIn {
    /// One was read: it is in the driver's buffers, or was dropped.
    Frame,
    /// There may be one, but there are too few buffers.
    NoBuffers,
    /// There is none, or the driver broke the protocol.
    Empty,
    /// The read failed.
    Failed(Errno),
}

/// The receive ring of a queue pair. Several senders may deliver to it, one at a time.
pub struct RxQueue {
    ring: DeviceEnd<Window>,
    interrupt: Interrupt,
    memory: Arc<MemoryContext>,
    counters: Arc<PairCounters>,
    capture: Option<Arc<Capture>>,
    /// Buffers taken from the ring and not yet filled.
    stash: VecDeque<Entry>,
    /// Bytes of the largest buffer so far.
    largest: u32,
    /// Bytes of the last frame that found too few buffers.
    wanted: usize,
    /// Frames and bytes since the last post.
    unposted: (u64, u64),
    waiters: Vec<(u64, TaskHandle)>,
    fault: Option<ErrorCode>,
    patience: Patience,
}

impl RxQueue {
    pub fn new(
        ring: DeviceEnd<Window>,
        interrupt: Interrupt,
        memory: Arc<MemoryContext>,
        counters: Arc<PairCounters>,
        capture: Option<Arc<Capture>>,
        patience: Duration,
    ) -> RxQueue {
        RxQueue {
            ring,
            interrupt,
            memory,
            counters,
            capture,
            stash: VecDeque::new(),
            largest: BUFFER_MIN,
            wanted: 0,
            unposted: (0, 0),
            waiters: Vec::new(),
            fault: None,
            patience: Patience::new(patience),
        }
    }

    /// Delivers a frame that comes from another device's driver, or from nowhere: this driver's
    /// memory is looked at if that is possible at once. Features have been seen to. If it finds too
    /// few buffers it waits for them if it is `patient`, and is dropped if not. Call
    /// [`post`](Self::post) after a batch.
    pub fn deliver(&mut self, packet: &Packet<'_>, patient: bool) -> Delivery {
        let memory = self.memory.clone();
        self.deliver_in(&memory.view(), packet, patient)
    }

    /// Delivers a frame through a view of this driver's memory.
    pub fn deliver_in(&mut self, view: &View<'_>, packet: &Packet<'_>, patient: bool) -> Delivery {
        let len = HEADER_BYTES + packet.len();
        match self.gather(view, len) {
            Gathered::Buffers(count) => {
                self.patience.fed(count);
                if let Err(status) = self.fill(view, packet, count, len) {
                    self.fault = Some(status);
                    return Delivery::Done;
                }
                self.count(packet.len());
                if let Some(capture) = &self.capture {
                    capture.record(packet);
                }
                Delivery::Done
            }
            Gathered::TooFew => self.starve(patient),
            Gathered::TooSmall => Delivery::TooLong,
            Gathered::Fault => Delivery::Done,
        }
    }

    /// Lets `read` fill the driver's buffers with a frame and the header before it, of at most
    /// `longest` bytes together, without a copy. Its vector begins with the header and the Ethernet
    /// header, which come to us: a frame to an address that `accepts` refuses is dropped, and its
    /// buffers serve for the next.
    pub fn read_in(
        &mut self,
        view: &View<'_>,
        longest: usize,
        read: &mut dyn FnMut(&mut [IoSliceMut<'_>]) -> Result<usize, Errno>,
        accepts: impl Fn(Mac) -> bool,
    ) -> ReadIn {
        let count = match self.gather(view, longest) {
            Gathered::Buffers(count) => count,
            Gathered::TooSmall => CHAIN_MAX,
            // The driver has posted all that it ever will: what fits, fits.
            Gathered::TooFew if self.ring.held() == self.ring.layout().entries() => {
                self.stash.len().min(CHAIN_MAX)
            }
            Gathered::TooFew => return ReadIn::NoBuffers,
            Gathered::Fault => return ReadIn::Empty,
        };
        let mut head = [0; HEADER_BYTES + ETH_BYTES];
        let mut spill = [0; 1];
        let (mut room, mut slots) = (0, 2);
        let received = {
            let mut vector: [IoSliceMut<'_>; PIECES_MAX + 2] =
                std::array::from_fn(|_| IoSliceMut::new(&mut []));
            for (i, entry) in self.stash.iter().take(count).enumerate() {
                let Ok(slice) = view.slice(entry.addr, u64::from(entry.len), true) else {
                    return ReadIn::Empty;
                };
                // No more than the frame needs, so that its pieces are counted.
                let slice = slice.split_at(longest.saturating_sub(room)).0;
                room += slice.len();
                let rest = if i == 0 { slice.split_at(head.len()).1 } else { slice };
                for piece in rest.io_slices_mut() {
                    let Some(slot) = vector.get_mut(slots - 1).filter(|_| slots < PIECES_MAX + 2)
                    else {
                        return ReadIn::Empty;
                    };
                    *slot = piece;
                    slots += 1;
                }
            }
            vector[0] = IoSliceMut::new(&mut head);
            vector[slots - 1] = IoSliceMut::new(&mut spill);
            read(&mut vector[..slots])
        };
        let len = match received {
            Ok(len) => len,
            Err(error) => return ReadIn::Failed(error),
        };
        let (Some((front, eth)), true) =
            (head.split_first_chunk::<HEADER_BYTES>(), len >= head.len())
        else {
            return ReadIn::Empty;
        };
        let header = Header::parse(front);
        let mut packet = Packet { header, eth: [0; ETH_BYTES], body: Body::Bytes(&[]) };
        packet.eth.copy_from_slice(eth);
        if !accepts(packet.destination()) {
            return ReadIn::Frame;
        }
        if len > room {
            self.counters.rx.drops.too_long.one();
            return ReadIn::Frame;
        }
        self.return_read(view, &packet, len).map_or(ReadIn::Empty, |()| ReadIn::Frame)
    }

    /// Gives back the buffers of a frame of `len` bytes (with its header) that is in them but for
    /// its headers.
    fn return_read(
        &mut self,
        view: &View<'_>,
        packet: &Packet<'_>,
        len: usize,
    ) -> Result<(), ErrorCode> {
        let mut rooms = 0;
        let count = 1 + self
            .stash
            .iter()
            .take_while(|entry| {
                rooms += entry.len as usize;
                rooms < len
            })
            .count();
        let Some(first) = self.stash.front() else { return Err(ErrorCode::FAILED) };
        let mut head = [0; HEADER_BYTES + ETH_BYTES];
        head[..HEADER_BYTES]
            .copy_from_slice(&packet.header.bytes(u16::try_from(count).unwrap_or(u16::MAX)));
        head[HEADER_BYTES..].copy_from_slice(&packet.eth);
        view.slice(first.addr, head.len() as u64, true)?.copy_from(&head);
        if let Some(capture) = &self.capture {
            let mut parts = Vec::with_capacity(count);
            let mut left = len;
            for entry in self.stash.iter().take(count) {
                let filled = left.min(entry.len as usize);
                left -= filled;
                parts.push(view.slice(entry.addr, filled as u64, true)?);
            }
            parts[0] = parts[0].split_at(head.len()).1;
            capture.record(&Packet { body: Body::Driver(&parts), ..*packet });
        }
        let mut left = len;
        for i in 0..count {
            let Some(entry) = self.stash.pop_front() else { break };
            let filled = left.min(entry.len as usize);
            left -= filled;
            let flags = if i + 1 < count { NEXT } else { 0 };
            self.ring.give_back(Entry {
                len: u32::try_from(filled).unwrap_or(entry.len),
                flags,
                ..entry
            });
        }
        self.count(len - HEADER_BYTES);
        Ok(())
    }

    /// Whether a frame of `len` bytes finds buffers now. (Also true if it never will: then its
    /// delivery says so.)
    pub fn has_room(&mut self, view: &View<'_>, len: usize) -> bool {
        !matches!(self.gather(view, HEADER_BYTES + len), Gathered::TooFew)
    }

    fn count(&mut self, bytes: usize) {
        self.unposted.0 += 1;
        self.unposted.1 += bytes as u64;
    }

    /// Takes one more buffer from the ring into the stash. False if there is none, or the driver
    /// broke the protocol.
    pub fn refill(&mut self) -> bool {
        if self.fault.is_some() {
            return false;
        }
        match self.ring.take() {
            Ok(Some(entry)) if entry.len < BUFFER_MIN => self.fault = Some(ErrorCode::BAD_LENGTH),
            Ok(Some(entry)) => {
                self.largest = self.largest.max(entry.len);
                self.stash.push_back(entry);
                return true;
            }
            Ok(None) => {}
            Err(corrupt) => self.fault = Some(corrupt.into()),
        }
        false
    }

    /// Makes sure that the front of the stash holds `len` bytes; says in how many buffers.
    fn gather(&mut self, view: &View<'_>, len: usize) -> Gathered {
        let mut room = 0;
        for count in 0..CHAIN_MAX {
            if self.stash.len() == count && !self.refill() {
                self.wanted = len;
                return if self.fault.is_some() { Gathered::Fault } else { Gathered::TooFew };
            }
            let Some(entry) = self.stash.get(count) else { return Gathered::TooFew };
            if let Err(status) = view.slice(entry.addr, u64::from(entry.len), true) {
                self.fault = Some(status);
                return Gathered::Fault;
            }
            room += entry.len as usize;
            if room >= len {
                return Gathered::Buffers(count + 1);
            }
        }
        Gathered::TooSmall
    }

    /// Writes the frame to the first `count` buffers and gives them back.
    fn fill(
        &mut self,
        view: &View<'_>,
        packet: &Packet<'_>,
        count: usize,
        len: usize,
    ) -> Result<(), ErrorCode> {
        let mut head = [0; HEADER_BYTES + ETH_BYTES];
        let buffers = u16::try_from(count).unwrap_or(u16::MAX);
        head[..HEADER_BYTES].copy_from_slice(&packet.header.bytes(buffers));
        head[HEADER_BYTES..].copy_from_slice(&packet.eth);
        let mut source = Source { body: packet.body, part: 0, at: 0 };
        let mut left = len;
        for i in 0..count {
            let Some(entry) = self.stash.pop_front() else { break };
            let filled = left.min(entry.len as usize);
            let mut to = view.slice(entry.addr, filled as u64, true)?;
            if i == 0 {
                let (front, rest) = to.split_at(head.len());
                front.copy_from(&head);
                to = rest;
            }
            source.copy(to);
            left -= filled;
            let flags = if i + 1 < count { NEXT } else { 0 };
            self.ring.give_back(Entry {
                len: u32::try_from(filled).unwrap_or(entry.len),
                flags,
                ..entry
            });
        }
        Ok(())
    }

    /// Makes the delivered frames visible, and wakes the driver if it wants that.
    pub fn post(&mut self) {
        if self.unposted.0 != 0 {
            let (frames, bytes) = std::mem::take(&mut self.unposted);
            let rx = &self.counters.rx;
            rx.frames.add(frames);
            rx.bytes.add(bytes);
            rx.batches.one();
            rx.ring_fill.set(self.ring.pending() + u32::try_from(self.stash.len()).unwrap_or(0));
            self.interrupt.kick(self.ring.post());
        }
    }

    fn starve(&mut self, patient: bool) -> Delivery {
        self.counters.rx.starved.one();
        match patient.then(|| self.patience.starve(Instant::now())).flatten() {
            Some(until) => Delivery::Wait(until),
            None => {
                self.counters.rx.drops.no_buffers.one();
                Delivery::Done
            }
        }
    }

    /// Lets `task` be woken when there are new buffers. `key` tells the waiters apart. The driver
    /// rings only after [`arm`](Self::arm): a task that polls need not be told.
    pub fn wait(&mut self, key: u64, task: &TaskHandle) {
        if self.waiters.iter().all(|(k, _)| *k != key) {
            self.waiters.push((key, task.clone()));
        }
    }

    /// If somebody waits and there are new buffers, wakes all who wait. Returns whether it did. The
    /// fault of a driver that broke the protocol comes out here, in the poll of its own device.
    pub fn serve_waiters(&mut self) -> Result<bool, ErrorCode> {
        let woken = !self.waiters.is_empty() && self.refill();
        if woken || self.fault.is_some() {
            for (_, task) in self.waiters.drain(..) {
                task.wake();
            }
        }
        self.fault.map_or(Ok(woken), Err)
    }

    /// If anybody waits, asks the driver to ring when it has posted as many buffers as the waiting
    /// frame lacks.
    /// [`Armed::Missed`]: they are there, and the next delivery succeeds. All who wait are woken
    /// then: the buffers are out of the ring, and nothing else would tell of them.
    pub fn arm(&mut self) -> Armed {
        if self.waiters.is_empty() {
            return Armed::Waiting;
        }
        loop {
            let lacking = self.lacking();
            if lacking == 0 || self.fault.is_some() {
                for (_, task) in self.waiters.drain(..) {
                    task.wake();
                }
                return Armed::Missed;
            }
            // Not even one in spite of the driver's count: it is not honest, and gets no more than
            // that.
            if self.ring.arm(lacking - 1) == Armed::Waiting || !self.refill() {
                return Armed::Waiting;
            }
            while self.refill() {}
        }
    }

    /// How many buffers the frame that found too few lacks at least, going by the largest one so
    /// far.
    fn lacking(&self) -> u32 {
        let room: usize = self.stash.iter().take(CHAIN_MAX).map(|entry| entry.len as usize).sum();
        if self.stash.len() >= CHAIN_MAX {
            return 0;
        }
        u32::try_from(self.wanted.saturating_sub(room).div_ceil(self.largest as usize)).unwrap_or(1)
    }

    /// Asks for no doorbell.
    pub fn disarm(&mut self) {
        self.ring.disarm();
    }

    /// Whether the driver broke the protocol: its own device must be polled.
    pub fn is_faulty(&self) -> bool {
        self.fault.is_some()
    }
}

impl Drop for RxQueue {
    fn drop(&mut self) {
        for (_, task) in self.waiters.drain(..) {
            task.wake();
        }
    }
}

enum Gathered {
    Buffers(usize),
    TooFew,
    TooSmall,
    Fault,
}

/// A frame's body while it is copied out piece by piece.
struct Source<'a> {
    body: Body<'a>,
    part: usize,
    at: usize,
}

impl Source<'_> {
    /// Fills `to` with what comes next.
    fn copy(&mut self, mut to: DriverSlice<'_>) {
        while !to.is_empty() {
            let copied = match self.body {
                Body::Bytes(bytes) => to.copy_from(&bytes[self.at.min(bytes.len())..]),
                Body::Driver(parts) => match parts.get(self.part) {
                    None => 0,
                    Some(part) => {
                        let (_, rest) = part.split_at(self.at);
                        let n = to.copy_from_driver(rest);
                        if n == rest.len() {
                            self.part += 1;
                            self.at = 0;
                            to = to.split_at(n).1;
                            continue;
                        }
                        n
                    }
                },
            };
            if copied == 0 {
                return;
            }
            self.at += copied;
            to = to.split_at(copied).1;
        }
    }
}
