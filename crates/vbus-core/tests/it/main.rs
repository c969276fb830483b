// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests of the public interface: endpoints with small devices, the event loop, memory, and the
//! model of the event loop's wake-up.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::cast_possible_truncation, reason = "numbers of a test are small")]

mod alarm_model;
mod alone;
mod dirty_log;
mod endpoint;
mod hand_over_model;
mod memory;
mod page_bits_model;
mod peer_files;
mod placement;
mod wake_model;
