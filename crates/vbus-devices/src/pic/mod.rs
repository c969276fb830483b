// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `pic`: an interrupt controller that ends interrupts without a VM exit (spec/pic.md).
//!
//! The driver shares a page for each of its processors. It routes interrupts of other devices of
//! the bus to lines of these pages. The driver can route only devices whose configuration names
//! this device (`pic = NAME`). A route ends with the connection of either device. If the connection
//! of the `pic` ends, the other device uses its own interrupt again.

mod connection;
mod page;

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use vbus_core::settings::Settings;
use vbus_core::shm::abi::{class, pic as abi};
use vbus_core::shm::pic::LINES_MAX;
use vbus_core::{
    Connection, CreateError, Device, DeviceClass, ErrorCode, Identity, Metric, Open, Region,
    Router, state,
};

use connection::{PicConnection, PicState};
use vbus_core::lock;

/// The class of interrupt controllers.
pub struct PicClass;

/// The default number of processors.
const CPUS: u16 = 64;

impl DeviceClass for PicClass {
    fn name(&self) -> &'static str {
        "pic"
    }

    fn help(&self) -> &'static str {
        "Interrupt controller for the devices of the bus that have pic = NAME. \
         cpus = 1 to 256 (64). Set msix = true to give each processor a vector of its own."
    }

    fn create(&self, _name: &str, config: &Value) -> Result<Arc<dyn Device>, CreateError> {
        let mut settings = Settings::new(config)?;
        let cpus = settings.integer("cpus", 1..=abi::CPUS_MAX)?.unwrap_or(CPUS);
        settings.finish()?;
        Ok(Arc::new(PicDevice { cpus, state: Arc::default(), router: Mutex::default() }))
    }

    fn metrics(&self) -> Vec<Metric> {
        page::METRICS.into()
    }
}

struct PicDevice {
    cpus: u16,
    /// The state of the open connection; empty without one.
    state: Arc<Mutex<PicState>>,
    /// Makes the routes again of a device that this one goes on for.
    router: Mutex<Option<Router>>,
}

impl Device for PicDevice {
    fn identity(&self) -> Identity {
        Identity::new(class::PIC, "pic", 0x08_80_00)
            .with_regions(u32::from(self.cpus))
            .with_vectors(self.cpus)
    }

    fn config(&self) -> Vec<u8> {
        let mut area = vec![0; abi::CONFIG_BYTES];
        area[abi::CONFIG_CPUS..][..4].copy_from_slice(&u32::from(self.cpus).to_le_bytes());
        area[abi::CONFIG_LINES..][..4].copy_from_slice(&u32::from(LINES_MAX).to_le_bytes());
        area
    }

    fn open(&self, open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(PicConnection::new(self.state.clone(), self.cpus, open.router)))
    }

    fn quiesce(&self) {
        lock(&self.state).park();
    }

    fn resume(&self) {
        let router = lock(&self.router).clone();
        lock(&self.state).go_on(router.as_ref());
    }

    fn save(&self) -> Result<Value, String> {
        Ok(state::nothing())
    }

    /// Routes change by calls alone, and what is pending is in the driver's memory.
    fn outlast(&self, _: &mut Value, _: Option<&mut Value>) -> Result<(), String> {
        Ok(())
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        state::is_nothing(saved)
    }

    fn reopen(
        &self,
        open: Open,
        regions: Vec<Region>,
        saved: &Value,
    ) -> Result<Box<dyn Connection>, String> {
        *lock(&self.router) = Some(open.router.clone());
        let (state, cpus) = (self.state.clone(), self.cpus);
        Ok(Box::new(PicConnection::again(state, cpus, open.router, regions, saved)?))
    }

    fn inspect(&self) -> Value {
        let mut shown = lock(&self.state).inspect();
        shown["cpus"] = json!(self.cpus);
        shown
    }
}
