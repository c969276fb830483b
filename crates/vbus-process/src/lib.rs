// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The environment of a driver in a plain process, without a virtual machine and without root.
//!
//! [`Process`] is a [`Hal`](vbus_driver::Hal). It reaches the device over the device's vfio-user
//! socket, and shares memory with it. Doorbells and interrupts are eventfds. This crate needs no
//! code of the device's side, so that the programs of a guest stay small.
//!
//! ```no_run
//! use vbus_driver::Function;
//! use vbus_process::{MEMORY_BYTES, Process};
//!
//! let process = Process::connect("/run/vbus/length0.sock", MEMORY_BYTES)?;
//! let mut function = Function::probe(process)?;
//! function.open(0)?;
//! let length = function.call(1, 0, &mut [0; 24])?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The crate `vbus-vfio-user` has the same example with its device, and runs it.

pub mod clock;
mod memory;
mod process;

pub use memory::{MEMORY_BYTES, ProcessMemory};
pub use process::Process;
pub use vfio_user_protocol::{ClientError, Errno, Patience};

/// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
