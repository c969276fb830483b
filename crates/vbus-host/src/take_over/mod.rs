// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A new process takes the place of a running bus, and nobody notices (spec/take-over.md): VMMs,
//! guests and drivers keep their connections.
//!
//! `steps` has the order of events and the decision who serves. `wire` carries the messages,
//! `content` says what is in them. `leaving` is the bus that is there already, `joining` the new
//! one.

mod content;
mod joining;
mod leaving;
mod steps;
mod wire;

pub use content::{DeviceContent, DeviceParcel, FORMAT, Handed, Spec, StatePart, now};
pub use joining::Joining;
pub use leaving::Departure;
