//! Whether a device has a link.

use std::sync::Mutex;

use vbus_core::{TaskHandle, lock};

/// The link of a device. Its back end sets the carrier, people can switch it off, and one task is
/// woken by each change.
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
    /// Whether there is a carrier, and nobody has switched the link off.
    pub fn is_up(&self) -> bool {
        let state = lock(&self.0);
        state.carrier && !state.off
    }

    /// The back end says whether there is a carrier.
    pub fn set_carrier(&self, carrier: bool) {
        self.change(|state| state.carrier = carrier);
    }

    /// Switches the link off, or on again.
    pub fn set_off(&self, off: bool) {
        self.change(|state| state.off = off);
    }

    /// Whether somebody has switched the link off.
    pub fn is_off(&self) -> bool {
        lock(&self.0).off
    }

    /// Asks the driver to announce its addresses to the network, as after a move to another place
    /// of it.
    pub fn announce(&self) {
        self.change(|state| state.announces += 1);
    }

    /// How often the driver was asked to.
    pub fn announces(&self) -> u64 {
        lock(&self.0).announces
    }

    /// Lets `task` be woken by changes, instead of the task before; `None`: no task.
    pub fn observe(&self, task: Option<TaskHandle>) {
        lock(&self.0).observer = task;
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.0);
        let facts = |state: &State| (state.carrier, state.off, state.announces);
        let before = facts(&state);
        change(&mut state);
        if before != facts(&state) {
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
