//! What a device is plugged into, as a front sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::Value;
use vbus_core::shm::signal::Armed;
use vbus_core::{ErrorCode, TaskHandle};
use vbus_tap::{Mac, Offloads};

use crate::filter::Filter;
use crate::frame::Packet;
use crate::sink::{RxSink, SharedSink};
use crate::steering::Steering;

/// What a device can be plugged into: a switch, an interface, a socket. It lives as long as the
/// device.
pub trait Backend: Send + Sync {
    /// The offloads that it can deal with in frames of the driver.
    fn tx_offloads(&self) -> Offloads;

    /// The offloads that it can leave to the driver in frames to it.
    fn rx_offloads(&self) -> Offloads;

    /// Whether other devices deliver frames to this one's receive queues. A front then shares them
    /// ([`Port::lanes`]); otherwise it lends them in each [`Queue::receive`].
    fn shares_sinks(&self) -> bool {
        false
    }

    /// Whether it can choose a receive queue by a hash ([`Steering`]). With one queue every back
    /// end can.
    fn steers(&self) -> bool;

    /// The device has the address `mac` by its settings: no driver of another device gets it
    /// ([`Plug::set_mac`]), whether or not this one's is there. Called once, first of all.
    fn reserve(&self, mac: Mac) {
        let _ = mac;
    }

    /// Plugs in a driver that has started. Dropping the plug and its queues unplugs it.
    fn plug(&self, port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode>;

    /// Settings and counters, for people.
    fn inspect(&self) -> Value;
}

/// A driver's place in a back end.
pub trait Plug: Send + Sync {
    /// Queue `index` of the port, for the task that will serve it. To be called once for each.
    fn queue(&self, index: u16, task: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode>;

    /// The driver uses queues 0 to `queues - 1`; to be called at the start too.
    fn set_queues(&self, queues: u16) -> Result<(), ErrorCode> {
        let _ = queues;
        Ok(())
    }

    /// The driver takes these offloads in frames to it; to be called at the start too. Sinks check
    /// each frame by themselves.
    fn set_rx_offloads(&self, offloads: Offloads) -> Result<(), ErrorCode> {
        let _ = offloads;
        Ok(())
    }

    /// Gives the port the address `mac`, also in its filter. False, and nothing changes, if
    /// another device has that address, or is to have it.
    fn set_mac(&self, mac: Mac) -> bool;

    /// The port's filter has changed.
    fn filter_changed(&self) {}
}

/// One queue pair's end of a back end. It belongs to the task of that pair.
pub trait Queue: Send {
    /// Sends a frame of the driver.
    fn send(&mut self, packet: &Packet<'_>) -> Sent;

    /// The frame that has to wait will not be sent again: its ring has gone. The next frame is
    /// another one.
    fn forget(&mut self) {}

    /// The last frame of a poll has been sent: pushes out what was gathered.
    fn flush(&mut self) {}

    /// Moves at most `budget` frames to the driver, through its receive queue. Returns how many.
    /// Called in each poll, unless [`Backend::shares_sinks`].
    fn receive(&mut self, sink: &mut dyn RxSink, budget: u32) -> Result<u32, ErrorCode> {
        let _ = (sink, budget);
        Ok(0)
    }

    /// A frame waits to be sent, and the task is about to sleep: asks for what will end the wait.
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
    Dropped(TxDrop),
    /// It has to wait: to be sent again when the task is woken, or at a certain moment.
    Wait {
        /// That moment, if there is one.
        until: Option<Instant>,
        /// Whether a part of it went on, so that it is another wait than the one before.
        moved: bool,
    },
}

/// Why a back end dropped a frame of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxDrop {
    /// Its content does not match its header.
    BadFrame,
    /// There is no link.
    NoLink,
    /// The back end refused it.
    Refused,
}

/// A driver that has started, as its back end sees it.
pub struct Port {
    /// Tells ports apart, for the life of the program.
    id: u64,
    /// Name of the device.
    pub name: String,
    /// The MTU: bytes of the longest frame without Ethernet header and tags.
    pub mtu: usize,
    /// The most queue pairs of the driver.
    pub queues: u16,
    /// What the driver wants to receive, with its address.
    pub filter: Arc<Filter>,
    /// Which receive queue a frame goes to.
    pub steering: Arc<Steering>,
    /// The receive queues by number, if the back end shares them; else none. Whoever holds the lock
    /// of one waits for nothing else.
    pub lanes: Vec<SharedSink>,
}

/// A number for each port of this program. Relaxed: the number alone counts.
static NEXT_PORT: AtomicU64 = AtomicU64::new(1);

impl Port {
    /// The port of device `name`.
    pub fn new(
        name: &str,
        mtu: u16,
        queues: u16,
        (filter, steering): (Arc<Filter>, Arc<Steering>),
        lanes: Vec<SharedSink>,
    ) -> Port {
        let id = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
        Port { id, name: name.into(), mtu: usize::from(mtu), queues, filter, steering, lanes }
    }

    /// A number that no other port of this program has or will have; not 0.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// A number that tells queue `index` of this port from all others.
    pub fn key(&self, index: u16) -> u64 {
        self.id << 16 | u64::from(index)
    }

    /// The same port, whose receive queues are reached by others.
    pub(crate) fn with_lanes(&self, lanes: Vec<SharedSink>) -> Port {
        Port {
            id: self.id,
            name: self.name.clone(),
            mtu: self.mtu,
            queues: self.queues,
            filter: self.filter.clone(),
            steering: self.steering.clone(),
            lanes,
        }
    }
}
