//! Signals as descriptors.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

/// Becomes readable on SIGINT or SIGTERM, which then do not end the program by themselves.
pub fn termination() -> Result<OwnedFd> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM] {
        pipe::register(signal, writer.try_clone()?).context("cannot watch for signals")?;
    }
    Ok(reader.into())
}
