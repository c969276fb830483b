// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The supervisor: the process that keeps the rights which the bus gives up (spec/control.md,
//! "Two processes").
//!
//! The bus talks to VMMs, guests and control clients. It holds descriptors, and opens nothing
//! itself. What it needs from outside, it asks the supervisor for, by a few verbs ([`verb`]). The
//! supervisor checks each request against the configuration ([`permits`]), as if the bus were
//! hostile, and answers with a descriptor. `place` finds a path without leaving an allowed folder.
//! `config_file` keeps the configuration out of the bus's reach.
//! `process` is the supervisor itself, `client` the bus's side.
//!
//! The supervisor ends with the bus, however the bus ends. Then it restores the scheduling class of
//! each thread that is changed, and removes the bus's sockets.

mod client;
mod config_file;
mod permits;
mod place;
mod process;
mod socket;
mod verb;

pub use client::{RemoteThreads, SocketFile, Supervisor};
pub use permits::{AllowSpec, Permits, Purpose};
#[cfg(feature = "fuzzing")]
pub use process::in_this_process;
pub use process::{COMMAND, run};
pub use socket::remove_left;
