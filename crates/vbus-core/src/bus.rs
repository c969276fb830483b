// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus: its classes and its devices.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use vbus_shm::Versions;
use vbus_shm::abi::reg;

use crate::device::{CreateError, Device, DeviceClass, Joined};
use crate::endpoint::Endpoint;
use crate::executor::Executor;
use crate::host::Host;
use crate::lock::lock;
use crate::losses::LossWatch;
use crate::memory::Budget;
use crate::router::Outlets;

/// The most devices of a bus.
pub const DEVICES_MAX: usize = 1024;
/// The longest name, in bytes: what the driver's register holds.
pub const NAME_MAX: usize = 32;

/// Why a device could not be added or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// The name does not have 1 to 32 characters of `a-z A-Z 0-9 - _ .`, or it begins with a dot.
    #[error(
        "bad device name {0:?}: use 1 to {NAME_MAX} letters, digits, '-', '_' and '.', not \
         beginning with '.'"
    )]
    BadName(String),
    /// A device of that name is on the bus.
    #[error("a device called {0:?} is on the bus already")]
    Exists(String),
    /// No device of that name is on the bus.
    #[error("no device called {0:?} is on the bus")]
    NotFound(String),
    /// No such class.
    #[error("no device class {0:?}; there are: {1}")]
    NoClass(String, String),
    /// The bus has [`DEVICES_MAX`] devices.
    #[error("more than {DEVICES_MAX} devices")]
    Full,
    /// The device's identity is invalid.
    #[error("device {0:?} cannot join a bus: {1}")]
    Identity(String, String),
    /// The class could not make the device.
    #[error("device {0:?}: {1}")]
    Create(String, CreateError),
}

type Devices = Mutex<BTreeMap<String, Arc<Endpoint>>>;

/// A bus. Devices may be added and removed at any time.
pub struct Bus {
    executor: Arc<Executor>,
    classes: Vec<Box<dyn DeviceClass>>,
    versions: Versions,
    devices: Arc<Devices>,
    outlets: Arc<Outlets>,
    _losses: LossWatch,
}

impl Bus {
    /// An empty bus. Its devices run on `executor`.
    pub fn new(executor: Arc<Executor>, classes: Vec<Box<dyn DeviceClass>>) -> Bus {
        // Now, because the process may later lack the right to read its limits.
        Budget::of_process();
        let versions = Versions::SUPPORTED;
        let devices = Arc::<Devices>::default();
        let all = Arc::downgrade(&devices);
        let _losses = LossWatch::start(&executor, move || {
            let devices = all.upgrade();
            let all = devices
                .iter()
                .flat_map(|devices| lock(devices).values().cloned().collect::<Vec<_>>());
            all.for_each(|endpoint| endpoint.check_memory());
        });
        Bus { executor, classes, versions, devices, outlets: Arc::default(), _losses }
    }

    /// Restricts the versions of the ABI that drivers can open devices with. It holds for devices
    /// that are added later.
    pub fn set_versions(&mut self, versions: Versions) {
        self.versions = versions;
    }

    /// The classes.
    pub fn classes(&self) -> impl Iterator<Item = &dyn DeviceClass> {
        self.classes.iter().map(|c| &**c)
    }

    /// The event loop.
    pub fn executor(&self) -> &Arc<Executor> {
        &self.executor
    }

    /// Makes a device of class `class` and adds it as `name`.
    pub fn create(
        &self,
        name: &str,
        class: &str,
        config: &Value,
    ) -> Result<Arc<Endpoint>, BusError> {
        self.join(name, self.make(name, class, config)?, false)
    }

    /// As [`create`](Self::create), of a device that goes on from a state
    /// ([`Endpoint::restore`]): it is quiesced before anything of it runs.
    pub fn create_quiesced(
        &self,
        name: &str,
        class: &str,
        config: &Value,
    ) -> Result<Arc<Endpoint>, BusError> {
        self.join(name, self.make(name, class, config)?, true)
    }

    /// Makes a device that is not on the bus yet.
    fn make(&self, name: &str, class: &str, config: &Value) -> Result<Arc<dyn Device>, BusError> {
        let maker = self.class(class)?;
        self.check_new(name)?;
        maker.create(name, config).map_err(|e| BusError::Create(name.into(), e))
    }

    /// Checks whether [`create`](Self::create) could add a device of class `class` as `name`. It
    /// makes no device, so it does not find every error.
    pub fn check(&self, name: &str, class: &str, config: &Value) -> Result<(), BusError> {
        self.class(class)?;
        self.check_new(name)?;
        self.check_settings(name, class, config)
    }

    /// Checks the settings for a device of class `class` called `name`, which may be on the bus.
    pub fn check_settings(&self, name: &str, class: &str, config: &Value) -> Result<(), BusError> {
        let checked = self.class(class)?.check(name, config);
        checked.map_err(|e| BusError::Create(name.into(), e))
    }

    fn class(&self, class: &str) -> Result<&dyn DeviceClass, BusError> {
        self.classes().find(|c| c.name() == class).ok_or_else(|| {
            let names: Vec<_> = self.classes().map(DeviceClass::name).collect();
            BusError::NoClass(class.into(), names.join(", "))
        })
    }

    /// Adds a device as `name`.
    pub fn add(&self, name: &str, device: Arc<dyn Device>) -> Result<Arc<Endpoint>, BusError> {
        self.join(name, device, false)
    }

    /// Adds a device. `quiesced`: nothing of it runs before [`Endpoint::resume`].
    fn join(
        &self,
        name: &str,
        device: Arc<dyn Device>,
        quiesced: bool,
    ) -> Result<Arc<Endpoint>, BusError> {
        self.check_new(name)?;
        let (identity, config) = (device.identity(), device.config());
        identity.check().map_err(|what| BusError::Identity(name.into(), what))?;
        if config.len() > reg::CONFIG_MAX {
            let what =
                format!("a config area of {} bytes; at most {}", config.len(), reg::CONFIG_MAX);
            return Err(BusError::Identity(name.into(), what));
        }
        let vectors = identity.vectors;
        let doorbells = identity.regions as usize;
        let host = Host::new(name, self.executor.clone(), vectors, doorbells);
        let outlets = Arc::downgrade(&self.outlets);
        let endpoint = Endpoint::new(host, device, (identity, config), self.versions, outlets);
        let mut devices = lock(&self.devices);
        if devices.contains_key(name) {
            return Err(BusError::Exists(name.into()));
        }
        devices.insert(name.into(), endpoint.clone());
        self.outlets.insert(name, endpoint.host().outlet());
        drop(devices);
        if quiesced {
            self.executor.halt(endpoint.counters());
        }
        let joined = Joined {
            notifier: endpoint.notifier(),
            executor: &self.executor,
            worker: endpoint.host().worker(),
            counters: endpoint.host().counters(),
        };
        if let Err(error) = endpoint.device().joined(joined) {
            let _ = self.remove(name);
            return Err(BusError::Create(name.into(), error));
        }
        if quiesced {
            // No call is in progress, so that it does not wait for one.
            endpoint.quiesce_now();
        }
        tracing::info!(device = name, class = endpoint.identity().class_name, "added");
        Ok(endpoint)
    }

    fn check_new(&self, name: &str) -> Result<(), BusError> {
        let good = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        if name.is_empty()
            || name.len() > NAME_MAX
            || name.starts_with('.')
            || !name.bytes().all(good)
        {
            return Err(BusError::BadName(name.into()));
        }
        let devices = lock(&self.devices);
        if devices.contains_key(name) {
            return Err(BusError::Exists(name.into()));
        }
        if devices.len() >= DEVICES_MAX { Err(BusError::Full) } else { Ok(()) }
    }

    /// Takes a device off the bus. Its connection has ended when this returns.
    pub fn remove(&self, name: &str) -> Result<(), BusError> {
        let endpoint =
            lock(&self.devices).remove(name).ok_or_else(|| BusError::NotFound(name.into()))?;
        self.outlets.remove(name);
        endpoint.remove();
        tracing::info!(device = name, "removed");
        Ok(())
    }

    /// The device called `name`.
    pub fn get(&self, name: &str) -> Result<Arc<Endpoint>, BusError> {
        lock(&self.devices).get(name).cloned().ok_or_else(|| BusError::NotFound(name.into()))
    }

    /// All devices, by name.
    pub fn devices(&self) -> Vec<Arc<Endpoint>> {
        lock(&self.devices).values().cloned().collect()
    }
}
