// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The rings of a venet device. Each entry is one buffer. The flag `NEXT` joins the entries of a
//! frame.

use vbus_core::memory::{DriverSlice, View};
use vbus_core::shm::abi::venet::{CHAIN_MAX, FRAME_MAX};
use vbus_core::shm::ring::{DeviceEnd, Entry, NEXT, Return};
use vbus_core::shm::signal::Armed;
use vbus_core::{ErrorCode, Interrupt, Window};
use vbus_net::front::{HEAD_MAX, Ring, RxRing, TxRing};

/// The least bytes of a receive buffer. The header and the Ethernet header fit in it.
const BUFFER_MIN: u32 = 64;
const _: () = assert!(HEAD_MAX <= BUFFER_MIN as usize);

/// A ring and the interrupt of its region. `S` is what the direction needs besides.
pub struct Entries<S> {
    ring: DeviceEnd<Window>,
    interrupt: Interrupt,
    state: S,
}

/// A transmit ring.
pub type TxEntries = Entries<Chain>;

/// A receive ring.
pub type RxEntries = Entries<()>;

/// The frame that was taken from a transmit ring, or the part of it that the driver has posted.
#[derive(Default)]
pub struct Chain {
    entries: Vec<Entry>,
    bytes: usize,
    took: bool,
}

impl<S: Default> Entries<S> {
    pub fn new(ring: DeviceEnd<Window>, interrupt: Interrupt) -> Entries<S> {
        Entries { ring, interrupt, state: S::default() }
    }
}

impl<S: Send> Ring for Entries<S> {
    fn post(&mut self) -> bool {
        self.ring.post().is_wanted()
    }

    fn interrupt(&self, wanted: bool) {
        self.interrupt.notify(wanted);
    }

    fn arm(&mut self, after: u32) -> Armed {
        self.ring.arm(after)
    }

    fn disarm(&mut self) {
        self.ring.disarm();
    }

    fn pending(&self) -> u32 {
        self.ring.pending()
    }
}

impl TxRing for TxEntries {
    fn take(&mut self, _view: &View<'_>) -> Result<Option<usize>, ErrorCode> {
        let chain = &mut self.state;
        while chain.entries.last().is_none_or(|last| last.flags & NEXT != 0) {
            let Some(entry) = self.ring.take()? else { return Ok(None) };
            chain.bytes = chain.bytes.saturating_add(entry.len as usize);
            if entry.len == 0 || chain.entries.len() == CHAIN_MAX || chain.bytes > FRAME_MAX {
                return Err(ErrorCode::BAD_LENGTH);
            }
            chain.entries.push(entry);
            // A part of a frame is progress too. The driver has rung for it, so the task must arm
            // again before it sleeps.
            chain.took = true;
        }
        Ok(Some(chain.bytes))
    }

    fn slices<'v>(
        &self,
        view: &'v View<'_>,
        mut each: impl FnMut(DriverSlice<'v>),
    ) -> Result<(), ErrorCode> {
        for entry in &self.state.entries {
            each(view.slice(entry.addr, u64::from(entry.len), false)?);
        }
        Ok(())
    }

    fn took(&mut self) -> bool {
        std::mem::take(&mut self.state.took)
    }

    fn done(&mut self, _view: &View<'_>) -> Result<(), ErrorCode> {
        self.ring.give_back_all(self.state.entries.drain(..).map(Into::into));
        self.state.bytes = 0;
        Ok(())
    }
}

impl RxRing for RxEntries {
    type Buffer = Entry;

    fn buffers_max(&self) -> usize {
        CHAIN_MAX
    }

    fn take(&mut self, _view: &View<'_>) -> Result<Option<Entry>, ErrorCode> {
        match self.ring.take()? {
            Some(entry) if entry.len < BUFFER_MIN => Err(ErrorCode::BAD_LENGTH),
            entry => Ok(entry),
        }
    }

    fn bytes(entry: &Entry) -> usize {
        entry.len as usize
    }

    fn parts(_entry: &Entry) -> usize {
        1
    }

    fn slices<'v>(
        entry: &Entry,
        view: &'v View<'_>,
        len: usize,
        mut each: impl FnMut(DriverSlice<'v>),
    ) -> Result<(), ErrorCode> {
        each(view.slice(entry.addr, len as u64, true)?);
        Ok(())
    }

    fn give_back(
        &mut self,
        _view: &View<'_>,
        entry: Entry,
        len: usize,
        more: bool,
    ) -> Result<(), ErrorCode> {
        self.ring.give_back(Return {
            len: u32::try_from(len).unwrap_or(entry.len),
            id: entry.id,
            flags: if more { NEXT } else { 0 },
        });
        Ok(())
    }

    fn holds_all(&self) -> bool {
        self.ring.held() == self.ring.layout().entries()
    }
}
