//! The program that serves a vbus, as a library call: an author of device classes gives their
//! classes and gets the whole of `vbus` with them: command line, configuration file, sockets,
//! control socket, lock of the directory, signals, log, clean-up, and the commands that control a
//! running bus.
//!
//! The `main` of such a program. Its class `echo` stands beside those of vbus in `bus.toml`, in
//! `device add` and in `device classes`:
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
//!         "gives back what it is sent; no settings"
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
//! `echo-host serve --config bus.toml` then serves the bus, and `vbus` or `echo-host` control it.
//! `vbus_core` says how a class and its devices are written.

mod classes;
mod client;
mod command;
mod config;
mod plug;
mod program;
mod serve;
mod vmm;

pub use program::Program;
