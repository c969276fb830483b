// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a device tells its driver outside its queues: events, the config area, and the incarnation
//! (spec/pci.md, "Events").

use std::sync::{Arc, Mutex};

use rustix::rand::{GetRandomFlags, getrandom};
use vbus_shm::abi::{event, reg};

use crate::interrupt::{InterruptSink, Outlet};
use crate::lock::lock;
use crate::state::{ConfigPart, EventsPart};

/// The events of one device, and the state that they tell of.
pub(crate) struct Events {
    state: Mutex<State>,
    outlet: Arc<Outlet>,
}

struct State {
    /// Bits of [`event`].
    pending: u32,
    /// The vector of the events. `None`: no driver has opened the device.
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

    /// A driver has opened the device and wants its events on `vector`.
    pub(crate) fn open(&self, vector: u16) {
        let mut state = lock(&self.state);
        (state.pending, state.vector) = (0, Some(vector));
    }

    /// The driver has closed the device or has gone.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.state);
        (state.pending, state.vector) = (0, None);
    }

    /// Makes events pending. The caller has changed the state that they tell of before. Interrupts
    /// the driver if one of them was not pending.
    pub(crate) fn raise(&self, events: u32) {
        self.change(|state| state.raise(events));
    }

    fn change(&self, change: impl FnOnce(&mut State) -> Option<u16>) {
        let vector = change(&mut lock(&self.state));
        self.trigger(vector);
    }

    /// As [`raise`](Self::raise), but leaves the interrupt to the caller: returns the vector to
    /// [`trigger`](Self::trigger).
    pub(crate) fn add(&self, events: u32) -> Option<u16> {
        lock(&self.state).raise(events)
    }

    /// Interrupts the driver on `vector`, if there is one. The caller holds no locks, because the
    /// connector may take locks of its own.
    pub(crate) fn trigger(&self, vector: Option<u16>) {
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

    /// The incarnation, the config area and the events, as plain data.
    pub(crate) fn save(&self) -> (u64, ConfigPart, EventsPart) {
        let state = lock(&self.state);
        let config = ConfigPart { generation: state.generation, bytes: state.config.to_vec() };
        (state.incarnation, config, EventsPart { pending: state.pending, vector: state.vector })
    }

    /// Goes on from what [`save`](Self::save) returned. The device keeps its own config area. If
    /// that differs from the one that was saved, this is a change for the driver.
    pub(crate) fn restore(&self, incarnation: u64, config: &ConfigPart, events: &EventsPart) {
        let mut state = lock(&self.state);
        state.incarnation = incarnation;
        (state.pending, state.vector) = (events.pending, events.vector);
        state.generation = config.generation;
        if *state.config != *config.bytes {
            state.generation = state.generation.wrapping_add(1);
            state.raise(event::CONFIG);
        }
    }

    /// Chooses another incarnation. The caller tells the driver.
    pub(crate) fn change_incarnation(&self) {
        let mut state = lock(&self.state);
        let before = state.incarnation;
        while state.incarnation == before {
            state.incarnation = incarnation();
        }
    }
}

impl State {
    /// Makes events pending. Returns the vector to trigger, if one of them was not pending.
    fn raise(&mut self, events: u32) -> Option<u16> {
        let vector = self.vector?;
        let new = events & !self.pending;
        self.pending |= events;
        (new != 0).then_some(vector)
    }
}

/// A random number that is not 0.
fn incarnation() -> u64 {
    let mut bytes = [0; 8];
    loop {
        // `getrandom` fails only if a signal interrupts it early in the machine's life.
        if getrandom(&mut bytes, GetRandomFlags::empty()).is_ok() && bytes != [0; 8] {
            return u64::from_ne_bytes(bytes);
        }
    }
}

fn area(mut config: Vec<u8>) -> Arc<[u8]> {
    config.truncate(reg::CONFIG_MAX);
    config.into()
}

/// A device's handle to tell its driver of changes, from any thread. Clones are handles to the same
/// device.
#[derive(Clone)]
pub struct Notifier(pub(crate) Arc<Events>);

impl Notifier {
    /// Replaces the config area by `config` (at most [`reg::CONFIG_MAX`] bytes). Each call counts
    /// as a change.
    pub fn config_changed(&self, config: Vec<u8>) {
        let config = area(config);
        self.0.change(|state| {
            // Both change under the lock. A driver that reads the same generation before and after
            // the area has read one area.
            state.config = config;
            state.generation = state.generation.wrapping_add(1);
            state.raise(event::CONFIG)
        });
    }

    /// Asks the driver to announce itself to others. The class defines what that means.
    pub fn announce(&self) {
        self.0.raise(event::ANNOUNCE);
    }

    /// The incarnation of the device. A class can publish it in shared memory: its driver then
    /// needs no register access to see it.
    pub fn incarnation(&self) -> u64 {
        self.0.incarnation()
    }
}

impl std::fmt::Debug for Notifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Notifier").finish()
    }
}
