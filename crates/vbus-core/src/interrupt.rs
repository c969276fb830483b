// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interrupts from the device to the driver. The device's connector delivers them, or another
//! device of the bus routes them.

use std::fmt;
use std::sync::{Arc, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use vbus_shm::signal::{Kick, end};

use vbus_shm::ErrorCode;

use crate::counter::ConnectionCounters;

/// Delivers interrupts, for example as a connector.
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

    /// Takes the kick that a post returned. Interrupts the driver if the driver asked for a kick.
    /// Counts the kick or its absence. The compiler checks that the kick comes from a device's end,
    /// but not from which ring: keep a ring and its interrupt in one value.
    pub fn kick(&self, kick: Kick<end::Device>) {
        self.notify(kick.is_wanted());
    }

    /// The device has posted something. Interrupts the driver if `wanted`: the driver asked for
    /// that. Counts the interrupt or its absence.
    pub fn notify(&self, wanted: bool) {
        if wanted {
            self.trigger();
        } else {
            self.counters.interrupts_suppressed.one();
        }
    }

    /// Interrupts the driver, whether or not the driver asked for a kick.
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

/// Where the interrupts of a device go: each routed vector to its route's sink, all others to the
/// connector.
pub(crate) struct Outlet {
    ways: RwLock<Ways>,
    vectors: u16,
    /// The device that may carry these interrupts.
    router: OnceLock<String>,
}

struct Ways {
    connector: Arc<dyn InterruptSink>,
    /// The routes of an open connection, by vector.
    routed: Vec<Option<Way>>,
    /// Number of routes made so far.
    count: u64,
}

struct Way {
    sink: Arc<dyn InterruptSink>,
    /// Tells this route from earlier routes of the vector.
    id: u64,
}

struct NoInterrupts;

impl InterruptSink for NoInterrupts {
    fn trigger(&self, _vector: u16) {}
}

impl Outlet {
    pub(crate) fn new(vectors: u16) -> Outlet {
        let connector = Arc::new(NoInterrupts);
        let ways = RwLock::new(Ways { connector, routed: Vec::new(), count: 0 });
        Outlet { ways, vectors, router: OnceLock::new() }
    }

    pub(crate) fn set_router(&self, router: &str) {
        let _ = self.router.set(router.to_owned()); // The first call counts.
    }

    pub(crate) fn router(&self) -> Option<&str> {
        self.router.get().map(String::as_str)
    }

    fn read(&self) -> RwLockReadGuard<'_, Ways> {
        self.ways.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, Ways> {
        self.ways.write().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn set_connector(&self, sink: Arc<dyn InterruptSink>) {
        self.write().connector = sink;
    }

    /// A connection begins. From now on its vectors can be routed.
    pub(crate) fn open(&self) {
        self.write().routed = (0..self.vectors).map(|_| None).collect();
    }

    /// Sends the interrupts of the open connection on `vector` to `sink`; see
    /// [`Router::route`](crate::Router::route).
    pub(crate) fn route(
        self: &Arc<Self>,
        vector: u16,
        sink: Arc<dyn InterruptSink>,
    ) -> Result<Route, ErrorCode> {
        if vector >= self.vectors {
            return Err(ErrorCode::BAD_VECTOR);
        }
        let mut ways = self.write();
        ways.count += 1;
        let id = ways.count;
        let slot = ways.routed.get_mut(usize::from(vector)).ok_or(ErrorCode::NOT_OPEN)?;
        if slot.is_some() {
            return Err(ErrorCode::EXISTS);
        }
        sink.trigger(vector);
        *slot = Some(Way { sink, id });
        Ok(Route { outlet: Arc::downgrade(self), vector, id })
    }

    /// The connection has ended, and so all routes end. `tell`: the driver does not know that yet
    /// and may wait for any routed vector, so each gets a last interrupt.
    pub(crate) fn close(&self, tell: bool) {
        let mut ways = self.write();
        let routed = std::mem::take(&mut ways.routed);
        // Still under the lock: once a route has ended nobody uses its sink any more.
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

/// A routed vector of another device. When this is dropped, that device's connector delivers the
/// vector again, and delivers one interrupt at once.
pub struct Route {
    outlet: Weak<Outlet>,
    vector: u16,
    id: u64,
}

impl Route {
    /// Calls `change` with the route's slot and the connector, unless the route has ended.
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

    /// Whether the routed device still has the connection that the route was made for.
    pub fn is_alive(&self) -> bool {
        self.with(|_, _| ()).is_some()
    }

    /// Sends the interrupts to `sink` from now on. When this returns, nobody uses the former sink
    /// any more. Returns false if the route has ended.
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
