// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Serves a bus with the class `block` and the classes of vbus, and controls it.
use example_block::device::BlockClass;
use vbus_host::{Program, Sandbox};

fn main() -> std::process::ExitCode {
    let program = Program::new("block-host", env!("CARGO_PKG_VERSION")).class(BlockClass);
    program.sandbox(Sandbox::default().configured_files()).run() // The class opens files.
}
