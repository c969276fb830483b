// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Driver of `venet`, the Ethernet controller (spec/venet.md).
//!
//! A [`Nic`] is opened, gets its queue pairs ([`Nic::queue_pair`]), and is started. Queues live
//! apart from it, each with the thread that serves it. A virtio-net header precedes each frame. It
//! has [`HEADER_BYTES`] bytes, or [`HASH_HEADER_BYTES`] bytes in received frames with [`F_HASH`].

mod fifo;
mod header;
mod pages;
mod rx;
mod tx;

use vbus_shm::abi::class;
use vbus_shm::abi::venet::{self, status_page};
use vbus_shm::ring::{DriverEnd, Layout, Returns, SIGNAL_OFFSET};
use vbus_shm::signal::Armed;
use vbus_shm::signal::end::Driver;
use vbus_shm::state;

pub use fifo::{Fifo, Place};
pub use header::{BadHeader, Gso, Header, HeaderHash, Segments, header_length};
pub use pages::{Duplex, NicStatus, PairCounters, Traffic};
pub use rx::{Received, Rx, RxRing};
pub use tx::{Piece, Tx};
pub use vbus_shm::abi::venet::{
    CHAIN_MAX, F_COALESCE, F_HASH, F_MAC, F_RSS, F_RX, F_RX_CSUM, F_RX_ECN, F_RX_SHIFT, F_RX_TSO4,
    F_RX_TSO6, F_RX_USO, F_TX, F_TX_CSUM, F_TX_ECN, F_TX_TSO4, F_TX_TSO6, F_TX_USO, F_VLAN,
    FILTER_ALL_MULTICAST, FILTER_MAX, FILTER_PROMISCUOUS, FRAME_MAX, HASH_HEADER_BYTES,
    HEADER_BYTES, RSS_KEY_BYTES, VLAN_MAP_BYTES, counters_page, hash_kind,
};

use crate::{Bell, Error, Function, Hal, Region, state_page};

/// The most entries of a ring that this driver makes.
pub const RING_MAX: u32 = 1024;
/// The smallest receive buffer: the largest frame, with its hash, fits a chain of these.
pub const BUFFER_MIN: u32 = 3328;

const _: () = assert!(
    BUFFER_MIN as usize * CHAIN_MAX >= FRAME_MAX - HEADER_BYTES + HASH_HEADER_BYTES
        && RING_MAX as usize > CHAIN_MAX
);

/// The contents of the device's config area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The device's MAC address.
    pub mac: [u8; 6],
    /// The largest frame without its Ethernet header, in bytes.
    pub mtu: u16,
    /// The most queue pairs, 1..=[`QUEUE_PAIRS_MAX`](venet::QUEUE_PAIRS_MAX).
    pub queue_pairs: u16,
    /// The most entries of a ring: a power of two, 32..=[`RING_MAX`].
    pub ring_entries: u32,
    /// The most entries of an indirection table.
    pub rss_table_max: u16,
    /// The kinds of frames that the device can hash.
    pub hash_kinds: u32,
}

/// How the device hashes received frames and spreads them over the receive queues.
#[derive(Clone, Copy, Debug)]
pub struct Rss<'a> {
    /// The kinds of frames that are hashed ([`hash_kind`]), some of [`Config::hash_kinds`].
    pub kinds: u32,
    /// The key.
    pub key: [u8; RSS_KEY_BYTES],
    /// The queue pair for each value of the hash's low bits: a power of two of them, at most
    /// [`Config::rss_table_max`]. Empty: the device hashes frames, but does not spread them by the
    /// hash.
    pub table: &'a [u16],
}

/// How long the device holds interrupts of a ring back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coalesce {
    /// Microseconds. 0: interrupts are not held back.
    pub usecs: u32,
    /// The interrupt comes once this many frames have passed, at the latest. 0: any number.
    pub frames: u32,
}

/// A ring that is registered.
#[derive(Debug)]
struct Ring<H: Hal> {
    end: DriverEnd<H::Dma>,
    bell: Bell<H>,
    region: Region,
}

/// A NIC with an open connection.
#[derive(Debug)]
pub struct Nic<H: Hal> {
    status: state::Reader<H::Dma, Driver>,
    seen: u64,
    counters: Option<state::Reader<H::Dma, Driver>>,
    config: Config,
    function: Function<H>,
}

/// Reads the config area of a NIC, before or after it is opened.
pub fn config<H: Hal>(function: &Function<H>) -> Result<Config, Error> {
    if function.info().class != u32::from(class::VENET) {
        return Err(Error::WrongClass(function.info().class));
    }
    let mut area = [0; venet::CONFIG_BYTES];
    function.config(&mut area)?;
    let u16_at = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
    let mut mac = [0; 6];
    mac.copy_from_slice(&area[venet::CONFIG_MAC..venet::CONFIG_MAC + 6]);
    let entries = u32::from(u16_at(venet::CONFIG_RING_MAX)).min(RING_MAX);
    let config = Config {
        mac,
        mtu: u16_at(venet::CONFIG_MTU),
        queue_pairs: u16_at(venet::CONFIG_QUEUE_PAIRS).min(venet::QUEUE_PAIRS_MAX),
        ring_entries: if entries == 0 { 0 } else { 1 << entries.ilog2() },
        rss_table_max: u16_at(venet::CONFIG_RSS_TABLE_MAX).min(venet::RSS_TABLE_MAX),
        hash_kinds: u32::from(u16_at(venet::CONFIG_HASH_KINDS))
            | u32::from(u16_at(venet::CONFIG_HASH_KINDS + 2)) << 16,
    };
    if config.queue_pairs == 0 || config.ring_entries < 32 {
        return Err(Error::Corrupt("the NIC's config area has no queue pairs, or too small rings"));
    }
    Ok(config)
}

impl<H: Hal> Nic<H> {
    /// Opens the NIC and registers its status page. It accepts the features of `wanted` that the
    /// NIC offers and that can be combined. The interrupts of the status page and the function's
    /// events come on `vector`.
    pub fn open(mut function: Function<H>, wanted: u64, vector: u16) -> Result<Nic<H>, Error> {
        let config = config(&function)?;
        let features = venet::complete(wanted & function.info().features);
        function.open_with_vector(features, vector)?;
        let (id, bytes) = (venet::REGION_STATUS, status_page::BYTES);
        let (status, _) = state_page::reader(&mut function, id, vector, bytes)?;
        Ok(Nic { status, seen: 0, counters: None, config, function })
    }

    /// The device's config area, as it was when the NIC was opened.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The function.
    pub fn function(&self) -> &Function<H> {
        &self.function
    }

    /// As [`Function::set_budget`].
    pub fn set_budget(&mut self, nanoseconds: Option<u64>) {
        self.function.set_budget(nanoseconds);
    }

    /// Makes queue pair `q` with rings of `entries` entries (a power of two, at most
    /// [`Config::ring_entries`]), and a receive buffer of `buffer_bytes` (at least [`BUFFER_MIN`])
    /// for each entry. The function keeps the memory of rings and receive buffers until the device
    /// has let go of it. Its interrupts come on `vector`. Pairs 0, 1, ... that are there at
    /// [`start`](Self::start) are in use then. One that is made later is in use from
    /// [`set_queues`](Self::set_queues) on.
    pub fn queue_pair(
        &mut self,
        q: u16,
        entries: u32,
        buffer_bytes: u32,
        vector: u16,
    ) -> Result<(Tx<H>, Rx<H>), Error> {
        Ok((self.tx(q, entries, vector)?, self.rx(q, entries, buffer_bytes, vector)?))
    }

    /// Makes the transmit queue of pair `q`, with a ring of `entries` entries. With
    /// [`rx_ring`](Self::rx_ring) it is for a driver that has receive buffers of its own. Otherwise
    /// as [`queue_pair`](Self::queue_pair).
    pub fn tx(&mut self, q: u16, entries: u32, vector: u16) -> Result<Tx<H>, Error> {
        Ok(Tx::new(q, self.ring(venet::tx(q), entries, Returns::Counted, vector)?))
    }

    /// Makes the receive queue of pair `q`, for a driver that has buffers of `buffer_bytes` bytes
    /// of its own and gives each by its address ([`RxRing::give`]). Otherwise as
    /// [`queue_pair`](Self::queue_pair).
    pub fn rx_ring(
        &mut self,
        q: u16,
        entries: u32,
        buffer_bytes: u32,
        vector: u16,
    ) -> Result<RxRing<H>, Error> {
        if buffer_bytes < BUFFER_MIN {
            return Err(Error::Unsupported("so small receive buffers"));
        }
        let ring = self.ring(venet::rx(q), entries, Returns::Runs, vector)?;
        Ok(RxRing::new(q, ring, buffer_bytes, self.function.features() & F_HASH != 0))
    }

    /// Takes a queue pair away. The device touches neither its rings nor its buffers when this
    /// returns. A pair in use is to be taken out of use first, by [`set_queues`](Self::set_queues).
    pub fn remove_pair(&mut self, tx: Tx<H>, rx: impl Into<RxRing<H>>) -> Result<(), Error> {
        self.function.region_drop(tx.ring.region)?;
        self.function.region_drop(rx.into().ring.region)
    }

    /// Resets a transmit queue: takes its ring away, and puts a new one of `entries` entries in its
    /// place. Frames that the device has not taken are not sent. The device does not touch their
    /// memory when this returns.
    pub fn reset_tx(&mut self, tx: Tx<H>, entries: u32, vector: u16) -> Result<Tx<H>, Error> {
        let q = tx.q;
        self.function.region_drop(tx.ring.region)?;
        self.tx(q, entries, vector)
    }

    /// Resets a receive queue: takes its ring away, and puts a new one of `entries` entries in its
    /// place, with new buffers that the driver has not given yet. The device does not touch the
    /// former buffers when this returns.
    pub fn reset_rx(
        &mut self,
        rx: Rx<H>,
        entries: u32,
        buffer_bytes: u32,
        vector: u16,
    ) -> Result<Rx<H>, Error> {
        let RxRing { q, ring, .. } = rx.into();
        self.function.region_drop(ring.region)?;
        self.rx(q, entries, buffer_bytes, vector)
    }

    fn rx(&mut self, q: u16, entries: u32, bytes: u32, vector: u16) -> Result<Rx<H>, Error> {
        let buffers = self.function.hal().alloc(entries as usize * bytes as usize)?;
        let mut rx = self.rx_ring(q, entries, bytes, vector)?;
        if let Err(error) = self.function.keep(&mut rx.ring.region, &buffers) {
            self.function.region_drop(rx.ring.region)?;
            return Err(error);
        }
        Ok(Rx::new(rx, buffers))
    }

    fn ring(
        &mut self,
        id: u32,
        entries: u32,
        returns: Returns,
        vector: u16,
    ) -> Result<Ring<H>, Error> {
        if id / 2 >= u32::from(self.config.queue_pairs) || entries > self.config.ring_entries {
            return Err(Error::Unsupported("so many queue pairs or entries"));
        }
        let layout =
            Layout::new(entries, returns).map_err(|_| Error::Unsupported("a ring of that size"))?;
        let memory = self.function.hal().alloc(layout.bytes())?;
        let ring = DriverEnd::create(memory.clone(), layout, 0).map_err(|_| Error::NoMemory)?;
        let region = self.function.region_add(
            id,
            vector,
            &memory,
            (0, layout.bytes()),
            Some(SIGNAL_OFFSET),
        )?;
        Ok(Ring { end: ring, bell: self.function.bell(region.handle()), region })
    }

    /// Lets the device serve the queues.
    pub fn start(&mut self) -> Result<(), Error> {
        self.function.call(venet::CALL_START, 0, &mut []).map(drop)
    }

    /// Sets the receive filter: `flags` ([`FILTER_PROMISCUOUS`], [`FILTER_ALL_MULTICAST`]), and the
    /// multicast addresses to be let through. If they are more than [`FILTER_MAX`], every multicast
    /// is.
    pub fn filter(&mut self, mut flags: u32, addresses: &[[u8; 6]]) -> Result<(), Error> {
        const FIXED: usize = 8;
        let mut buffer = [0; FIXED + 6 * FILTER_MAX as usize];
        let mut count = 0u32;
        if addresses.len() > FILTER_MAX as usize {
            flags |= FILTER_ALL_MULTICAST;
        } else {
            for (entry, address) in buffer[FIXED..].chunks_exact_mut(6).zip(addresses) {
                entry.copy_from_slice(address);
                count += 1;
            }
        }
        buffer[..4].copy_from_slice(&flags.to_le_bytes());
        buffer[4..8].copy_from_slice(&count.to_le_bytes());
        let used = FIXED + 6 * count as usize;
        self.function.call(venet::CALL_FILTER, 0, &mut buffer[..used]).map(drop)
    }

    /// Sets the offloads of received frames, a part of the `F_RX_` features that were accepted.
    /// Frames that were received before may still go by the former ones.
    pub fn set_offloads(&mut self, features: u64) -> Result<(), Error> {
        self.function.call(venet::CALL_SET_OFFLOADS, 0, &mut features.to_le_bytes()).map(drop)
    }

    /// Uses queue pairs 0 to `queues - 1` from here on. They must be there. Others send what is in
    /// their transmit rings, and receive nothing.
    pub fn set_queues(&mut self, queues: u16) -> Result<(), Error> {
        let mut buffer = u32::from(queues).to_le_bytes();
        self.function.call(venet::CALL_SET_QUEUES, 0, &mut buffer).map(drop)
    }

    /// Gives the device another address, until the connection closes. Needs [`F_MAC`].
    pub fn set_mac(&mut self, mut mac: [u8; 6]) -> Result<(), Error> {
        self.function.call(venet::CALL_SET_MAC, 0, &mut mac).map(drop)
    }

    /// Hashes received frames, or with `None` no longer. Needs [`F_HASH`] or [`F_RSS`]; a table
    /// needs [`F_RSS`].
    pub fn set_rss(&mut self, rss: Option<&Rss<'_>>) -> Result<(), Error> {
        const FIXED: usize = 8 + RSS_KEY_BYTES;
        let mut buffer = [0; FIXED + 2 * venet::RSS_TABLE_MAX as usize];
        let mut used = FIXED;
        if let Some(rss) = rss {
            let table = buffer[FIXED..].chunks_exact_mut(2);
            let Some(entries) = u16::try_from(rss.table.len()).ok().filter(|entries| {
                *entries <= self.config.rss_table_max && usize::from(*entries) <= table.len()
            }) else {
                return Err(Error::Unsupported("so large an indirection table"));
            };
            for (entry, queue) in table.zip(rss.table) {
                entry.copy_from_slice(&queue.to_le_bytes());
            }
            used += 2 * rss.table.len();
            buffer[..4].copy_from_slice(&rss.kinds.to_le_bytes());
            buffer[4..6].copy_from_slice(&entries.to_le_bytes());
            buffer[8..FIXED].copy_from_slice(&rss.key);
        }
        self.function.call(venet::CALL_SET_RSS, 0, &mut buffer[..used]).map(drop)
    }

    /// Lets the device hold the interrupts of queue pair `pair` back, or those of all pairs. The
    /// device counts from the frame that it would have interrupted for. Needs [`F_COALESCE`].
    pub fn set_coalesce(
        &mut self,
        pair: Option<u16>,
        rx: Coalesce,
        tx: Coalesce,
    ) -> Result<(), Error> {
        let pair = pair.map_or(venet::ALL_PAIRS, u32::from);
        let mut buffer = [0; 24];
        let words = [pair, 0, rx.usecs, rx.frames, tx.usecs, tx.frames];
        for (bytes, word) in buffer.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        self.function.call(venet::CALL_SET_COALESCE, 0, &mut buffer).map(drop)
    }

    /// Lets only tagged frames of these VLAN ids through (id `n` is bit `n % 8` of byte `n / 8`),
    /// besides those without a tag and of id 0; with `None` all. Needs [`F_VLAN`].
    pub fn set_vlans(&mut self, ids: Option<&[u8; VLAN_MAP_BYTES]>) -> Result<(), Error> {
        let mut buffer = [0; 8 + VLAN_MAP_BYTES];
        let mut used = 8;
        if let Some(ids) = ids {
            buffer[0] = 1;
            buffer[8..].copy_from_slice(ids);
            used = buffer.len();
        }
        self.function.call(venet::CALL_SET_VLANS, 0, &mut buffer[..used]).map(drop)
    }

    /// Registers the counters page, for [`counters`](Self::counters). It never interrupts.
    pub fn add_counters(&mut self, vector: u16) -> Result<(), Error> {
        let bytes = counters_page::BYTES * u32::from(self.config.queue_pairs);
        let id = venet::REGION_COUNTERS;
        self.counters = Some(state_page::reader(&mut self.function, id, vector, bytes)?.0);
        Ok(())
    }

    /// The counters of queue pair `q`, as the device wrote them last: at most 100 ms ago while
    /// there is traffic.
    pub fn counters(&self, q: u16) -> Result<PairCounters, Error> {
        let reader = self.counters.as_ref().ok_or(Error::Unsupported("no counters page"))?;
        // A pair that the page does not have counts nothing.
        let mut value = [0; counters_page::BYTES as usize];
        let first = usize::from(q) * counters_page::WORDS;
        reader.read_from(first, &mut value).map_err(|state::Overrun| NEVER_STILL)?;
        Ok(pages::counters(&value))
    }

    /// Reads the newest status, and notes its version for [`arm_status`](Self::arm_status).
    pub fn status(&mut self) -> Result<NicStatus, Error> {
        let mut value = [0; status_page::BYTES as usize];
        self.seen = self.status.read(&mut value).map_err(|state::Overrun| NEVER_STILL)?;
        Ok(pages::status(&value))
    }

    /// Whether there is a newer status than the one read last. It reads shared memory.
    pub fn status_is_newer(&self) -> bool {
        self.status.version() != self.seen
    }

    /// Asks for an interrupt by the first status after the one read last.
    pub fn arm_status(&mut self) -> Armed {
        self.status.arm_newer(self.seen)
    }

    /// Closes the connection and gives the function back. The NIC's queues can no longer be used.
    pub fn close(mut self) -> Function<H> {
        self.function.close();
        self.function
    }
}

const NEVER_STILL: Error = Error::Corrupt("a page that changes during every read");
