// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver of venet in this process, and the driver's end of its rings.

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::Value;
use vbus_core::shm::abi::venet as abi;
use vbus_core::shm::ring::{self, DriverEnd, Entry, Layout, NEXT, Returns};
use vbus_core::shm::signal::{Armed, end};
use vbus_core::shm::state;
use vbus_core::{Bus, Endpoint, ErrorCode, Window};
pub use vbus_test_driver::{Interrupts, Memory, TIMEOUT, add, call, open};

/// A bus with the classes of this crate.
pub fn bus(workers: usize) -> Bus {
    vbus_test_driver::bus(workers, vbus_devices::classes())
}

/// The shape of a driver.
#[derive(Clone, Copy)]
pub struct Shape {
    pub pairs: u16,
    pub entries: u32,
    pub buffer_bytes: u32,
    pub features: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Shape { pairs: 1, entries: 64, buffer_bytes: 2048, features: 0 }
    }
}

/// One queue pair.
pub struct Pair {
    pub tx: DriverEnd<Window>,
    pub rx: DriverEnd<Window>,
    pub tx_addr: u64,
    pub rx_addr: u64,
    pub tx_handle: u32,
    pub rx_handle: u32,
    tx_buffers: u64,
    pub rx_buffers: u64,
    sent: u64,
    /// The receive buffers that the device has, in order.
    order: VecDeque<u16>,
    /// The entries so far of a frame that is arriving.
    partial: Vec<u8>,
}

/// Makes a ring and registers it.
fn ring(
    endpoint: &Endpoint,
    memory: &mut Memory,
    id: u32,
    entries: u32,
) -> (DriverEnd<Window>, u64, u32) {
    let returns = if id % 2 == 0 { TX_RETURNS } else { RX_RETURNS };
    let layout = Layout::new(entries, returns).unwrap();
    let addr = memory.alloc(layout.bytes());
    let end = DriverEnd::create(memory.window(addr, layout.bytes()), layout, 0).unwrap();
    let handle = add(endpoint, id, addr, layout.bytes(), ring::SIGNAL_OFFSET).unwrap();
    (end, addr, handle)
}

/// How a transmit ring returns entries.
pub const TX_RETURNS: Returns = Returns::Counted;
/// How a receive ring returns entries.
pub const RX_RETURNS: Returns = Returns::Runs;

impl Pair {
    fn new(endpoint: &Endpoint, memory: &mut Memory, q: u16, shape: Shape) -> Pair {
        let (tx, tx_addr, tx_handle) = ring(endpoint, memory, abi::tx(q), shape.entries);
        let (rx, rx_addr, rx_handle) = ring(endpoint, memory, abi::rx(q), shape.entries);
        let tx_buffers = memory.alloc(SLOT * shape.entries as usize);
        let rx_buffers = memory.alloc((shape.buffer_bytes * shape.entries) as usize);
        Pair {
            tx,
            rx,
            tx_addr,
            rx_addr,
            tx_handle,
            rx_handle,
            tx_buffers,
            rx_buffers,
            sent: 0,
            order: VecDeque::new(),
            partial: Vec::new(),
        }
    }
}

/// A venet driver.
pub struct Net {
    pub endpoint: Arc<Endpoint>,
    pub memory: Memory,
    pub interrupts: Arc<Interrupts>,
    pub pairs: Vec<Pair>,
    pub shape: Shape,
    status: Option<state::Reader<Window, end::Driver>>,
}

/// The space for one sent frame.
const SLOT: usize = 128 << 10;

impl Net {
    /// A device of class venet on `bus` and a driver that has started on it, with all its buffers
    /// posted.
    pub fn new(bus: &Bus, name: &str, config: Value, shape: Shape) -> Net {
        let endpoint = bus.create(name, "venet", &config).unwrap();
        let mut net = Net::open(&endpoint, shape);
        net.post_all();
        net
    }

    /// A driver that has opened and started the device behind `endpoint`, without buffers.
    pub fn open(endpoint: &Arc<Endpoint>, shape: Shape) -> Net {
        endpoint.close();
        endpoint.unmap_all();
        let interrupts = Arc::new(Interrupts::default());
        endpoint.set_interrupt_sink(interrupts.clone());
        let per_pair = u64::from(shape.entries)
            * (SLOT as u64 + u64::from(shape.buffer_bytes.max(4096)))
            + (2 << 20);
        // Room for another pair, and for later rings.
        let mut memory = Memory::new(endpoint, per_pair * (u64::from(shape.pairs) + 1) + (1 << 20));
        open(endpoint, &memory, shape.features).unwrap();
        let pairs = (0..shape.pairs).map(|q| Pair::new(endpoint, &mut memory, q, shape)).collect();
        let mut net =
            Net { endpoint: endpoint.clone(), memory, interrupts, pairs, shape, status: None };
        net.call(abi::CALL_START, &[]).unwrap();
        net
    }

    pub fn call(&mut self, function: u32, buffer: &[u8]) -> Result<u64, ErrorCode> {
        call(&self.endpoint, &self.memory, function, buffer)
    }

    /// Makes one more queue pair, with its buffers posted.
    pub fn add_pair(&mut self) {
        let q = self.pairs.len();
        let pair = Pair::new(&self.endpoint, &mut self.memory, q as u16, self.shape);
        self.pairs.push(pair);
        self.post_all();
    }

    /// Drops the receive ring of pair `q`, or the transmit ring.
    pub fn drop_ring(&mut self, q: usize, is_rx: bool) {
        let pair = &self.pairs[q];
        let handle = if is_rx { pair.rx_handle } else { pair.tx_handle };
        self.endpoint.region_drop(u64::from(handle)).unwrap();
    }

    /// Makes a ring of `entries` entries, without buffers, in the place of one that was dropped.
    pub fn add_ring(&mut self, q: usize, is_rx: bool, entries: u32) {
        let id = if is_rx { abi::rx(q as u16) } else { abi::tx(q as u16) };
        let (end, addr, handle) = ring(&self.endpoint, &mut self.memory, id, entries);
        let pair = &mut self.pairs[q];
        if is_rx {
            (pair.rx, pair.rx_addr, pair.rx_handle) = (end, addr, handle);
            pair.partial.clear();
            pair.order.clear();
        } else {
            (pair.tx, pair.tx_addr, pair.tx_handle, pair.sent) = (end, addr, handle, 0);
        }
    }

    /// Registers the counters page of a device with `pairs` queue pairs.
    pub fn add_counters_page(&mut self, pairs: u32) -> state::Reader<Window, end::Driver> {
        let layout = state::Layout::new(abi::counters_page::BYTES * pairs, 4).unwrap();
        let addr = self.memory.alloc(layout.bytes());
        let window = self.memory.window(addr, layout.bytes());
        layout.format(&window, 0).unwrap();
        let (id, signal) = (abi::REGION_COUNTERS, state::SIGNAL_OFFSET);
        add(&self.endpoint, id, addr, layout.bytes(), signal).unwrap();
        state::Reader::attach(window, end::Driver).unwrap()
    }

    /// Registers the status page.
    pub fn add_status_page(&mut self) -> u32 {
        let layout = state::Layout::new(abi::status_page::BYTES, 4).unwrap();
        let addr = self.memory.alloc(layout.bytes());
        let window = self.memory.window(addr, layout.bytes());
        layout.format(&window, 0).unwrap();
        self.status = Some(state::Reader::attach(window, end::Driver).unwrap());
        add(&self.endpoint, abi::REGION_STATUS, addr, layout.bytes(), state::SIGNAL_OFFSET).unwrap()
    }

    /// Waits until `done` accepts the status page.
    pub fn status(&mut self, what: &str, done: impl Fn(&[u64; abi::status_page::WORDS]) -> bool) {
        let reader = self.status.as_mut().unwrap();
        self.interrupts.wait(what, || {
            let mut bytes = [0; abi::status_page::BYTES as usize];
            let version = reader.read(&mut bytes).unwrap();
            let mut words = [0; abi::status_page::WORDS];
            for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
                *word = u64::from_le_bytes(bytes.try_into().unwrap());
            }
            let _ = reader.arm_newer(version);
            done(&words).then_some(())
        });
    }

    /// Posts every buffer of every receive ring.
    pub fn post_all(&mut self) {
        for q in 0..self.pairs.len() {
            let free = self.pairs[q].rx.space();
            for id in 0..free {
                self.post_buffer(q, id as u16);
            }
            self.kick_rx(q);
        }
    }

    /// Puts buffer `id` into the receive ring; [`kick_rx`](Self::kick_rx) posts.
    pub fn post_buffer(&mut self, q: usize, id: u16) {
        let (len, addr) = (self.shape.buffer_bytes, self.buffer(q, id));
        self.pairs[q].rx.submit(Entry { addr, len, id, flags: 0 }).unwrap();
        self.pairs[q].order.push_back(id);
    }

    /// Address of receive buffer `id`.
    fn buffer(&self, q: usize, id: u16) -> u64 {
        self.pairs[q].rx_buffers + u64::from(self.shape.buffer_bytes) * u64::from(id)
    }

    pub fn kick_rx(&mut self, q: usize) {
        if self.pairs[q].rx.post().is_wanted() {
            self.endpoint.ring(u64::from(self.pairs[q].rx_handle));
        }
    }

    pub fn kick_tx(&mut self, q: usize) {
        if self.pairs[q].tx.post().is_wanted() {
            self.endpoint.ring(u64::from(self.pairs[q].tx_handle));
        }
    }

    /// Puts a frame into the transmit ring in `parts` pieces, without posting it; false if there is
    /// no room.
    pub fn submit(&mut self, q: usize, header: &[u8; 12], frame: &[u8], parts: usize) -> bool {
        let pair = &mut self.pairs[q];
        if pair.tx.layout().returns() == Returns::Counted {
            pair.tx.reap_count(u32::MAX).unwrap();
        }
        if (pair.tx.space() as usize) < parts {
            return false;
        }
        let addr = pair.tx_buffers + pair.sent % u64::from(self.shape.entries) * SLOT as u64;
        pair.sent += 1;
        let bytes = [&header[..], frame].concat();
        self.memory.write(addr, &bytes);
        let step = bytes.len().div_ceil(parts);
        let chunks: Vec<_> = bytes.chunks(step).map(<[u8]>::len).collect();
        let mut at = addr;
        for (i, len) in chunks.iter().enumerate() {
            let flags = if i + 1 < chunks.len() { NEXT } else { 0 };
            self.pairs[q].tx.submit(Entry { addr: at, len: *len as u32, id: 0, flags }).unwrap();
            at += *len as u64;
        }
        true
    }

    /// Frames put into the transmit ring so far.
    pub fn sent(&self, q: usize) -> u64 {
        self.pairs[q].sent
    }

    /// Sends a plain frame, waiting for room in the ring.
    pub fn send(&mut self, q: usize, frame: &[u8]) {
        self.send_with(q, &[0; 12], frame, 1);
    }

    /// Sends a frame with a header, in `parts` pieces, waiting for room in the ring.
    pub fn send_with(&mut self, q: usize, header: &[u8; 12], frame: &[u8], parts: usize) {
        let interrupts = self.interrupts.clone();
        interrupts.wait("room in the transmit ring", || {
            let sent = self.submit(q, header, frame, parts);
            if !sent && self.pairs[q].tx.arm(0) == Armed::Missed {
                return self.submit(q, header, frame, parts).then_some(());
            }
            sent.then_some(())
        });
        self.kick_tx(q);
    }

    /// The next frame with its header, if there is one; its buffers are posted again.
    pub fn try_recv(&mut self, q: usize) -> Option<Vec<u8>> {
        while let Some(entry) = self.pairs[q].rx.reap().unwrap() {
            let id = self.pairs[q].order.pop_front().unwrap();
            let addr = self.buffer(q, id);
            let bytes = self.memory.read(addr, entry.len as usize);
            self.pairs[q].partial.extend_from_slice(&bytes);
            self.post_buffer(q, id);
            self.kick_rx(q);
            if entry.flags & NEXT == 0 {
                return Some(std::mem::take(&mut self.pairs[q].partial));
            }
        }
        None
    }

    /// Waits for the next frame; without its header.
    pub fn recv(&mut self, q: usize) -> Vec<u8> {
        self.recv_with(q).1
    }

    /// Waits for the next frame and its header.
    pub fn recv_with(&mut self, q: usize) -> ([u8; 12], Vec<u8>) {
        let (header, frame) = self.recv_header(q);
        (header[..12].try_into().unwrap(), frame)
    }

    /// Waits for the next frame on any of the first `queues` queues. Returns its queue and, without
    /// its header, the frame.
    pub fn recv_any(&mut self, queues: usize) -> (usize, Vec<u8>) {
        let (q, _, frame) = self.recv_any_header(queues);
        (q, frame)
    }

    /// The same, with the frame's header.
    pub fn recv_any_header(&mut self, queues: usize) -> (usize, Vec<u8>, Vec<u8>) {
        let (interrupts, header) = (self.interrupts.clone(), self.header_bytes());
        interrupts.wait("a frame", || {
            (0..queues).find_map(|q| {
                let got = self.try_recv(q).or_else(|| match self.pairs[q].rx.arm(0) {
                    Armed::Missed => self.try_recv(q),
                    Armed::Waiting => None,
                });
                got.map(|frame| (q, frame[..header].to_vec(), frame[header..].to_vec()))
            })
        })
    }

    /// Bytes of the header before each frame to the driver.
    fn header_bytes(&self) -> usize {
        match self.shape.features & abi::F_HASH {
            0 => abi::HEADER_BYTES,
            _ => abi::HASH_HEADER_BYTES,
        }
    }

    /// Waits for the next frame and its header, which has a hash if that was negotiated.
    pub fn recv_header(&mut self, q: usize) -> (Vec<u8>, Vec<u8>) {
        let interrupts = self.interrupts.clone();
        let mut frame = interrupts.wait("a frame", || {
            if let Some(frame) = self.try_recv(q) {
                return Some(frame);
            }
            match self.pairs[q].rx.arm(0) {
                Armed::Missed => self.try_recv(q),
                Armed::Waiting => None,
            }
        });
        let rest = frame.split_off(self.header_bytes());
        (frame, rest)
    }

    /// The frames to the driver that were dropped, for any reason, on all queues.
    pub fn drops(&self) -> u64 {
        let device = &self.endpoint.inspect()["device"];
        let pairs = device["pairs"].as_array().unwrap().iter();
        pairs
            .flat_map(|pair| pair["rx"]["drops"].as_object().unwrap().values())
            .map(|count| count.as_u64().unwrap())
            .sum()
    }

    /// A counter of the device, by its path in `inspect`.
    pub fn counter(&self, path: &str) -> u64 {
        self.endpoint.inspect()["device"].pointer(path).and_then(Value::as_u64).unwrap()
    }
}

/// A frame of `len` bytes between two addresses, with content that follows from `seed`.
pub fn frame(to: [u8; 6], from: [u8; 6], seed: u64, len: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from[..], &[0x88, 0xb5]].concat();
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    frame.extend_from_slice(&seed.to_le_bytes());
    while frame.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        frame.extend_from_slice(&x.to_le_bytes());
    }
    frame.truncate(len);
    frame
}
