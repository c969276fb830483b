//! The status page: link, address and counters, from the device to the driver.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vbus_core::shm::abi::venet::status_page as word;
use vbus_core::shm::signal::{Kick, end};
use vbus_core::shm::state::{SIGNAL_OFFSET, Writer};
use vbus_core::{ErrorCode, Progress, Region, Task, Window, lock};
use vbus_net::{Filter, Link};

use super::counters::PairCounters;
use super::news::Pending;

/// The least time between two updates that only bring newer counters.
const INTERVAL: Duration = Duration::from_millis(100);

type Value = [u64; word::WORDS];

/// A page that the driver has registered.
struct Page {
    writer: Writer<Window, end::Device>,
    region: Region,
    written: Option<(Instant, Value)>,
    /// The driver has armed, and was not interrupted for the update that followed because it
    /// brought only newer counters. It is interrupted when the link changes.
    owed: Kick<end::Device>,
}

/// The status page of a connection. The driver may or may not have registered one.
pub struct Pages {
    filter: Arc<Filter>,
    link: Arc<Link>,
    pairs: Arc<[Arc<PairCounters>]>,
    pending: Pending,
    page: Mutex<Option<Page>>,
}

impl Pages {
    /// No page yet. The address is that of the filter.
    pub fn new(
        filter: Arc<Filter>,
        link: Arc<Link>,
        pairs: Arc<[Arc<PairCounters>]>,
        pending: Pending,
    ) -> Pages {
        Pages { filter, link, pairs, pending, page: Mutex::default() }
    }

    /// The driver registers the page; the task is to be woken then.
    pub fn add(&self, region: Region) -> Result<(), ErrorCode> {
        let mut page = lock(&self.page);
        if page.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        let writer = Writer::attach(region.window.clone(), end::Device)?;
        if region.signal_offset.is_some_and(|at| at != SIGNAL_OFFSET) {
            return Err(ErrorCode::BAD_SIGNAL);
        }
        if writer.layout().value_bytes() < word::BYTES as usize {
            return Err(ErrorCode::BAD_LENGTH);
        }
        *page = Some(Page { writer, region, written: None, owed: Kick::NONE });
        Ok(())
    }

    /// The driver drops region `handle`; true if that was the page.
    pub fn drop_region(&self, handle: u32) -> bool {
        lock(&self.page).take_if(|page| page.region.handle == handle).is_some()
    }

    /// The connection ends.
    pub fn close(&self) {
        *lock(&self.page) = None;
    }

    fn value(&self) -> Value {
        let mut value = [0; word::WORDS];
        let mut mac = [0; 8];
        mac[..6].copy_from_slice(&self.filter.mac());
        value[word::LINK] = u64::from(self.link.is_up());
        value[word::MAC] = u64::from_le_bytes(mac);
        for pair in &*self.pairs {
            value[word::TX_FRAMES] += pair.tx.frames.get();
            value[word::TX_BYTES] += pair.tx.bytes.get();
            value[word::TX_DROPS] += pair.tx.drops.sum();
            value[word::RX_FRAMES] += pair.rx.frames.get();
            value[word::RX_BYTES] += pair.rx.bytes.get();
            value[word::RX_DROPS] += pair.rx.drops.sum();
        }
        value
    }

    /// Writes the page if it is time. Returns when it will be, if there is something to write then.
    fn update(&self) -> Option<Instant> {
        let mut guard = lock(&self.page);
        let page = guard.as_mut()?;
        self.pending.take();
        let (now, value) = (Instant::now(), self.value());
        let mut link_changed = true;
        if let Some((at, last)) = page.written {
            if last == value {
                return None;
            }
            let next = at + INTERVAL;
            link_changed = last[word::LINK] != value[word::LINK];
            if !link_changed && now < next {
                self.pending.keep();
                return Some(next);
            }
        }
        page.written = Some((now, value));
        let mut bytes = [0; word::BYTES as usize];
        for (to, word) in bytes.chunks_exact_mut(8).zip(value) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        let owed = std::mem::replace(&mut page.owed, Kick::NONE).or(page.writer.write(&bytes));
        if link_changed {
            page.region.interrupt.kick(owed);
        } else {
            page.owed = owed;
            page.region.interrupt.kick(Kick::NONE);
        }
        None
    }
}

/// Writes the page from time to time.
pub struct PagesTask {
    pages: Arc<Pages>,
    next: Option<Instant>,
}

impl PagesTask {
    pub fn new(pages: Arc<Pages>) -> PagesTask {
        PagesTask { pages, next: None }
    }
}

impl Task for PagesTask {
    fn poll(&mut self, _budget: u32) -> Result<Progress, ErrorCode> {
        self.next = self.pages.update();
        Ok(Progress::Idle)
    }

    fn deadline(&self) -> Option<Instant> {
        self.next
    }

    fn adaptive(&self) -> bool {
        false
    }
}
