//! Where a device's queues and what it is plugged into meet.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use serde_json::Value;
use vbus_core::memory::View;
use vbus_core::shm::signal::Armed;
use vbus_core::{ErrorCode, TaskHandle};

use super::counters::{PairCounters, TxDrops};
use super::filter::Filter;
use super::frame::{Mac, Packet};
use super::rx::RxQueue;
use super::status::StatusPage;
use vbus_core::lock;

/// What a device can be plugged into: the settings of one device's back end.
pub trait Backend: Send + Sync {
    /// Features that it can deal with.
    fn features(&self) -> u64;

    /// Plugs in a driver that has started. Returns one queue for each lane of the port.
    fn connect(&self, port: &Arc<Port>) -> Result<Vec<Box<dyn Queue>>, ErrorCode>;

    /// The port's filter has changed.
    fn filter_changed(&self, port: &Arc<Port>) {
        let _ = port;
    }

    /// Settings and counters, for people.
    fn inspect(&self) -> Value;
}

/// One queue pair's end of a back end. It belongs to the task of that pair, and ends with it.
pub trait Queue: Send {
    /// Sends a frame of the driver.
    fn send(&mut self, packet: &Packet<'_>) -> Sent;

    /// The poll's last frame has been sent: push out what was gathered.
    fn flush(&mut self) {}

    /// Moves at most `budget` frames to the driver, whose memory `view` shows. Returns how many.
    /// Called in each poll. Not for back ends whose frames are brought by others.
    fn receive(&mut self, view: &View<'_>, budget: u32) -> Result<u32, ErrorCode> {
        let _ = (view, budget);
        Ok(0)
    }

    /// A frame waits, and the task is about to sleep: asks for what will end the wait.
    /// [`Armed::Missed`]: it is there already.
    fn arm(&mut self) -> Armed {
        Armed::Waiting
    }

    /// When it wants to be polled even if nothing happens.
    fn deadline(&self) -> Option<Instant> {
        None
    }
}

/// What became of a frame that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way.
    Done {
        /// How many frames of work it was.
        units: u32,
    },
    /// It was dropped.
    Dropped(Drop),
    /// It has to wait: send it again when woken, or at a certain moment if there is one.
    Wait {
        /// That moment.
        until: Option<Instant>,
        /// Whether a part of it went on, so that it is another wait than the last.
        moved: bool,
    },
}

/// Why a frame of the driver was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drop {
    /// Shorter than an Ethernet header.
    Short,
    /// Its header is wrong.
    BadHeader,
    /// No link.
    NoLink,
    /// The back end refused it.
    Refused,
}

impl TxDrops {
    /// Counts one.
    pub fn count(&self, reason: Drop) {
        match reason {
            Drop::Short => self.short.one(),
            Drop::BadHeader => self.bad_header.one(),
            Drop::NoLink => self.no_link.one(),
            Drop::Refused => self.refused.one(),
        }
    }
}

/// A queue pair, as others see it.
pub struct Lane {
    /// Its number.
    pub index: u16,
    /// The receive ring, until the connection ends. Whoever holds this lock waits for nothing else.
    pub rx: Mutex<Option<RxQueue>>,
    /// The pair's task, once it runs.
    pub task: OnceLock<TaskHandle>,
    /// What it counts.
    pub counters: Arc<PairCounters>,
}

/// A driver that has started, as its back end sees it.
pub struct Port {
    /// Tells ports apart, for the life of the program.
    pub id: u64,
    /// Name of the device.
    pub name: String,
    /// The device's address.
    pub mac: Mac,
    /// The largest frame without its Ethernet header.
    pub mtu: usize,
    /// Features of the connection.
    pub features: u64,
    /// What the driver wants to receive.
    pub filter: Arc<Mutex<Filter>>,
    /// The queue pairs.
    pub lanes: Vec<Lane>,
    /// The status page.
    pub status: Arc<StatusPage>,
}

impl Port {
    /// Whether the driver wants frames to `mac`.
    pub fn accepts(&self, mac: Mac) -> bool {
        mac == self.mac || lock(&self.filter).accepts(mac)
    }

    /// A number that tells lane `index` of this port from all others.
    pub fn key(&self, index: u16) -> u64 {
        self.id << 16 | u64::from(index)
    }
}

/// Whether the back end has a link; shared by the device and its back end.
#[derive(Debug, Default)]
pub struct Link(AtomicBool);

impl Link {
    /// Whether there is a link.
    pub fn is_up(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Sets it; true if that is a change.
    pub fn set(&self, up: bool) -> bool {
        self.0.swap(up, Ordering::Relaxed) != up
    }
}
