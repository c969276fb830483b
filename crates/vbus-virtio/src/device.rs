// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtio device, and what it gets from a transport. Neither knows the other: a device works
//! behind any transport, and a transport in front of any device.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::{ConnectionCounters, Doorbell, ErrorCode, Executor, Host, MemoryContext};

use crate::queue::{Chain, Layout, Position, Queue, State};

/// Feature bits that belong neither to a device nor to its queues (VIRTIO 1.3, section 6).
pub mod feature {
    pub use crate::queue::feature::*;

    /// The device reaches memory by the addresses that an IOMMU of the platform gives it.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// The device needs the memory barriers of a device in hardware.
    pub const ORDER_PLATFORM: u64 = 1 << 36;
}

/// Bits of the device status (VIRTIO 1.3, section 2.1).
pub mod status {
    /// The driver has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Both ends agree on the features.
    pub const FEATURES_OK: u8 = 8;
    /// The device has met an error that only a reset ends.
    pub const NEEDS_RESET: u8 = 0x40;
    /// The driver has given up.
    pub const FAILED: u8 = 0x80;
}

/// What a device is. It does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// The device's number in the standard (VIRTIO 1.3, section 5): 1 is a network card.
    pub id: u16,
    /// PCI base class, subclass, programming interface, as 24 bits.
    pub pci_class: u32,
    /// Queues that the device has.
    pub queues: u16,
    /// The most descriptors of a queue, a power of two.
    pub queue_size: u16,
    /// All features that the device offers, [`feature::VERSION_1`] among them.
    pub features: u64,
}

/// A virtio device. It lives as long as its bus device; drivers come and go.
pub trait VirtioDevice: Send + Sync {
    /// What it is.
    fn kind(&self) -> Kind;

    /// Bytes of the device configuration. The driver cannot write them.
    fn config_bytes(&self) -> usize;

    /// The transport that serves the device; the last call counts. The device tells it the device
    /// configuration at once, and each change later ([`Transport::config_changed`]).
    fn attach(&self, transport: Weak<dyn Transport>);

    /// A driver has set DRIVER_OK. The session gets the queues one by one. It is dropped at a
    /// reset; when its drop returns, nothing touches the driver's memory any more.
    ///
    /// # Errors
    /// The device cannot work now. It then needs a reset.
    fn start(self: Arc<Self>, driver: Driver) -> Result<Box<dyn Session>, ErrorCode>;

    /// Makes the session again that a driver had with a device that this one goes on for, in place
    /// of [`start`](Self::start). `state` is what [`Session::save`] returned. The session gets its
    /// queues next, and then [`Session::restored`]. Its tasks do not run before that. The state may
    /// be forged.
    ///
    /// # Errors
    /// The state is wrong. The text says what. The provided method refuses.
    fn restart(self: Arc<Self>, driver: Driver, state: &Value) -> Result<Box<dyn Session>, String> {
        let _ = (driver, state);
        Err("the device has no saved state".into())
    }
}

/// A driver that has set DRIVER_OK, as the device sees it.
pub struct Driver {
    /// The features that it accepted, a subset of those offered.
    pub features: u64,
    /// Its memory.
    pub memory: Arc<MemoryContext>,
    /// The event loop, for the device's tasks.
    pub executor: Arc<Executor>,
    /// The worker on which the first task does best. Further tasks do best on the following ones.
    pub worker: usize,
    /// The counters of the device, for its tasks.
    pub counters: Arc<ConnectionCounters>,
    /// Ends the session when one of its tasks fails. The device then needs a reset.
    pub fail: Arc<dyn Fn(ErrorCode) + Send + Sync>,
}

impl Driver {
    /// The driver of the device at `host`.
    pub fn new(
        host: &Host,
        features: u64,
        fail: impl Fn(ErrorCode) + Send + Sync + 'static,
    ) -> Driver {
        Driver {
            features,
            memory: host.memory().clone(),
            executor: host.executor().clone(),
            worker: host.worker(),
            counters: host.counters().clone(),
            fail: Arc::new(fail),
        }
    }
}

/// A device at work for one driver. Its methods are called one at a time, and do not block.
pub trait Session: Send {
    /// The driver has enabled queue `index`, which was not in use.
    ///
    /// # Errors
    /// The device cannot serve it. The device then needs a reset.
    fn enable(&mut self, index: u16, enabled: Enabled) -> Result<(), ErrorCode>;

    /// The driver resets or stops queue `index`. When this returns, nothing touches the queue or
    /// its buffers any more. The device returns what it has finished, and forgets the buffers that
    /// it has only taken. Returns where somebody can go on with the queue; `None`: the device had
    /// no such queue, or cannot say.
    fn disable(&mut self, index: u16) -> Option<Position>;

    /// The driver uses the queues whose flag in `enabled` is set, by index. A transport calls this
    /// if drivers do not tell the device so themselves, with a command. The provided method does
    /// nothing.
    ///
    /// # Errors
    /// The device cannot work with these. It then needs a reset.
    fn set_in_use(&mut self, enabled: &[bool]) -> Result<(), ErrorCode> {
        let _ = enabled;
        Ok(())
    }

    /// What [`Call::eventfd`] returns may have changed. When this returns, nothing writes a former
    /// eventfd any more.
    fn calls_changed(&mut self) {}

    /// As [`enable`](Self::enable), of a queue from which another session has taken the chains
    /// `taken`, oldest first, and has not returned them. This session serves them first. The
    /// provided method takes no queue with such chains.
    ///
    /// # Errors
    /// As [`enable`](Self::enable).
    fn enable_again(
        &mut self,
        index: u16,
        enabled: Enabled,
        taken: Vec<Chain>,
    ) -> Result<(), ErrorCode> {
        if taken.is_empty() { self.enable(index, enabled) } else { Err(ErrorCode::DENIED) }
    }

    /// A session that [`VirtioDevice::restart`] has made has all its queues.
    ///
    /// # Errors
    /// The state was wrong. The text says what.
    fn restored(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// What the session has, as plain data, and the state of each queue that it has. Its tasks
    /// stand still, and it changes nothing.
    ///
    /// # Errors
    /// As [`Unsaved`] says. The provided method refuses.
    fn save(&mut self) -> Result<SavedSession, Unsaved> {
        Err(Unsaved::Not("the device has no saved state".into()))
    }

    /// From now on `record` gets what the driver has chosen by commands, as an object whose fields
    /// are some of [`outlast`](Self::outlast), after each change and before the driver has its
    /// answer. The provided method gives nothing.
    fn record_with(&mut self, record: Record) {
        drop(record);
    }

    /// Replaces each queue of the session by what `again` makes, a queue of the same layout that
    /// goes on at the position. What was taken and not returned is available again. The tasks stand
    /// still. A session whose queue cannot be replaced ends soon. The provided method does nothing.
    fn retake(&mut self, again: &mut Again<'_>) {
        let _ = again;
    }

    /// As [`save`](Self::save), the session's own part alone, for a state that outlasts this
    /// process ([`vbus_core::Device::outlast`]). The transport keeps how far the queues are.
    ///
    /// # Errors
    /// As for `save`. The provided method refuses.
    fn outlast(&mut self) -> Result<Value, Unsaved> {
        Err(Unsaved::Not("the device cannot go on after its bus was killed".into()))
    }
}

/// Takes what a driver has chosen; see [`Session::record_with`].
pub type Record = Arc<dyn Fn(&Value) + Send + Sync>;

/// Makes a queue again: by its index and layout, and where it goes on; see [`Session::retake`].
pub type Again<'a> = dyn FnMut(u16, Layout, Position) -> Result<Queue, ErrorCode> + 'a;

/// A session as plain data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSession {
    /// The session's own part.
    pub own: Value,
    /// The state of each queue that the session serves, by its number.
    pub queues: BTreeMap<u16, State>,
}

/// Why a session has no state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unsaved {
    /// The driver has broken the protocol, and the session was about to end: the device needs a
    /// reset.
    Broken(ErrorCode),
    /// It cannot be saved. The text says why.
    Not(String),
}

/// A queue that the driver has enabled, and its signals.
pub struct Enabled {
    /// The queue.
    pub queue: Queue,
    /// Wakes a task when the driver says that there are buffers.
    pub doorbell: Doorbell,
    /// Tells the driver of used buffers.
    pub call: Call,
}

/// How a device tells its driver something.
pub trait Transport: Send + Sync {
    /// Interrupts the driver for queue `index`. Never blocks.
    fn queue_used(&self, index: u16);

    /// The eventfd whose writes interrupt the driver for queue `index` now. `None`: there is none.
    fn queue_eventfd(&self, index: u16) -> Option<OwnedFd> {
        let _ = index;
        None
    }

    /// Replaces the device configuration. If it differs from before and `tell`, interrupts a driver
    /// that has set DRIVER_OK.
    fn config_changed(&self, config: Vec<u8>, tell: bool);
}

/// The interrupt of a queue.
#[derive(Clone)]
pub struct Call {
    transport: Arc<dyn Transport>,
    index: u16,
    counters: Arc<ConnectionCounters>,
}

impl Call {
    /// The interrupt of queue `index`. `counters` count it.
    pub fn new(
        transport: Arc<dyn Transport>,
        index: u16,
        counters: Arc<ConnectionCounters>,
    ) -> Call {
        Call { transport, index, counters }
    }

    /// Interrupts the driver if `wanted`: it asked for that. Counts the interrupt or its absence.
    pub fn notify(&self, wanted: bool) {
        if wanted {
            self.counters.interrupts.one();
            self.transport.queue_used(self.index);
        } else {
            self.counters.interrupts_suppressed.one();
        }
    }

    /// The eventfd whose writes interrupt the driver, for somebody who writes it himself. `None`:
    /// only [`notify`](Self::notify) interrupts the driver now. It holds until
    /// [`Session::calls_changed`].
    pub fn eventfd(&self) -> Option<OwnedFd> {
        self.transport.queue_eventfd(self.index)
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Call").field(&self.index).finish()
    }
}
