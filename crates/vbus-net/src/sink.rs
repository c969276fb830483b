//! What a front lends to a back end: a receive queue of its driver.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::io::Errno;
use vbus_core::TaskHandle;
use vbus_core::io_vec::IoVecMut;
use vbus_core::shm::signal::Armed;

use crate::frame::Packet;

/// A receive queue, in the hands of a back end. The queue counts what happens to the frames, and
/// leaves out those that its driver's filter refuses.
///
/// A fault of the driver (a buffer outside of its memory, say) ends the driver's connection from
/// within the front. To the back end the frame is then delivered.
pub trait RxSink: Send {
    /// Delivers a frame into the driver's buffers. `on_full` says what becomes of it if there are
    /// too few. The driver sees frames after [`post`](Self::post) at the latest.
    fn deliver(&mut self, packet: &Packet<'_>, on_full: OnFull) -> Delivery;

    /// Whether a frame of `bytes` bytes finds buffers now. Also true if it never will, so that its
    /// delivery says so.
    fn has_room(&mut self, bytes: usize) -> bool;

    /// Reserves buffers for the longest frame that the driver takes, and lets `read` fill them,
    /// without a copy of our own. The vector that `read` is given begins with the virtio-net header
    /// and the Ethernet header. `read` returns how many bytes it put there.
    fn reserve(&mut self, read: &mut Read<'_>) -> Reserved;

    /// Bytes of the longest frame that the driver takes, with segmentation if it accepts that.
    fn longest(&self) -> usize;

    /// Makes delivered frames visible to the driver, and interrupts it if it asked for that. To be
    /// called once after several frames.
    fn post(&mut self);

    /// Lets the waiter's task be woken once, when there are new buffers. The driver rings for
    /// buffers only after [`arm`](Self::arm); a task that polls need not be told.
    fn wait(&mut self, waiter: &Waiter);

    /// If somebody waits, asks the driver to ring when it has posted as many buffers as the waiting
    /// frame lacks. [`Armed::Missed`]: they are there already, and all who wait have been woken.
    fn arm(&mut self) -> Armed;

    /// Counts a frame that could not be delivered.
    fn count_drop(&mut self, reason: RxDrop);
}

/// Fills a vector with a frame: a read from a descriptor.
pub type Read<'a> = dyn FnMut(&mut [IoVecMut<'_>]) -> Result<usize, Errno> + 'a;

/// A receive queue that several devices deliver to.
pub type SharedSink = Arc<Mutex<dyn RxSink>>;

/// What becomes of a frame that finds too few buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    /// It is dropped and counted.
    Drop,
    /// The sender waits, as long as the receiver's backpressure budget lasts. Without any left, the
    /// frame is dropped and counted.
    WaitBounded,
    /// The sender waits as long as it takes.
    Wait,
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is in the driver's buffers.
    Delivered,
    /// The driver does not want it, or it was dropped and counted.
    Dropped,
    /// There are too few buffers; nothing has changed. The frame is to be delivered again when the
    /// task is woken (see [`RxSink::wait`]), or at this moment at the latest.
    Full {
        /// When the sender's wait ends.
        until: Option<Instant>,
    },
    /// The driver does not take the frame as it is: an offload that it did not accept, or too many
    /// buffers for one frame. To be cut into plain frames. Never said of a plain frame.
    NeedsCut,
}

/// What became of reserved buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserved {
    /// A frame was read, and delivered or dropped.
    Frame,
    /// There are too few buffers; nothing was read.
    Full,
    /// There was nothing to read, or nobody to read it for.
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
    /// It could not be brought into a form that the driver takes.
    BadFrame,
}

/// A task that waits for buffers.
#[derive(Clone, Debug)]
pub struct Waiter {
    /// Tells waiters apart.
    pub key: u64,
    /// The task to wake.
    pub task: TaskHandle,
}
