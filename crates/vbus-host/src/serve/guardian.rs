//! The guardian: a process that gives threads their own scheduling class back if the bus is killed
//! (spec/sched.md, "If the bus is killed").
//!
//! It is started before the first thread is changed, holds the ledger
//! ([`vbus_sched::Ledger`]) as its standard output and the reading end of a pipe as its
//! standard input, and sleeps in a read of that pipe, to which nobody writes: the pipe ends with
//! the bus.

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

/// The hidden command.
pub const COMMAND: &str = "guardian";
/// One that has ended is followed by another one, but not sooner after the start of the last one.
const PAUSE: Duration = Duration::from_secs(1);
/// How long it may take to end, at the end of the bus.
const PATIENCE: Duration = Duration::from_secs(10);

/// Starts the process when it is needed, and ends it with the bus.
#[derive(Default)]
pub struct Guardian(Mutex<State>);

#[derive(Default)]
struct State {
    running: Option<Running>,
    stopped: bool,
}

struct Running {
    child: Child,
    /// Its other end is the guardian's alone: there is an error on this one once the guardian has
    /// ended.
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
                    "the guardian has ended; there will be another one in a second",
                ));
            }
        }
        if let Some(Running { mut child, .. }) = state.running.take() {
            // It has closed its end of the pipe, and so is as good as gone.
            let _ = child.wait();
            tracing::warn!("the guardian has ended; starting another one");
        }
        state.running = Some(Running::start(ledger)?);
        Ok(())
    }
}

impl Guardian {
    /// Ends it, when no thread is changed any more.
    pub fn stop(&self) {
        let mut state = self.0.lock().unwrap_or_else(|e| e.into_inner());
        state.stopped = true;
        let Some(Running { mut child, pipe, .. }) = state.running.take() else { return };
        drop(pipe);
        let ended = || -> io::Result<bool> {
            let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
            let patience = Timespec::try_from(PATIENCE).map_err(io::Error::other)?;
            Ok(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&patience))? > 0)
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
        // This very program, also if its file has been replaced.
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

/// The guardian's own life.
pub fn run() -> ExitCode {
    // What is meant for the bus, from a terminal or from who ends all processes of a service, is
    // not for this one: it ends when the bus has.
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
        let _ = signal_hook::flag::register(signal, std::sync::Arc::default()); // Caught, and nothing more.
    }
    let _ = rustix::process::setsid(); // Fails for who calls it by hand.
    let _ = rustix::thread::set_name(c"vbus-guardian");
    if let Err(error) = wait() {
        eprintln!("error: the guardian cannot wait for the end of the bus: {error}");
        return ExitCode::FAILURE;
    }
    let ledger = io::stdout().as_fd().try_clone_to_owned().map(File::from);
    match ledger.and_then(|ledger| vbus_sched::put_back(&ledger)) {
        Ok(vbus_sched::Outcome { restored: 0, left: 0, failed: 0 }) => ExitCode::SUCCESS,
        Ok(vbus_sched::Outcome { restored, left, failed }) => {
            eprintln!(
                "the bus was killed: {restored} threads got their scheduling class back, {left} had ended or another one, {failed} failed"
            );
            if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("error: the guardian cannot read its ledger: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns once the other end of the pipe is closed.
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
