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
pub mod progress;
pub mod rundir;
pub mod signals;
mod standard;

use std::fmt;
use std::process::ExitCode;

/// Ends a program: writes what is left of the log, prints the error with all its causes on standard
/// error, and returns the exit code: 0, that of an [`ExitWith`] among the causes, or 1.
pub fn exit(result: anyhow::Result<()>) -> ExitCode {
    let code = result.err().map_or(0, |error| {
        log::line(&format!("error: {error:#}"));
        error.downcast_ref::<ExitWith>().map_or(1, |with| with.code)
    });
    log::flush();
    ExitCode::from(code)
}

/// An error with an exit code of its own, so that scripts can tell it from others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitWith {
    /// The exit code. 1 is any error, and 2 is wrong arguments.
    pub code: u8,
    /// What is wrong.
    pub text: String,
}

impl fmt::Display for ExitWith {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for ExitWith {}

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
