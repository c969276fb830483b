// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that carry the interrupts of other devices on their bus (spec/pci.md, "Interrupts").

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use vbus_shm::ErrorCode;

use crate::interrupt::{InterruptSink, Outlet, Route};
use crate::lock::lock;

/// Where the interrupts of each device of a bus go, by the device's name.
#[derive(Default)]
pub(crate) struct Outlets(Mutex<BTreeMap<String, Weak<Outlet>>>);

impl Outlets {
    pub(crate) fn insert(&self, name: &str, outlet: &Arc<Outlet>) {
        lock(&self.0).insert(name.into(), Arc::downgrade(outlet));
    }

    pub(crate) fn remove(&self, name: &str) {
        lock(&self.0).remove(name);
    }

    fn get(&self, name: &str) -> Option<Arc<Outlet>> {
        lock(&self.0).get(name)?.upgrade()
    }
}

/// Lets a device carry the interrupts of other devices on its bus. Each of those devices must name
/// it ([`Endpoint::set_router`](crate::Endpoint::set_router)).
#[derive(Clone)]
pub struct Router {
    /// The name of the device that routes. `None` if another device routes its interrupts: routes
    /// could then form a circle.
    name: Option<String>,
    outlets: Weak<Outlets>,
}

impl Router {
    /// The router of the device `name`. `routed`: another device may route its interrupts.
    pub(crate) fn new(name: &str, routed: bool, outlets: Weak<Outlets>) -> Router {
        Router { name: (!routed).then(|| name.into()), outlets }
    }

    /// Sends the interrupts of the open connection of `device` on `vector` to `sink`, until the
    /// route is dropped or that connection ends. `sink` gets one interrupt at once, because the
    /// driver may have missed the last one on the old path.
    ///
    /// # Errors
    /// [`ErrorCode::DENIED`] (there is no such device, or it does not name this router),
    /// [`ErrorCode::NOT_OPEN`], [`ErrorCode::BAD_VECTOR`], [`ErrorCode::EXISTS`].
    pub fn route(
        &self,
        device: &str,
        vector: u16,
        sink: Arc<dyn InterruptSink>,
    ) -> Result<Route, ErrorCode> {
        let name = self.name.as_deref().ok_or(ErrorCode::DENIED)?;
        let outlets = self.outlets.upgrade().ok_or(ErrorCode::REMOVED)?;
        let outlet = outlets.get(device).ok_or(ErrorCode::DENIED)?;
        if outlet.router() != Some(name) {
            return Err(ErrorCode::DENIED);
        }
        outlet.route(vector, sink)
    }
}
