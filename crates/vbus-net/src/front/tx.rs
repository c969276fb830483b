// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A transmit ring. It checks each frame of the driver.

use std::sync::Arc;
use std::time::Instant;

use vbus_core::memory::{DriverSlice, View};
use vbus_core::shm::abi::venet::HEADER_BYTES;
use vbus_core::shm::ring::{DeviceEnd, Entry, NEXT};
use vbus_core::{ErrorCode, Interrupt, Window};
use vbus_net::{Body, CHAIN_MAX, ETH_BYTES, FRAME_MAX, Header, Offloads, Packet};

use super::coalesce::{Held, Setting};

/// The next frame of the transmit ring: its entries and, once they are complete, its header.
#[derive(Default)]
struct Chain {
    entries: Vec<Entry>,
    bytes: usize,
    head: Option<(Header, [u8; ETH_BYTES])>,
}

/// The transmit ring of a queue pair.
pub struct TxQueue {
    pub ring: DeviceEnd<Window>,
    interrupt: Interrupt,
    coalesce: Arc<Setting>,
    held: Held,
    chain: Chain,
    /// Whether the device took entries since [`begin`](Self::begin).
    pub took: bool,
}

/// What the transmit ring holds next.
pub enum Next {
    /// No complete frame.
    Nothing,
    /// A frame.
    Frame(Header, [u8; ETH_BYTES]),
    /// A frame that is shorter than an Ethernet header.
    Short,
    /// A frame with a wrong header.
    BadHeader,
    /// A frame, or a frame with segments, that is longer than the MTU allows.
    TooLong,
}

impl TxQueue {
    pub fn new(ring: DeviceEnd<Window>, interrupt: Interrupt, coalesce: Arc<Setting>) -> TxQueue {
        let chain = Chain { entries: Vec::with_capacity(CHAIN_MAX), ..Chain::default() };
        TxQueue { ring, interrupt, coalesce, held: Held::default(), chain, took: false }
    }

    /// Returns the next frame of the ring, or the frame that had to wait. `parts` gets the bytes
    /// after its Ethernet header. `offloads` are those that the driver may use.
    pub fn next<'v>(
        &mut self,
        view: &'v View<'_>,
        parts: &mut Vec<DriverSlice<'v>>,
        offloads: Offloads,
        mtu: usize,
    ) -> Result<Next, ErrorCode> {
        let chain = &mut self.chain;
        while chain.entries.last().is_none_or(|last| last.flags & NEXT != 0) {
            let Some(entry) = self.ring.take()? else { return Ok(Next::Nothing) };
            chain.bytes = chain.bytes.saturating_add(entry.len as usize);
            if entry.len == 0 || chain.entries.len() == CHAIN_MAX || chain.bytes > FRAME_MAX {
                return Err(ErrorCode::BAD_LENGTH);
            }
            chain.entries.push(entry);
            // A part of a frame is progress too. The driver has rung for it, so the task must arm
            // again before it sleeps.
            self.took = true;
        }
        const HEAD: usize = HEADER_BYTES + ETH_BYTES;
        let mut head = [0; HEAD];
        let mut at = 0;
        for entry in &chain.entries {
            let slice = view.slice(entry.addr, u64::from(entry.len), false)?;
            let (front, rest) = slice.split_at(HEAD - at);
            at += front.copy_to(&mut head[at..]);
            if !rest.is_empty() {
                parts.push(rest);
            }
        }
        if at < HEAD {
            return Ok(Next::Short);
        }
        // The device reads and checks the header once. A frame that waits keeps the checked header,
        // whatever the driver writes later.
        if let Some((header, eth)) = chain.head {
            return Ok(Next::Frame(header, eth));
        }
        let (mut front, mut eth) = ([0; HEADER_BYTES], [0; ETH_BYTES]);
        front.copy_from_slice(&head[..HEADER_BYTES]);
        eth.copy_from_slice(&head[HEADER_BYTES..]);
        let mut header = Header::parse(&front);
        if !header.check(chain.bytes - HEADER_BYTES, offloads) {
            return Ok(Next::BadHeader);
        }
        if !Packet::new(header, eth, Body::Driver(parts)).fits_mtu(mtu) {
            return Ok(Next::TooLong);
        }
        chain.head = Some((header, eth));
        Ok(Next::Frame(header, eth))
    }

    /// Makes the returns of `frames` frames visible.
    pub fn post(&mut self, frames: u32) {
        let kick = self.ring.post();
        self.held.posted(kick, frames.into(), &self.coalesce, &self.interrupt);
    }

    /// Sends the interrupt that is held back, if it is due.
    pub fn poll_held(&mut self) {
        self.held.poll(&self.coalesce, &self.interrupt);
    }

    /// When [`poll_held`](Self::poll_held) must be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.held.deadline()
    }

    /// The frame was sent or dropped: returns its entries to the driver.
    pub fn done(&mut self) {
        self.ring.give_back_all(self.chain.entries.drain(..).map(Into::into));
        self.chain.bytes = 0;
        self.chain.head = None;
    }
}
