// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The parts that the programs of vbus share: the log, the output for people and for scripts, the
//! signals that end a program, the limit of descriptors, and the directory in which a bus has its
//! sockets.
//!
//! ```
//! use std::process::ExitCode;
//! use vbus_cli::output::{columns, emit};
//!
//! fn run() -> anyhow::Result<()> {
//!     emit(&columns(&[vec!["NAME".into(), "CLASS".into()], vec!["net0".into(), "venet".into()]]));
//!     Ok(())
//! }
//!
//! fn main() -> ExitCode {
//!     vbus_cli::exit(run())
//! }
//! ```

pub mod documents;
pub mod limits;
pub mod log;
pub mod output;
pub mod rundir;
pub mod signals;

use std::io::Write;
use std::process::ExitCode;

/// Ends a program: prints the error with all its causes on standard error, and returns the exit
/// code, 0 or 1.
pub fn exit(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be full, or closed.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
