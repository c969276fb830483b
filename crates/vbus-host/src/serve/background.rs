// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus serve --take-over --background`: starts the bus as a process of its own, and waits until
//! it is up.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};

/// The option that the other process does not get.
const OPTION: &str = "--background";

/// Starts this program once more, with the same arguments and without the option, and returns once
/// it serves.
///
/// # Errors
/// It has ended without serving. It has said why itself.
pub fn run() -> Result<()> {
    let (ready, tells) = pipe_with(PipeFlags::CLOEXEC)?;
    // The other process is to have this end.
    fcntl_setfd(&tells, FdFlags::empty())?;
    let mut command = Command::new("/proc/self/exe");
    let mut args = std::env::args_os();
    command
        .arg0(args.next().unwrap_or_else(|| "vbus".into()))
        .args(args.filter(|arg| arg != OPTION))
        .arg(format!("--ready-fd={}", tells.as_raw_fd()))
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    // It is no part of the terminal's job, so that the end of this process does not stop it.
    command.process_group(0);
    let mut child = command.spawn().context("starting the new bus")?;
    drop(tells);
    // The other process keeps the descriptor, so that its end can be seen.
    let mut text = String::new();
    BufReader::new(File::from(ready)).read_line(&mut text)?;
    if text.contains("READY=1") {
        return Ok(());
    }
    let status = child.wait()?;
    bail!("the new bus has ended ({status}), and the one that was there goes on")
}
