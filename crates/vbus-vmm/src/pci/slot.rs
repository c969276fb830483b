// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A slot: a root port, and the function in it.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vbus_kvm::{Route, Routes};

use super::error::UnplugError;
use super::function::Function;
use super::root_port::{Msi, RootPort, window};
use super::saved::SavedSlot;
use crate::layout;
use crate::lock::lock;

/// How long the guest may take to release a function. Linux waits 5 s after the button in case it
/// is pressed again, and an emulated machine is slow.
const UNPLUG_TIMEOUT: Duration = Duration::from_secs(25);
/// The time after which the button is pressed again if the guest has not reacted. A guest ignores
/// the button while it brings the function in.
const PRESS_AGAIN: Duration = Duration::from_secs(6);
/// More time than closing a function can take. An access of the guest to the function may wait for
/// the server, and delays the closing.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// A slot.
pub(super) struct Slot {
    /// The number of the slot, which is the device number of its root port on bus 0: 1 to 31.
    pub(super) number: u8,
    routes: Arc<Routes>,
    inner: Mutex<Inner>,
    /// Signalled when a function has left.
    left: Condvar,
}

struct Inner {
    port: RootPort,
    occupant: Occupant,
    /// The guest has been asked to release the function.
    leaving: bool,
    /// First and last address of the function's BAR0 in the guest's memory.
    bar_range: Option<(u64, u64)>,
}

#[derive(Default)]
enum Occupant {
    #[default]
    None,
    /// A function of this name is about to be plugged.
    Reserved(String),
    Function(Arc<Function>),
    /// The guest cannot reach the function of this name any more, and its connection is being
    /// closed.
    Closing(String),
}

impl Inner {
    fn function(&self) -> Option<&Arc<Function>> {
        match &self.occupant {
            Occupant::Function(function) => Some(function),
            _ => None,
        }
    }

    /// The function, if the guest can access it.
    fn reachable(&self) -> Option<&Arc<Function>> {
        self.function().filter(|_| self.port.link_up() && !self.port.holds_reset())
    }

    /// Updates the range of BAR0 from all registers on which it depends, those of the bridges too.
    fn update_bar_range(&mut self) {
        let root = layout::PCI_WINDOW..layout::PCI_WINDOW + layout::PCI_WINDOW_BYTES;
        let range =
            self.reachable().and_then(|function| function.bar()).and_then(|(first, bytes)| {
                let last = first + bytes - 1;
                let (window_first, window_last) = self.port.window()?;
                let passes = first >= window_first
                    && last <= window_last
                    && root.contains(&first)
                    && root.contains(&last);
                passes.then_some((first, last))
            });
        self.bar_range = range;
        if let Some(function) = self.function() {
            function.place_doorbells(range.map(|(first, _)| first));
        }
    }

    /// Takes the function out of the slot. The caller must close it.
    fn take(&mut self) -> Option<(Arc<Function>, Option<Msi>)> {
        let function = self.function()?.clone();
        self.occupant = Occupant::Closing(function.name.clone());
        self.leaving = false;
        self.bar_range = None;
        Some((function, self.port.remove()))
    }
}

impl Slot {
    pub(super) fn new(number: u8, routes: Arc<Routes>) -> Slot {
        let inner = Inner {
            port: RootPort::new(number),
            occupant: Occupant::None,
            leaving: false,
            bar_range: None,
        };
        Slot { number, routes, inner: Mutex::new(inner), left: Condvar::new() }
    }

    fn send(&self, message: Option<Msi>) {
        let Some((address, data)) = message else { return };
        // The guest may have written an address and data that are no interrupt. It gets none then.
        let sent =
            Route::of_message(address, data, None).and_then(|_| self.routes.send(address, data));
        if let Err(e) = sent {
            tracing::debug!("slot {}: hotplug interrupt: {e}", self.number);
        }
    }

    /// Closes a function that was taken out.
    fn close(&self, taken: Option<(Arc<Function>, Option<Msi>)>) {
        let Some((function, message)) = taken else { return };
        self.send(message);
        function.close();
        lock(&self.inner).occupant = Occupant::None;
        self.left.notify_all();
    }

    /// `None` if the port does not pass accesses to `bus` on; otherwise the function that the guest
    /// can access on `bus`, if there is one.
    pub(super) fn behind(&self, bus: u8) -> Option<Option<Arc<Function>>> {
        let inner = lock(&self.inner);
        let leads = inner.port.leads_to(bus);
        leads.then(|| inner.reachable().filter(|_| inner.port.secondary() == bus).cloned())
    }

    /// The function, if the guest can access it.
    pub(super) fn reachable_function(&self) -> Option<Arc<Function>> {
        lock(&self.inner).reachable().cloned()
    }

    /// The function, if its BAR0 has the `len` addresses from `address` on, and the offset in BAR0.
    pub(super) fn at(&self, address: u64, len: usize) -> Option<(Arc<Function>, u64)> {
        let inner = lock(&self.inner);
        let (first, last) = inner.bar_range?;
        let within = address >= first && address <= last && last - address + 1 >= len as u64;
        within.then(|| inner.reachable().map(|function| (function.clone(), address - first)))?
    }

    /// Reads the port's configuration space.
    pub(super) fn read_port(&self, offset: usize, data: &mut [u8]) {
        lock(&self.inner).port.read(offset, data);
    }

    /// Writes the port's configuration space.
    pub(super) fn write_port(&self, offset: usize, data: &[u8]) {
        let mut inner = lock(&self.inner);
        let before = inner.reachable().cloned();
        let message = inner.port.write(offset, data);
        inner.update_bar_range();
        let lost = before.filter(|_| inner.reachable().is_none());
        let taken = if inner.leaving && inner.port.released() { inner.take() } else { None };
        drop(inner);
        self.send(message);
        // The function lost its power or is held in reset. A function that was taken out needs no
        // reset: its server resets it when the connection ends.
        if let Some(function) = lost.filter(|_| taken.is_none()) {
            function.reset(0);
        }
        self.close(taken);
    }

    /// Writes the function's configuration space.
    pub(super) fn write_function(&self, function: &Function, offset: usize, data: &[u8]) {
        function.write_config(offset, data);
        lock(&self.inner).update_bar_range();
    }

    /// Waits until a function that has been taken out is closed.
    pub(super) fn wait_closed(&self) {
        let closing = |inner: &mut Inner| matches!(inner.occupant, Occupant::Closing(_));
        let inner = lock(&self.inner);
        drop(
            self.left
                .wait_timeout_while(inner, CLOSE_TIMEOUT, closing)
                .unwrap_or_else(|e| e.into_inner()),
        );
    }

    /// Reserves the slot for a function. Returns false if the slot is not free. With `off`, a slot
    /// that the guest manages is free only if the guest has switched it off.
    pub(super) fn reserve(&self, name: &str, off: bool) -> bool {
        let mut inner = lock(&self.inner);
        let free = matches!(inner.occupant, Occupant::None)
            && !(off && inner.port.managed() && !inner.port.released());
        if free {
            inner.occupant = Occupant::Reserved(name.to_owned());
        }
        free
    }

    /// Cancels the reservation.
    pub(super) fn cancel_reservation(&self) {
        lock(&self.inner).occupant = Occupant::None;
    }

    /// Puts a function into the slot, which must be reserved.
    pub(super) fn insert(&self, function: Arc<Function>) {
        if !lock(&self.inner).port.managed() {
            // The guest has not looked yet: BAR0 is where firmware would have put it.
            function.reset(self.first_bar());
        }
        let mut inner = lock(&self.inner);
        inner.occupant = Occupant::Function(function);
        let message = inner.port.insert();
        inner.update_bar_range();
        drop(inner);
        self.send(message);
    }

    /// Puts a function that was saved into the slot, which must be reserved. The guest is not told:
    /// for it, the function has been there all the time.
    pub(super) fn insert_saved(&self, function: Arc<Function>) {
        let mut inner = lock(&self.inner);
        inner.occupant = Occupant::Function(function);
        let _ = inner.port.insert();
    }

    /// The name of a function that comes or goes just now.
    pub(super) fn changing(&self) -> Option<String> {
        let inner = lock(&self.inner);
        match &inner.occupant {
            Occupant::Reserved(name) | Occupant::Closing(name) => Some(name.clone()),
            Occupant::Function(function) if inner.leaving => Some(function.name.clone()),
            Occupant::Function(_) | Occupant::None => None,
        }
    }

    /// The state of the slot. Its function must be paused.
    pub(super) fn save(&self) -> SavedSlot {
        let inner = lock(&self.inner);
        let (port, function) = (inner.port.save(), inner.function().cloned());
        drop(inner);
        SavedSlot { port, function: function.map(|function| function.save()) }
    }

    /// Gives the slot and its function a saved state.
    ///
    /// # Errors
    /// The state is that of another slot or function. The text says what differs.
    pub(super) fn restore(&self, saved: &SavedSlot) -> Result<(), String> {
        let mut inner = lock(&self.inner);
        let number = self.number;
        let function = inner.function().cloned();
        if !inner.port.restore(&saved.port) {
            return Err(format!("slot {number}: the saved configuration space is that of no port"));
        }
        drop(inner);
        match (function, &saved.function) {
            (Some(function), Some(saved)) => function.restore(saved)?,
            (None, None) => {}
            (_, Some(saved)) => return Err(format!("slot {number}: {} is missing", saved.name)),
            (Some(function), None) => {
                return Err(format!("slot {number}: it was empty, and now has {}", function.name));
            }
        }
        lock(&self.inner).update_bar_range();
        Ok(())
    }

    fn first_bar(&self) -> u32 {
        u32::try_from(window(self.number)).unwrap_or(0)
    }

    /// The name of the function that is, or is about to be, in the slot.
    pub(super) fn name(&self) -> Option<String> {
        match &lock(&self.inner).occupant {
            Occupant::None => None,
            Occupant::Reserved(name) | Occupant::Closing(name) => Some(name.clone()),
            Occupant::Function(function) => Some(function.name.clone()),
        }
    }

    /// The function, the bus that it is on, and whether the guest has it switched on.
    pub(super) fn occupant(&self) -> Option<(Arc<Function>, u8, bool)> {
        let inner = lock(&self.inner);
        inner
            .function()
            .map(|function| (function.clone(), inner.port.secondary(), inner.port.link_up()))
    }

    /// Asks the guest to release the function `name`, and waits until it has. `begun` is called
    /// once [`changing`](Self::changing) tells of it.
    ///
    /// # Errors
    /// See [`UnplugError`].
    pub(super) fn unplug(&self, name: &str, begun: impl FnOnce()) -> Result<(), UnplugError> {
        let missing = || UnplugError::Unknown(name.to_owned());
        let mut inner = lock(&self.inner);
        let function =
            inner.function().filter(|function| function.name == name).ok_or_else(missing)?.clone();
        if inner.port.released() || !inner.port.managed() && !function.in_use() {
            let taken = inner.take();
            drop(inner);
            begun();
            self.close(taken);
            return Ok(());
        }
        inner.leaving = true;
        begun();
        let deadline = Instant::now() + UNPLUG_TIMEOUT;
        loop {
            if inner.port.link_up() && !inner.port.busy() {
                let message = inner.port.press();
                drop(inner);
                self.send(message);
                inner = lock(&self.inner);
            }
            let until = deadline.min(Instant::now() + PRESS_AGAIN);
            loop {
                let same = inner.function().is_some_and(|now| Arc::ptr_eq(now, &function));
                let closing =
                    matches!(&inner.occupant, Occupant::Closing(closing) if closing == name);
                if !same && !closing {
                    return Ok(());
                }
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                inner = self.left.wait_timeout(inner, left).unwrap_or_else(|e| e.into_inner()).0;
            }
            if Instant::now() >= deadline {
                if inner.port.link_up() {
                    return Err(UnplugError::Kept {
                        name: name.to_owned(),
                        timeout: UNPLUG_TIMEOUT,
                    });
                }
                // The guest has switched the slot off, but not the power indicator.
                let taken = inner.take();
                drop(inner);
                self.close(taken);
                return Ok(());
            }
        }
    }

    /// Takes the function out without asking the guest, because its server has gone. The guest is
    /// told that the slot is empty. Returns false if the function is in the slot no more.
    pub(super) fn vanish(&self, function: &Arc<Function>) -> bool {
        let mut inner = lock(&self.inner);
        if !inner.function().is_some_and(|now| Arc::ptr_eq(now, function)) {
            return false;
        }
        let taken = inner.take();
        drop(inner);
        self.close(taken);
        true
    }

    /// Puts the slot into the state after power-on. A function that the guest was asked to release
    /// is taken out.
    pub(super) fn reset(&self) {
        let mut inner = lock(&self.inner);
        let taken = if inner.leaving { inner.take() } else { None };
        inner.port.reset();
        let function = inner.function().cloned();
        inner.bar_range = None;
        drop(inner);
        self.close(taken);
        if let Some(function) = function {
            function.reset(self.first_bar());
            function.end_intx();
        }
        lock(&self.inner).update_bar_range();
    }
}
