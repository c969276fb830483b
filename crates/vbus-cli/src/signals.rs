// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Signals as descriptors.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

/// A descriptor that becomes readable on the first SIGINT, SIGTERM or SIGHUP (the terminal has
/// gone). From now on these signals do not end the process by themselves.
///
/// # Errors
/// The process has no more descriptors.
pub fn termination() -> Result<OwnedFd> {
    descriptor(&[SIGINT, SIGTERM, SIGHUP])
}

/// A descriptor from which each of `signals` can be read as one byte. From now on these signals do
/// not end the process by themselves.
///
/// # Errors
/// The process has no more descriptors, or one of `signals` cannot be caught.
pub fn descriptor(signals: &[i32]) -> Result<OwnedFd> {
    let (reader, writer) = UnixStream::pair().context("making a socket pair")?;
    for signal in signals {
        let writer = writer.try_clone().context("duplicating a socket")?;
        pipe::register(*signal, writer).context("catching signals")?;
    }
    Ok(reader.into())
}
