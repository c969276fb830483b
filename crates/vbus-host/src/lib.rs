// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program that serves a vbus, as a library. An author of device classes passes the classes to
//! [`Program`] and gets the whole program `vbus` with them: command line, configuration file,
//! sockets, control socket, lock of the directory, signals, log, clean-up, and the commands that
//! control a running bus.
//!
//! This is the `main` of such a program. Users name its class `echo` in `bus.toml` and in `device
//! add`, like the classes of vbus:
//!
//! ```no_run
//! use std::process::ExitCode;
//! use std::sync::Arc;
//! use vbus_core::{Connection, CreateError, Device, DeviceClass, ErrorCode, Identity, Open, Region};
//!
//! struct EchoClass;
//!
//! impl DeviceClass for EchoClass {
//!     fn name(&self) -> &'static str {
//!         "echo"
//!     }
//!     fn help(&self) -> &'static str {
//!         "Sends back each request; no settings."
//!     }
//!     fn create(
//!         &self,
//!         _name: &str,
//!         _settings: &serde_json::Value,
//!     ) -> Result<Arc<dyn Device>, CreateError> {
//!         Ok(Arc::new(Echo))
//!     }
//! }
//! # struct Echo;
//! # impl Device for Echo {
//! #     fn identity(&self) -> Identity {
//! #         Identity::user("echo")
//! #     }
//! #     fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
//! #         Err(ErrorCode::DENIED)
//! #     }
//! # }
//!
//! fn main() -> ExitCode {
//!     vbus_host::Program::new("echo-host", env!("CARGO_PKG_VERSION")).class(EchoClass).run()
//! }
//! ```
//!
//! `echo-host serve --config bus.toml` serves the bus. Both `vbus` and `echo-host` can control it.
//! The documentation of `vbus_core` shows how to write a class and its devices.

mod access;
mod classes;
mod client;
mod command;
mod config;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod keeper;
mod metrics;
mod plug;
mod program;
mod rights;
mod sandbox;
mod serve;
mod supervisor;
mod take_over;
mod telemetry;
mod vmm;

pub use program::Program;
pub use sandbox::Sandbox;

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
