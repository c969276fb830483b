// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the author of a device writes: [`DeviceClass`], [`Device`], [`Connection`].

use std::any::Any;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;
use vbus_shm::ErrorCode;
use vbus_shm::abi::{bar0, class, feature};
use vbus_shm::signal::Armed;

use crate::call::Call;
use crate::counter::ConnectionCounters;
use crate::doorbell::Doorbell;
use crate::events::Notifier;
use crate::executor::{Executor, Progress};
use crate::interrupt::Interrupt;
use crate::memory::{MemoryContext, Window};
use crate::metric::Metric;
use crate::router::Router;

/// Makes devices of one class from their configuration.
pub trait DeviceClass: Send + Sync {
    /// The name of the class in configurations, at most 16 bytes of ASCII.
    fn name(&self) -> &'static str;

    /// One line for people: what the class is, and what its configuration takes.
    fn help(&self) -> &'static str;

    /// Makes a device called `name`. `config` is the object of the device's own settings. The
    /// error's text says what is wrong and what to do.
    fn create(&self, name: &str, config: &Value) -> Result<Arc<dyn Device>, CreateError>;

    /// Checks the settings and makes nothing, for `vbus config check`. A class whose
    /// [`create`](Self::create) touches anything outside of this process (a file, a socket, an
    /// interface) overrides this and checks only what it can see without that.
    fn check(&self, name: &str, config: &Value) -> Result<(), CreateError> {
        self.create(name, config).map(drop)
    }

    /// Whether drivers of vbus open the devices of this class. Otherwise each has a
    /// [front](Device::front) for drivers of another kind.
    fn has_vbus_drivers(&self) -> bool {
        true
    }

    /// What the numbers in [`Device::inspect`] of this class's devices mean. `vbus stats`, `vbus
    /// top` and the metrics for Prometheus show the numbers that are in this table with their
    /// texts. The provided method has none; `vbus stats --all` shows the numbers all the same.
    fn metrics(&self) -> Vec<Metric> {
        Vec::new()
    }

    /// The files that a device with these settings opens in this process. A program can permit
    /// those of its configuration's devices, and no others, before it makes the devices. Wrong
    /// settings, and by default all, name no files.
    fn files(&self, config: &Value) -> Vec<PathBuf> {
        let _ = config;
        Vec::new()
    }
}

/// Why a device could not be made. The text is for the person who wrote the configuration. A text
/// about one setting begins with that key in double quotes, as
/// [`Settings`](crate::settings::Settings) writes it. `vbus` then points at the key's line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct CreateError(pub String);

/// What a device is. It does not change. The bus [checks](Identity::check) it when the device
/// joins.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Identity {
    /// Number of the class ([`vbus_shm::abi::class`]). Numbers from [`class::USER`] on are free for
    /// other classes.
    pub class: u16,
    /// Name of the class, as the driver reads it; at most 16 bytes of ASCII.
    pub class_name: &'static str,
    /// PCI base class, subclass, programming interface, as 24 bits.
    pub pci_class: u32,
    /// Features offered (bits 0..48).
    pub features: u64,
    /// The most regions of a connection, at most [`vbus_shm::abi::bar0::DOORBELL_COUNT`].
    pub regions: u32,
    /// Interrupt vectors that the device can use, 1..=256.
    pub vectors: u16,
}

impl Identity {
    /// A device of the class with this number and name, without features, with 8 regions and one
    /// vector.
    pub fn new(class: u16, class_name: &'static str, pci_class: u32) -> Identity {
        Identity { class, class_name, pci_class, features: 0, regions: 8, vectors: 1 }
    }

    /// A device of a class outside the specification: class [`class::USER`], PCI class
    /// "unassigned", no features, 8 regions, one vector.
    pub fn user(class_name: &'static str) -> Identity {
        Identity::new(class::USER, class_name, 0xff_00_00)
    }

    /// The same with another class number ([`class::USER`] and above are free).
    #[must_use]
    pub fn with_class(mut self, class: u16) -> Identity {
        self.class = class;
        self
    }

    /// The same with these features.
    #[must_use]
    pub fn with_features(mut self, features: u64) -> Identity {
        self.features = features;
        self
    }

    /// The same with at most `regions` regions.
    #[must_use]
    pub fn with_regions(mut self, regions: u32) -> Identity {
        self.regions = regions;
        self
    }

    /// The same with `vectors` interrupt vectors.
    #[must_use]
    pub fn with_vectors(mut self, vectors: u16) -> Identity {
        self.vectors = vectors;
        self
    }

    /// Checks that registers and configuration space can hold the identity.
    ///
    /// # Errors
    /// The field that is out of range, and its range, for the author of the class.
    pub fn check(&self) -> Result<(), String> {
        let name = self.class_name;
        if self.class == 0 {
            return Err("class number 0; use 0x8000 to 0xffff for a class of your own".into());
        }
        if !(1..=CLASS_NAME_MAX).contains(&name.len())
            || !name.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return Err(format!(
                "class name {name:?}; use 1 to {CLASS_NAME_MAX} printable characters of ASCII, \
                 without spaces"
            ));
        }
        if self.pci_class > 0xff_ffff {
            return Err(format!("PCI class {:#x}; it has 24 bits", self.pci_class));
        }
        if self.features & !feature::CLASS_MASK != 0 {
            return Err(format!("features {:#x}; bits 48 to 63 are the bus's own", self.features));
        }
        if self.regions > bar0::DOORBELL_COUNT {
            return Err(format!("{} regions; at most {}", self.regions, bar0::DOORBELL_COUNT));
        }
        if !(1..=bar0::MSIX_MAX).contains(&self.vectors) {
            return Err(format!("{} vectors; 1 to {}", self.vectors, bar0::MSIX_MAX));
        }
        Ok(())
    }
}

/// The longest name of a class, in bytes.
const CLASS_NAME_MAX: usize = 16;

/// A device on the bus. It lives until it is removed. Drivers come and go, one at a time.
pub trait Device: Send + Sync {
    /// What it is.
    fn identity(&self) -> Identity;

    /// The class's config area as it is when the device joins the bus (at most
    /// [`vbus_shm::abi::reg::CONFIG_MAX`] bytes). Later changes go to
    /// [`Notifier::config_changed`].
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Whether drivers can open the device. A device that works for others only, such as the uplink
    /// of a switch, has no driver. It gets no socket, and no machine can have it.
    fn takes_drivers(&self) -> bool {
        true
    }

    /// The bus calls this when the device has joined it. The device may use what it gets at any
    /// time, also while no driver has opened the device.
    ///
    /// # Errors
    /// The device cannot work. It leaves the bus again. The text says why.
    fn joined(&self, joined: Joined<'_>) -> Result<(), CreateError> {
        let _ = joined;
        Ok(())
    }

    /// What a connector needs that serves the device in another way than as a device of vbus: the
    /// connector knows the type. For example, a device with a PCI function of its own returns the
    /// `OwnFunction` of the crate `vbus-pci`. The provided method has nothing.
    fn front(&self) -> Option<&(dyn Any + Send + Sync)> {
        None
    }

    /// A driver opens the device. The connection is dropped after the driver's CLOSE, a reset, an
    /// unplug, or the driver's end.
    fn open(&self, open: Open) -> Result<Box<dyn Connection>, ErrorCode>;

    /// The device's own counters and settings, as a JSON object, for `vbus stats` and `vbus device
    /// show`. The class says what the numbers mean ([`DeviceClass::metrics`]).
    fn inspect(&self) -> Value {
        Value::Object(serde_json::Map::new())
    }

    /// Handles a request of a control client (`vbus state set`, ...). The device passes each answer
    /// to `reply`. `reply` returns false once the client has gone; the device must then end the
    /// request. `reply` does not send a null: a null only asks whether the client is still there.
    /// The method may block, because it runs on its own thread. The error's text is for the person
    /// who asked.
    fn control(&self, request: &Value, reply: &mut dyn FnMut(Value) -> bool) -> Result<(), String> {
        let _ = (request, reply);
        Err("this device takes no requests".into())
    }

    /// Whether [`control`](Self::control) with this request may change what the device or its
    /// connection saves. The method is quick. The provided method says that each does.
    fn is_kept_request(&self, request: &Value) -> bool {
        let _ = request;
        true
    }

    /// Takes over other settings while the device is on the bus, also while a driver uses it. `old`
    /// are the settings that it has, and `new` valid settings that differ from them
    /// ([`settings::changed`](crate::settings::changed) says in which keys). The device takes all
    /// of them or none.
    ///
    /// # Errors
    /// It can take these settings only when it is made. The text is for the operator.
    fn reconfigure(&self, old: &Value, new: &Value) -> Result<(), String> {
        let _ = (old, new);
        Err("the device takes settings only when it is made".into())
    }

    /// The device has left the bus. Its connection has ended, and there will be no other. Requests
    /// that wait must end.
    fn removed(&self) {}

    /// Stops everything of the device that is no task and touches the driver's memory or the back
    /// end: threads of its own, control requests, what other devices deliver. It returns when none
    /// of them is at it. The bus calls it when the tasks with the connection's counters stand
    /// still, and [`resume`](Self::resume) later. Between the two the device keeps what comes, or
    /// lets it wait.
    fn quiesce(&self) {}

    /// Undoes [`quiesce`](Self::quiesce), also of a device that was restored.
    fn resume(&self) {}

    /// The settings with which an equal device is made: `config`, the settings that this device
    /// has, with what the device has chosen itself, for example a random address. Whoever makes
    /// the device that goes on from a state gives it these. The provided method returns `config`.
    fn settled(&self, config: &Value) -> Value {
        config.clone()
    }

    /// Copies of the descriptors of the device's back end, by name. A process that takes this one's
    /// place before the same network hands them to the device that goes on. The device is quiesced.
    /// The provided method has none.
    ///
    /// # Errors
    /// The process has no more descriptors.
    fn descriptors(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        Ok(Vec::new())
    }

    /// What the device has beside its settings and its connection, as plain data
    /// (spec/state-format.md): [`state::part`](crate::state::part) of a type of the class's own.
    /// The bus calls it while the device is quiesced. It changes nothing.
    ///
    /// # Errors
    /// The device cannot be saved, now or ever. The text says why. The provided method refuses.
    fn save(&self) -> Result<Value, String> {
        Err(UNSAVABLE.into())
    }

    /// Makes a state one that holds for longer than this moment: the process may be killed at any
    /// time from now on, and another device goes on from the state, and from the driver's memory as
    /// it is then. `device` is what [`save`](Self::save) returned, and `connection` what
    /// [`Connection::save`] returned. The method takes out what is on its way, because it may have
    /// come on since. The bus saves a state again with each command of the driver and each request
    /// of a control client, not with work in rings and pages.
    ///
    /// # Errors
    /// No device can go on like this. The text says why. The provided method refuses.
    fn outlast(&self, device: &mut Value, connection: Option<&mut Value>) -> Result<(), String> {
        let _ = (device, connection);
        Err("devices of this class cannot go on after the bus was killed".into())
    }

    /// Nobody goes on any more if the process is killed. Called before a change of the settings,
    /// and perhaps again and again. The provided method does nothing.
    fn outlast_no_more(&self) {}

    /// Goes on from what [`save`](Self::save) returned for a device of the same class. Nobody has
    /// used this device so far, and it is quiesced. The state may be forged: the device checks it.
    ///
    /// # Errors
    /// The state is wrong, or does not fit the settings. The text says what.
    fn restore(&self, state: &Value) -> Result<(), String> {
        let _ = state;
        Err(UNSAVABLE.into())
    }

    /// Makes the connection again that a driver had, in place of [`open`](Self::open).
    /// [`restore`](Self::restore) comes first. `regions` are those that the driver had registered,
    /// in the order of their handles, and `state` is what [`Connection::save`] returned. The
    /// connection's ring ends resume from the memory of the regions. As in
    /// [`Connection::region_added`], a connection binds a doorbell if another task than its own
    /// shall be woken. Its tasks do not run before [`resume`](Self::resume).
    ///
    /// # Errors
    /// The state or a region is wrong. The text says what. The device then has no connection.
    fn reopen(
        &self,
        open: Open,
        regions: Vec<Region>,
        state: &Value,
    ) -> Result<Box<dyn Connection>, String> {
        let _ = (open, regions, state);
        Err(UNSAVABLE.into())
    }
}

/// What the provided methods for saving say.
const UNSAVABLE: &str = "the class has no saved state";

/// What a device gets when it joins a bus.
#[non_exhaustive]
pub struct Joined<'a> {
    /// Tells drivers of changes.
    pub notifier: Notifier,
    /// The event loop, where the device can run tasks of its own.
    pub executor: &'a Arc<Executor>,
    /// The index of the worker on which the device's tasks do best.
    pub worker: usize,
    /// The counters of the device, for its own tasks.
    pub counters: &'a Arc<ConnectionCounters>,
}

/// What a new connection gets.
#[non_exhaustive]
pub struct Open {
    /// The version of the ABI that both ends speak.
    pub version: u16,
    /// The features that the driver accepted: a subset of those offered.
    pub features: u64,
    /// The device's [incarnation](Notifier::incarnation), not 0. A class with a status page
    /// publishes it there.
    pub incarnation: u64,
    /// Tells the driver of changes.
    pub notifier: Notifier,
    /// The driver's memory.
    pub memory: Arc<MemoryContext>,
    /// The event loop, where the connection can run tasks of its own.
    pub executor: Arc<Executor>,
    /// The index of the worker that runs the connection. A first task of the connection's own does
    /// best on the same worker, further tasks on the following workers.
    pub worker: usize,
    /// The connection's counters, for its own tasks.
    pub counters: Arc<ConnectionCounters>,
    /// The connection calls it when one of its own tasks fails. It ends the connection with that
    /// error code.
    pub fail: Fail,
    /// For a device that carries the interrupts of others.
    pub router: Router,
}

/// Ends a connection from one of its own tasks.
#[derive(Clone)]
pub struct Fail(pub(crate) Arc<dyn Fn(ErrorCode) + Send + Sync>);

impl Fail {
    /// Ends the connection with the error code `code`, which the driver can read. Do not call it
    /// from within a poll or a method of the connection: those return the error code instead.
    pub fn fail(&self, code: ErrorCode) {
        (self.0)(code);
    }
}

/// Memory that the driver registered with a connection.
#[derive(Debug)]
#[non_exhaustive]
pub struct Region {
    /// The class's id of the region.
    pub id: u32,
    /// The handle of the region: the number of its doorbell.
    pub handle: u32,
    /// The memory.
    pub window: Window,
    /// Offset of the signal block in the window, in bytes. The whole block lies within the window.
    pub signal_offset: Option<usize>,
    /// Interrupts the driver for this region.
    pub interrupt: Interrupt,
    /// The driver's doorbell for this region. It wakes the connection, unless the connection binds
    /// it to another task.
    pub doorbell: Doorbell,
}

/// An open connection: one driver's use of the device.
///
/// The bus calls its methods one at a time. [`poll`](Self::poll), [`arm`](Self::arm) and
/// [`disarm`](Self::disarm) are the methods of a [`Task`](crate::Task). The doorbells of its
/// regions wake the connection. An error that `poll` or `arm` returns ends the connection.
pub trait Connection: Send {
    /// The driver wants to register a region `id` of `len` bytes. The bus asks before it maps the
    /// region's memory, which can take milliseconds. A connection that can tell here that it will
    /// refuse the region says so, with the error of [`region_added`](Self::region_added). That
    /// method checks all the same. The provided method refuses nothing.
    fn check_region(&mut self, id: u32, len: u64) -> Result<(), ErrorCode> {
        let _ = (id, len);
        Ok(())
    }

    /// The driver registers a region. The connection refuses an unknown id with
    /// [`ErrorCode::BAD_ARGUMENT`].
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode>;

    /// The driver drops a region. The connection must drop all clones of its window.
    fn region_dropped(&mut self, handle: u32) -> Result<(), ErrorCode> {
        let _ = handle;
        Err(ErrorCode::DENIED)
    }

    /// The driver calls `function`. `buffer` is a copy of the driver's buffer. The bus copies it
    /// back after success. Returns the call's value. Must not block: see
    /// [`start_call`](Self::start_call).
    fn call(&mut self, function: u32, flags: u32, buffer: &mut [u8]) -> Result<u64, ErrorCode> {
        let _ = (function, flags, buffer);
        Err(ErrorCode::BAD_FUNCTION)
    }

    /// The driver calls, and the answer may take time. The class keeps `call`, returns, and ends
    /// the call later, from any thread ([`Call::finish`]). The driver makes no other call
    /// meanwhile. CLOSE, reset and the end of the connection cancel the call. A class that works on
    /// a cancelled call should drop it soon ([`Call::is_cancelled`]): while it holds 16 calls of a
    /// device, the bus refuses further ones. The provided method answers at once, with
    /// [`call`](Self::call).
    fn start_call(&mut self, mut call: Call) {
        let (function, flags) = (call.function(), call.flags());
        let result = self.call(function, flags, call.buffer());
        call.finish(result);
    }

    /// Does at most `budget` units of work.
    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let _ = budget;
        Ok(Progress::Idle)
    }

    /// Asks for kicks, before the connection sleeps.
    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        Ok(Armed::Waiting)
    }

    /// Asks for no kicks.
    fn disarm(&mut self) {}

    /// What the connection has that is neither in its regions nor in the bus's own part of the
    /// state, as plain data: [`state::part`](crate::state::part) of a type of the class's own. The
    /// bus calls it while the device is quiesced. It changes nothing. What the connection took from
    /// a ring and did not finish is taken again by the end that resumes the ring, or is in the
    /// state.
    ///
    /// # Errors
    /// The connection cannot be saved now. The text says why. The provided method refuses.
    fn save(&mut self) -> Result<Value, String> {
        Err(UNSAVABLE.into())
    }
}
