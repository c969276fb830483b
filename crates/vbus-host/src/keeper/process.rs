// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The keeper: starts the bus, follows it, and starts the next one when it has died.

use std::ffi::OsString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vbus_cli::{log, rundir, signals};

use super::journal::{Journal, News};
use crate::config;
use crate::supervisor::{AllowSpec, Permits, remove_left};
use crate::take_over::{AFTER_DEATH, Leaves, Parcel, Wire, adopt, leave};

/// The option that tells a bus that its standard input leads to a keeper, and how often that has
/// started it because it had died.
const KEPT: &str = "--kept";

/// A bus that dies sooner after it was up has not got anywhere.
const PROGRESS: Duration = Duration::from_secs(1);
/// How many times in a row a bus may die that has not got anywhere.
const DEATHS_MAX: u32 = 8;
/// How long a message of the bus may take from its first byte to its last.
const MESSAGE: Duration = Duration::from_secs(10);
/// How long a bus takes to end that has closed its socket, and its supervisor, which then cleans
/// up.
const END: Duration = Duration::from_secs(3);
/// The pause before the keeper starts a bus again that has died twice in a row without progress, or
/// that the system did not start. Each further pause is twice as long: 13 s in all.
const START_PAUSE: Duration = Duration::from_millis(100);
/// The pause before the keeper asks again for a bus that has dropped it or has moved.
const ADOPT_PAUSE: Duration = Duration::from_secs(1);
/// How many times it asks.
const ADOPT_TRIES: u32 = 10;

/// What the keeper needs of the command line.
pub struct Order<'a> {
    /// The directory of the bus.
    pub dir: Option<&'a Path>,
    /// A bus serves there already, and is to be kept.
    pub adopt: bool,
    /// The configuration file of the bus, which SIGHUP reads again.
    pub config: Option<&'a Path>,
}

/// Keeps a bus until it ends in order.
///
/// # Errors
/// The bus cannot be started, ends with an error before it is up, or dies again and again.
pub fn run(order: &Order<'_>) -> Result<()> {
    log::prepare("info");
    log::write();
    let _ = rustix::thread::set_name(c"vbus-keeper");
    vbus_cli::limits::raise_descriptor_limit();
    let has_config = order.config.is_some();
    let stop = if has_config { vec![SIGTERM, SIGINT] } else { vec![SIGTERM, SIGINT, SIGHUP] };
    let stop = signals::descriptor(&stop)?;
    let hangup = if has_config { Some(signals::descriptor(&[SIGHUP])?) } else { None };
    let mut keeper = Keeper {
        program: std::env::current_exe().context("the path of this program")?,
        arguments: arguments(std::env::args_os().skip(1)),
        dir: rundir::choose(order.dir),
        config: order.config.map(Path::to_owned),
        stop,
        hangup,
        restarts: 0,
        asked: false,
    };
    let ended = keeper.keep(order.adopt);
    log::flush();
    match ended? {
        Ended { status: Some(status) } if !status.success() => {
            std::process::exit(status.code().unwrap_or(1))
        }
        Ended { .. } => Ok(()),
    }
}

/// The arguments of a bus: those of the keeper without what is for the keeper.
fn arguments(own: impl Iterator<Item = OsString>) -> Vec<OsString> {
    own.filter(|argument| argument != "--keep" && argument != "--adopt").collect()
}

/// The arguments of a bus after the first one: nobody waits any more for it to be up.
fn later(arguments: &[OsString]) -> Vec<OsString> {
    let mut all = arguments.iter();
    let mut later = Vec::new();
    while let Some(argument) = all.next() {
        match argument.to_str() {
            Some("--ready-fd") => drop(all.next()),
            Some(text) if text.starts_with("--ready-fd=") => {}
            _ => later.push(argument.clone()),
        }
    }
    later
}

struct Keeper {
    program: PathBuf,
    arguments: Vec<OsString>,
    dir: PathBuf,
    config: Option<PathBuf>,
    /// Readable when somebody wants the bus to end.
    stop: OwnedFd,
    /// Readable when somebody wants it to read its configuration.
    hangup: Option<OwnedFd>,
    restarts: u32,
    /// The bus was told to end.
    asked: bool,
}

/// A bus, and the connection to it.
struct Bus {
    socket: OwnedFd,
    process: OwnedFd,
    pid: i32,
    /// `None`: somebody else has started it.
    child: Option<Child>,
}

/// The bus has ended in order.
struct Ended {
    status: Option<ExitStatus>,
}

/// How following a bus has ended.
enum Followed {
    Ended,
    /// It has died.
    Died,
    /// Another process has taken over.
    Moved,
    /// It lives, and does not want this keeper any more.
    Lost,
}

impl Keeper {
    fn keep(&mut self, adopts: bool) -> Result<Ended> {
        let mut journal = Journal::default();
        let mut bus = match adopts {
            true => self.adopt()?,
            false => self.start(false)?,
        };
        let mut deaths = 0;
        loop {
            let begun = Instant::now();
            let (followed, is_whole) = self.follow(&bus, &mut journal);
            match followed {
                Followed::Ended => return Ok(Ended { status: wait(&mut bus) }),
                Followed::Moved | Followed::Lost if self.asked => {
                    return Ok(Ended { status: None });
                }
                Followed::Moved => {
                    // It is this process's child only if this process has started it. What a client
                    // has sent can keep it from its end, and the other bus is to be kept.
                    if ends(&bus.process, END) {
                        let _ = wait(&mut bus);
                    }
                    journal = Journal::default();
                    let Some(next) = self.adopt_again()? else {
                        return Ok(Ended { status: None });
                    };
                    bus = next;
                    continue;
                }
                Followed::Died | Followed::Lost if journal.is_replaced() => {
                    tracing::warn!(
                        "this keeper stood still, and the bus (process {}) has another one, or has \
                         moved",
                        bus.pid
                    );
                    journal = Journal::default();
                    let Some(next) = self.adopt_again()? else {
                        return Ok(Ended { status: None });
                    };
                    bus = next;
                    continue;
                }
                Followed::Lost => {
                    tracing::error!("the bus (process {}) has dropped its keeper", bus.pid);
                    journal = Journal::default();
                    let Some(next) = self.adopt_again()? else {
                        return Ok(Ended { status: None });
                    };
                    bus = next;
                    continue;
                }
                Followed::Died => {}
            }
            let noticed = Instant::now();
            let status = wait(&mut bus);
            let how = status.map_or_else(|| "has died".into(), how);
            if self.asked {
                tracing::warn!("the bus (process {}) {how}, when it was to end", bus.pid);
                self.clean_up(&journal);
                self.leave_nothing(&journal);
                return Ok(Ended { status });
            }
            if journal.offer().is_err() {
                // It has said itself why it could not start.
                return Ok(Ended { status: status.or(Some(ExitStatus::from_raw(256))) });
            }
            let got_on = is_whole && begun.elapsed() >= PROGRESS;
            deaths = if got_on { 0 } else { deaths };
            self.clean_up(&journal);
            bus = loop {
                deaths += 1;
                let Some(pause) = pause(deaths) else {
                    self.leave_nothing(&journal);
                    bail!(
                        "the bus has died {DEATHS_MAX} times in a row without {PROGRESS:?} of \
                         service: its keeper gives up, and its clients lose their connections"
                    );
                };
                if self.rests(pause) {
                    tracing::warn!("the bus was to end, and is not started again");
                    self.leave_nothing(&journal);
                    return Ok(Ended { status: None });
                }
                tracing::error!("the bus (process {}) {how}; the keeper starts it again", bus.pid);
                let mut next = match self.start(true) {
                    Ok(next) => next,
                    // What has ended the bus may be a lack of memory, and it passes.
                    Err(error) if deaths < DEATHS_MAX => {
                        tracing::error!("the bus cannot be started now: {error:#}");
                        continue;
                    }
                    Err(error) => {
                        self.leave_nothing(&journal);
                        return Err(error);
                    }
                };
                self.restarts += 1;
                match self.hand_over(&next, &journal) {
                    Ok(()) => break next,
                    Err(_) if self.asked => {
                        tracing::warn!("process {} was to take the bus up, and ends", next.pid);
                        wait(&mut next);
                        self.leave_nothing(&journal);
                        return Ok(Ended { status: None });
                    }
                    Err(error) => {
                        tracing::error!("process {} has not taken the bus up: {error:#}", next.pid);
                        if let Some(child) = &mut next.child {
                            let _ = child.kill();
                        }
                        let _ = wait(&mut next);
                    }
                }
            };
            tracing::warn!(
                "process {} has taken up {} devices, {:.0?} after the end of the former one \
                 (start {} of the bus)",
                bus.pid,
                journal.devices(),
                noticed.elapsed(),
                self.restarts + 1
            );
        }
    }

    /// Lets the next bus take everything up. If somebody wants the bus to end meanwhile, the
    /// process is killed: it may be at work for as long as its limits.
    ///
    /// # Errors
    /// It has not taken it up.
    fn hand_over(&mut self, next: &Bus, journal: &Journal) -> Result<()> {
        let done = eventfd(0, EventfdFlags::CLOEXEC).context("watching the next bus")?;
        let stop = self.stop.as_fd();
        let watch = || {
            let mut fds =
                [PollFd::from_borrowed_fd(stop, PollFlags::IN), PollFd::new(&done, PollFlags::IN)];
            while matches!(poll(&mut fds, None), Err(rustix::io::Errno::INTR)) {}
            let [stopped, is_done] = fds.map(|fd| !fd.revents().is_empty());
            // One that has taken over ends in order, as `follow` tells it.
            let ends = stopped && !is_done;
            if ends {
                let _ = pidfd_send_signal(&next.process, Signal::KILL);
            }
            ends
        };
        let (left, ended) = std::thread::scope(|scope| {
            // The system may have no thread now. This process is the last that has everything, so
            // it must not panic.
            let watcher = std::thread::Builder::new().spawn_scoped(scope, watch);
            let watcher = watcher.context("a thread that watches the next bus")?;
            let left = leave(next.socket.as_fd(), &mut Heritage(journal), &AFTER_DEATH);
            let _ = rustix::io::write(&done, &1_u64.to_ne_bytes());
            anyhow::Ok((left, watcher.join().unwrap_or(false)))
        })?;
        self.asked |= ended && left.is_err();
        left
    }

    /// Waits for so long. Returns whether somebody wants the bus to end.
    fn rests(&mut self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        loop {
            let rest = until.saturating_duration_since(Instant::now());
            let Ok(timeout) = Timespec::try_from(rest) else { return false };
            let mut fds = [PollFd::new(&self.stop, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return false,
                Ok(_) => {
                    self.asked = true;
                    return true;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Starts a bus. `again`: it goes on with what a former one had.
    fn start(&self, again: bool) -> Result<Bus> {
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let (socket, theirs) = pair?;
        let arguments = if again { later(&self.arguments) } else { self.arguments.clone() };
        let mut command = Command::new(&self.program);
        command.arg0("vbus").args(arguments);
        command.arg(format!("{KEPT}={}", if again { self.restarts + 1 } else { 0 }));
        command.stdin(Stdio::from(theirs));
        if again {
            // It gets the sockets with everything else.
            command.env_remove("LISTEN_FDS");
        }
        let child =
            command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        let pid = Pid::from_child(&child);
        let process = pidfd_open(pid, PidfdFlags::empty()).context("watching the bus")?;
        Ok(Bus { socket, process, pid: pid.as_raw_nonzero().get(), child: Some(child) })
    }

    /// Asks the bus that serves in the directory to be kept.
    fn adopt(&self) -> Result<Bus> {
        let (socket, pid, process) = adopt(&self.dir)?;
        // The socket is that of one that was about to take over, and has not.
        ensure!(!ends(&process, Duration::ZERO), "process {pid} has ended; try again");
        tracing::info!("the bus (process {pid}) in {} is kept", self.dir.display());
        Ok(Bus { socket, process, pid, child: None })
    }

    /// As [`adopt`](Self::adopt), when the bus has moved. `None`: somebody wants the keeper to end
    /// meanwhile. The bus gets no signal: its process is not known.
    fn adopt_again(&mut self) -> Result<Option<Bus>> {
        let mut tries = 1;
        loop {
            match self.adopt() {
                Ok(bus) => return Ok(Some(bus)),
                Err(error) if tries == ADOPT_TRIES => {
                    return Err(error.context("the bus goes on without this keeper"));
                }
                Err(_) if self.rests(ADOPT_PAUSE) => {
                    tracing::warn!("the keeper ends, and the bus goes on without one");
                    return Ok(None);
                }
                Err(_) => {}
            }
            tries += 1;
        }
    }

    /// Follows a bus until it ends. Says how, and whether all that it has has come.
    fn follow(&mut self, bus: &Bus, journal: &mut Journal) -> (Followed, bool) {
        // Until all of it is there, what the former bus had still holds.
        let mut coming = Some(Journal::default());
        loop {
            let (stopped, hung_up, spoke) = {
                let nothing = self.hangup.as_ref().unwrap_or(&self.stop);
                let mut fds = [
                    PollFd::new(&self.stop, PollFlags::IN),
                    PollFd::new(nothing, PollFlags::IN),
                    PollFd::new(&bus.socket, PollFlags::IN),
                ];
                if poll(&mut fds, None).is_err() {
                    continue;
                }
                let [stop, hangup, socket] = fds.map(|fd| !fd.revents().is_empty());
                (stop, hangup && self.hangup.is_some(), socket)
            };
            if stopped {
                let _ = rustix::io::read(&self.stop, &mut [0; 64]);
                self.asked = true;
                let _ = pidfd_send_signal(&bus.process, Signal::TERM);
            }
            if let (true, Some(hangup)) = (hung_up, &self.hangup) {
                let _ = rustix::io::read(hangup, &mut [0; 64]);
                let _ = pidfd_send_signal(&bus.process, Signal::HUP);
            }
            if !spoke {
                continue;
            }
            let wire = Wire::new(bus.socket.as_fd());
            let frame = match wire.receive(Instant::now() + MESSAGE) {
                Ok(Some(frame)) => frame,
                // It was killed within a message, which then does not count, or closed the socket.
                Ok(None) | Err(_) => {
                    // A bus that lives must not take this for its keeper any more.
                    wire.close();
                    let is_whole = coming.is_none();
                    let has_died = ends(&bus.process, END);
                    return (if has_died { Followed::Died } else { Followed::Lost }, is_whole);
                }
            };
            let place = coming.as_mut().unwrap_or(journal);
            match place.take(frame) {
                Ok(News::Kept) => {}
                Ok(News::Whole) => {
                    if let Some(all) = coming.take() {
                        *journal = all;
                    }
                }
                Ok(News::Ends) => return (Followed::Ended, true),
                Ok(News::Moved(pid)) => {
                    tracing::info!("process {pid} has taken over from the bus {}", bus.pid);
                    return (Followed::Moved, true);
                }
                Err(error) => {
                    tracing::error!("the bus (process {}) sends nonsense: {error:#}", bus.pid);
                    wire.close();
                    return (Followed::Lost, coming.is_none());
                }
            }
        }
    }

    /// Waits until the supervisor of the former bus has cleaned up.
    fn clean_up(&self, journal: &Journal) {
        if journal.supervisor().is_some_and(|process| !ends(process, END)) {
            tracing::warn!("the supervisor of the former bus does not end");
        }
    }

    /// Removes the files of the sockets of a bus that nobody goes on with. The bus may have been in
    /// the hands of an attacker: what the configuration does not allow stays.
    fn leave_nothing(&self, journal: &Journal) {
        let config = self.config.as_ref().and_then(|path| config::read(path).ok());
        let config = config.map(|(config, _)| config).unwrap_or_default();
        let permits = Permits::new(&self.dir, &AllowSpec::default(), &[]).with(&config);
        remove_left(permits, journal.files(&self.dir));
    }
}

/// What the keeper leaves to the next bus.
struct Heritage<'a>(&'a Journal);

impl Leaves for Heritage<'_> {
    fn offer(&mut self) -> Result<Parcel> {
        self.0.offer()
    }

    fn stop(&mut self, _: Instant) -> Result<Parcel> {
        self.0.state()
    }

    fn go_on(&mut self) {}
}

/// Waits for the end of a bus that has died or is about to end. `None`: it is not known.
fn wait(bus: &mut Bus) -> Option<ExitStatus> {
    match &mut bus.child {
        Some(child) => child.wait().ok(),
        None => {
            ends(&bus.process, END);
            None
        }
    }
}

/// Whether a process has ended, at the latest after `limit`.
fn ends(process: &OwnedFd, limit: Duration) -> bool {
    let by = Instant::now() + limit;
    loop {
        let rest = by.saturating_duration_since(Instant::now());
        let Ok(timeout) = Timespec::try_from(rest) else { return false };
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// The pause before the keeper starts a bus that has died, or did not start, for the `deaths`th
/// time in a row. `None`: it starts it no more.
fn pause(deaths: u32) -> Option<Duration> {
    match (deaths.checked_sub(2), deaths) {
        (None, _) => Some(Duration::ZERO),
        (Some(doubled), ..=DEATHS_MAX) => Some(START_PAUSE * (1 << doubled)),
        _ => None,
    }
}

/// How a process has ended, for the log.
fn how(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("was killed by signal {signal}"),
        (None, Some(code)) => format!("has ended with exit code {code}"),
        (None, None) => "has died".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn a_bus_that_died_once_is_started_at_once_and_later_ones_after_pauses_that_double() {
        let pauses = (1..=DEATHS_MAX).map(|deaths| pause(deaths).unwrap().as_millis());
        assert_eq!(pauses.collect::<Vec<_>>(), [0, 100, 200, 400, 800, 1600, 3200, 6400]);
        for deaths in [DEATHS_MAX + 1, u32::MAX] {
            assert_eq!(pause(deaths), None, "nobody waits for a bus that is given up");
        }
    }

    #[test]
    fn a_keeper_that_is_to_end_asks_no_more_for_the_bus_that_has_moved() {
        let nowhere = tempfile::tempdir().unwrap();
        let mut keeper = Keeper {
            program: PathBuf::new(),
            arguments: Vec::new(),
            dir: nowhere.path().to_owned(),
            config: None,
            stop: eventfd(1, EventfdFlags::CLOEXEC).unwrap(),
            hangup: None,
            restarts: 0,
            asked: false,
        };
        assert!(keeper.adopt_again().unwrap().is_none() && keeper.asked);
    }

    #[test]
    fn the_bus_gets_the_arguments_that_are_not_for_the_keeper() {
        let text = |arguments: &[&str]| arguments.iter().map(OsString::from).collect::<Vec<_>>();
        let own = ["serve", "--keep", "--config", "a", "--ready-fd", "3", "--adopt", "--dir", "d"];
        let first = arguments(text(&own).into_iter());
        assert_eq!(first, text(&["serve", "--config", "a", "--ready-fd", "3", "--dir", "d"]));
        assert_eq!(later(&first), text(&["serve", "--config", "a", "--dir", "d"]));
        assert_eq!(later(&text(&["serve", "--ready-fd=3"])), [OsStr::new("serve")]);
    }
}
