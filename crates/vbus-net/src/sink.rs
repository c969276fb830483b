// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The receive queue of a driver, which a front lends to a back end or shares with it.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::io::Errno;
use vbus_core::io_vec::IoVecMut;
use vbus_core::shm::signal::Armed;
use vbus_core::{TaskHandle, lock};

use crate::frame::Packet;

/// A receive queue as a back end uses it. The queue counts each frame once: as delivered, as
/// refused by its driver's filter, or as dropped.
///
/// If the driver breaks the protocol (for instance with a buffer outside of its memory), the front
/// ends the driver's connection. The back end then sees the frame as dropped.
pub trait RxSink: Send {
    /// Delivers a frame into the driver's buffers. `on_full` decides what happens if there are too
    /// few. The driver sees the frame after the next [`post`](Self::post) at the latest.
    fn deliver(&mut self, packet: &Packet<'_>, on_full: OnFull) -> Delivery;

    /// Whether a frame of `bytes` bytes finds buffers now. Also true if the frame can never be
    /// delivered: `deliver` then reports that.
    fn has_room(&mut self, bytes: usize) -> bool;

    /// Reserves buffers for the longest frame that the driver accepts, and lets `read` fill them
    /// without another copy. The vector that `read` gets begins with the virtio-net header and the
    /// Ethernet header. `read` returns how many bytes it wrote.
    fn reserve(&mut self, read: &mut Read<'_>) -> Reserved;

    /// Bytes of the longest frame that the driver accepts, with segmentation if it accepts that.
    fn longest(&self) -> usize;

    /// Makes delivered frames visible to the driver, and interrupts it if it asked for that. One
    /// call after several frames is enough.
    fn post(&mut self);

    /// Registers a waiter: its task is woken once, when there are new buffers. The driver rings for
    /// buffers only after [`arm`](Self::arm), because a task that polls needs no doorbell.
    fn wait(&mut self, waiter: &Waiter);

    /// If a task waits, asks the driver to ring when it has posted as many buffers as the waiting
    /// frame lacks. [`Armed::Missed`]: the buffers are there already, and all waiters have been
    /// woken.
    fn arm(&mut self) -> Armed;

    /// Counts a frame that could not be delivered.
    fn count_drop(&mut self, reason: RxDrop);

    /// The receiving device is quiesced, or goes on. While it is quiesced, the queue touches no
    /// memory of its driver: it has shown the driver all frames, has no room for others, and wakes
    /// its waiters when it goes on. The front calls it for queues that it shares.
    fn pause(&mut self, paused: bool) {
        let _ = paused;
    }
}

/// Fills a vector with a frame: a read from a descriptor.
pub type Read<'a> = dyn FnMut(&mut [IoVecMut<'_>]) -> Result<usize, Errno> + 'a;

/// A receive queue that several devices deliver to.
pub type SharedSink = Arc<Mutex<dyn RxSink>>;

/// A front of a shared receive queue. It delivers frames in its own way, and passes everything else
/// on.
pub(crate) struct SharedFront<F> {
    sink: SharedSink,
    deliver: F,
}

impl<F> SharedFront<F>
where
    F: FnMut(&mut dyn RxSink, &Packet<'_>, OnFull) -> Delivery + Send + 'static,
{
    /// Puts a front before `sink`. `deliver` gets the queue behind it, locked.
    pub(crate) fn sink(sink: &SharedSink, deliver: F) -> SharedSink {
        Arc::new(Mutex::new(SharedFront { sink: sink.clone(), deliver }))
    }
}

impl<F> RxSink for SharedFront<F>
where
    F: FnMut(&mut dyn RxSink, &Packet<'_>, OnFull) -> Delivery + Send,
{
    fn deliver(&mut self, packet: &Packet<'_>, on_full: OnFull) -> Delivery {
        (self.deliver)(&mut *lock(&self.sink), packet, on_full)
    }

    fn has_room(&mut self, bytes: usize) -> bool {
        lock(&self.sink).has_room(bytes)
    }

    fn reserve(&mut self, _read: &mut Read<'_>) -> Reserved {
        Reserved::Nothing // Other devices bring frames through `deliver`.
    }

    fn longest(&self) -> usize {
        lock(&self.sink).longest()
    }

    fn post(&mut self) {
        lock(&self.sink).post();
    }

    fn wait(&mut self, waiter: &Waiter) {
        lock(&self.sink).wait(waiter);
    }

    fn arm(&mut self) -> Armed {
        lock(&self.sink).arm()
    }

    fn count_drop(&mut self, reason: RxDrop) {
        lock(&self.sink).count_drop(reason);
    }

    fn pause(&mut self, paused: bool) {
        lock(&self.sink).pause(paused);
    }
}

/// What happens to a frame that finds too few buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    /// The queue drops and counts the frame.
    Drop,
    /// The sender waits while the receiver's backpressure budget lasts. When the budget is used up,
    /// the queue drops and counts the frame.
    WaitBounded,
    /// The sender waits as long as it takes.
    Wait,
}

/// The result of delivering a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The frame is in the driver's buffers.
    Delivered {
        /// The work done, in frames: 1, and more if the buffers lie in very many parts.
        units: u32,
    },
    /// The queue did not deliver the frame, and has counted it.
    Dropped,
    /// There are too few buffers, and nothing has changed. The sender delivers the frame again when
    /// its task is woken (see [`RxSink::wait`]), or at `until` at the latest.
    Full {
        /// The time at which the sender's wait ends.
        until: Option<Instant>,
    },
    /// The driver cannot get the frame as it is: it did not accept an offload, or the frame needs
    /// too many buffers. The sender must cut the frame into plain frames. A plain frame never has
    /// this result.
    NeedsCut,
}

/// The result of reserving buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserved {
    /// `read` has read a frame, and the queue has delivered or dropped it.
    Frame,
    /// There are too few buffers. `read` was not called.
    Full,
    /// The driver's buffers cannot hold the longest frame, however many it posts. `read` was not
    /// called. The back end must read the frame itself, and [`deliver`](RxSink::deliver) it.
    Unfit,
    /// There was nothing to read, or there is no receive queue.
    Nothing,
    /// `read` failed.
    Failed(Errno),
}

/// Why a frame to the driver was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RxDrop {
    /// The driver had too few buffers.
    NoBuffers,
    /// It is longer than the MTU or the buffers of the driver allow.
    TooLong,
    /// It could not be converted to a form that the driver accepts.
    BadFrame,
    /// The driver had too few buffers, and the sender does not wait for it any more.
    TooSlow,
    /// It is above the rate that the settings allow.
    Rate,
    /// The queue has no ring, or its driver has broken the protocol.
    NoLink,
}

/// A task that waits for buffers.
#[derive(Clone, Debug)]
pub struct Waiter {
    /// Unique among waiters.
    pub key: u64,
    /// The task to wake.
    pub task: TaskHandle,
}
