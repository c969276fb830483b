// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver's use of a device with state pages.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::shm::abi::state::{CALL_DESCRIBE, DESCRIPTION_BYTES};
use vbus_core::shm::signal::Armed;
use vbus_core::{Connection, ErrorCode, Open, Progress, Region, Task, TaskHandle, state};

use super::StatePages;
use super::page::Page;
use vbus_core::lock;

/// A connection. Its task reads the pages that clients watch, and sleeps while nobody watches.
pub struct StateConnection {
    device: Arc<StatePages>,
    task: TaskHandle,
}

impl StateConnection {
    pub fn new(device: Arc<StatePages>, open: &Open) -> StateConnection {
        let fail = open.fail.clone();
        let watch = Watch { device: device.clone(), next: 0 };
        let task = open.executor.spawn(
            open.worker,
            Box::new(watch),
            open.counters.clone(),
            move |status| fail.fail(status),
        );
        *lock(&device.task) = Some(task.clone());
        StateConnection { device, task }
    }

    /// The connection of a driver that had these regions with a device that this one goes on for.
    pub fn again(
        device: Arc<StatePages>,
        open: &Open,
        regions: Vec<Region>,
        saved: &Value,
    ) -> Result<StateConnection, String> {
        let Saved { seen } = state::read_part(saved)?;
        if seen.iter().any(|one| regions.iter().all(|region| region.id != one.page)) {
            return Err("seen has a page that is not registered".into());
        }
        let connection = StateConnection::new(device, open);
        for region in regions {
            let seen = seen.iter().find(|one| one.page == region.id).map(|one| one.version);
            let shown = connection.page(region.id).and_then(|page| page.show_again(&region, seen));
            let bound = shown.and_then(|()| region.doorbell.bind(&connection.task));
            bound.map_err(|error| format!("page {}: {error}", region.id))?;
        }
        Ok(connection)
    }

    /// Page `number`.
    fn page(&self, number: u32) -> Result<&Page, ErrorCode> {
        let number = usize::try_from(number).map_err(|_| ErrorCode::BAD_ARGUMENT)?;
        self.device.pages.get(number).ok_or(ErrorCode::BAD_ARGUMENT)
    }
}

/// The connection as plain data (spec/state-format.md, "state").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    /// The registered pages that the driver owns.
    seen: Vec<Seen>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seen {
    page: u32,
    /// The version that the device read last.
    version: u64,
}

impl Connection for StateConnection {
    fn check_region(&mut self, id: u32, _: u64) -> Result<(), ErrorCode> {
        self.page(id).map(drop)
    }

    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        self.page(region.id)?.show(&region)?;
        region.doorbell.bind(&self.task).inspect_err(|_| {
            let _ = self.region_dropped(region.handle);
        })
    }

    fn region_dropped(&mut self, handle: u32) -> Result<(), ErrorCode> {
        self.device.pages.iter().for_each(|page| page.hide(Some(handle)));
        Ok(())
    }

    fn call(&mut self, function: u32, flags: u32, buffer: &mut [u8]) -> Result<u64, ErrorCode> {
        if function != CALL_DESCRIBE {
            return Err(ErrorCode::BAD_FUNCTION);
        }
        if flags != 0 {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        let out = buffer.first_chunk_mut::<DESCRIPTION_BYTES>().ok_or(ErrorCode::BAD_LENGTH)?;
        let number = u32::from_le_bytes([out[0], out[1], out[2], out[3]]);
        *out = self.page(number)?.description();
        Ok(0)
    }

    fn save(&mut self) -> Result<Value, String> {
        let seen = |(page, of): (u32, &Page)| of.seen().map(|version| Seen { page, version });
        state::part(&Saved { seen: (0..).zip(&self.device.pages).filter_map(seen).collect() })
    }
}

impl Drop for StateConnection {
    fn drop(&mut self) {
        *lock(&self.device.task) = None;
        self.task.stop();
        self.device.pages.iter().for_each(|page| page.hide(None));
    }
}

/// The task that takes over newer values of watched pages.
struct Watch {
    device: Arc<StatePages>,
    /// The page at which the next poll begins. It moves on, so that a page that changes all the
    /// time does not keep the others waiting.
    next: usize,
}

/// Bytes of values that the task copies for one unit of the budget.
const BYTES_PER_UNIT: u64 = 4096;

impl Task for Watch {
    fn work(&self) -> String {
        "state pages".into()
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let pages = &self.device.pages;
        let mut left = i64::from(budget);
        let mut progress = Progress::Idle;
        for _ in 0..pages.len() {
            if left <= 0 {
                return Ok(Progress::Busy);
            }
            let page = &pages[self.next % pages.len()];
            self.next = (self.next + 1) % pages.len();
            if page.poll() {
                progress = Progress::Busy;
                left -=
                    i64::try_from(1 + u64::from(page.bytes) / BYTES_PER_UNIT).unwrap_or(i64::MAX);
            }
        }
        Ok(progress)
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        // Arm every page, even after one has missed: the task may sleep nevertheless.
        let missed =
            self.device.pages.iter().map(Page::arm).filter(|armed| *armed == Armed::Missed).count();
        Ok(if missed == 0 { Armed::Waiting } else { Armed::Missed })
    }

    fn disarm(&mut self) {
        self.device.pages.iter().for_each(Page::disarm);
    }
}
