// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Serves a bus with the class `block` and the classes of vbus, and controls it.

use std::process::ExitCode;

use example_block::device::BlockClass;

fn main() -> ExitCode {
    vbus_host::Program::new("block-host", env!("CARGO_PKG_VERSION")).class(BlockClass).run()
}
