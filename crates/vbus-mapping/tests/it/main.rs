// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that is taken away in each way there is. The process goes on, and a SIGBUS from anywhere
//! else ends it.

#![allow(unsafe_code)] // Accesses mapped memory, and raises signals.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod lost;
mod other_signals;
