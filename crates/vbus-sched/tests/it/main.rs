// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The class from end to end, against drivers in this process.
// A test may panic, and its numbers are small.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod saved;
mod sched;
