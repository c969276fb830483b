// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a front's rings must do, whatever their layout is.

use serde_json::Value;
use vbus_core::ErrorCode;
use vbus_core::memory::{DriverSlice, View};
use vbus_core::shm::signal::Armed;

/// One direction of a queue pair: the signals between device and driver.
///
/// The driver is hostile. Each method checks what it reads, and does bounded work.
pub trait Ring: Send {
    /// Makes what was given back visible to the driver. Returns whether the driver asked for an
    /// interrupt.
    fn post(&mut self) -> bool;

    /// Interrupts the driver if `wanted`. Counts the interrupt or its absence.
    fn interrupt(&self, wanted: bool);

    /// Asks the driver for a doorbell when it has posted `after + 1` more buffers or frames. A ring
    /// that cannot count asks for a doorbell with the next one. [`Armed::Missed`]: they are there.
    fn arm(&mut self, after: u32) -> Armed;

    /// Asks for no doorbell.
    fn disarm(&mut self);

    /// How many buffers or frames the driver has posted and the device has not taken.
    fn pending(&self) -> u32;
}

/// A ring of frames from the driver.
pub trait TxRing: Ring {
    /// Takes the next frame, unless the ring holds one that was taken and is not
    /// [`done`](Self::done). Returns its bytes with its header. `None`: there is no whole frame.
    ///
    /// # Errors
    /// The driver broke the protocol. Its connection ends.
    fn take(&mut self, view: &View<'_>) -> Result<Option<usize>, ErrorCode>;

    /// Calls `each` with the bytes of the frame that was taken, in order.
    ///
    /// # Errors
    /// They are not the driver's memory.
    fn slices<'v>(
        &self,
        view: &'v View<'_>,
        each: impl FnMut(DriverSlice<'v>),
    ) -> Result<(), ErrorCode>;

    /// Whether [`take`](Self::take) has taken anything from the ring since the last call of this
    /// method: also a part of a frame.
    fn took(&mut self) -> bool;

    /// The frame was sent or dropped: gives its buffers back.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    fn done(&mut self, view: &View<'_>) -> Result<(), ErrorCode>;

    /// How far the ring is, as plain data, if another end cannot find that in the driver's memory.
    /// The provided method has nothing.
    ///
    /// # Errors
    /// The driver broke the protocol, and the next poll would find it.
    fn save(&self) -> Result<Value, ErrorCode> {
        Ok(Value::Null)
    }
}

/// A ring of buffers for frames to the driver.
pub trait RxRing: Ring {
    /// A buffer that the driver posted and the device took.
    type Buffer: Send;

    /// The most buffers that one frame may use, at least 1.
    fn buffers_max(&self) -> usize;

    /// Takes the next buffer.
    ///
    /// # Errors
    /// The driver broke the protocol: for example, the buffer is too small for any frame. Its
    /// connection ends.
    fn take(&mut self, view: &View<'_>) -> Result<Option<Self::Buffer>, ErrorCode>;

    /// Bytes of a buffer.
    fn bytes(buffer: &Self::Buffer) -> usize;

    /// The parts of a buffer in the driver's memory. Each is looked up and copied by itself.
    fn parts(buffer: &Self::Buffer) -> usize;

    /// Calls `each` with the first `len` bytes of a buffer, in order. `len` is not above
    /// [`bytes`](Self::bytes).
    ///
    /// # Errors
    /// They are not memory that the driver lets the device write.
    fn slices<'v>(
        buffer: &Self::Buffer,
        view: &'v View<'_>,
        len: usize,
        each: impl FnMut(DriverSlice<'v>),
    ) -> Result<(), ErrorCode>;

    /// Gives a buffer back, in the order in which they were taken, with `len` bytes of a frame in
    /// it. `more`: the frame goes on in the next buffer.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    fn give_back(
        &mut self,
        view: &View<'_>,
        buffer: Self::Buffer,
        len: usize,
        more: bool,
    ) -> Result<(), ErrorCode>;

    /// How far the ring is, as [`TxRing::save`]. `held` are the buffers that were taken and not
    /// given back, oldest first.
    ///
    /// # Errors
    /// As [`TxRing::save`].
    fn save<'b>(&self, held: impl Iterator<Item = &'b Self::Buffer>) -> Result<Value, ErrorCode>
    where
        Self::Buffer: 'b,
    {
        drop(held);
        Ok(Value::Null)
    }

    /// Whether the device holds so many buffers that the driver cannot post more, or may not before
    /// it gets some back.
    fn holds_all(&self) -> bool;
}
