//! Driver of `venet`, the Ethernet controller (spec/venet.md).
//!
//! A [`Nic`] is opened, gets its queue pairs ([`Nic::queue_pair`]), and is started. Queues live
//! apart from it, each with whichever thread serves it. Frames carry a virtio-net header of
//! [`HEADER_BYTES`] bytes in front.

mod rx;
mod tx;

use vbus_shm::abi::class;
use vbus_shm::abi::venet::{self, status_page};
use vbus_shm::ring::{DriverEnd, Layout, Returns, SIGNAL_OFFSET};
use vbus_shm::signal::Armed;
use vbus_shm::signal::end::Driver;
use vbus_shm::state;

pub use rx::{Received, Rx};
pub use tx::{Piece, Tx};
pub use vbus_shm::abi::venet::{
    CHAIN_MAX, F_CSUM, F_TSO, F_USO, FILTER_ALL_MULTICAST, FILTER_MAX, FILTER_PROMISCUOUS,
    FRAME_MAX, HEADER_BYTES,
};

use crate::{Bell, Error, Function, Hal};

/// The most entries of a ring that this driver makes.
pub const RING_MAX: u32 = 1024;
/// The smallest receive buffer: the largest frame fits a chain of these.
pub const BUFFER_MIN: u32 = 4096;

const _: () =
    assert!(BUFFER_MIN as usize * CHAIN_MAX >= FRAME_MAX && RING_MAX as usize > CHAIN_MAX);

/// What the device says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Its address.
    pub mac: [u8; 6],
    /// The largest frame without its Ethernet header, in bytes.
    pub mtu: u16,
    /// The most queue pairs, 1..=[`QUEUE_PAIRS_MAX`](venet::QUEUE_PAIRS_MAX).
    pub queue_pairs: u16,
    /// The most entries of a ring: a power of two, 32..=[`RING_MAX`].
    pub ring_entries: u32,
}

/// What the device's status page says: link and statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NicStatus {
    /// Whether there is a link.
    pub link: bool,
    /// Frames, bytes and dropped frames from the driver.
    pub tx: Traffic,
    /// Frames, bytes and dropped frames to the driver.
    pub rx: Traffic,
}

/// Counters of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames that passed.
    pub frames: u64,
    /// Their bytes, without the headers.
    pub bytes: u64,
    /// Frames that did not.
    pub drops: u64,
}

/// A NIC with an open connection.
#[derive(Debug)]
pub struct Nic<H: Hal> {
    status: state::Reader<H::Dma, Driver>,
    seen: u64,
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
    };
    if config.queue_pairs == 0 || config.ring_entries < 32 {
        return Err(Error::Corrupt("the NIC's config area says that it has no queues"));
    }
    Ok(config)
}

impl<H: Hal> Nic<H> {
    /// Opens the NIC with those of the features `wanted` that it offers and that go together, and
    /// registers its status page. The interrupts of both that page and the function come on `vector`.
    pub fn open(mut function: Function<H>, wanted: u64, vector: u16) -> Result<Nic<H>, Error> {
        let config = config(&function)?;
        let mut features = wanted & function.info().features & (F_CSUM | F_TSO | F_USO);
        if features & F_CSUM == 0 {
            features = 0;
        }
        function.open_with_vector(features, vector)?;
        let layout =
            state::Layout::new(status_page::BYTES, state::DEFAULT_SLOTS).map_err(|_| LAYOUT)?;
        let page = function.hal().alloc(layout.bytes())?;
        layout.format(&page, 0).map_err(|_| Error::NoMemory)?;
        let status = state::Reader::attach(page.clone(), Driver).map_err(|_| LAYOUT)?;
        let place = (0, layout.bytes());
        function.region_add(
            venet::REGION_STATUS,
            vector,
            &page,
            place,
            Some(state::SIGNAL_OFFSET),
        )?;
        Ok(Nic { status, seen: 0, config, function })
    }

    /// The device's config area, as it was at the time of opening.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The function.
    pub fn function(&self) -> &Function<H> {
        &self.function
    }

    /// Makes queue pair `q` with rings of `entries` entries (a power of two, at most
    /// [`Config::ring_entries`]) and receive buffers of `buffer_bytes` (at least [`BUFFER_MIN`]).
    /// Its interrupts come on `vector`. To be called for pairs 0, 1, ... before
    /// [`start`](Self::start).
    pub fn queue_pair(
        &mut self,
        q: u16,
        entries: u32,
        buffer_bytes: u32,
        vector: u16,
    ) -> Result<(Tx<H>, Rx<H>), Error> {
        if q >= self.config.queue_pairs
            || entries > self.config.ring_entries
            || buffer_bytes < BUFFER_MIN
        {
            return Err(Error::Unsupported("so many queue pairs or entries, or so small buffers"));
        }
        let (ring, bell) = self.ring(venet::tx(q), entries, Returns::Counted, vector)?;
        let tx = Tx::new(ring, bell);
        let (ring, bell) = self.ring(venet::rx(q), entries, Returns::Entries, vector)?;
        let rx = Rx::new(ring, bell, buffer_bytes);
        Ok((tx, rx))
    }

    fn ring(
        &mut self,
        id: u32,
        entries: u32,
        returns: Returns,
        vector: u16,
    ) -> Result<(DriverEnd<H::Dma>, Bell<H>), Error> {
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
        Ok((ring, self.function.bell(region.handle())))
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
            for (place, address) in buffer[FIXED..].chunks_exact_mut(6).zip(addresses) {
                place.copy_from_slice(address);
                count += 1;
            }
        }
        buffer[..4].copy_from_slice(&flags.to_le_bytes());
        buffer[4..8].copy_from_slice(&count.to_le_bytes());
        let used = FIXED + 6 * count as usize;
        self.function.call(venet::CALL_FILTER, 0, &mut buffer[..used]).map(drop)
    }

    /// The newest status, and a mark for [`arm_status`](Self::arm_status).
    pub fn status(&mut self) -> Result<NicStatus, Error> {
        let mut value = [0; status_page::BYTES as usize];
        self.seen = self
            .status
            .read(&mut value)
            .map_err(|state::Overrun| Error::Corrupt("the status page never stands still"))?;
        let word = |at: usize| {
            value
                .chunks_exact(8)
                .nth(at)
                .map_or(0, |b| b.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)))
        };
        Ok(NicStatus {
            link: word(status_page::LINK) == 1,
            tx: Traffic {
                frames: word(status_page::TX_FRAMES),
                bytes: word(status_page::TX_BYTES),
                drops: word(status_page::TX_DROPS),
            },
            rx: Traffic {
                frames: word(status_page::RX_FRAMES),
                bytes: word(status_page::RX_BYTES),
                drops: word(status_page::RX_DROPS),
            },
        })
    }

    /// Whether there is a status newer than the one read last; costs a look at memory.
    pub fn status_is_newer(&self) -> bool {
        self.status.version() != self.seen
    }

    /// Asks for an interrupt by the status that follows the one read last.
    pub fn arm_status(&mut self) -> Armed {
        self.status.arm_newer(self.seen)
    }

    /// Closes the connection and gives the function back. Its queues are of no more use.
    pub fn close(mut self) -> Function<H> {
        self.function.close();
        self.function
    }
}

const LAYOUT: Error = Error::Unsupported("a page of that size");
