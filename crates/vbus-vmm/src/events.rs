// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The events that change the machine's life: reset, power-off, end.

use std::sync::mpsc::{Receiver, Sender};

use serde_json::Value;

/// An event that the main thread handles. A virtual CPU, a control client, a signal or the terminal
/// causes it.
#[derive(Debug)]
pub enum VmEvent {
    /// The machine must reset. The text says who asked for it.
    Reset(String),
    /// The guest has powered the machine off.
    PowerOff,
    /// Somebody wants to know what the machine does.
    Dump(Sender<Vec<Value>>),
    /// The machine must stand still while it is saved.
    Park(Parking),
    /// The machine must end at once.
    Quit,
    /// The machine cannot go on.
    Fail(anyhow::Error),
}

/// How the main thread and the one that saves the machine talk.
#[derive(Debug)]
pub struct Parking {
    /// Learns that the machine stands still, or why it does not.
    pub told: Sender<Result<(), String>>,
    /// Says what comes then: true, the machine runs elsewhere and ends here once the sender is
    /// dropped; false, it goes on. If the sender is dropped without a word, it goes on.
    pub then: Receiver<bool>,
}

/// Sends events to the main thread. Sending fails only when the machine is about to end.
pub type EventSender = Sender<VmEvent>;
