// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Programs that serve a bus with classes of their own.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic")]

mod watchdog;
