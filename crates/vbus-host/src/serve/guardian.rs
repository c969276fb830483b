// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guardian: a process that restores the scheduling class of threads if the bus is killed
//! (spec/sched.md, "If the bus is killed").
//!
//! The bus starts the guardian before it changes the first thread. The guardian's standard output
//! is the ledger ([`vbus_sched::Ledger`]), and its standard input is the reading end of a pipe.
//! Nobody writes to the pipe. The guardian sleeps in a read of it until the bus ends, which closes
//! the other end.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

/// The name of the hidden command.
pub const COMMAND: &str = "guardian";
/// The least time between the starts of two guardians.
const PAUSE: Duration = Duration::from_secs(1);
/// How long the bus waits for the guardian to end.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Starts the guardian when it is needed, and ends it with the bus.
#[derive(Default)]
pub struct Guardian(Mutex<State>);

#[derive(Default)]
struct State {
    running: Option<Running>,
    stopped: bool,
}

struct Running {
    child: Child,
    /// The writing end of the pipe. Only the guardian has the reading end, so a poll of this end
    /// reports an error once the guardian has ended.
    pipe: OwnedFd,
    since: Instant,
}

impl vbus_sched::Guardian for Guardian {
    fn attend(&self, ledger: BorrowedFd<'_>) -> io::Result<()> {
        let mut state = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if state.stopped {
            return Err(io::Error::other("the bus is ending"));
        }
        if let Some(running) = &state.running {
            if running.is_there() {
                return Ok(());
            }
            if running.since.elapsed() < PAUSE {
                return Err(io::Error::other(
                    "the guardian has ended; the bus starts another one in a second",
                ));
            }
        }
        if let Some(Running { mut child, .. }) = state.running.take() {
            // It has closed its end of the pipe, so it has ended or ends at once.
            let _ = child.wait();
            tracing::warn!("the guardian has ended; starting another one");
        }
        state.running = Some(Running::start(ledger)?);
        Ok(())
    }
}

impl Guardian {
    /// Ends the guardian. The bus calls this when it has restored all threads.
    pub fn stop(&self) {
        let mut state = self.0.lock().unwrap_or_else(|e| e.into_inner());
        state.stopped = true;
        let Some(Running { mut child, pipe, .. }) = state.running.take() else { return };
        drop(pipe);
        let ended = || -> io::Result<bool> {
            let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
            let timeout = Timespec::try_from(TIMEOUT).map_err(io::Error::other)?;
            Ok(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout))? > 0)
        };
        match ended() {
            Ok(true) => drop(child.wait()),
            Ok(false) => tracing::warn!(process = child.id(), "the guardian does not end"),
            Err(error) => {
                tracing::warn!(%error, process = child.id(), "cannot wait for the guardian")
            }
        }
    }
}

impl Running {
    fn start(ledger: BorrowedFd<'_>) -> io::Result<Running> {
        let (read, pipe) = pipe_with(PipeFlags::CLOEXEC)?;
        // This program itself, even if its file has been replaced.
        let child = Command::new("/proc/self/exe")
            .arg0("vbus")
            .arg(COMMAND)
            .stdin(Stdio::from(read))
            .stdout(Stdio::from(ledger.try_clone_to_owned()?))
            .spawn()?;
        tracing::debug!(process = child.id(), "started the guardian");
        Ok(Running { child, pipe, since: Instant::now() })
    }

    fn is_there(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.pipe, PollFlags::empty())], Some(&now))
            .is_ok_and(|count| count == 0)
    }
}

/// Runs the guardian.
pub fn run() -> ExitCode {
    // A terminal or a service manager may send these signals to all processes of the bus. The
    // guardian ignores them, because it must outlive the bus.
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
        let _ = signal_hook::flag::register(signal, std::sync::Arc::default());
    }
    // This fails if a person started the command by hand, which does no harm.
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"vbus-guardian");
    if let Err(error) = wait() {
        eprintln!("error: the guardian cannot wait for the end of the bus: {error}");
        return ExitCode::FAILURE;
    }
    let ledger = io::stdout().as_fd().try_clone_to_owned().map(File::from);
    match ledger.and_then(|ledger| vbus_sched::restore(&ledger)) {
        Ok(vbus_sched::RestoreCounts { restored: 0, left: 0, failed: 0 }) => ExitCode::SUCCESS,
        Ok(vbus_sched::RestoreCounts { restored, left, failed }) => {
            eprintln!(
                "the bus was killed: {restored} threads got their scheduling class back, {left} \
                 had ended or had changed their class, {failed} failed"
            );
            if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("error: the guardian cannot read its ledger: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Waits until the other end of the pipe is closed.
fn wait() -> io::Result<()> {
    let mut pipe = io::stdin().lock();
    loop {
        match pipe.read(&mut [0; 16]) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
