// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two examples. [`shout`] is a complete device class with its driver. [`shout_by_hand`] is the
//! same device without `vbus_core::service`, with a ring of its own. `tests/shout.rs` runs device
//! and driver against each other through the bus, in two threads of one process that share only a
//! socket and a memory file.

pub mod shout;
pub mod shout_by_hand;
