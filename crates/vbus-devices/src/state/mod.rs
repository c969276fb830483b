// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `state`: named values (spec/state.md).
//!
//! A device has pages, each with a name, a size, and an owner. Control clients set the value of a
//! page that the device owns, and read the value of a page that the driver owns. The device keeps
//! the newest value when the driver goes. The device reads a driver's page only when it must: when
//! a client asks, while a client watches, and when the driver leaves.

mod config;
mod connection;
mod control;
mod page;

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vbus_core::shm::abi::{class, state as abi};
use vbus_core::{
    Connection, CreateError, Device, DeviceClass, ErrorCode, Identity, Metric, Open, Region,
    TaskHandle, state,
};

use connection::StateConnection;
use page::{Page, SavedPage};
use vbus_core::lock;

/// The class of devices with state pages.
pub struct StateClass;

impl DeviceClass for StateClass {
    fn name(&self) -> &'static str {
        "state"
    }

    fn help(&self) -> &'static str {
        "Named values. pages = [{ name = NAME, bytes = 1 to 1048576, \
         owner = \"device\" or \"driver\", initial = TEXT (optional) }, ...]."
    }

    fn create(&self, _name: &str, config: &Value) -> Result<Arc<dyn Device>, CreateError> {
        let pages = config::parse(config)?;
        Ok(Arc::new(StateDevice(Arc::new(StatePages { pages, task: Mutex::default() }))))
    }

    fn metrics(&self) -> Vec<Metric> {
        page::METRICS.into()
    }
}

/// The pages of a device. The device and its connection share them.
struct StatePages {
    pages: Vec<Page>,
    /// The task of the open connection, which reads watched pages.
    task: Mutex<Option<TaskHandle>>,
}

impl StatePages {
    fn page(&self, name: &str) -> Result<&Page, String> {
        self.pages.iter().find(|page| page.name == name).ok_or_else(|| {
            let names: Vec<_> = self.pages.iter().map(|page| page.name.as_str()).collect();
            format!("there is no page {name:?}; there are: {}", names.join(", "))
        })
    }

    fn wake(&self) {
        if let Some(task) = &*lock(&self.task) {
            task.wake();
        }
    }
}

struct StateDevice(Arc<StatePages>);

/// The device as plain data (spec/state-format.md, "state").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    pages: Vec<SavedPage>,
}

impl Device for StateDevice {
    fn identity(&self) -> Identity {
        let pages = u16::try_from(self.0.pages.len()).unwrap_or(u16::MAX);
        Identity::new(class::STATE, "state", 0x05_80_00)
            .with_regions(u32::from(pages))
            .with_vectors(pages)
    }

    fn config(&self) -> Vec<u8> {
        let mut area = vec![0; abi::CONFIG_BYTES];
        let pages = u32::try_from(self.0.pages.len()).unwrap_or(u32::MAX);
        area[abi::CONFIG_PAGES..][..4].copy_from_slice(&pages.to_le_bytes());
        area
    }

    fn open(&self, open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(StateConnection::new(self.0.clone(), &open)))
    }

    fn inspect(&self) -> Value {
        json!({ "pages": self.0.pages.iter().map(Page::inspect).collect::<Vec<_>>() })
    }

    fn control(&self, request: &Value, reply: &mut dyn FnMut(Value) -> bool) -> Result<(), String> {
        control::serve(&self.0, request, reply)
    }

    fn is_kept_request(&self, request: &Value) -> bool {
        control::changes(request)
    }

    fn removed(&self) {
        self.0.pages.iter().for_each(Page::remove);
    }

    fn quiesce(&self) {
        self.0.pages.iter().for_each(|page| page.freeze(true));
    }

    fn resume(&self) {
        self.0.pages.iter().for_each(|page| page.freeze(false));
    }

    fn save(&self) -> Result<Value, String> {
        state::part(&Saved { pages: self.0.pages.iter().map(Page::save).collect() })
    }

    /// The driver's memory has the newest value of each page of the driver's. The values of the
    /// device's pages are in the state, and a page that has another one gets that again.
    fn outlast(&self, _: &mut Value, _: Option<&mut Value>) -> Result<(), String> {
        Ok(())
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        let Saved { pages } = state::read_part(saved)?;
        if pages.len() != self.0.pages.len() {
            return Err(format!("it has {} pages, not {}", self.0.pages.len(), pages.len()));
        }
        self.0.pages.iter().zip(&pages).try_for_each(|(page, saved)| page.restore(saved))
    }

    fn reopen(
        &self,
        open: Open,
        regions: Vec<Region>,
        saved: &Value,
    ) -> Result<Box<dyn Connection>, String> {
        Ok(Box::new(StateConnection::again(self.0.clone(), &open, regions, saved)?))
    }
}
