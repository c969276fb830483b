// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A receive ring. It puts frames into the buffers that the driver posted.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use serde_json::Value;
use vbus_core::io_vec::IoVecMut;
use vbus_core::memory::{DriverSlice, View};
use vbus_core::shm::signal::Armed;
use vbus_core::{ErrorCode, MemoryContext, TaskHandle};
use vbus_tap::{HEADER_BYTES, Offloads};

use super::backpressure::Backpressure;
use super::coalesce::{Held, Setting};
use super::counters::{PairCounters, RxCounters};
use super::ring::RxRing;
use super::saved::{Address, ReceiverState, RssState, VlanMap};
use crate::filter::{Addresses, Filter, Vlans};
use crate::frame::{
    Body, CHAIN_MAX, ETH_BYTES, ETH_OVERHEAD, FRAME_MAX, Hash, Header, PIECES_MAX, Packet,
    TAG_BYTES,
};
use crate::offload::dhcp_checksum;
use crate::rss::{Rss, kinds};
use crate::sink::{Delivery, OnFull, Read, Reserved, RxDrop, RxSink, Waiter};
use crate::steering::Steering;

/// Bytes of the header before a frame with its hash: value and kind follow the virtio-net header.
const HASH_HEADER_BYTES: usize = HEADER_BYTES + 8;
/// The most bytes that the device writes before the body of a frame: the header, and the Ethernet
/// header with a tag that the switch has put in.
pub const HEAD_MAX: usize = HASH_HEADER_BYTES + FRONT_MAX;
/// An Ethernet header with a tag that the switch has put in.
const FRONT_MAX: usize = ETH_BYTES + TAG_BYTES;

/// The most entries of an indirection table.
const RSS_TABLE_MAX: usize = 128;

/// Which frames the driver of a connection accepts. All its receive rings share this.
pub struct Receiver {
    /// The largest frame without its Ethernet header and tags.
    pub mtu: usize,
    /// The filter of addresses and VLANs.
    pub filter: Arc<Filter>,
    /// The offloads, as bits. The driver may change them at any time. Relaxed: a frame that is
    /// delivered during the change may still use the old ones.
    pub offloads: AtomicU64,
    /// Chooses the receive queue of a frame, and holds the key of the hash.
    pub steering: Arc<Steering>,
    /// Whether the header before each frame has its hash.
    pub hash: bool,
    /// The backpressure budget.
    pub backpressure: Duration,
    /// Called when frames have passed, in either direction.
    pub moved: Box<dyn Fn() + Send + Sync>,
}

/// What a driver has chosen of the things for which the back end sets itself up.
pub struct Choices {
    queues: u16,
    rss: Option<Rss>,
    offloads: Offloads,
}

impl Receiver {
    /// Bytes of the header before each frame.
    pub fn header_bytes(&self) -> usize {
        if self.hash { HASH_HEADER_BYTES } else { HEADER_BYTES }
    }

    /// The header and the Ethernet header of a frame in `buffers` buffers, and their length in
    /// bytes.
    fn head(&self, packet: &Packet<'_>, buffers: usize) -> ([u8; HEAD_MAX], usize) {
        let mut head = [0; HEAD_MAX];
        let header = packet.header.bytes(u16::try_from(buffers).unwrap_or(u16::MAX));
        head[..HEADER_BYTES].copy_from_slice(&header);
        let mut at = HEADER_BYTES;
        if self.hash {
            let Hash { value, kind } = packet.hash.unwrap_or_else(|| self.steering.hash(packet));
            head[at..at + 4].copy_from_slice(&value.to_le_bytes());
            head[at + 4..at + 6].copy_from_slice(&kind.to_le_bytes());
            at = HASH_HEADER_BYTES;
        }
        head[at..at + FRONT_MAX].copy_from_slice(&packet.front());
        (head, at + packet.front_bytes())
    }

    /// What the driver has chosen now.
    pub fn choices(&self) -> Choices {
        let (queues, rss) = self.steering.state();
        Choices { queues, rss, offloads: self.offloads() }
    }

    /// Takes back what the driver has chosen since [`choices`](Self::choices).
    pub(super) fn choose(&self, choices: &Choices) {
        self.steering.replace(choices.queues, choices.rss.clone());
        self.set_offloads(choices.offloads);
    }

    /// The offloads that the driver accepts now.
    pub fn offloads(&self) -> Offloads {
        Offloads::from_bits(self.offloads.load(Ordering::Relaxed))
    }
}

impl Receiver {
    /// Sets the offloads that the driver accepts from now on.
    pub fn set_offloads(&self, offloads: Offloads) {
        self.offloads.store(offloads.bits(), Ordering::Relaxed);
    }

    /// What the driver accepts, as plain data.
    pub fn save(&self) -> ReceiverState {
        let addresses = self.filter.addresses();
        let vlans = self
            .filter
            .vlans()
            .map(|vlans| VlanMap(vlans.iter().flat_map(|word| word.to_le_bytes()).collect()));
        let (queues, rss) = self.steering.state();
        let rss = rss.map(|rss| {
            let (kinds, key, table) = rss.parts();
            let (key, table) = (*key, table.to_vec());
            RssState { kinds, key, table, unclassified: rss.unclassified() }
        });
        ReceiverState {
            mac: self.filter.mac(),
            modes: addresses.modes,
            listed: addresses.listed.into_iter().map(Address).collect(),
            vlans,
            offloads: self.offloads().bits(),
            queues,
            rss,
        }
    }

    /// Goes on from what [`save`](Self::save) returned, except the address: that is the back
    /// end's to grant ([`Plug::set_mac`](crate::Plug::set_mac)). At most `listed` addresses may be
    /// listed, and at most `queues` queue pairs in use.
    ///
    /// # Errors
    /// A value is out of its range. The text says which. The front checks what its driver had to
    /// accept first.
    pub fn restore(&self, state: &ReceiverState, listed: usize, queues: u16) -> Result<(), String> {
        if state.listed.len() > listed {
            return Err(format!("{} addresses are listed; at most {listed}", state.listed.len()));
        }
        let vlans = state.vlans.as_ref().map(|VlanMap(bytes)| {
            let mut vlans = Box::new([0; 64]);
            for (word, bytes) in vlans.iter_mut().zip(bytes.chunks_exact(8)) {
                *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
            }
            (bytes.len() == size_of::<Vlans>()).then_some(vlans).ok_or("vlans has not 512 bytes")
        });
        let vlans = vlans.transpose()?;
        if Offloads::from_bits(state.offloads).bits() != state.offloads {
            return Err(format!("offloads are {:#x}, which are none", state.offloads));
        }
        let rss = state.rss.as_ref().map(|RssState { kinds, key, table, unclassified }| {
            let wanted = kinds & !kinds::ALL == 0 && table.len() <= RSS_TABLE_MAX;
            let rss = Rss::new(*kinds, *key, table.clone()).filter(|_| wanted);
            rss.map(|rss| match unclassified {
                Some(queue) => rss.with_unclassified(*queue),
                None => rss,
            })
        });
        let rss = match rss {
            Some(None) => return Err("rss has kinds or a table that no driver can set".into()),
            Some(Some(rss)) => Some(rss),
            None => None,
        };
        if state.queues > queues || !self.steering.replace(state.queues, rss) {
            return Err(format!(
                "{} queues, or a table for others; at most {queues}",
                state.queues
            ));
        }
        let listed = state.listed.iter().map(|Address(mac)| *mac).collect();
        self.filter.set_addresses(Addresses { modes: state.modes, listed });
        self.filter.set_vlans(vlans);
        self.set_offloads(Offloads::from_bits(state.offloads));
        Ok(())
    }
}

/// The receive ring of a queue pair. Several senders may deliver to it, but only one at a time.
pub struct RxQueue<R: RxRing> {
    ring: R,
    memory: Arc<MemoryContext>,
    receiver: Arc<Receiver>,
    counters: Arc<PairCounters>,
    /// The number of this queue pair.
    number: u16,
    /// The task of this queue pair. The queue wakes it if the driver breaks the protocol.
    task: TaskHandle,
    coalesce: Arc<Setting>,
    held: Held,
    /// Buffers taken from the ring and not yet filled.
    stash: VecDeque<R::Buffer>,
    /// Bytes of the largest buffer so far. 0: there was none.
    largest: usize,
    /// Bytes of the last frame that found too few buffers.
    wanted: usize,
    /// Frames and bytes since the last post.
    unposted: (u64, u64),
    waiters: Vec<Waiter>,
    fault: Option<ErrorCode>,
    backpressure: Backpressure,
}

impl<R: RxRing> RxQueue<R> {
    /// The queue of `ring`, for pair `number`, which `task` serves.
    pub fn new(
        ring: R,
        memory: Arc<MemoryContext>,
        receiver: Arc<Receiver>,
        counters: Arc<PairCounters>,
        (number, task, coalesce): (u16, TaskHandle, Arc<Setting>),
    ) -> RxQueue<R> {
        let backpressure = Backpressure::new(receiver.backpressure);
        RxQueue {
            ring,
            memory,
            receiver,
            counters,
            number,
            task,
            coalesce,
            held: Held::default(),
            stash: VecDeque::new(),
            largest: 0,
            wanted: 0,
            unposted: (0, 0),
            waiters: Vec::new(),
            fault: None,
            backpressure,
        }
    }

    /// Lets `last` see the ring with all frames that were delivered, and drops it.
    pub(super) fn end<O>(mut self, last: impl FnOnce(&mut R) -> O) -> O {
        self.post();
        last(&mut self.ring)
    }

    /// How far the ring is, as plain data.
    pub(super) fn save_ring(&self) -> Result<Value, ErrorCode> {
        self.fault.map_or(Ok(()), Err)?;
        self.ring.save(self.stash.iter())
    }

    fn rx(&self) -> &RxCounters {
        &self.counters.rx
    }

    /// Delivers a frame through a view of this driver's memory.
    fn deliver(&mut self, view: &View<'_>, packet: &Packet<'_>, on_full: OnFull) -> Delivery {
        if let Some(delivery) = self.refuse(packet) {
            return delivery;
        }
        let len = self.receiver.header_bytes() + packet.bytes();
        match self.gather(view, len) {
            Gathered::Buffers(count) => {
                self.backpressure.fed(count);
                let units = match self.fill(view, packet, count, len) {
                    Ok(parts) => 1 + u32::try_from(parts / CHAIN_MAX).unwrap_or(u32::MAX - 1),
                    Err(error) => {
                        self.fail(error);
                        return self.refused(RxDrop::NoLink);
                    }
                };
                self.count(&packet.header, packet.bytes());
                Delivery::Delivered { units }
            }
            // The driver posts no more buffers. They may hold the segments.
            Gathered::TooFew if self.holds_all() && packet.header.leaves_segmentation() => {
                Delivery::NeedsCut
            }
            Gathered::TooFew => self.starve(on_full),
            Gathered::TooMany if packet.header.leaves_segmentation() => Delivery::NeedsCut,
            Gathered::TooMany => self.refused(RxDrop::TooLong),
            Gathered::Fault => self.refused(RxDrop::NoLink),
        }
    }

    /// Checks a frame against what the driver accepts. Returns the outcome if the frame cannot be
    /// delivered as it is.
    fn refuse(&self, packet: &Packet<'_>) -> Option<Delivery> {
        if !self.receiver.filter.wants(packet) {
            self.rx().filtered.one();
            return Some(Delivery::Dropped);
        }
        if !packet.fits_mtu(self.receiver.mtu) {
            return Some(self.refused(RxDrop::TooLong));
        }
        let fits = packet.header.fits(self.receiver.offloads());
        // The tag that the switch has put in can make the longest segment too long for a driver.
        let is_longer = packet.bytes() > FRAME_MAX - HEADER_BYTES;
        (!fits || is_longer || dhcp_checksum(packet).is_some()).then_some(Delivery::NeedsCut)
    }

    fn refused(&self, reason: RxDrop) -> Delivery {
        self.rx().drops.count(reason);
        Delivery::Dropped
    }

    /// The driver broke the protocol. Wakes the pair's own task, which reports the error when it is
    /// polled.
    fn fail(&mut self, error: ErrorCode) {
        self.fault = Some(error);
        self.task.wake();
    }

    /// Lets `read` fill the driver's buffers, without a copy. If the driver does not accept the
    /// frame, the device drops it and uses the buffers for the next one.
    fn reserve(&mut self, view: &View<'_>, read: &mut Read<'_>) -> Reserved {
        let header_bytes = self.receiver.header_bytes();
        let longest = header_bytes + self.longest();
        let count = match self.gather(view, longest) {
            Gathered::Buffers(count) => count,
            Gathered::TooMany => return Reserved::Unfit,
            // The driver posts no more buffers.
            Gathered::TooFew if self.holds_all() => return Reserved::Unfit,
            Gathered::TooFew => {
                self.tell();
                return Reserved::Full;
            }
            Gathered::Fault => return Reserved::Nothing,
        };
        let mut head = [0; HEADER_BYTES + ETH_BYTES];
        let mut spill = [0; 1];
        let (mut room, mut slots) = (0, 2);
        // Looked up once for the read and for the delivery. Offer only the bytes that the frame can
        // need, so that the pieces are counted for it alone.
        let mut slices = Vec::with_capacity(count);
        for buffer in self.stash.iter().take(count) {
            let len = R::bytes(buffer).min(longest - room.min(longest));
            if let Err(error) = R::slices(buffer, view, len, |slice| slices.push(slice)) {
                self.fail(error);
                return Reserved::Nothing;
            }
            if slices.len() > PIECES_MAX {
                return Reserved::Unfit; // The delivery says what the parts cost.
            }
            room += len;
        }
        let received = {
            let mut vector = [const { IoVecMut::EMPTY }; PIECES_MAX + 2];
            let mut skip = header_bytes + ETH_BYTES;
            for slice in &slices {
                let (front, rest) = slice.split_at(skip);
                skip -= front.len();
                for piece in rest.io_vecs_mut() {
                    if slots == vector.len() {
                        return Reserved::Unfit; // The back end reads the frame in one piece.
                    }
                    vector[slots - 1] = piece;
                    slots += 1;
                }
            }
            vector[0] = IoVecMut::new(&mut head);
            vector[slots - 1] = IoVecMut::new(&mut spill);
            read(&mut vector[..slots])
        };
        if view.is_logged() {
            // The kernel may have written a part before it failed.
            let body = received.map_or(usize::MAX, |len| len.saturating_sub(head.len()));
            self.wrote(&slices, body);
        }
        let len = match received {
            Ok(len) => len,
            Err(Errno::FAULT) => {
                // The driver has taken the memory away. Touching it lets the bus see that.
                slices.iter().for_each(DriverSlice::touch);
                return Reserved::Failed(Errno::FAULT);
            }
            Err(error) => return Reserved::Failed(error),
        };
        let (Some((front, eth)), true) =
            (head.split_first_chunk::<HEADER_BYTES>(), len >= head.len())
        else {
            return Reserved::Nothing;
        };
        // The layout of the frame in the buffers.
        let len = len - HEADER_BYTES + header_bytes;
        if len > room {
            self.refused(RxDrop::TooLong);
            return Reserved::Frame;
        }
        match self.return_read(view, slices, (Header::parse(front), eth), len) {
            Ok(()) => Reserved::Frame,
            Err(error) => {
                self.fail(error);
                Reserved::Nothing
            }
        }
    }

    /// The back end has written `body` bytes in the buffers, behind the headers.
    #[cold]
    fn wrote(&self, slices: &[DriverSlice<'_>], body: usize) {
        let (mut skip, mut left) = (self.receiver.header_bytes() + ETH_BYTES, body);
        for slice in slices {
            let (front, rest) = slice.split_at(skip);
            skip -= front.len();
            rest.wrote(left);
            left -= left.min(rest.len());
        }
    }

    /// Whether it is in vain to wait for more buffers.
    fn holds_all(&self) -> bool {
        self.ring.holds_all()
    }

    fn longest(&self) -> usize {
        let segments = self.receiver.offloads() & (Offloads::TSO | Offloads::USO);
        let payload = if segments.is_empty() { self.receiver.mtu } else { 65536 };
        payload + ETH_OVERHEAD
    }

    /// Delivers a frame of `len` bytes (with its header), if the driver accepts it. The frame is in
    /// `parts`, the buffers at the front of the stash, except for its headers.
    fn return_read(
        &mut self,
        view: &View<'_>,
        mut parts: Vec<DriverSlice<'_>>,
        (header, eth): (Header, &[u8]),
        len: usize,
    ) -> Result<(), ErrorCode> {
        let (mut left, mut skip) = (len, self.receiver.header_bytes() + ETH_BYTES);
        // The bytes of the header and of the Ethernet header, and then those of the body.
        let mut front = Vec::with_capacity(1);
        parts.retain_mut(|part| {
            *part = part.split_at(left).0;
            left -= part.len();
            let (of_front, of_body) = part.split_at(skip);
            skip -= of_front.len();
            if !of_front.is_empty() {
                front.push(of_front);
            }
            *part = of_body;
            !part.is_empty()
        });
        let mut packet = Packet::new(header, [0; ETH_BYTES], Body::Driver(&parts));
        packet.eth.copy_from_slice(eth);
        match self.refuse(&packet) {
            None => {}
            Some(Delivery::NeedsCut) => match dhcp_checksum(&packet) {
                Some(checksum) => {
                    let at = usize::from(header.csum_start) + usize::from(header.csum_offset);
                    put(&parts, at - ETH_BYTES, checksum);
                    packet.header = Header::default();
                }
                None => {
                    // The driver changed its offloads after the frame was sent.
                    self.refused(RxDrop::BadFrame);
                    return Ok(());
                }
            },
            Some(_) => return Ok(()),
        }
        let count = self.buffers_for(len);
        let (head, head_bytes) = self.receiver.head(&packet, count);
        let mut head = &head[..head_bytes];
        for part in front {
            head = &head[part.copy_from(head)..];
        }
        let (header, bytes) = (packet.header, len - self.receiver.header_bytes());
        let mut left = len;
        for i in 0..count {
            let Some(buffer) = self.stash.pop_front() else { break };
            let filled = left.min(R::bytes(&buffer));
            left -= filled;
            self.ring.give_back(view, buffer, filled, i + 1 < count)?;
        }
        self.count(&header, bytes);
        Ok(())
    }

    /// The number of buffers at the front of the stash that hold `len` bytes. They are there.
    fn buffers_for(&self, len: usize) -> usize {
        let mut left = len;
        let full = self.stash.iter().take_while(|buffer| {
            let is_full = left > R::bytes(buffer);
            left = left.saturating_sub(R::bytes(buffer));
            is_full
        });
        full.count() + 1
    }

    fn has_room(&mut self, view: &View<'_>, bytes: usize) -> bool {
        let gathered = self.gather(view, self.receiver.header_bytes() + bytes);
        let lacks = matches!(gathered, Gathered::TooFew) && !self.holds_all();
        if lacks {
            self.tell();
        }
        !lacks
    }

    /// A frame lacks buffers. The driver must hear of the frames that it has at once, because it
    /// gives their buffers back: no interrupt is held back.
    fn tell(&mut self) {
        self.post();
        self.held.release(&self.ring);
    }

    fn count(&mut self, header: &Header, bytes: usize) {
        self.unposted.0 += 1;
        self.unposted.1 += bytes as u64;
        if header.leaves_checksum() {
            self.rx().csum.one();
        }
        if header.leaves_segmentation() {
            self.rx().segments.one();
        }
    }

    /// Takes one more buffer from the ring into the stash. Returns false if there is none, or if
    /// the driver broke the protocol.
    fn refill(&mut self, view: &View<'_>) -> bool {
        if self.fault.is_some() {
            return false;
        }
        match self.ring.take(view) {
            Ok(Some(buffer)) => {
                self.largest = self.largest.max(R::bytes(&buffer));
                self.stash.push_back(buffer);
                return true;
            }
            Ok(None) => {}
            Err(error) => self.fail(error),
        }
        false
    }

    /// Fills the stash until the buffers at its front hold `len` bytes. Returns how many buffers
    /// that takes. Whoever writes to the buffers looks up where they are.
    fn gather(&mut self, view: &View<'_>, len: usize) -> Gathered {
        let mut room = 0;
        for count in 0..self.ring.buffers_max() {
            if self.stash.len() == count && !self.refill(view) {
                self.wanted = len;
                return if self.fault.is_some() { Gathered::Fault } else { Gathered::TooFew };
            }
            let Some(buffer) = self.stash.get(count) else { return Gathered::TooFew };
            room += R::bytes(buffer);
            if room >= len {
                return Gathered::Buffers(count + 1);
            }
        }
        Gathered::TooMany
    }

    /// Writes the frame to the first `count` buffers and returns them to the driver. Returns how
    /// many parts they had.
    fn fill(
        &mut self,
        view: &View<'_>,
        packet: &Packet<'_>,
        count: usize,
        len: usize,
    ) -> Result<usize, ErrorCode> {
        let (head, head_bytes) = self.receiver.head(packet, count);
        let mut head = &head[..head_bytes];
        let mut source = Source { body: packet.body, part: 0, at: 0 };
        let (mut left, mut parts) = (len, 0);
        for i in 0..count {
            let Some(buffer) = self.stash.pop_front() else { break };
            parts += R::parts(&buffer);
            let filled = left.min(R::bytes(&buffer));
            R::slices(&buffer, view, filled, |slice| {
                let copied = slice.copy_from(head);
                head = &head[copied..];
                source.copy(slice.split_at(copied).1);
            })?;
            left -= filled;
            self.ring.give_back(view, buffer, filled, i + 1 < count)?;
        }
        Ok(parts)
    }

    /// Makes the delivered frames visible, and interrupts the driver if it has armed.
    pub(super) fn post(&mut self) {
        if self.unposted.0 != 0 {
            let (frames, bytes) = std::mem::take(&mut self.unposted);
            let held = u32::try_from(self.stash.len()).unwrap_or(0);
            let held = self.ring.pending().saturating_add(held);
            let rx = self.rx();
            rx.frames.add(frames);
            rx.bytes.add(bytes);
            rx.batches.one();
            rx.ring_fill.set(held);
            let wanted = self.ring.post();
            if self.held.posted(wanted, frames, &self.coalesce, &self.ring) {
                self.task.wake(); // It sends the interrupt in time.
            }
            (self.receiver.moved)();
        }
    }

    /// Sends the interrupt that is held back, if it is due.
    pub(super) fn poll_held(&mut self) {
        self.held.poll(&self.coalesce, &self.ring);
    }

    /// When [`poll_held`](Self::poll_held) must be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.held.deadline()
    }

    /// Decides about a frame that finds too few buffers: it waits or is dropped.
    fn starve(&mut self, on_full: OnFull) -> Delivery {
        self.tell();
        self.rx().starved.one();
        self.make_wait(on_full)
    }

    fn make_wait(&mut self, on_full: OnFull) -> Delivery {
        match on_full {
            OnFull::Drop => self.refused(RxDrop::NoBuffers),
            _ if self.holds_all() => self.refused(RxDrop::NoBuffers),
            OnFull::Wait => Delivery::Full { until: None },
            OnFull::WaitBounded => match self.backpressure.wait(Instant::now()) {
                Some(until) => Delivery::Full { until: Some(until) },
                None => self.refused(RxDrop::NoBuffers),
            },
        }
    }

    /// Whether the queue pair is in use. No frame is steered to another pair.
    fn is_used(&self) -> bool {
        self.number < self.receiver.steering.queues()
    }

    /// The driver has changed which pairs are in use. Senders that wait for one that is not choose
    /// another queue. A sender that has chosen this queue, but does not wait yet, finds that out in
    /// [`wait`](Self::wait).
    pub(super) fn queues_changed(&mut self) {
        if !self.is_used() {
            self.wake_waiters();
        }
    }

    fn wait(&mut self, waiter: &Waiter) {
        if !self.is_used() {
            waiter.task.wake();
            return;
        }
        if self.waiters.iter().all(|other| other.key != waiter.key) {
            self.waiters.push(waiter.clone());
        }
    }

    fn wake_waiters(&mut self) {
        for waiter in self.waiters.drain(..) {
            waiter.task.wake();
        }
    }

    /// Wakes all waiters if there are new buffers. Returns whether it did. If the driver broke the
    /// protocol, returns that error: the caller is the poll of its own device.
    pub(super) fn serve_waiters(&mut self) -> Result<bool, ErrorCode> {
        let woken = !self.waiters.is_empty() && {
            let memory = self.memory.clone();
            self.refill(&memory.view())
        };
        if woken || self.fault.is_some() {
            self.wake_waiters();
        }
        self.fault.map_or(Ok(woken), Err)
    }

    /// If a sender waits, asks the driver to ring when it has posted as many buffers as the waiting
    /// frame lacks. [`Armed::Missed`]: the buffers are there, and the next delivery succeeds. Then
    /// this call has woken all waiters, because it took the buffers out of the ring and nothing
    /// else would wake them.
    pub(super) fn arm(&mut self) -> Armed {
        if self.waiters.is_empty() {
            return Armed::Waiting;
        }
        let memory = self.memory.clone();
        loop {
            let lacking = self.lacking();
            // A sender of a frame for which more buffers never come does something else.
            if lacking == 0 || self.holds_all() || self.fault.is_some() {
                self.wake_waiters();
                return Armed::Missed;
            }
            if self.ring.arm(lacking - 1) == Armed::Waiting {
                return Armed::Waiting;
            }
            // The driver may have mapped the buffer just before it made it available, so an earlier
            // view might not have it.
            let view = memory.view();
            // The driver's count says that there is a buffer, but there is none. The driver is
            // hostile or broken, so the loop ends.
            if !self.refill(&view) {
                return Armed::Waiting;
            }
            // No more than the frame needs: a driver could have very many, each of many parts.
            while self.lacking() > 0 && self.refill(&view) {}
        }
    }

    /// The least number of buffers that the waiting frame lacks, if each is as large as the largest
    /// buffer so far.
    fn lacking(&self) -> u32 {
        let max = self.ring.buffers_max();
        if self.stash.len() >= max {
            return 0;
        }
        let room: usize = self.stash.iter().take(max).map(R::bytes).sum();
        if self.largest == 0 {
            return 1;
        }
        u32::try_from(self.wanted.saturating_sub(room).div_ceil(self.largest)).unwrap_or(1)
    }

    /// Asks for no doorbell.
    pub(super) fn disarm(&mut self) {
        self.ring.disarm();
    }
}

impl<R: RxRing> Drop for RxQueue<R> {
    fn drop(&mut self) {
        self.wake_waiters();
    }
}

enum Gathered {
    /// This many buffers hold the frame.
    Buffers(usize),
    /// The driver has not posted enough buffers.
    TooFew,
    /// The frame needs more buffers than one frame may use.
    TooMany,
    /// The driver broke the protocol.
    Fault,
}

/// A receive queue that the front lends to the back end for one poll, with a view of the driver's
/// memory.
pub(super) struct Lent<'a, R: RxRing> {
    pub queue: &'a mut RxQueue<R>,
    pub view: &'a View<'a>,
}

impl<R: RxRing> RxSink for Lent<'_, R> {
    fn deliver(&mut self, packet: &Packet<'_>, on_full: OnFull) -> Delivery {
        self.queue.deliver(self.view, packet, on_full)
    }

    fn has_room(&mut self, bytes: usize) -> bool {
        self.queue.has_room(self.view, bytes)
    }

    fn reserve(&mut self, read: &mut Read<'_>) -> Reserved {
        self.queue.reserve(self.view, read)
    }

    fn longest(&self) -> usize {
        self.queue.longest()
    }

    fn post(&mut self) {
        self.queue.post();
    }

    fn wait(&mut self, waiter: &Waiter) {
        self.queue.wait(waiter);
    }

    fn arm(&mut self) -> Armed {
        self.queue.arm()
    }

    fn count_drop(&mut self, reason: RxDrop) {
        self.queue.refused(reason);
    }
}

/// A receive queue that other devices deliver to; `None` while there is no ring. Each call takes
/// its own view of the driver's memory.
pub struct RxSlot<R: RxRing> {
    pub(super) queue: Option<RxQueue<R>>,
    counters: Arc<PairCounters>,
    /// The device is quiesced.
    paused: bool,
}

impl<R: RxRing> RxSlot<R> {
    /// A slot without a ring. It counts the frames that come meanwhile as dropped.
    pub fn new(counters: Arc<PairCounters>, paused: bool) -> RxSlot<R> {
        RxSlot { queue: None, counters, paused }
    }

    /// Calls `work` with the queue and a view of the driver's memory. `None`: there is no ring.
    fn look<O>(&mut self, work: impl FnOnce(&mut RxQueue<R>, &View<'_>) -> O) -> Option<O> {
        let queue = self.queue.as_mut()?;
        let memory = queue.memory.clone();
        Some(work(queue, &memory.view()))
    }
}

impl<R: RxRing> RxSink for RxSlot<R> {
    fn deliver(&mut self, packet: &Packet<'_>, on_full: OnFull) -> Delivery {
        if let (true, Some(queue)) = (self.paused, &mut self.queue) {
            return queue.make_wait(on_full);
        }
        let delivery = self.look(|queue, view| queue.deliver(view, packet, on_full));
        delivery.unwrap_or_else(|| {
            self.count_drop(RxDrop::NoLink);
            Delivery::Dropped
        })
    }

    fn has_room(&mut self, bytes: usize) -> bool {
        !self.paused && self.look(|queue, view| queue.has_room(view, bytes)).unwrap_or(false)
    }

    fn reserve(&mut self, read: &mut Read<'_>) -> Reserved {
        if self.paused {
            return Reserved::Full;
        }
        self.look(|queue, view| queue.reserve(view, read)).unwrap_or(Reserved::Full)
    }

    fn longest(&self) -> usize {
        self.queue.as_ref().map_or(0, RxQueue::longest)
    }

    fn post(&mut self) {
        // While it is paused there is nothing to post.
        if let Some(queue) = &mut self.queue {
            queue.post();
        }
    }

    fn wait(&mut self, waiter: &Waiter) {
        if let Some(queue) = &mut self.queue {
            queue.wait(waiter);
        }
    }

    fn arm(&mut self) -> Armed {
        let queue = self.queue.as_mut().filter(|_| !self.paused);
        queue.map_or(Armed::Waiting, RxQueue::arm)
    }

    fn count_drop(&mut self, reason: RxDrop) {
        self.counters.rx.drops.count(reason);
    }

    fn pause(&mut self, paused: bool) {
        if let Some(queue) = &mut self.queue {
            queue.post();
            queue.wake_waiters();
        }
        self.paused = paused;
    }
}

/// Writes `value`, most significant byte first, at byte `at` of the body in `parts`.
fn put(parts: &[DriverSlice<'_>], at: usize, value: u16) {
    let (mut skip, mut bytes) = (at, &value.to_be_bytes()[..]);
    for part in parts {
        let (front, rest) = part.split_at(skip);
        skip -= front.len();
        bytes = &bytes[rest.copy_from(bytes)..];
    }
}

/// The body of a frame, while the device copies it piece by piece.
struct Source<'a> {
    body: Body<'a>,
    part: usize,
    at: usize,
}

impl Source<'_> {
    /// Fills `to` with the next bytes.
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
