// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The status page (link, address, counters) and the counters page (counters of each queue pair).
//! The device writes both for the driver.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vbus_core::shm::abi::venet::{REGION_STATUS, counters_page, status_page as word};
use vbus_core::shm::signal::{Kick, end};
use vbus_core::shm::state::{SIGNAL_OFFSET, Writer};
use vbus_core::{ErrorCode, Notifier, Progress, Region, Task, Window, lock};
use vbus_net::Filter;
use vbus_net::front::{Duplex, PairCounters};

use super::device::VenetDevice;
use super::news::Pending;

/// The least time between two updates that change only counters.
const INTERVAL: Duration = Duration::from_millis(100);

/// A page that the driver has registered.
struct Page {
    writer: Writer<Window, end::Device>,
    region: Region,
    /// Its present value.
    written: Vec<u64>,
    /// The driver armed, and the device did not interrupt it for the next update, because that
    /// changed only counters. The next urgent update interrupts the driver.
    owed: Kick<end::Device>,
}

impl Page {
    /// Attaches a page of `words` words in `region`. Fails if the region is not such a page.
    fn new(region: Region, words: usize) -> Result<Page, ErrorCode> {
        let writer = Writer::attach(region.window.clone(), end::Device)?;
        if region.signal_offset.is_some_and(|at| at != SIGNAL_OFFSET) {
            return Err(ErrorCode::BAD_SIGNAL);
        }
        if writer.layout().value_bytes() < words * 8 {
            return Err(ErrorCode::BAD_LENGTH);
        }
        Ok(Page { writer, region, written: Vec::new(), owed: Kick::NONE })
    }

    /// Writes `value`. Only an `urgent` update interrupts the driver.
    fn write(&mut self, value: Vec<u64>, urgent: bool) {
        let bytes: Vec<u8> = value.iter().flat_map(|word| word.to_le_bytes()).collect();
        let owed = std::mem::replace(&mut self.owed, Kick::NONE).or(self.writer.write(&bytes));
        self.written = value;
        if urgent {
            self.region.interrupt.kick(owed);
        } else {
            self.owed = owed;
            self.region.interrupt.kick(Kick::NONE);
        }
    }
}

/// The pages as plain data (spec/state-format.md, "venet").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PagesState {
    /// How many requests to announce the device has passed to the driver.
    pub announces: u64,
    /// The words that each registered page has.
    status: Option<Vec<u64>>,
    counters: Option<Vec<u64>>,
}

impl PagesState {
    /// Makes it a state that outlasts the process: what the pages have then is not known.
    pub fn outlast(&mut self) {
        for page in [&mut self.status, &mut self.counters].into_iter().flatten() {
            page.clear();
        }
    }
}

#[derive(Default)]
struct Registered {
    status: Option<Page>,
    counters: Option<Page>,
    /// When the device last wrote the counters.
    at: Option<Instant>,
    /// How many requests to announce the device has passed to the driver.
    announces: u64,
}

/// The pages of a connection. The driver may have registered none, one or both.
pub struct Pages {
    device: Arc<VenetDevice>,
    filter: Arc<Filter>,
    pending: Pending,
    incarnation: u64,
    notifier: Notifier,
    registered: Mutex<Registered>,
}

impl Pages {
    /// Makes the state without pages. The status page gets the address of the filter.
    pub fn new(
        device: Arc<VenetDevice>,
        filter: Arc<Filter>,
        pending: Pending,
        (incarnation, notifier): (u64, Notifier),
    ) -> Pages {
        let announces = device.nic.link.announces();
        let registered = Mutex::new(Registered { announces, ..Registered::default() });
        Pages { device, filter, pending, incarnation, notifier, registered }
    }

    /// The driver registers a page. The caller must then wake the task.
    pub fn add(&self, region: Region) -> Result<(), ErrorCode> {
        let mut registered = lock(&self.registered);
        let is_status = region.id == REGION_STATUS;
        let (place, words) = if is_status {
            (&mut registered.status, word::WORDS)
        } else {
            (&mut registered.counters, self.device.nic.pairs.len() * counters_page::WORDS)
        };
        if place.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        *place = Some(Page::new(region, words)?);
        registered.at = None;
        Ok(())
    }

    /// The driver had registered a page with a device that this one goes on for.
    pub fn add_again(&self, region: Region, saved: &PagesState) -> Result<(), ErrorCode> {
        let mut registered = lock(&self.registered);
        let is_status = region.id == REGION_STATUS;
        let (place, words, written) = if is_status {
            (&mut registered.status, word::WORDS, &saved.status)
        } else {
            let words = self.device.nic.pairs.len() * counters_page::WORDS;
            (&mut registered.counters, words, &saved.counters)
        };
        if place.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        // Without the words the page is written anew.
        let written = written.clone().unwrap_or_default();
        if written.len() > words {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        let mut page = Page::new(region, words)?;
        let (writer, owed) = Writer::resume(page.region.window.clone(), end::Device)?;
        (page.writer, page.owed, page.written) = (writer, owed, written);
        *place = Some(page);
        Ok(())
    }

    /// The pages as plain data.
    pub fn save(&self) -> PagesState {
        let registered = lock(&self.registered);
        let written = |page: &Option<Page>| page.as_ref().map(|page| page.written.clone());
        PagesState {
            announces: registered.announces,
            status: written(&registered.status),
            counters: written(&registered.counters),
        }
    }

    /// Sets how many requests to announce the device has passed to the driver.
    pub fn set_announces(&self, announces: u64) {
        lock(&self.registered).announces = announces;
    }

    /// The driver drops region `handle`. Returns whether that was a page.
    pub fn drop_region(&self, handle: u32) -> bool {
        let registered = &mut *lock(&self.registered);
        let drop =
            |page: &mut Option<Page>| page.take_if(|page| page.region.handle == handle).is_some();
        drop(&mut registered.status) || drop(&mut registered.counters)
    }

    /// The connection ends.
    pub fn close(&self) {
        *lock(&self.registered) = Registered::default();
    }

    fn status(&self) -> Vec<u64> {
        let (config, link) = (&self.device.nic.config, &self.device.nic.link);
        let mut value = vec![0; word::WORDS];
        let mut mac = [0; 8];
        mac[..6].copy_from_slice(&self.filter.mac());
        value[word::LINK] = u64::from(link.is_up());
        value[word::MAC] = u64::from_le_bytes(mac);
        value[word::SPEED] = u64::from(config.speed);
        value[word::DUPLEX] = match config.duplex {
            Some(Duplex::Half) => 0,
            Some(Duplex::Full) => 1,
            None => 2,
        };
        value[word::ANNOUNCE] = link.announces();
        value[word::INCARNATION] = self.incarnation;
        for pair in &*self.device.nic.pairs {
            value[word::TX_FRAMES] += pair.tx.frames.get();
            value[word::TX_BYTES] += pair.tx.bytes.get();
            value[word::TX_DROPS] += pair.tx.drops.sum();
            value[word::RX_FRAMES] += pair.rx.frames.get();
            value[word::RX_BYTES] += pair.rx.bytes.get();
            value[word::RX_DROPS] += pair.rx.drops.sum();
        }
        value
    }

    /// Writes the pages if an update is due. Returns when the next update is due, if one is
    /// pending.
    fn update(&self) -> Option<Instant> {
        let registered = &mut *lock(&self.registered);
        let announces = self.device.nic.link.announces();
        if std::mem::replace(&mut registered.announces, announces) != announces {
            self.notifier.announce(); // A driver without a status page needs it too.
        }
        if registered.status.is_none() && registered.counters.is_none() {
            return None;
        }
        self.pending.take();
        let now = Instant::now();
        let status = self.status();
        let next = registered.at.map(|at| at + INTERVAL).filter(|next| now < *next);
        let mut later = false;
        if let Some(page) = &mut registered.status {
            let link = |value: &[u64]| value.get(..word::TX_FRAMES).map(<[u64]>::to_vec);
            let urgent = link(&page.written) != link(&status);
            if urgent || (page.written != status && next.is_none()) {
                page.write(status, urgent);
            } else {
                later |= page.written != status;
            }
        }
        if let Some(page) = &mut registered.counters {
            let value: Vec<u64> =
                self.device.nic.pairs.iter().flat_map(|pair| words(pair)).collect();
            if page.written != value && next.is_none() {
                page.write(value, false);
            } else {
                later |= page.written != value;
            }
        }
        if later {
            self.pending.keep();
            return next;
        }
        if next.is_none() {
            registered.at = Some(now);
        }
        None
    }
}

/// The words of one queue pair in the counters page.
fn words(pair: &PairCounters) -> [u64; counters_page::WORDS] {
    use counters_page as at;
    let (tx, rx) = (&pair.tx, &pair.rx);
    let mut words = [0; at::WORDS];
    for (at, counter) in [
        (at::TX_FRAMES, &tx.frames),
        (at::TX_BYTES, &tx.bytes),
        (at::TX_BATCHES, &tx.batches),
        (at::TX_WAITS, &tx.waits),
        (at::TX_CSUM, &tx.csum),
        (at::TX_SEGMENTS, &tx.segments),
        (at::TX_DROPS_SHORT, &tx.drops.short),
        (at::TX_DROPS_HEADER, &tx.drops.bad_header),
        (at::TX_DROPS_NO_LINK, &tx.drops.no_link),
        (at::TX_DROPS_REFUSED, &tx.drops.refused),
        (at::TX_DROPS_LONG, &tx.drops.too_long),
        (at::TX_DROPS_SPOOFED, &tx.drops.spoofed),
        (at::TX_DROPS_DENIED, &tx.drops.denied),
        (at::TX_DROPS_STORM, &tx.drops.storm),
        (at::RX_FRAMES, &rx.frames),
        (at::RX_BYTES, &rx.bytes),
        (at::RX_BATCHES, &rx.batches),
        (at::RX_STARVED, &rx.starved),
        (at::RX_CSUM, &rx.csum),
        (at::RX_SEGMENTS, &rx.segments),
        (at::RX_FILTERED, &rx.filtered),
        (at::RX_DROPS_BUFFERS, &rx.drops.no_buffers),
        (at::RX_DROPS_LONG, &rx.drops.too_long),
        (at::RX_DROPS_BAD, &rx.drops.bad_frame),
        (at::RX_DROPS_SLOW, &rx.drops.too_slow),
        (at::RX_DROPS_RATE, &rx.drops.rate),
        (at::RX_DROPS_NO_LINK, &rx.drops.no_link),
    ] {
        words[at] = counter.get();
    }
    words
}

/// The task that writes the pages.
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
    fn work(&self) -> String {
        "the status and counter pages".into()
    }

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
