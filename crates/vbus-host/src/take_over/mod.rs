// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A new process takes the place of a running bus, and nobody notices (spec/take-over.md): VMMs,
//! guests and drivers keep their connections.
//!
//! A keeper hands over what a bus had that has died, in the same way (`keeper`).
//!
//! `steps` has the order of events and the decision who serves. `wire` carries the messages,
//! `content` says what is in them. `leaving` is the bus that is there already, `joining` the new
//! one.

mod content;
mod joining;
mod leaving;
mod steps;
mod wire;

pub use content::{
    DeviceContent, DeviceParcel, DevicePart, FORMAT, Handed, HeldPart, Offer, Remains, Spec,
    StatePart, now, pack, read,
};
pub use joining::{Joining, adopt};
pub use leaving::Departure;
pub use steps::{AFTER_DEATH, Leaves, Parcel, leave};
#[cfg(test)]
pub use wire::DESCRIPTORS_MAX;
pub use wire::{Frame, Wire};

/// The descriptors that a bus with so many devices may have during a hand-over: more than it ever
/// needs with the usual numbers of queues.
fn room(devices: usize) -> i32 {
    const OF_DEVICE: usize = 128;
    const OTHERS: usize = 1024;
    const MOST: i32 = 1 << 17;
    i32::try_from(devices.saturating_mul(OF_DEVICE) + OTHERS).unwrap_or(MOST).min(MOST)
}
