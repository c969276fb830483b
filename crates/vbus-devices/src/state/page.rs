// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A page: its newest value, and the driver's memory of the page while the driver has registered
//! it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vbus_core::shm::abi::state::{DESCRIPTION_BYTES, NAME_MAX, OWNER_DEVICE, OWNER_DRIVER};
use vbus_core::shm::signal::{Armed, end};
use vbus_core::shm::state::{READ_TRIES, Reader, SIGNAL_OFFSET, Writer};
use vbus_core::{ErrorCode, Interrupt, Metric, Region, Window};

use vbus_core::lock;

/// What the numbers of a page mean.
pub const METRICS: &[Metric] = &[
    Metric::gauge(
        "pages.{page=name}.version",
        "state_page_version",
        "Values that the page has had since the device was created",
    )
    .unit("values"),
    Metric::flag(
        "pages.{page=name}.shown",
        "state_page_shown",
        "Whether the driver has registered the page",
    ),
    Metric::gauge(
        "pages.{page=name}.watchers",
        "state_page_watchers",
        "Control clients that watch the page",
    )
    .unit("clients"),
    Metric::counter(
        "pages.{page=name}.overruns",
        "state_page_overruns",
        "Readings that the driver spoiled, because it wrote faster than the device could read",
    )
    .unit("readings"),
];

/// Which end writes a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// The device: control clients set the value.
    Device,
    /// The driver.
    Driver,
}

/// A page of a device.
pub struct Page {
    pub name: String,
    pub bytes: u32,
    pub owner: Owner,
    inner: Mutex<Inner>,
    /// Notified when the value has changed, or when the device has left the bus.
    news: Condvar,
}

struct Inner {
    /// The newest value that the device knows. A watcher keeps its reference to an older value
    /// while it writes that value out.
    value: Arc<[u8]>,
    /// The number of values that the page has had.
    version: u64,
    shown: Option<Shown>,
    watchers: u32,
    overruns: u64,
    removed: bool,
    /// The device is quiesced: nobody touches the driver's memory, and nobody sets the value.
    frozen: bool,
    /// The driver's memory has another value of a page of the device's: that of a bus that was
    /// killed before it could keep the value.
    rewrite: bool,
}

/// How long a client's request waits for a device that is quiesced.
const FROZEN_WAIT: Duration = Duration::from_secs(10);

/// A page as plain data (spec/state-format.md, "state").
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedPage {
    name: String,
    owner: Owner,
    #[serde(with = "hex::serde")]
    value: Vec<u8>,
    version: u64,
    overruns: u64,
}

/// The driver's memory of a page.
struct Shown {
    handle: u32,
    end: PageEnd,
}

enum PageEnd {
    Writer(Writer<Window, end::Device>, Interrupt),
    /// The reader, and the page version that the device read last.
    Reader(Reader<Window, end::Device>, u64),
}

/// What a look at the driver's page found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum News {
    None,
    Taken,
    /// The driver wrote all slots meanwhile.
    Overrun,
}

/// A value and its version.
pub struct Current {
    pub value: Arc<[u8]>,
    pub version: u64,
}

impl Page {
    pub fn new(name: String, bytes: u32, owner: Owner, initial: Option<Vec<u8>>) -> Page {
        let version = u64::from(initial.is_some());
        let mut value = initial.unwrap_or_default();
        value.resize(bytes as usize, 0);
        let inner = Inner {
            value: value.into(),
            version,
            shown: None,
            watchers: 0,
            overruns: 0,
            removed: false,
            frozen: false,
            rewrite: false,
        };
        Page { name, bytes, owner, inner: Mutex::new(inner), news: Condvar::new() }
    }

    /// The answer of CALL_DESCRIBE.
    pub fn description(&self) -> [u8; DESCRIPTION_BYTES] {
        let mut out = [0; DESCRIPTION_BYTES];
        let owner = if self.owner == Owner::Device { OWNER_DEVICE } else { OWNER_DRIVER };
        out[..4].copy_from_slice(&self.bytes.to_le_bytes());
        out[4..8].copy_from_slice(&owner.to_le_bytes());
        let name = &self.name.as_bytes()[..self.name.len().min(NAME_MAX)];
        out[8..8 + name.len()].copy_from_slice(name);
        out
    }

    /// The driver registers the page. If the device owns the page and has a value, it writes that.
    pub fn show(&self, region: &Region) -> Result<(), ErrorCode> {
        let mut inner = lock(&self.inner);
        let end = match self.owner {
            Owner::Device => {
                let writer = Writer::attach(region.window.clone(), end::Device)?;
                PageEnd::Writer(writer, region.interrupt.clone())
            }
            // A new page is at version 0, and its zeros are not a value. The device keeps the last
            // value until the driver writes one.
            Owner::Driver => {
                PageEnd::Reader(Reader::attach(region.window.clone(), end::Device)?, 0)
            }
        };
        self.show_end(&mut inner, region, end)?;
        if inner.version != 0 {
            inner.write();
        }
        Ok(())
    }

    /// The driver had registered the page with a device that this one goes on for. `seen` is the
    /// version that that device read last.
    pub fn show_again(&self, region: &Region, seen: Option<u64>) -> Result<(), ErrorCode> {
        let mut inner = lock(&self.inner);
        let end = match (self.owner, seen) {
            (Owner::Device, None) => {
                // The driver is interrupted anyway.
                let (writer, _) = Writer::resume(region.window.clone(), end::Device)?;
                let reader = Reader::attach(region.window.clone(), end::Driver)?;
                let mut there = vec![0; self.bytes as usize];
                inner.rewrite = reader.read_once(&mut there).is_err() || there != *inner.value;
                PageEnd::Writer(writer, region.interrupt.clone())
            }
            (Owner::Driver, Some(seen)) => {
                PageEnd::Reader(Reader::attach(region.window.clone(), end::Device)?, seen)
            }
            _ => return Err(ErrorCode::BAD_ARGUMENT),
        };
        self.show_end(&mut inner, region, end)
    }

    fn show_end(&self, inner: &mut Inner, region: &Region, end: PageEnd) -> Result<(), ErrorCode> {
        if inner.shown.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        if region.signal_offset != Some(SIGNAL_OFFSET) {
            return Err(ErrorCode::BAD_SIGNAL);
        }
        let layout = match &end {
            PageEnd::Writer(writer, _) => writer.layout(),
            PageEnd::Reader(reader, _) => reader.layout(),
        };
        if layout.value_bytes() != self.bytes as usize {
            return Err(ErrorCode::BAD_LENGTH);
        }
        inner.shown = Some(Shown { handle: region.handle, end });
        Ok(())
    }

    /// Freezes the page: clients' requests wait, and the driver's memory is not touched. Or thaws
    /// it.
    pub fn freeze(&self, frozen: bool) {
        let mut inner = lock(&self.inner);
        inner.frozen = frozen;
        if !frozen && std::mem::take(&mut inner.rewrite) {
            inner.write();
        }
        drop(inner);
        self.news.notify_all();
    }

    /// The page's state while it is not frozen. Waits for that, for a time.
    fn thawed(&self) -> MutexGuard<'_, Inner> {
        let waits = |inner: &mut Inner| inner.frozen && !inner.removed;
        let waited = self.news.wait_timeout_while(lock(&self.inner), FROZEN_WAIT, waits);
        waited.unwrap_or_else(|error| error.into_inner()).0
    }

    /// The version that the device read last from the driver's memory, if the page is the driver's
    /// and registered.
    pub fn seen(&self) -> Option<u64> {
        match &lock(&self.inner).shown {
            Some(Shown { end: PageEnd::Reader(_, seen), .. }) => Some(*seen),
            _ => None,
        }
    }

    /// The page as plain data.
    pub fn save(&self) -> SavedPage {
        let inner = lock(&self.inner);
        SavedPage {
            name: self.name.clone(),
            owner: self.owner,
            value: inner.value.to_vec(),
            version: inner.version,
            overruns: inner.overruns,
        }
    }

    /// Goes on from what [`save`](Self::save) returned for the same page. The driver's memory of
    /// the page comes with [`show_again`](Self::show_again).
    ///
    /// # Errors
    /// It is another page.
    pub fn restore(&self, saved: &SavedPage) -> Result<(), String> {
        if saved.name != self.name || saved.owner != self.owner {
            let (name, owner) = (&self.name, self.owner);
            return Err(format!("page {:?} is not page {name:?} of the {owner:?}", saved.name));
        }
        if saved.value.len() != self.bytes as usize {
            let bytes = self.bytes;
            return Err(format!(
                "page {:?} has {bytes} bytes, not {}",
                self.name,
                saved.value.len()
            ));
        }
        let mut inner = lock(&self.inner);
        inner.value = saved.value.clone().into();
        (inner.version, inner.overruns) = (saved.version, saved.overruns);
        Ok(())
    }

    /// The driver drops region `handle`, or leaves (`None`). The device keeps the last value.
    pub fn hide(&self, handle: Option<u32>) {
        let mut inner = lock(&self.inner);
        if inner
            .shown
            .as_ref()
            .is_some_and(|shown| handle.is_none_or(|handle| handle == shown.handle))
        {
            for _ in 0..READ_TRIES {
                if self.take_news(&mut inner) != News::Overrun {
                    break;
                }
            }
            inner.shown = None;
        }
    }

    /// Takes over a newer value from the driver's page, with one try.
    fn take_news(&self, inner: &mut MutexGuard<'_, Inner>) -> News {
        if inner.frozen {
            return News::None;
        }
        let Some(Shown { end: PageEnd::Reader(reader, seen), .. }) = &mut inner.shown else {
            return News::None;
        };
        // Before anything that costs: most looks find nothing.
        if reader.version() == *seen {
            return News::None;
        }
        let mut value = vec![0; self.bytes as usize];
        match reader.read_once(&mut value) {
            Ok(version) => {
                *seen = version;
                inner.value = value.into();
                inner.version = inner.version.wrapping_add(1);
                self.news.notify_all();
                News::Taken
            }
            Err(_overrun) => {
                inner.overruns = inner.overruns.saturating_add(1);
                News::Overrun
            }
        }
    }

    /// The current value.
    pub fn current(&self) -> Current {
        for _ in 1..READ_TRIES {
            // The lock is free between two tries: a worker may wait for it.
            let mut inner = self.thawed();
            if self.take_news(&mut inner) != News::Overrun {
                return Current { value: inner.value.clone(), version: inner.version };
            }
        }
        let inner = lock(&self.inner);
        Current { value: inner.value.clone(), version: inner.version }
    }

    /// Makes `value`, filled up with zeros, the current value. Returns its version. The page must
    /// be one that the device owns.
    pub fn set(&self, mut value: Vec<u8>) -> Result<u64, String> {
        if self.owner != Owner::Device {
            return Err(format!(
                "page {:?} belongs to the driver; it can be read and watched",
                self.name
            ));
        }
        if value.len() > self.bytes as usize {
            return Err(format!(
                "page {:?} holds {} bytes; the value has {}",
                self.name,
                self.bytes,
                value.len()
            ));
        }
        value.resize(self.bytes as usize, 0);
        let mut inner = self.thawed();
        if inner.frozen {
            return Err("the device is being saved; try again".into());
        }
        inner.value = value.into();
        inner.version = inner.version.wrapping_add(1);
        inner.write();
        self.news.notify_all();
        Ok(inner.version)
    }

    /// Waits at most `timeout` for a value newer than version `than`.
    pub fn wait_newer(&self, than: u64, timeout: Duration) -> Wait {
        let same = |inner: &mut Inner| inner.version == than && !inner.removed;
        let (inner, _) = self
            .news
            .wait_timeout_while(lock(&self.inner), timeout, same)
            .unwrap_or_else(|error| error.into_inner());
        if inner.removed {
            Wait::Removed
        } else if inner.version == than {
            Wait::Nothing
        } else {
            Wait::Newer(Current { value: inner.value.clone(), version: inner.version })
        }
    }

    /// Counts one more client that watches, or one fewer if `begins` is false.
    pub fn watch(&self, begins: bool) {
        let mut inner = lock(&self.inner);
        inner.watchers = if begins {
            inner.watchers.saturating_add(1)
        } else {
            inner.watchers.saturating_sub(1)
        };
    }

    /// Takes over a newer value of the driver, if a client watches. Returns whether the page had
    /// one. It also returns true if the driver overran the read, which has to be tried again.
    pub fn poll(&self) -> bool {
        let mut inner = lock(&self.inner);
        inner.watchers != 0 && self.take_news(&mut inner) != News::None
    }

    /// If a client watches, arms the page: the driver rings the doorbell with its next value.
    pub fn arm(&self) -> Armed {
        let mut inner = lock(&self.inner);
        let watched = inner.watchers != 0;
        match &mut inner.shown {
            Some(Shown { end: PageEnd::Reader(reader, seen), .. }) if watched => {
                reader.arm_newer(*seen)
            }
            _ => Armed::Waiting,
        }
    }

    /// Asks for no doorbell.
    pub fn disarm(&self) {
        if let Some(Shown { end: PageEnd::Reader(reader, _), .. }) = &mut lock(&self.inner).shown {
            reader.disarm();
        }
    }

    /// The device leaves the bus. Every wait for a value ends.
    pub fn remove(&self) {
        lock(&self.inner).removed = true;
        self.news.notify_all();
    }

    pub fn inspect(&self) -> Value {
        let inner = lock(&self.inner);
        json!({
            "name": self.name,
            "bytes": self.bytes,
            "owner": self.owner,
            "version": inner.version,
            "shown": inner.shown.is_some(),
            "watchers": inner.watchers,
            "overruns": inner.overruns,
        })
    }
}

/// The result of waiting.
pub enum Wait {
    Newer(Current),
    Nothing,
    Removed,
}

impl Inner {
    /// Writes the device's value to the driver's memory if the driver has registered the page.
    fn write(&mut self) {
        if let Some(Shown { end: PageEnd::Writer(writer, interrupt), .. }) = &mut self.shown {
            interrupt.kick(writer.write(&self.value));
        }
    }
}
