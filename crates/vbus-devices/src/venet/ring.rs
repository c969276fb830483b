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

/// Takes the next entry of `ring`, for the device to read or to `write`.
///
/// Behind an IOMMU a driver maps a buffer just before it posts it. A view that was taken before
/// lacks it: the entry stays in the ring for a poll with a newer view, and until then the ring's
/// `arm` says that it was missed. Of memory that no view has, the device learns when it looks the
/// entry up.
#[inline]
fn take(
    ring: &mut DeviceEnd<Window>,
    view: &View<'_>,
    write: bool,
) -> Result<Option<Entry>, ErrorCode> {
    let has = |entry: &Entry| view.slice(entry.addr, entry.len.into(), write).is_ok();
    Ok(ring.take_if(|entry| view.is_current() || has(entry))?)
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
    fn take(&mut self, view: &View<'_>) -> Result<Option<usize>, ErrorCode> {
        let chain = &mut self.state;
        while chain.entries.last().is_none_or(|last| last.flags & NEXT != 0) {
            let Some(entry) = take(&mut self.ring, view, false)? else { return Ok(None) };
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

    fn take(&mut self, view: &View<'_>) -> Result<Option<Entry>, ErrorCode> {
        match take(&mut self.ring, view, true)? {
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

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vbus_core::MemoryContext;
    use vbus_core::memory::Access;
    use vbus_core::shm::ring::{DriverEnd, Layout, Returns};

    use super::*;

    const PAGE: u64 = 4096;

    fn map(memory: &MemoryContext, addr: u64) {
        let file = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, PAGE).unwrap();
        memory.map(addr, PAGE, Some((file, 0)), Access::BOTH).unwrap();
    }

    #[test]
    fn an_entry_that_was_mapped_after_the_view_is_taken_later() {
        const LATE: u64 = 16 * PAGE;
        for write in [false, true] {
            let memory = MemoryContext::new();
            map(&memory, 0);
            map(&memory, PAGE);
            let layout = Layout::new(8, Returns::Entries).unwrap();
            let window = || memory.window(0, PAGE).unwrap();
            let mut driver = DriverEnd::create(window(), layout, 0).unwrap();
            let mut ring = DeviceEnd::attach(window()).unwrap();
            let old = memory.view();
            map(&memory, LATE);
            let new = memory.view();
            assert!(new.is_current() && !old.is_current());
            let mut submit = |addr| {
                driver.submit(Entry { addr, len: 64, id: 0, flags: 0 }).unwrap();
                let _ = driver.post(); // Nobody sleeps.
            };
            submit(PAGE);
            submit(LATE);
            let addr = |entry: Result<Option<Entry>, ErrorCode>| entry.unwrap().map(|e| e.addr);
            assert_eq!(addr(take(&mut ring, &old, write)), Some(PAGE), "the old view has it");
            assert_eq!(addr(take(&mut ring, &old, write)), None);
            assert_eq!(ring.arm(0), Armed::Missed);
            assert_eq!(addr(take(&mut ring, &new, write)), Some(LATE));
            assert_eq!(ring.arm(0), Armed::Waiting);
            // For what no view has, nobody waits.
            submit(2 * LATE);
            assert_eq!(addr(take(&mut ring, &new, write)), Some(2 * LATE));
        }
    }
}
