// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A program on a terminal of its own, and what its screen shows.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// The size of the terminal.
const ROWS: u16 = 14;
const COLUMNS: u16 = 152;

/// A program that runs on a terminal. Dropping this ends it.
pub struct Running {
    terminal: OwnedFd,
    child: Child,
    screen: vt100::Parser,
}

impl Running {
    /// Starts `command`.
    pub fn start(mut command: Command) -> Result<Running> {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .context("there are no terminals")?;
        grantpt(&terminal)?;
        unlockpt(&terminal)?;
        let size = Winsize { ws_row: ROWS, ws_col: COLUMNS, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&terminal, size)?;
        let name = ptsname(&terminal, Vec::new())?.into_string()?;
        let no_control = i32::try_from(OFlags::NOCTTY.bits())?;
        let line = File::options().read(true).write(true).custom_flags(no_control).open(name)?;
        let child = command
            .env("TERM", "xterm-256color")
            .env_remove("NO_COLOR")
            .stdin(line.try_clone()?)
            .stdout(line.try_clone()?)
            .stderr(line)
            .spawn()
            .context("cannot start the program")?;
        Ok(Running { terminal, child, screen: vt100::Parser::new(ROWS, COLUMNS, 0) })
    }

    /// The screen after `time`.
    pub fn after(&mut self, time: Duration) -> Result<&vt100::Screen> {
        let end = Instant::now() + time;
        loop {
            let left = Timespec::try_from(end.saturating_duration_since(Instant::now()))?;
            let mut fds = [PollFd::new(&self.terminal, PollFlags::IN)];
            if poll(&mut fds, Some(&left))? == 0 {
                return Ok(self.screen.screen());
            }
            let mut buffer = [0; 4096];
            let bytes = rustix::io::read(&self.terminal, &mut buffer)
                .context("the program has ended too early")?;
            self.screen.process(&buffer[..bytes]);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
