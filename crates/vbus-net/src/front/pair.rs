// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A queue pair and its task. The task moves the driver's frames to the back end, and the back
//! end's frames to the driver.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde_json::Value;
use vbus_core::memory::{DriverSlice, View};
use vbus_core::shm::signal::Armed;
use vbus_core::{ErrorCode, MemoryContext, Progress, Task, lock};
use vbus_tap::Offloads;

use super::counters::PairCounters;
use super::ring::{RxRing, TxRing};
use super::rx::{Lent, Receiver, RxQueue, RxSlot};
use super::tx::{Next, TxQueue};
use crate::backend::{Queue, Sent, TxDrop};
use crate::frame::{CHAIN_MAX, Packet};

/// The receive ring of a pair, while there is one.
#[allow(
    clippy::large_enum_variant,
    reason = "there is one for each pair, and every frame passes it; not all clippies mind"
)]
pub enum Rx<R: RxRing> {
    /// Only the pair's own task delivers to it.
    Own(RxSlot<R>),
    /// Other devices deliver to it.
    Shared(Arc<Mutex<RxSlot<R>>>),
}

impl<R: RxRing> Rx<R> {
    fn with<O>(&mut self, work: impl FnOnce(&mut RxQueue<R>) -> O) -> Option<O> {
        match self {
            Rx::Own(slot) => slot.queue.as_mut().map(work),
            Rx::Shared(slot) => lock(slot).queue.as_mut().map(work),
        }
    }

    /// When the queue must be polled to send an interrupt that it holds back.
    fn deadline(&self) -> Option<Instant> {
        match self {
            Rx::Own(slot) => slot.queue.as_ref().and_then(RxQueue::deadline),
            Rx::Shared(slot) => lock(slot).queue.as_ref().and_then(RxQueue::deadline),
        }
    }

    fn take(&mut self) -> Option<RxQueue<R>> {
        match self {
            Rx::Own(slot) => slot.queue.take(),
            Rx::Shared(slot) => lock(slot).queue.take(),
        }
    }

    fn set(&mut self, queue: Option<RxQueue<R>>) {
        match self {
            Rx::Own(slot) => slot.queue = queue,
            Rx::Shared(slot) => lock(slot).queue = queue,
        }
    }
}

/// A queue pair of a connection that has started. Calls of the driver change it between two polls.
pub struct Pair<T, R: RxRing> {
    tx: Option<TxQueue<T>>,
    rx: Rx<R>,
    queue: Box<dyn Queue>,
    memory: Arc<MemoryContext>,
    receiver: Arc<Receiver>,
    /// The offloads that the driver may leave to the device.
    tx_offloads: Offloads,
    counters: Arc<PairCounters>,
    /// Whether the next frame waits for the back end; `until` is the time at which the wait ends.
    waiting: bool,
    moved: bool,
    until: Option<Instant>,
    /// The back end has a frame of the ring in part, or lets it wait.
    begun: bool,
    /// The frames of the transmit ring are dropped.
    drops: bool,
    /// A frame of the device itself, which is sent before the next one of the ring.
    own: Option<Vec<u8>>,
    /// The back end has it in part, or lets it wait.
    own_begun: bool,
}

impl<T: TxRing, R: RxRing> Pair<T, R> {
    /// A pair without rings.
    pub fn new(
        rx: Rx<R>,
        queue: Box<dyn Queue>,
        memory: Arc<MemoryContext>,
        receiver: Arc<Receiver>,
        tx_offloads: Offloads,
        counters: Arc<PairCounters>,
    ) -> Pair<T, R> {
        Pair {
            tx: None,
            rx,
            queue,
            memory,
            receiver,
            tx_offloads,
            counters,
            waiting: false,
            moved: false,
            until: None,
            begun: false,
            drops: false,
            own: None,
            own_begun: false,
        }
    }

    /// Sets the transmit ring; `None`: the pair has none from now on. The pair does not send the
    /// waiting frame, or the rest of a frame, of the former ring.
    pub fn set_tx(&mut self, tx: Option<TxQueue<T>>) {
        self.tx = tx;
        self.queue.forget();
        (self.waiting, self.moved, self.until, self.begun) = (false, false, None, false);
        self.own_begun = false;
    }

    /// Whether the frames of the transmit ring are dropped from now on, in place of being sent. The
    /// task has to be woken: a frame that waited for the back end does so no longer.
    pub fn set_drops(&mut self, drops: bool) {
        if drops && std::mem::take(&mut self.begun) {
            self.queue.forget();
            (self.waiting, self.moved, self.until) = (false, false, None);
        }
        self.drops = drops;
    }

    /// Sends a frame of the device itself with the next poll.
    pub fn send_own(&mut self, frame: Vec<u8>) {
        if std::mem::take(&mut self.own_begun) {
            self.queue.forget();
        }
        self.own = Some(frame);
    }

    /// Sends the frame of the device itself, unless the back end has begun with one of the ring.
    /// While it has no room for it, no frame of the ring passes it.
    fn transmit_own(&mut self) {
        let Some(packet) = self.own.as_deref().filter(|_| !self.begun).and_then(Packet::plain)
        else {
            return;
        };
        let sent = self.queue.send(&packet);
        self.own_begun = matches!(sent, Sent::Part | Sent::Wait { .. });
        match sent {
            Sent::Done { .. } | Sent::Dropped(_) => self.own = None,
            Sent::Part => self.moved = true,
            Sent::Wait { until, moved } => {
                (self.waiting, self.until, self.moved) = (true, until, moved);
            }
        }
    }

    /// Sets the receive ring; `None`: the pair has none from now on.
    pub fn set_rx(&mut self, rx: Option<RxQueue<R>>) {
        if rx.is_none() {
            self.queue.rest();
        }
        self.rx.set(rx);
    }

    /// Takes the transmit ring away, and lets `last` see it.
    pub fn end_tx<O>(&mut self, last: impl FnOnce(&mut T) -> O) -> Option<O> {
        let tx = self.tx.take();
        self.set_tx(None);
        tx.map(|mut tx| last(&mut tx.ring))
    }

    /// Takes the receive ring away, and lets `last` see it with all frames that it got.
    pub fn end_rx<O>(&mut self, last: impl FnOnce(&mut R) -> O) -> Option<O> {
        let rx = self.rx.take();
        self.set_rx(None);
        rx.map(|rx| rx.end(last))
    }

    /// The driver has changed which pairs are in use.
    pub fn queues_changed(&mut self) {
        self.rx.with(RxQueue::queues_changed);
    }

    /// Waits until a running delivery has ended. Later deliveries see what the driver has changed.
    pub fn settle(&mut self) {
        self.rx.with(|_| ());
    }

    /// How far the transmit ring and the receive ring are.
    pub fn rings(&mut self) -> Result<[Option<Value>; 2], ErrorCode> {
        let tx = self.tx.as_ref().map(|tx| tx.ring.save()).transpose()?;
        let rx = self.rx.with(|rx| rx.save_ring()).transpose()?;
        Ok([tx, rx])
    }

    /// What the pair's end of the back end has, as plain data.
    pub fn save(&mut self) -> Result<Value, String> {
        self.queue.save()
    }

    /// Goes on from what [`save`](Self::save) returned.
    pub fn restore(&mut self, state: &Value) -> Result<(), String> {
        self.queue.restore(state)
    }

    /// Sends frames with at most `budget` units of work. Returns the units that it used.
    fn transmit(&mut self, view: &View<'_>, budget: u32) -> Result<u32, ErrorCode> {
        (self.waiting, self.moved, self.until) = (false, false, None);
        self.transmit_own();
        if self.own_begun && !self.drops {
            return Ok(0);
        }
        let Some(tx) = &mut self.tx else { return Ok(0) };
        let counters = &self.counters.tx;
        let (mut frames, mut bytes, mut taken, mut spent) = (0, 0, 0, 0_u32);
        let mut parts: Vec<DriverSlice<'_>> = Vec::with_capacity(CHAIN_MAX);
        tx.ring.took(); // What came before was a poll's of its own.
        while spent < budget {
            parts.clear();
            match tx.next(view, &mut parts, self.tx_offloads, self.receiver.mtu)? {
                Next::Nothing => break,
                Next::Short => {
                    counters.drops.short.one();
                    spent += 1;
                }
                Next::BadHeader => {
                    counters.drops.bad_header.one();
                    spent += 1;
                }
                Next::TooLong => {
                    counters.drops.too_long.one();
                    spent += 1;
                }
                Next::Frame(..) if self.drops => {
                    counters.drops.count(TxDrop::NoLink);
                    spent += 1;
                }
                Next::Frame(header, eth) => {
                    let packet = Packet::new(header, eth, tx.body(&parts));
                    let sent = self.queue.send(&packet);
                    self.begun = matches!(sent, Sent::Part | Sent::Wait { .. });
                    match sent {
                        Sent::Done { units } => {
                            frames += 1;
                            if header.leaves_checksum() {
                                counters.csum.one();
                            }
                            if header.leaves_segmentation() {
                                counters.segments.one();
                            }
                            bytes += packet.bytes() as u64;
                            spent = spent.saturating_add(units.max(1));
                        }
                        Sent::Part => {
                            self.moved = true;
                            break;
                        }
                        Sent::Dropped(reason) => {
                            counters.drops.count(reason);
                            spent += 1;
                        }
                        Sent::Wait { until, moved } => {
                            counters.waits.one();
                            self.waiting = true;
                            self.until = until;
                            self.moved = moved;
                            break;
                        }
                    }
                }
            }
            taken += 1;
            spent = spent.saturating_add(tx.extra());
            tx.done(view)?;
        }
        self.moved |= tx.ring.took();
        // The own frame waited until the back end was done with one of the ring.
        self.moved |= self.own.is_some() && !self.begun && !self.own_begun;
        if taken != 0 {
            counters.frames.add(frames);
            counters.bytes.add(bytes);
            counters.batches.one();
            counters.ring_fill.set(tx.ring.pending());
        }
        Ok(taken)
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let memory = self.memory.clone();
        let view = memory.view();
        let sent = self.transmit(&view, budget);
        // Flush even if this driver broke the protocol: its earlier frames are in other drivers'
        // buffers, and those drivers wait for them.
        self.queue.flush();
        let sent = sent?;
        if let Some(tx) = &mut self.tx {
            if sent != 0 {
                tx.post(sent);
            }
            tx.poll_held();
        }
        let received = match &mut self.rx {
            Rx::Own(RxSlot { queue: Some(queue), .. }) => {
                self.queue.receive(&mut Lent { queue, view: &view }, budget)?
            }
            Rx::Own(_) => 0,
            Rx::Shared(_) => {
                // The queues take views of their own.
                drop(view);
                self.queue.receive_shared(budget)?
            }
        };
        let served = self.rx.with(|rx| {
            rx.post();
            rx.poll_held();
            rx.serve_waiters()
        });
        let woke = served.transpose()?.unwrap_or(false);
        if sent != 0 {
            (self.receiver.moved)();
        }
        let busy = sent + received != 0 || woke || self.moved;
        Ok(if busy { Progress::Busy } else { Progress::Idle })
    }

    fn arm(&mut self) -> Armed {
        let rx = self.rx.with(RxQueue::arm).unwrap_or(Armed::Waiting);
        let back = if self.waiting { self.queue.arm() } else { Armed::Waiting };
        // While a frame waits for the back end, the task need not know of more frames, unless it
        // drops them.
        let tx = match &mut self.tx {
            Some(tx) if !self.waiting || self.drops => tx.ring.arm(0),
            _ => Armed::Waiting,
        };
        if [back, tx].contains(&Armed::Missed) { Armed::Missed } else { rx }
    }

    fn disarm(&mut self) {
        if let Some(tx) = &mut self.tx {
            tx.ring.disarm();
        }
        self.rx.with(RxQueue::disarm);
    }
}

/// The task of a pair.
pub struct PairTask<T, R: RxRing> {
    /// The pair.
    pub pair: Arc<Mutex<Pair<T, R>>>,
    /// Its number, for the log.
    pub number: u16,
}

impl<T: TxRing, R: RxRing> Task for PairTask<T, R> {
    fn work(&self) -> String {
        format!("queue pair {}", self.number)
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        lock(&self.pair).poll(budget)
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        Ok(lock(&self.pair).arm())
    }

    fn disarm(&mut self) {
        lock(&self.pair).disarm();
    }

    fn carried(&self) -> u64 {
        const EACH: u64 = 512;
        let pair = lock(&self.pair);
        let (tx, rx) = (&pair.counters.tx, &pair.counters.rx);
        tx.bytes.get() + rx.bytes.get() + EACH * (tx.frames.get() + rx.frames.get())
    }

    fn deadline(&self) -> Option<Instant> {
        let pair = lock(&self.pair);
        let tx = pair.tx.as_ref().and_then(TxQueue::deadline);
        [pair.until, pair.queue.deadline(), tx, pair.rx.deadline()].into_iter().flatten().min()
    }
}
