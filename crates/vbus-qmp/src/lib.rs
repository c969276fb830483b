// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's machine protocol, QMP: lines of JSON on a UNIX socket.
//!
//! [`Qmp`] is a client that waits for each answer. It runs one command at a time, and keeps the
//! events that arrive meanwhile. A client that must not wait has its own socket, and uses [`Lines`]
//! and [`Message`] alone.
//!
//! ```no_run
//! use std::time::Duration;
//! use serde_json::json;
//! use vbus_qmp::Qmp;
//!
//! # fn main() -> anyhow::Result<()> {
//! let mut qmp = Qmp::connect("/run/vm/qmp".as_ref(), Duration::from_secs(30))?;
//! qmp.run("device_del", json!({ "id": "net0" }))?;
//! while let Some(event) = qmp.event()? {
//!     if event["event"] == "DEVICE_DELETED" && event["data"]["device"] == "net0" {
//!         break;
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod client;
mod lines;
mod message;

pub use client::Qmp;
pub use lines::{LineError, Lines};
pub use message::{Message, QemuError};

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
