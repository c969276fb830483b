// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The interface between a front and a back end.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::Value;
use vbus_core::shm::signal::Armed;
use vbus_core::{ErrorCode, TaskHandle, state};
use vbus_tap::{Mac, Offloads};

use crate::filter::Filter;
use crate::frame::Packet;
use crate::limits::Limits;
use crate::sink::{RxSink, SharedSink};
use crate::steering::Steering;

/// A back end: a switch, an interface or a socket that a device is plugged into. It lives as long
/// as the device.
pub trait Backend: Send + Sync {
    /// The offloads that the back end supports in frames from the driver.
    fn tx_offloads(&self) -> Offloads;

    /// The offloads that the back end can leave to the driver in frames to the driver.
    fn rx_offloads(&self) -> Offloads;

    /// Whether a receive queue gets frames from elsewhere than its own pair's task: from other
    /// devices, or from other pairs. The front then shares the queues ([`Port::lanes`]). Otherwise
    /// it lends a queue in each call of [`Queue::receive`]. `by_hash`: the driver may choose
    /// receive queues by a hash.
    fn shares_sinks(&self, by_hash: bool) -> bool {
        let _ = by_hash;
        false
    }

    /// Whether the back end can choose a receive queue by a hash ([`Steering`]).
    fn steers(&self) -> bool;

    /// Reserves the address `mac`, which the device has by its settings. No driver of another
    /// device can get it ([`Plug::set_mac`]), even while this device has no driver. The front
    /// calls this once, before any other method.
    fn reserve(&self, mac: Mac) {
        let _ = mac;
    }

    /// Changes the limits of the rate of both directions, at once. Returns false, and changes
    /// nothing, if the back end cannot: it was made without a limit for a direction that shall have
    /// one.
    fn set_limits(&self, limits: &Limits) -> bool {
        *limits == Limits::default()
    }

    /// The descriptor of queue `index` of the interface, from which the kernel can carry frames
    /// itself ([`Plug::leave_to_kernel`]). `None`: the back end has none, or works on each frame.
    fn kernel_queue(&self, index: u16) -> Option<BorrowedFd<'_>> {
        let _ = index;
        None
    }

    /// Plugs in a driver that has started. Dropping the plug and its queues unplugs it.
    fn plug(&self, port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode>;

    /// Settings and counters, for people.
    fn inspect(&self) -> Value;

    /// Stops everything of the back end that is no task of the device: when this returns, nothing
    /// touches its descriptors. Until [`resume`](Self::resume) a plug that is dropped leaves them
    /// as they are, because another process may have taken them over.
    fn quiesce(&self) {}

    /// Undoes [`quiesce`](Self::quiesce).
    fn resume(&self) {}

    /// What the back end has beside its settings and a driver, as plain data
    /// (spec/state-format.md, "Back ends"). The device is quiesced.
    ///
    /// # Errors
    /// It cannot be saved. The text says why. The provided method refuses.
    fn save(&self) -> Result<Value, String> {
        Err(UNSAVABLE.into())
    }

    /// Goes on from what [`save`](Self::save) returned. The device is a fresh one, and quiesced.
    /// The state may be forged.
    ///
    /// # Errors
    /// The state is wrong. The text says what.
    fn restore(&self, state: &Value) -> Result<(), String> {
        let _ = state;
        Err(UNSAVABLE.into())
    }

    /// Copies of the descriptors that the back end has opened, by name, for a process that takes
    /// this one's place ([`Opener::handed_over`](crate::Opener::handed_over)). The device is
    /// quiesced.
    ///
    /// # Errors
    /// The process has no more descriptors.
    fn descriptors(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        Ok(Vec::new())
    }
}

/// What the provided methods for saving say.
const UNSAVABLE: &str = "its back end has no saved state";

/// Told how [`Plug::configure`] has ended. An error comes from another thread only.
pub type Done = Box<dyn FnOnce(Result<(), ErrorCode>) + Send>;

/// A driver's connection to a back end.
pub trait Plug: Send + Sync {
    /// Returns queue `index` of the port, for the task that will serve it. The front calls this
    /// once for each queue.
    fn queue(&self, index: u16, task: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode>;

    /// The driver uses queues 0 to `queues - 1`, and accepts these offloads in frames to it. The
    /// front calls this at the start and at each change. Each sink checks every frame nevertheless.
    /// The back end calls `done` when it has set itself up, at once or later on another thread. It
    /// does not block. With an error that it returns, it has dropped `done`.
    fn configure(&self, queues: u16, offloads: Offloads, done: Done) -> Result<(), ErrorCode> {
        let _ = (queues, offloads);
        done(Ok(()));
        Ok(())
    }

    /// Gives the port the address `mac`, also in its filter. Returns false and changes nothing if
    /// another device has that address, or has reserved it.
    fn set_mac(&self, mac: Mac) -> bool;

    /// The port's filter has changed.
    fn filter_changed(&self) {}

    /// Whether the kernel carries the frames from now on. Then no frame passes a [`Queue`] of this
    /// process, and what the back end does with each frame is left to the kernel. The next
    /// [`configure`](Self::configure) carries that out.
    fn leave_to_kernel(&self, leave: bool) {
        let _ = leave;
    }

    /// What the back end has for this driver beside its queues, as plain data. The provided method
    /// has nothing.
    ///
    /// # Errors
    /// As [`Backend::save`].
    fn save(&self) -> Result<Value, String> {
        Ok(state::nothing())
    }

    /// Goes on from what [`save`](Self::save) returned.
    ///
    /// # Errors
    /// As [`Backend::restore`].
    fn restore(&self, state: &Value) -> Result<(), String> {
        state::is_nothing(state)
    }
}

/// One queue pair's end of a back end. It belongs to the task of that pair.
pub trait Queue: Send {
    /// Sends a frame of the driver.
    fn send(&mut self, packet: &Packet<'_>) -> Sent;

    /// The waiting frame will not be sent again, because its ring is gone. The next frame is a new
    /// one.
    fn forget(&mut self) {}

    /// The pair has no receive ring any more: the queue waits for no frames, and drops one that it
    /// has read.
    fn rest(&mut self) {}

    /// Called after the last frame of a poll: sends the frames that the queue has gathered.
    fn flush(&mut self) {}

    /// Moves at most `budget` frames to the driver, through its receive queue. Returns how many.
    /// The front calls this in each poll, unless [`Backend::shares_sinks`].
    fn receive(&mut self, sink: &mut dyn RxSink, budget: u32) -> Result<u32, ErrorCode> {
        let _ = (sink, budget);
        Ok(0)
    }

    /// Moves at most `budget` frames to the driver, through the receive queues of [`Port::lanes`].
    /// Returns how many. The front calls this in each poll in place of [`receive`](Self::receive)
    /// if [`Backend::shares_sinks`].
    fn receive_shared(&mut self, budget: u32) -> Result<u32, ErrorCode> {
        let _ = budget;
        Ok(0)
    }

    /// Called when a frame waits to be sent and the task is about to sleep: makes sure that the end
    /// of the wait will wake the task. [`Armed::Missed`]: the wait has ended already.
    fn arm(&mut self) -> Armed {
        Armed::Waiting
    }

    /// The time at which the queue needs a poll even if no event comes.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// What the queue has, as plain data: frames that it has read and not delivered, how far a
    /// frame of the driver has come that is sent in parts. The device is quiesced. The provided
    /// method has nothing.
    ///
    /// # Errors
    /// As [`Backend::save`].
    fn save(&mut self) -> Result<Value, String> {
        Ok(state::nothing())
    }

    /// Goes on from what [`save`](Self::save) returned, before the first poll.
    ///
    /// # Errors
    /// As [`Backend::restore`].
    fn restore(&mut self, state: &Value) -> Result<(), String> {
        state::is_nothing(state)
    }
}

/// The result of sending a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The back end has accepted the frame.
    Done {
        /// The work done, in frames.
        units: u32,
    },
    /// The back end has done a part of the frame, and it is the turn of others. The front sends the
    /// frame again in the next poll, even if no event comes.
    Part,
    /// The back end dropped the frame.
    Dropped(TxDrop),
    /// The frame has to wait. The front sends it again when the task is woken, or at `until`.
    Wait {
        /// The time at which the wait ends at the latest, if there is one.
        until: Option<Instant>,
        /// Whether the back end sent a part of the frame, so that this wait is a new one.
        moved: bool,
    },
}

/// Why a back end dropped a frame of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TxDrop {
    /// The frame's content does not match its header.
    BadFrame,
    /// There is no link.
    NoLink,
    /// The back end refused the frame.
    Refused,
    /// The source address does not belong to the device.
    Spoofed,
    /// The settings of VLANs or of isolation forbid the frame.
    Denied,
    /// The device sent too many frames to several receivers, or the frame is in a loop.
    Storm,
}

/// A port: a driver that has started, as its back end sees it.
pub struct Port {
    /// Unique among all ports in the life of the program.
    id: u64,
    /// Name of the device.
    pub name: String,
    /// The MTU: bytes of the longest frame without Ethernet header and tags.
    pub mtu: usize,
    /// The most queue pairs of the driver.
    pub queues: u16,
    /// The frames that the driver wants to receive, and its address.
    pub filter: Arc<Filter>,
    /// Chooses the receive queue of a frame.
    pub steering: Arc<Steering>,
    /// The receive queues by number, if the back end shares them; otherwise empty. A holder of one
    /// lock must not wait for anything else.
    pub lanes: Vec<SharedSink>,
}

/// The number of the next port. Relaxed: only the number matters.
static NEXT_PORT: AtomicU64 = AtomicU64::new(1);

impl Port {
    /// Makes the port of device `name`.
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

    /// A number, not 0, that no other port of this program ever has.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// A number that no queue but `index` of this port has.
    pub fn key(&self, index: u16) -> u64 {
        self.id << 16 | u64::from(index)
    }

    /// A copy of this port with other receive queues.
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
