// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How tasks get to a worker that may sleep. `tests/it/hand_over_model.rs` compiles this file with
//! the mutex of a model checker.

use std::collections::VecDeque;

use super::sync::{Mutex, lock};

/// The queue of a worker. A thread that puts something in learns whether it must kick the worker.
/// The worker says that it is about to sleep in the same step in which it finds the queue empty. So
/// whoever comes later kicks it.
pub struct HandOver<T>(Mutex<State<T>>);

#[derive(Clone)]
struct State<T> {
    ready: VecDeque<T>,
    /// The worker sleeps, or is about to, and nobody has kicked it since.
    sleeping: bool,
    stop: bool,
}

/// What the worker does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It has something to do.
    Work,
    /// It sleeps until somebody kicks it. Then it calls [`HandOver::wakes`].
    Sleep,
    /// It ends.
    End,
}

impl<T: Clone> HandOver<T> {
    /// Nothing yet. The worker is awake.
    pub fn new() -> HandOver<T> {
        HandOver(Mutex::new(State { ready: VecDeque::new(), sleeping: false, stop: false }))
    }

    /// Puts something in, for the worker. Returns true if the caller must kick the worker.
    #[must_use = "true: the worker sleeps"]
    pub fn push(&self, item: T) -> bool {
        let mut state = lock(&self.0);
        state.ready.push_back(item);
        std::mem::take(&mut state.sleeping)
    }

    /// Appends all that is there to `into`, which is empty.
    pub fn take(&self, into: &mut Vec<T>) -> Next {
        let mut state = lock(&self.0);
        if state.stop {
            return Next::End;
        }
        into.extend(state.ready.drain(..));
        if into.is_empty() {
            state.sleeping = true;
            return Next::Sleep;
        }
        Next::Work
    }

    /// The worker does not sleep any more.
    pub fn wakes(&self) {
        lock(&self.0).sleeping = false;
    }

    /// Ends the worker. The caller kicks it.
    pub fn stop(&self) {
        lock(&self.0).stop = true;
    }
}
