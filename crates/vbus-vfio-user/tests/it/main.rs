// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices of a bus behind their sockets.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic")]

mod device;
mod pic;
mod storm;
