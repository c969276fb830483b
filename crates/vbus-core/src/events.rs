//! What a device tells its driver apart from queues: events, the config area, and in which
//! incarnation it is (spec/pci.md, "Events").

use std::sync::{Arc, Mutex};

use rustix::rand::{GetRandomFlags, getrandom};
use vbus_shm::abi::{event, reg};

use crate::interrupt::{InterruptSink, Outlet};
use crate::lock::lock;

/// The events of one device, and what they are about.
pub(crate) struct Events {
    state: Mutex<State>,
    outlet: Arc<Outlet>,
}

struct State {
    /// Bits of [`event`].
    pending: u32,
    /// Where the driver wants to be told; `None`: there is no driver.
    vector: Option<u16>,
    config: Arc<[u8]>,
    generation: u32,
    incarnation: u64,
}

impl Events {
    pub(crate) fn new(config: Vec<u8>, outlet: Arc<Outlet>) -> Events {
        let state = State {
            pending: 0,
            vector: None,
            config: area(config),
            generation: 1,
            incarnation: incarnation(),
        };
        Events { state: Mutex::new(state), outlet }
    }

    /// A driver has opened the device, and wants to be told on `vector`.
    pub(crate) fn open(&self, vector: u16) {
        let mut state = lock(&self.state);
        (state.pending, state.vector) = (0, Some(vector));
    }

    /// There is no driver any more.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.state);
        (state.pending, state.vector) = (0, None);
    }

    /// Makes events pending. What they are about has changed before. The driver is interrupted by
    /// each that was not pending.
    pub(crate) fn raise(&self, events: u32) {
        self.change(|state| state.raise(events));
    }

    fn change(&self, change: impl FnOnce(&mut State) -> Option<u16>) {
        let vector = change(&mut lock(&self.state));
        // Outside of the lock: the connector does what it likes.
        if let Some(vector) = vector {
            self.outlet.trigger(vector);
        }
    }

    /// The driver has seen these events.
    pub(crate) fn acknowledge(&self, events: u32) {
        lock(&self.state).pending &= !events;
    }

    pub(crate) fn pending(&self) -> u32 {
        lock(&self.state).pending
    }

    pub(crate) fn config(&self) -> (Arc<[u8]>, u32) {
        let state = lock(&self.state);
        (state.config.clone(), state.generation)
    }

    pub(crate) fn incarnation(&self) -> u64 {
        lock(&self.state).incarnation
    }

    /// The device has lost what its driver told it.
    pub(crate) fn reincarnate(&self) {
        self.change(|state| {
            let before = state.incarnation;
            while state.incarnation == before {
                state.incarnation = incarnation();
            }
            state.raise(event::INCARNATION)
        });
    }
}

impl State {
    /// Makes events pending; returns the vector that is to be triggered.
    fn raise(&mut self, events: u32) -> Option<u16> {
        let vector = self.vector?;
        let new = events & !self.pending;
        self.pending |= events;
        (new != 0).then_some(vector)
    }
}

/// A number that is not 0 and that nobody had before.
fn incarnation() -> u64 {
    let mut bytes = [0; 8];
    loop {
        // Fails only if interrupted early in the machine's life.
        if getrandom(&mut bytes, GetRandomFlags::empty()).is_ok() && bytes != [0; 8] {
            return u64::from_ne_bytes(bytes);
        }
    }
}

fn area(mut config: Vec<u8>) -> Arc<[u8]> {
    config.truncate(reg::CONFIG_MAX);
    config.into()
}

/// By this a device tells its driver what changes, from any thread. Clones are the same.
#[derive(Clone)]
pub struct Notifier(pub(crate) Arc<Events>);

impl Notifier {
    /// The config area is `config` from now on (at most [`reg::CONFIG_MAX`] bytes). Each call
    /// counts as a change.
    pub fn config_changed(&self, config: Vec<u8>) {
        let config = area(config);
        self.0.change(|state| {
            // Together, under the lock: a driver that reads one generation before and after the
            // area has read one area.
            state.config = config;
            state.generation = state.generation.wrapping_add(1);
            state.raise(event::CONFIG)
        });
    }

    /// Asks the driver to announce itself to others; what that means the class says.
    pub fn announce(&self) {
        self.0.raise(event::ANNOUNCE);
    }

    /// The incarnation of the device, for a class that puts it where its driver sees it without an
    /// access to registers.
    pub fn incarnation(&self) -> u64 {
        self.0.incarnation()
    }
}

impl std::fmt::Debug for Notifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Notifier").finish()
    }
}
