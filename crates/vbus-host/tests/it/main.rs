// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Programs that serve a bus with classes of their own.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic")]

mod sandbox;
mod watchdog;

/// The arguments by which this program runs [`supervises`], the supervisor of its buses.
const SUPERVISOR: [&str; 4] = ["--ignored", "--exact", "supervises", "--nocapture"];

#[test]
#[ignore = "ends with the bus that starts it"]
fn supervises() {
    vbus_host::Program::new("test", "1").run_from(["test", "supervisor"]);
}
