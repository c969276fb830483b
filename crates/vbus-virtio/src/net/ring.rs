// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The queues of a network card as rings of frames. Each chain is a frame from the driver, or a
//! buffer for one to the driver.

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::Value;
use vbus_core::memory::{DriverSlice, MemoryContext, View};
use vbus_core::shm::signal::Armed;
use vbus_core::{ErrorCode, state};
use vbus_net::front::{Ring, RxRing, TxRing};

use crate::device::{Call, Enabled};
use crate::queue::{Chain, Part, Position, Queue, Unsettled, Violation};

/// How many chains a ring takes at a time, for one look at where the queue is.
const BATCH: usize = 32;

/// A queue with the chains that were taken from it. `S` is what the direction needs besides.
pub struct Frames<S> {
    queue: Queue,
    call: Call,
    memory: Arc<MemoryContext>,
    /// Chains that were taken from the queue ahead.
    ahead: VecDeque<Chain>,
    /// Chains to give back with the next post, and the bytes written to each.
    back: Vec<(Chain, u32)>,
    /// Empty chains, for their memory.
    spare: Vec<Chain>,
    side: S,
}

/// A queue of frames from the driver.
pub type TxFrames = Frames<Sending>;

/// A queue of buffers for frames to the driver.
pub type RxFrames = Frames<Receiving>;

/// What a transmit queue needs.
#[derive(Default)]
pub struct Sending {
    /// The frame that was taken.
    chain: Option<Chain>,
    took: bool,
}

/// What a receive queue needs.
pub struct Receiving {
    /// Whether a frame may use several buffers.
    mergeable: bool,
    /// The least bytes of a buffer: those of the header.
    bytes_min: usize,
    /// Descriptors of the queue. `None`: the driver may use indirect tables, of which any number
    /// fits.
    descriptors: Option<usize>,
    /// Parts of the buffers that the device holds.
    parts: usize,
}

impl TxFrames {
    /// The ring over `enabled`, a queue in `memory`. `taken` are chains that another end has taken
    /// and not returned, oldest first.
    pub fn new(enabled: Enabled, memory: Arc<MemoryContext>, taken: Vec<Chain>) -> TxFrames {
        Frames::over(enabled, memory, Sending::default(), taken)
    }
}

impl RxFrames {
    /// The ring over `enabled`, a queue in `memory`. A header of `header_bytes` bytes precedes each
    /// frame. `mergeable`: a frame may use several buffers. `indirect`: the driver may use indirect
    /// tables. `taken` are chains that another end has taken and not returned, oldest first.
    pub fn new(
        enabled: Enabled,
        memory: Arc<MemoryContext>,
        header_bytes: usize,
        (mergeable, indirect): (bool, bool),
        taken: Vec<Chain>,
    ) -> RxFrames {
        let size = usize::from(enabled.queue.layout().size);
        let descriptors = (!indirect).then_some(size);
        let side = Receiving { mergeable, bytes_min: header_bytes, descriptors, parts: 0 };
        Frames::over(enabled, memory, side, taken)
    }
}

impl<S> Frames<S> {
    fn over(enabled: Enabled, memory: Arc<MemoryContext>, side: S, taken: Vec<Chain>) -> Frames<S> {
        let Enabled { queue, call, .. } = enabled;
        let (back, spare) = Default::default();
        Frames { queue, call, memory, ahead: taken.into(), back, spare, side }
    }

    /// The queue's state. `held` are the chains that the front holds.
    fn state<'c>(&'c self, held: impl Iterator<Item = &'c Chain>) -> Result<Value, ErrorCode> {
        let state = self.queue.state(held.chain(&self.ahead)).map_err(|unsettled| {
            match unsettled {
                Unsettled::Retired(violation) => code(violation),
                // The ends of a poll leave nothing unpublished and nothing unnamed.
                _ => ErrorCode::FAILED,
            }
        })?;
        state::part(&state).map_err(|_| ErrorCode::FAILED)
    }

    /// The next chain that the driver has made available.
    fn next(&mut self, view: &View<'_>) -> Result<Option<Chain>, ErrorCode> {
        if self.ahead.is_empty() {
            // A post or an arm may have found it.
            if let Some(violation) = self.queue.retired() {
                return Err(code(violation));
            }
            let mut turn = self.queue.turn(view).map_err(code)?;
            while self.ahead.len() < BATCH {
                let mut chain = self.spare.pop().unwrap_or_default();
                if !turn.next(&mut chain).map_err(code)? {
                    self.spare.push(chain);
                    break;
                }
                self.ahead.push_back(chain);
            }
        }
        Ok(self.ahead.pop_front())
    }

    /// Chains that the front holds, or that wait for it here.
    fn held(&self) -> usize {
        usize::from(self.queue.held()) - self.back.len()
    }
}

impl<S: Send> Frames<S> {
    /// The device leaves the queue. Returns where another end goes on: what was taken and not
    /// returned is available again, because the device returns buffers in their order. Whoever ends
    /// the service interrupts the driver. With the position comes what the driver did wrong.
    pub fn leave(&mut self) -> (Position, Option<ErrorCode>) {
        self.post();
        let Position { used, used_wrap, .. } = self.queue.position();
        let position = Position { available: used, available_wrap: used_wrap, used, used_wrap };
        (position, self.queue.retired().map(code))
    }
}

impl<S: Send> Ring for Frames<S> {
    fn post(&mut self) -> bool {
        let view = self.memory.view();
        // The next take finds a queue that is not there any more.
        let Ok(mut turn) = self.queue.turn(&view) else { return false };
        for (mut chain, written) in self.back.drain(..) {
            turn.complete(&mut chain, written);
            self.spare.push(chain);
        }
        turn.flush().is_wanted()
    }

    fn interrupt(&self, wanted: bool) {
        self.call.notify(wanted);
    }

    fn arm(&mut self, _after: u32) -> Armed {
        if !self.ahead.is_empty() {
            return Armed::Missed;
        }
        let view = self.memory.view();
        self.queue.turn(&view).map_or(Armed::Missed, |mut turn| turn.arm())
    }

    fn disarm(&mut self) {
        let view = self.memory.view();
        if let Ok(mut turn) = self.queue.turn(&view) {
            turn.disarm();
        }
    }

    fn pending(&self) -> u32 {
        u32::try_from(self.ahead.len()).unwrap_or(u32::MAX)
    }
}

/// Calls `each` with the first `len` bytes of `parts`.
fn slices<'v>(
    parts: &[Part],
    view: &'v View<'_>,
    len: usize,
    write: bool,
    mut each: impl FnMut(DriverSlice<'v>),
) -> Result<(), ErrorCode> {
    let mut left = len as u64;
    for part in parts {
        let bytes = left.min(u64::from(part.len));
        if bytes == 0 {
            break;
        }
        each(view.slice(part.addr, bytes, write)?);
        left -= bytes;
    }
    Ok(())
}

impl TxRing for TxFrames {
    fn take(&mut self, view: &View<'_>) -> Result<Option<usize>, ErrorCode> {
        if self.side.chain.is_none() {
            self.side.chain = self.next(view)?;
            self.side.took |= self.side.chain.is_some();
        }
        Ok(self.side.chain.as_ref().map(|chain| chain.readable_bytes() as usize))
    }

    fn slices<'v>(
        &self,
        view: &'v View<'_>,
        each: impl FnMut(DriverSlice<'v>),
    ) -> Result<(), ErrorCode> {
        let parts = self.side.chain.as_ref().map_or(&[][..], Chain::readable);
        slices(parts, view, usize::MAX, false, each)
    }

    fn took(&mut self) -> bool {
        std::mem::take(&mut self.side.took)
    }

    fn done(&mut self, _view: &View<'_>) -> Result<(), ErrorCode> {
        self.back.extend(self.side.chain.take().map(|chain| (chain, 0)));
        Ok(())
    }

    fn save(&self) -> Result<Value, ErrorCode> {
        self.state(self.side.chain.iter())
    }
}

impl RxRing for RxFrames {
    type Buffer = Chain;

    fn buffers_max(&self) -> usize {
        if self.side.mergeable { BUFFERS_MAX } else { 1 }
    }

    fn take(&mut self, view: &View<'_>) -> Result<Option<Chain>, ErrorCode> {
        let Some(chain) = self.next(view)? else { return Ok(None) };
        // The header of a frame lies in its first buffer.
        if (chain.writable_bytes() as usize) < self.side.bytes_min {
            return Err(ErrorCode::BAD_LENGTH);
        }
        self.side.parts += chain.writable().len();
        Ok(Some(chain))
    }

    fn bytes(chain: &Chain) -> usize {
        chain.writable_bytes() as usize
    }

    fn parts(chain: &Chain) -> usize {
        chain.writable().len()
    }

    fn slices<'v>(
        chain: &Chain,
        view: &'v View<'_>,
        len: usize,
        each: impl FnMut(DriverSlice<'v>),
    ) -> Result<(), ErrorCode> {
        slices(chain.writable(), view, len, true, each)
    }

    fn give_back(
        &mut self,
        _view: &View<'_>,
        chain: Chain,
        len: usize,
        _more: bool,
    ) -> Result<(), ErrorCode> {
        // The header of the frame says how many buffers it has. All come back with one post.
        self.side.parts -= chain.writable().len();
        self.back.push((chain, u32::try_from(len).unwrap_or(u32::MAX)));
        Ok(())
    }

    fn save<'b>(&self, held: impl Iterator<Item = &'b Chain>) -> Result<Value, ErrorCode> {
        let held: Vec<_> = held.collect();
        self.state(held.iter().copied())
    }

    fn holds_all(&self) -> bool {
        // Drivers post buffers again only when they have got many back: that of Linux when they are
        // more than half of a small queue. To wait for them before any frame comes would be to wait
        // for ever.
        let is_half = |held: usize, of: usize| held * 2 >= of;
        is_half(self.held(), usize::from(self.queue.layout().size))
            || self.side.descriptors.is_some_and(|all| is_half(self.side.parts, all))
    }
}

/// The most buffers of a frame: a segment of 64 KiB in buffers of 1.5 KiB.
const BUFFERS_MAX: usize = 48;

/// What the log and the bus call a violation of the driver.
pub fn code(violation: Violation) -> ErrorCode {
    tracing::debug!(%violation, "a queue is retired");
    match violation {
        Violation::Unmapped(_) | Violation::Buffer | Violation::IndirectUnmapped => {
            ErrorCode::BAD_ADDRESS
        }
        _ => ErrorCode::CORRUPT,
    }
}
