// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What every front of a device needs, whatever protocol its driver uses: the peer's memory, a
//! worker of the event loop, interrupts, doorbells, counters. The front of vbus is
//! [`Endpoint`](crate::Endpoint).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use vbus_shm::ErrorCode;

use crate::counter::ConnectionCounters;
use crate::doorbell::Doorbells;
use crate::executor::Executor;
use crate::interrupt::{Interrupt, InterruptSink, Outlet};
use crate::memory::MemoryContext;

/// Whether a driver has a device open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionState {
    /// No connection is open.
    Closed,
    /// A connection is open.
    Open,
    /// A fault ended it. The driver must close the device before it opens it again.
    Broken(ErrorCode),
}

/// A [`ConnectionState`] that is read without a lock.
#[derive(Default)]
struct StateWord(AtomicU64);

impl StateWord {
    const OPEN: u64 = 1;
    /// The error code is in the upper half.
    const BROKEN: u64 = 2;

    fn store(&self, state: ConnectionState) {
        let word = match state {
            ConnectionState::Closed => 0,
            ConnectionState::Open => StateWord::OPEN,
            ConnectionState::Broken(code) => StateWord::BROKEN | u64::from(code.0) << 32,
        };
        // Release: pairs with the load. Whoever sees the state sees what led to it.
        self.0.store(word, Ordering::Release);
    }

    fn load(&self) -> ConnectionState {
        // Acquire: pairs with the store.
        let word = self.0.load(Ordering::Acquire);
        match word & 0xff {
            StateWord::OPEN => ConnectionState::Open,
            StateWord::BROKEN => {
                ConnectionState::Broken(ErrorCode(u32::try_from(word >> 32).unwrap_or(0)))
            }
            _ => ConnectionState::Closed,
        }
    }
}

/// The host's half of a device: everything that does not depend on the driver's protocol.
pub struct Host {
    name: String,
    executor: Arc<Executor>,
    worker: usize,
    memory: Arc<MemoryContext>,
    counters: Arc<ConnectionCounters>,
    outlet: Arc<Outlet>,
    doorbells: Arc<Doorbells>,
    has_left: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
    state: StateWord,
}

impl Host {
    /// A device called `name` with `vectors` interrupt vectors and `doorbells` doorbells. Its tasks
    /// run on `executor`.
    pub fn new(name: &str, executor: Arc<Executor>, vectors: u16, doorbells: usize) -> Host {
        let counters = Arc::new(ConnectionCounters::of(name));
        Host {
            name: name.to_owned(),
            worker: executor.next_worker(),
            executor,
            memory: Arc::new(MemoryContext::of(name)),
            doorbells: Doorbells::new(doorbells, counters.clone()),
            counters,
            outlet: Arc::new(Outlet::new(vectors)),
            has_left: OnceLock::new(),
            state: StateWord::default(),
        }
    }

    /// The device's name on its bus.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The event loop that the device's tasks run on.
    pub fn executor(&self) -> &Arc<Executor> {
        &self.executor
    }

    /// The index of the worker that runs the device's connection. The device's connector does best
    /// on the same worker.
    pub fn worker(&self) -> usize {
        self.worker
    }

    /// The memory of the peer.
    pub fn memory(&self) -> &Arc<MemoryContext> {
        &self.memory
    }

    /// The counters of the device's connections.
    pub fn counters(&self) -> &Arc<ConnectionCounters> {
        &self.counters
    }

    /// The doorbells.
    pub fn doorbells(&self) -> &Arc<Doorbells> {
        &self.doorbells
    }

    /// How to interrupt the driver on `vector`.
    pub fn interrupt(&self, vector: u16) -> Interrupt {
        Interrupt::new(self.outlet.clone(), vector, self.counters.clone())
    }

    /// Sets the sink of the interrupts. The last call counts.
    pub fn set_interrupt_sink(&self, sink: Arc<dyn InterruptSink>) {
        self.outlet.set_connector(sink);
    }

    /// Lets the device `router` of the same bus carry this device's interrupts, if the router's
    /// driver asks for that ([`Router`](crate::Router)). The first call counts. The router's driver
    /// can take the interrupts away from this device's driver.
    pub fn set_router(&self, router: &str) {
        self.outlet.set_router(router);
    }

    /// The name of the device that may carry this device's interrupts.
    pub fn router(&self) -> Option<String> {
        self.outlet.router().map(str::to_owned)
    }

    /// Sets how to find out that the peer has left, before its connector has come to notice it. The
    /// first call counts. The function must not block: it runs when a fault of the driver is found.
    /// What a driver leaves behind may look like a fault.
    pub fn set_has_left(&self, has_left: impl Fn() -> bool + Send + Sync + 'static) {
        let _ = self.has_left.set(Box::new(has_left));
    }

    /// Whether a driver has the device open.
    pub fn state(&self) -> ConnectionState {
        self.state.load()
    }

    /// The front says whether a driver has the device open.
    pub fn set_state(&self, state: ConnectionState) {
        self.state.store(state);
    }

    /// Whether the peer has left.
    pub fn has_left(&self) -> bool {
        self.has_left.get().is_some_and(|has_left| has_left())
    }

    pub(crate) fn outlet(&self) -> &Arc<Outlet> {
        &self.outlet
    }
}
