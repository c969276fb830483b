// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The link of a device: up or down.

use std::sync::Mutex;

use vbus_core::{TaskHandle, lock};

/// The link of a device. The back end sets the carrier. A control client can switch the link off.
/// Each change wakes one task.
#[derive(Debug, Default)]
pub struct Link(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    carrier: bool,
    off: bool,
    announces: u64,
    observer: Option<TaskHandle>,
}

impl Link {
    /// Whether there is a carrier and the link is not switched off.
    pub fn is_up(&self) -> bool {
        let state = lock(&self.0);
        state.carrier && !state.off
    }

    /// The back end sets the carrier.
    pub fn set_carrier(&self, carrier: bool) {
        self.change(|state| state.carrier = carrier);
    }

    /// Switches the link off, or on again.
    pub fn set_off(&self, off: bool) {
        self.change(|state| state.off = off);
    }

    /// Whether a control client has switched the link off.
    pub fn is_off(&self) -> bool {
        lock(&self.0).off
    }

    /// Asks the driver to announce its addresses to the network, as after a migration to another
    /// host.
    pub fn announce(&self) {
        self.change(|state| state.announces += 1);
    }

    /// How often the driver has been asked to announce its addresses.
    pub fn announces(&self) -> u64 {
        lock(&self.0).announces
    }

    /// Sets what [`is_off`](Self::is_off) and [`announces`](Self::announces) return, as those of a
    /// link that this one goes on for.
    pub(crate) fn restore(&self, off: bool, announces: u64) {
        self.change(|state| (state.off, state.announces) = (off, announces));
    }

    /// Each change wakes `task` from now on, instead of the former task. `None`: no task.
    pub fn observe(&self, task: Option<TaskHandle>) {
        lock(&self.0).observer = task;
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.0);
        let observed = |state: &State| (state.carrier, state.off, state.announces);
        let before = observed(&state);
        change(&mut state);
        if before != observed(&state) {
            if let Some(task) = &state.observer {
                task.wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Link;

    #[test]
    fn a_link_that_is_switched_off_stays_off() {
        let link = Link::default();
        assert!(!link.is_up());
        link.set_carrier(true);
        assert!(link.is_up());
        link.set_off(true);
        link.set_carrier(false);
        link.set_carrier(true);
        assert!(!link.is_up());
        link.set_off(false);
        assert!(link.is_up());
    }
}
