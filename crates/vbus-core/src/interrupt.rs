//! Interrupts: from the device to the driver, by the device's own connector or through another
//! device of the bus.

use std::fmt;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use vbus_shm::signal::{Kick, end};

use crate::ErrorCode;
use crate::bus::Devices;
use crate::counter::ConnectionCounters;

/// Where interrupts go: what the connector makes of a vector.
pub trait InterruptSink: Send + Sync {
    /// Delivers an interrupt on `vector`. Never blocks.
    fn trigger(&self, vector: u16);
}

/// A device's handle to interrupt its driver on one vector.
#[derive(Clone)]
pub struct Interrupt {
    sink: Arc<dyn InterruptSink>,
    vector: u16,
    counters: Arc<ConnectionCounters>,
}

impl Interrupt {
    pub(crate) fn new(
        sink: Arc<dyn InterruptSink>,
        vector: u16,
        counters: Arc<ConnectionCounters>,
    ) -> Interrupt {
        Interrupt { sink, vector, counters }
    }

    /// Takes what a post returned: interrupts the driver if it asked for a kick, and counts either
    /// way.
    pub fn kick(&self, kick: Kick<end::Device>) {
        if kick.is_wanted() {
            self.trigger();
        } else {
            self.counters.interrupts_suppressed.one();
        }
    }

    /// Interrupts the driver, whether or not it asked for that.
    pub fn trigger(&self) {
        self.counters.interrupts.one();
        self.sink.trigger(self.vector);
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupt").field("vector", &self.vector).finish_non_exhaustive()
    }
}

/// Where the interrupts of a device go: to its connector, but for the vectors that are routed.
pub(crate) struct Outlet(RwLock<Ways>);

struct Ways {
    connector: Arc<dyn InterruptSink>,
    /// Of an open connection, by vector.
    routed: Vec<Option<Way>>,
    /// Routes so far.
    count: u64,
}

struct Way {
    sink: Arc<dyn InterruptSink>,
    /// Tells it from those before.
    id: u64,
}

struct NoInterrupts;

impl InterruptSink for NoInterrupts {
    fn trigger(&self, _vector: u16) {}
}

impl Outlet {
    pub(crate) fn new() -> Outlet {
        Outlet(RwLock::new(Ways {
            connector: Arc::new(NoInterrupts),
            routed: Vec::new(),
            count: 0,
        }))
    }

    fn read(&self) -> RwLockReadGuard<'_, Ways> {
        self.0.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, Ways> {
        self.0.write().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn set_connector(&self, sink: Arc<dyn InterruptSink>) {
        self.write().connector = sink;
    }

    /// A connection begins: its vectors can be routed.
    pub(crate) fn open(&self, vectors: u16) {
        self.write().routed = (0..vectors).map(|_| None).collect();
    }

    /// The connection has ended, and with it all routes. `tell`: the driver does not know yet, and
    /// may wait for any of them.
    pub(crate) fn close(&self, tell: bool) {
        let mut ways = self.write();
        let routed = std::mem::take(&mut ways.routed);
        // Still locked: once a route has ended nobody uses its sink any more.
        for (vector, way) in (0..).zip(&routed) {
            if let Some(way) = way.as_ref().filter(|_| tell) {
                way.sink.trigger(vector);
            }
        }
    }
}

impl InterruptSink for Outlet {
    fn trigger(&self, vector: u16) {
        let ways = self.read();
        match ways.routed.get(usize::from(vector)) {
            Some(Some(way)) => way.sink.trigger(vector),
            _ => ways.connector.trigger(vector),
        }
    }
}

/// Lets a device carry the interrupts of others on its bus: of those that were made with its name
/// ([`Endpoint::set_router`](crate::Endpoint::set_router)).
#[derive(Clone)]
pub struct Router {
    /// The device that routes; `None` if it is routed itself, for that could go round in a circle.
    pub(crate) name: Option<String>,
    pub(crate) devices: Weak<Devices>,
}

impl Router {
    /// Lets `sink` have the interrupts of the open connection of `device` on `vector`, from now
    /// until the route is dropped or that connection ends. One interrupt goes there at once, in
    /// case that the last one by the old way was not attended to any more.
    ///
    /// # Errors
    /// [`ErrorCode::DENIED`] (no such device, or it may not be routed from here),
    /// [`ErrorCode::NOT_OPEN`], [`ErrorCode::BAD_VECTOR`], [`ErrorCode::EXISTS`].
    pub fn route(
        &self,
        device: &str,
        vector: u16,
        sink: Arc<dyn InterruptSink>,
    ) -> Result<Route, ErrorCode> {
        let name = self.name.as_deref().ok_or(ErrorCode::DENIED)?;
        let devices = self.devices.upgrade().ok_or(ErrorCode::REMOVED)?;
        let endpoint = devices.get(device).ok_or(ErrorCode::DENIED)?;
        if endpoint.router().as_deref() != Some(name) {
            return Err(ErrorCode::DENIED);
        }
        if vector >= endpoint.identity().vectors {
            return Err(ErrorCode::BAD_VECTOR);
        }
        let outlet = endpoint.outlet();
        let mut ways = outlet.write();
        ways.count += 1;
        let id = ways.count;
        let slot = ways.routed.get_mut(usize::from(vector)).ok_or(ErrorCode::NOT_OPEN)?;
        if slot.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        sink.trigger(vector);
        *slot = Some(Way { sink, id });
        Ok(Route { outlet: Arc::downgrade(outlet), vector, id })
    }
}

/// A vector of another device that is routed, until this is dropped. Then that device interrupts by
/// its own connector again, once at once.
pub struct Route {
    outlet: Weak<Outlet>,
    vector: u16,
    id: u64,
}

impl Route {
    /// Calls `change` with the place of the route, unless it has ended.
    fn with<T>(
        &self,
        change: impl FnOnce(&mut Option<Way>, &Arc<dyn InterruptSink>) -> T,
    ) -> Option<T> {
        let outlet = self.outlet.upgrade()?;
        let mut ways = outlet.write();
        let Ways { connector, routed, .. } = &mut *ways;
        let slot = routed.get_mut(usize::from(self.vector))?;
        slot.as_ref().is_some_and(|way| way.id == self.id).then(|| change(slot, connector))
    }

    /// Whether the routed device's connection still is that of the route.
    pub fn is_alive(&self) -> bool {
        self.with(|_, _| ()).is_some()
    }

    /// Lets `sink` have the interrupts from now on. When this returns, the sink before is not used
    /// any more. False: the route has ended.
    pub fn redirect(&self, sink: Arc<dyn InterruptSink>) -> bool {
        self.with(|slot, _| *slot = Some(Way { sink, id: self.id })).is_some()
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        self.with(|slot, connector| {
            *slot = None;
            connector.trigger(self.vector);
        });
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Route").field("vector", &self.vector).finish_non_exhaustive()
    }
}
