// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A program on a terminal of its own, and what its screen shows.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// The size of the terminal.
const ROWS: u16 = 14;
const COLUMNS: u16 = 152;

/// How long a screen is kept.
pub const KEPT: Duration = Duration::from_secs(10);
/// The time between two screens that are kept.
const STEP: Duration = Duration::from_millis(200);

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

    /// The screen as it was at `before` the end, which comes when `end` says so or is dropped.
    /// `before` is at most [`KEPT`].
    pub fn at(&mut self, before: Duration, end: &Receiver<()>) -> Result<vt100::Screen> {
        let mut film: VecDeque<(Instant, vt100::Screen)> = VecDeque::new();
        loop {
            let mut fds = [PollFd::new(&self.terminal, PollFlags::IN)];
            if poll(&mut fds, Some(&Timespec::try_from(STEP)?))? > 0 {
                let mut buffer = [0; 4096];
                let bytes = rustix::io::read(&self.terminal, &mut buffer)
                    .context("the program has ended too early")?;
                self.screen.process(&buffer[..bytes]);
            }
            let now = Instant::now();
            if film.back().is_none_or(|(at, _)| now - *at >= STEP) {
                film.push_back((now, self.screen.screen().clone()));
            }
            film.retain(|(at, _)| now - *at <= 2 * KEPT);
            if !matches!(end.try_recv(), Err(TryRecvError::Empty)) {
                let wanted = film.iter().rev().find(|(at, _)| now - *at >= before);
                let (_, screen) = wanted.or(film.front()).context("there is no screen yet")?;
                return Ok(screen.clone());
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
