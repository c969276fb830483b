// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests both ends of each layout with plain models, with a hostile peer, and with a peer in C.
#![allow(clippy::unwrap_used)] // A failed unwrap fails its test.

#[cfg(target_os = "linux")]
#[allow(unsafe_code)] // Maps memory.
mod c_peer;
mod logged;
mod pic;
mod ring;
mod state;
