// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `vbus`: serves a bus with the classes of vbus, and controls it. `vbus-guest` is the
//! program that drives the devices.

use std::process::ExitCode;

fn main() -> ExitCode {
    vbus_host::Program::new("vbus", env!("CARGO_PKG_VERSION")).run()
}
