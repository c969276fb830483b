// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The classes of this crate from end to end, against drivers in this process.
// A test may panic, and its numbers are small.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod bystanders;
mod calls;
mod driver;
mod hostile;
mod offloads;
mod page;
mod saved;
#[path = "../../examples/bystanders/stage.rs"]
mod stage;
mod state;
mod stream;
mod switch;
mod tap;
