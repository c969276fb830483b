//! The status page: link, address and counters, from the device to the driver.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use vbus_core::shm::abi::venet::status_page as word;
use vbus_core::shm::signal::End;
use vbus_core::shm::state::{SIGNAL_OFFSET, Writer};
use vbus_core::{ErrorCode, Progress, Region, Task, TaskHandle, Window};

use super::counters::PairCounters;
use super::frame::Mac;
use super::port::Link;
use vbus_core::lock;

/// The least time between two updates that only bring newer counters.
const INTERVAL: Duration = Duration::from_millis(100);

type Value = [u64; word::WORDS];

struct Page {
    handle: u32,
    writer: Writer<Window>,
    region: Region,
    written: Option<(Instant, Value)>,
    /// The driver asked for an interrupt by an update that brought no more than newer counters. It
    /// gets it when the link changes: to be woken ten times a second for a statistic costs it more
    /// than its frames do.
    owed: bool,
}

/// The status page of a connection. The driver may or may not have registered one.
pub struct StatusPage {
    mac: Mac,
    link: Arc<Link>,
    pairs: Arc<[Arc<PairCounters>]>,
    page: Mutex<Option<Page>>,
    /// Whether the task has been told that there is news, and has not slept since.
    awake: AtomicBool,
    task: OnceLock<TaskHandle>,
}

impl StatusPage {
    pub fn new(mac: Mac, link: Arc<Link>, pairs: Arc<[Arc<PairCounters>]>) -> StatusPage {
        StatusPage {
            mac,
            link,
            pairs,
            page: Mutex::default(),
            awake: AtomicBool::new(false),
            task: OnceLock::new(),
        }
    }

    /// The driver registers the page.
    pub fn add(&self, region: Region) -> Result<(), ErrorCode> {
        let mut page = lock(&self.page);
        if page.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        let writer = Writer::attach(region.window.clone(), End::Device)?;
        if region.signal_offset.is_some_and(|at| at != SIGNAL_OFFSET) {
            return Err(ErrorCode::BAD_SIGNAL);
        }
        if writer.layout().value_bytes() < word::BYTES as usize {
            return Err(ErrorCode::BAD_LENGTH);
        }
        *page = Some(Page { handle: region.handle, writer, region, written: None, owed: false });
        drop(page);
        self.wake();
        Ok(())
    }

    /// The driver drops region `handle`; true if that was the page.
    pub fn drop_region(&self, handle: u32) -> bool {
        lock(&self.page).take_if(|page| page.handle == handle).is_some()
    }

    /// The connection ends.
    pub fn close(&self) {
        *lock(&self.page) = None;
    }

    /// Frames were moved: the page will be brought up to date soon.
    pub fn moved(&self) {
        // Pairs with the swap of `update`, which sees the counters of whoever left it to somebody
        // else's wake-up.
        if !self.awake.swap(true, Ordering::Release) {
            self.wake();
        }
    }

    /// The link changed: the page is brought up to date at once.
    pub fn wake(&self) {
        if let Some(task) = self.task.get() {
            task.wake();
        }
    }

    pub fn set_task(&self, task: TaskHandle) {
        let _ = self.task.set(task); // Set once, by the connection that made it.
        self.wake();
    }

    fn value(&self) -> Value {
        let mut value = [0; word::WORDS];
        let mut mac = [0; 8];
        mac[..6].copy_from_slice(&self.mac);
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
        self.awake.swap(false, Ordering::Acquire);
        let (now, value) = (Instant::now(), self.value());
        let mut link_changed = true;
        if let Some((at, last)) = page.written {
            if last == value {
                return None;
            }
            let next = at + INTERVAL;
            link_changed = last[word::LINK] != value[word::LINK];
            if !link_changed && now < next {
                self.awake.store(true, Ordering::Relaxed);
                return Some(next);
            }
        }
        page.written = Some((now, value));
        let mut bytes = [0; word::BYTES as usize];
        for (to, word) in bytes.chunks_exact_mut(8).zip(value) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        page.owed |= page.writer.write(&bytes);
        let kick = link_changed && std::mem::take(&mut page.owed);
        page.region.interrupt.kick(kick);
        None
    }
}

/// Writes the page from time to time.
pub struct StatusTask {
    page: Arc<StatusPage>,
    next: Option<Instant>,
}

impl StatusTask {
    pub fn new(page: Arc<StatusPage>) -> StatusTask {
        StatusTask { page, next: None }
    }
}

impl Task for StatusTask {
    fn poll(&mut self, _budget: u32) -> Result<Progress, ErrorCode> {
        self.next = self.page.update();
        Ok(Progress::Idle)
    }

    fn deadline(&self) -> Option<Instant> {
        self.next
    }

    fn adaptive(&self) -> bool {
        false
    }
}
