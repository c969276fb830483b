//! A queue pair's task: the driver's frames to the back end, the back end's frames to the driver.

use std::sync::Arc;
use std::time::Instant;

use vbus_core::memory::{DriverSlice, View};
use vbus_core::shm::abi::venet::{CHAIN_MAX, FRAME_MAX, HEADER_BYTES};
use vbus_core::shm::ring::{DeviceEnd, Entry, NEXT};
use vbus_core::shm::signal::Armed;
use vbus_core::{ErrorCode, Interrupt, MemoryContext, Progress, Task, Window};

use super::counters::PairCounters;
use super::frame::{Body, ETH_BYTES, Header, Packet};
use super::pcap::Capture;
use super::port::{Drop as DropReason, Port, Queue, Sent};
use vbus_core::lock;

/// The next frame of the transmit ring: entries taken, and once they are whole, what its header
/// said.
#[derive(Default)]
struct Chain {
    entries: Vec<Entry>,
    bytes: usize,
    head: Option<(Header, [u8; ETH_BYTES])>,
}

/// The transmit ring.
pub struct TxQueue {
    pub ring: DeviceEnd<Window>,
    pub interrupt: Interrupt,
}

/// The task of a queue pair.
pub struct Pair {
    port: Arc<Port>,
    index: u16,
    tx: TxQueue,
    queue: Box<dyn Queue>,
    memory: Arc<MemoryContext>,
    counters: Arc<PairCounters>,
    capture: Option<Arc<Capture>>,
    chain: Chain,
    /// The chain has to wait for the back end; until when at most.
    waiting: bool,
    moved: bool,
    until: Option<Instant>,
}

/// A frame of the transmit ring that is whole.
enum Next {
    Nothing,
    Ready,
    Bad(DropReason),
}

impl Pair {
    pub fn new(
        port: Arc<Port>,
        index: u16,
        tx: TxQueue,
        queue: Box<dyn Queue>,
        memory: Arc<MemoryContext>,
        counters: Arc<PairCounters>,
        capture: Option<Arc<Capture>>,
    ) -> Pair {
        let chain = Chain { entries: Vec::with_capacity(CHAIN_MAX), ..Chain::default() };
        Pair {
            port,
            index,
            tx,
            queue,
            memory,
            counters,
            capture,
            chain,
            waiting: false,
            moved: false,
            until: None,
        }
    }

    /// Sends at most `budget` frames; returns how many went.
    fn transmit(&mut self, view: &View<'_>, budget: u32) -> Result<u32, ErrorCode> {
        let (mut frames, mut bytes, mut taken, mut spent) = (0, 0, 0, 0_u32);
        let mut parts: Vec<DriverSlice<'_>> = Vec::with_capacity(CHAIN_MAX);
        (self.waiting, self.moved, self.until) = (false, false, None);
        while spent < budget {
            parts.clear();
            let sent = match self.next(view, &mut parts)? {
                Next::Nothing => break,
                Next::Bad(reason) => Sent::Dropped(reason),
                Next::Ready => {
                    let Some((header, eth)) = self.chain.head else { break };
                    let packet = Packet { header, eth, body: Body::Driver(&parts) };
                    let sent = self.queue.send(&packet);
                    if let Sent::Done { .. } = sent {
                        frames += 1;
                        bytes += packet.len() as u64;
                        if let Some(capture) = &self.capture {
                            capture.record(&packet);
                        }
                    }
                    sent
                }
            };
            match sent {
                Sent::Done { units } => spent = spent.saturating_add(units.max(1)),
                Sent::Dropped(reason) => {
                    self.counters.tx.drops.count(reason);
                    spent += 1;
                }
                Sent::Wait { until, moved } => {
                    self.counters.tx.waits.one();
                    self.waiting = true;
                    self.until = until;
                    self.moved |= moved;
                    break;
                }
            }
            taken += 1;
            for entry in self.chain.entries.drain(..) {
                self.tx.ring.give_back(entry);
            }
            self.chain.bytes = 0;
            self.chain.head = None;
        }
        if taken != 0 {
            self.counters.tx.frames.add(frames);
            self.counters.tx.bytes.add(bytes);
            self.counters.tx.batches.one();
            self.counters.tx.ring_fill.set(self.tx.ring.pending());
        }
        Ok(taken)
    }

    /// Takes the next frame from the ring, or the one that had to wait; `parts` gets what follows
    /// its Ethernet header.
    fn next<'v>(
        &mut self,
        view: &'v View<'_>,
        parts: &mut Vec<DriverSlice<'v>>,
    ) -> Result<Next, ErrorCode> {
        while self.chain.entries.last().is_none_or(|last| last.flags & NEXT != 0) {
            let Some(entry) = self.tx.ring.take()? else { return Ok(Next::Nothing) };
            self.chain.bytes = self.chain.bytes.saturating_add(entry.len as usize);
            if entry.len == 0
                || self.chain.entries.len() == CHAIN_MAX
                || self.chain.bytes > FRAME_MAX
            {
                return Err(ErrorCode::BAD_LENGTH);
            }
            self.chain.entries.push(entry);
            // A part of a frame is progress too: what it was armed for has come, and the task must
            // not sleep before it has armed again.
            self.moved = true;
        }
        const HEAD: usize = HEADER_BYTES + ETH_BYTES;
        let mut head = [0; HEAD];
        let mut at = 0;
        for entry in &self.chain.entries {
            let slice = view.slice(entry.addr, u64::from(entry.len), false)?;
            let (front, rest) = slice.split_at(HEAD - at);
            at += front.copy_to(&mut head[at..]);
            if !rest.is_empty() {
                parts.push(rest);
            }
        }
        if at < HEAD {
            return Ok(Next::Bad(DropReason::Short));
        }
        // Once a frame waits, what its header said when it was checked stays what it is sent with.
        if self.chain.head.is_none() {
            let (mut front, mut eth) = ([0; HEADER_BYTES], [0; ETH_BYTES]);
            front.copy_from_slice(&head[..HEADER_BYTES]);
            eth.copy_from_slice(&head[HEADER_BYTES..]);
            let mut header = Header::parse(&front);
            if !header.check(self.chain.bytes - HEADER_BYTES, self.port.features, self.port.mtu) {
                return Ok(Next::Bad(DropReason::BadHeader));
            }
            self.chain.head = Some((header, eth));
        }
        Ok(Next::Ready)
    }
}

impl Task for Pair {
    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let memory = self.memory.clone();
        let view = memory.view();
        let sent = self.transmit(&view, budget);
        // Even if this driver broke the protocol: what went before is in others' hands, and they
        // wait for it.
        self.queue.flush();
        let sent = sent?;
        if sent != 0 {
            self.tx.interrupt.kick(self.tx.ring.post());
        }
        let received = self.queue.receive(&view, budget)?;
        let mut woke = false;
        if let Some(rx) = &mut *lock(&self.port.lanes[usize::from(self.index)].rx) {
            rx.post();
            woke = rx.serve_waiters()?;
        }
        if sent + received != 0 {
            self.port.status.moved();
        }
        Ok(if sent + received != 0 || woke || self.moved { Progress::Busy } else { Progress::Idle })
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        let rx = lock(&self.port.lanes[usize::from(self.index)].rx)
            .as_mut()
            .map_or(Armed::Waiting, |rx| rx.arm());
        // While a frame waits for the back end, more frames would be no news.
        let tx = if self.waiting { self.queue.arm() } else { self.tx.ring.arm(0) };
        Ok(if tx == Armed::Missed { tx } else { rx })
    }

    fn disarm(&mut self) {
        self.tx.ring.disarm();
        if let Some(rx) = &mut *lock(&self.port.lanes[usize::from(self.index)].rx) {
            rx.disarm();
        }
    }

    fn carried(&self) -> u64 {
        const EACH: u64 = 512;
        let (tx, rx) = (&self.counters.tx, &self.counters.rx);
        tx.bytes.get() + rx.bytes.get() + EACH * (tx.frames.get() + rx.frames.get())
    }

    fn deadline(&self) -> Option<Instant> {
        [self.until, self.queue.deadline()].into_iter().flatten().min()
    }
}
