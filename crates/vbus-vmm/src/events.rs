// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The events that change the machine's life: reset, power-off, end.

use std::sync::mpsc::Sender;

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
    /// The machine must end at once.
    Quit,
    /// The machine cannot go on.
    Fail(anyhow::Error),
}

/// Sends events to the main thread. Sending fails only when the machine is about to end.
pub type EventSender = Sender<VmEvent>;
