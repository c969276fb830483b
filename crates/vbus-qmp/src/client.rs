// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client that waits for each answer.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{self, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use serde_json::{Value, json};

use crate::lines::{LineError, Lines};
use crate::message::Message;

/// The longest line that the client accepts, in bytes.
const LINE_MAX: usize = 1 << 20;
/// The most events that the client keeps. QEMU sends few while a command runs, but a command may
/// take hours.
const EVENTS_MAX: usize = 256;
/// How long QEMU may take to send its greeting. QEMU serves one client at a time. Other clients
/// wait without an answer.
const GREETING: Duration = Duration::from_secs(5);

/// A connection to one QEMU, ready for commands.
pub struct Qmp {
    socket: UnixStream,
    lines: Lines,
    deadline: Instant,
    events: VecDeque<Value>,
    /// Commands that QEMU has not answered: the time of all but the last one was up. It answers in
    /// order, so theirs come first.
    unanswered: u64,
}

impl Qmp {
    /// Connects to the socket `path`. All commands on the connection together must end within
    /// `timeout`, unless [`set_timeout`](Self::set_timeout) gives more time.
    ///
    /// # Errors
    /// Nobody listens there, QEMU serves another client, or the other end is not QEMU.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Qmp> {
        let socket = connect(path, timeout)
            .with_context(|| format!("cannot reach QEMU at {}", path.display()))?;
        Qmp::over(socket, timeout).with_context(|| format!("the QMP socket {}", path.display()))
    }

    /// Makes a connection as [`connect`](Self::connect) does, over a connected socket.
    ///
    /// # Errors
    /// QEMU serves another client, or the other end is not QEMU.
    pub fn over(socket: UnixStream, timeout: Duration) -> Result<Qmp> {
        let now = Instant::now();
        let mut qmp = Qmp {
            socket,
            lines: Lines::new(LINE_MAX),
            deadline: now + timeout,
            events: VecDeque::new(),
            unanswered: 0,
        };
        let greeting = qmp.message(qmp.deadline.min(now + GREETING)).context(
            "no greeting; does another client hold this QMP socket? (QEMU can have several)",
        )?;
        ensure!(matches!(greeting, Message::Greeting), "the other end is not QEMU");
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Sets the time, from now on, within which all later commands must end.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.deadline = Instant::now() + timeout;
    }

    /// Runs a command and returns its value. An answer to a former command, whose time was up, is
    /// not taken for its own.
    ///
    /// # Errors
    /// [`QemuError`](crate::QemuError) if QEMU refuses the command. Another error if QEMU has gone,
    /// or does not answer in time: then QEMU may carry the command out nevertheless.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.run_while(command, arguments, Duration::ZERO, &mut || false)
    }

    /// The same for a command that may take any time. When the time is up, it asks `goes_on`
    /// whether QEMU works on it still, and waits for `more` then, again and again.
    ///
    /// # Errors
    /// Those of [`run`](Self::run).
    pub fn run_while(
        &mut self,
        command: &str,
        arguments: Value,
        more: Duration,
        goes_on: &mut dyn FnMut() -> bool,
    ) -> Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        let deadline = self.deadline.max(Instant::now() + more);
        let mut socket = Until { socket: &self.socket, deadline };
        socket.write_all(line.as_bytes()).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => anyhow!("QEMU did not read in time"),
            _ => anyhow!("QEMU has gone"),
        })?;
        self.unanswered += 1;
        loop {
            let message = match self.message(self.deadline) {
                Err(_) if Instant::now() >= self.deadline && goes_on() => {
                    self.set_timeout(more);
                    continue;
                }
                message => {
                    message.with_context(|| format!("waiting for the answer to {command}"))?
                }
            };
            match message {
                Message::Return(_) | Message::Error(_) if self.is_late() => {}
                Message::Return(value) => return Ok(value),
                Message::Error(error) => return Err(error.into()),
                Message::Event(event) => {
                    self.keep(event);
                }
                Message::Greeting | Message::Unknown => {}
            }
        }
    }

    /// Keeps an event. If there are too many, the oldest of the most frequent kind goes: what comes
    /// often and without end does not push out what comes once.
    fn keep(&mut self, event: Value) {
        if self.events.len() == EVENTS_MAX {
            // How many events there are of each kind, and the place of the oldest.
            let mut kinds = HashMap::new();
            for (at, event) in self.events.iter().enumerate() {
                let (count, _) = kinds.entry(event["event"].as_str()).or_insert((0, at));
                *count += 1;
            }
            let frequent = kinds.values().max().map(|(_, oldest)| *oldest);
            if let Some(left) = frequent.and_then(|at| self.events.remove(at)) {
                tracing::debug!("too many events: {left} is left out");
            }
        }
        self.events.push_back(event);
    }

    /// The process that listens at the socket, as the kernel knows it: QEMU, or who has opened the
    /// socket for it.
    #[must_use]
    pub fn process(&self) -> Option<u32> {
        let peer = sockopt::socket_peercred(&self.socket).ok()?;
        u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
    }

    /// Returns the oldest event that it has kept, or waits for the next. Returns `None` once the
    /// time is up.
    ///
    /// # Errors
    /// QEMU has gone, or sends a line that is not JSON.
    pub fn event(&mut self) -> Result<Option<Value>> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        loop {
            match self.message(self.deadline) {
                Ok(Message::Event(event)) => return Ok(Some(event)),
                Ok(Message::Return(_) | Message::Error(_)) => _ = self.is_late(),
                Ok(_) => {}
                Err(error) if Instant::now() >= self.deadline => {
                    tracing::debug!("no event: {error:#}");
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// An answer has come. Whether it is that of a former command.
    fn is_late(&mut self) -> bool {
        self.unanswered = self.unanswered.saturating_sub(1);
        self.unanswered > 0
    }

    /// Discards the events that have arrived so far.
    ///
    /// # Errors
    /// Those of [`run`](Self::run).
    pub fn forget_events(&mut self) -> Result<()> {
        // QEMU sends earlier events before the answer to a later command.
        self.run("query-version", json!({}))?;
        self.events.clear();
        Ok(())
    }

    /// Returns the next message. Keeps a part of a line that arrived before `deadline`.
    fn message(&mut self, deadline: Instant) -> Result<Message> {
        loop {
            ensure!(deadline > Instant::now(), "QEMU did not answer in time");
            match self.lines.next(Until { socket: &self.socket, deadline }) {
                Ok(Some(line)) => return Ok(line.into()),
                Ok(None) => {}
                Err(LineError::Closed) => bail!("QEMU has gone"),
                Err(error) => return Err(anyhow!("QEMU {error}")),
            }
        }
    }
}

/// Connects to the socket `path`. A listener whose backlog is full lets this wait, `timeout` at
/// most.
fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let timeout = timeout.max(Duration::from_millis(1));
    set_socket_timeout(&socket, sockopt::Timeout::Send, Some(timeout))?;
    let address = SocketAddrUnix::new(path)?;
    retry_on_intr(|| rustix::net::connect(&socket, &address)).map_err(|error| match error {
        Errno::AGAIN => io::Error::new(ErrorKind::TimedOut, "it accepts no client in time"),
        error => error.into(),
    })?;
    Ok(socket.into())
}

/// A socket whose reads and writes all end at the deadline, however little the other end does at a
/// time.
struct Until<'a> {
    socket: &'a UnixStream,
    deadline: Instant,
}

impl Until<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Until<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(bytes)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// Takes the place of a QEMU that writes `lines` at once.
    fn qemu(lines: &[Value]) -> (UnixStream, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for line in lines {
            theirs.write_all(format!("{line}\n").as_bytes()).unwrap();
        }
        (ours, theirs)
    }

    #[test]
    fn events_are_kept_while_commands_run() {
        let event = |name: &str| json!({ "event": name, "data": {} });
        let done = json!({ "return": {} });
        let (socket, _theirs) = qemu(&[
            json!({ "QMP": {} }),
            event("A"),
            done.clone(),
            event("B"),
            json!({ "return": 7 }),
            event("C"),
            done,
            event("D"),
        ]);
        let mut qmp = Qmp::over(socket, LONG).unwrap();
        assert_eq!(qmp.run("seven", json!({})).unwrap(), 7);
        assert_eq!(qmp.event().unwrap().unwrap()["event"], "A");
        qmp.forget_events().unwrap();
        assert_eq!(qmp.event().unwrap().unwrap()["event"], "D");
        qmp.set_timeout(Duration::ZERO);
        assert!(qmp.event().unwrap().is_none());
    }

    #[test]
    fn many_events_push_out_no_rare_one_and_no_command() {
        let event = |name: &str, n: usize| json!({ "event": name, "data": { "n": n } });
        let rare = [event("DEVICE_DELETED", 0), event("RESUME", 0)];
        let mut lines = vec![json!({ "QMP": {} }), json!({ "return": {} }), rare[0].clone()];
        lines.extend((0..2000).flat_map(|n| [event("RTC_CHANGE", n), event("JOB", n)]));
        lines.extend([rare[1].clone(), json!({ "return": 7 })]);
        // More than a socket takes at once.
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let all: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let writing = std::thread::spawn(move || theirs.write_all(all.as_bytes()).map(|()| theirs));
        let mut qmp = Qmp::over(ours, LONG).unwrap();
        assert_eq!(qmp.run("seven", json!({})).unwrap(), 7);
        drop(writing.join().unwrap().unwrap());
        let kept: Vec<_> = qmp.events.drain(..).collect();
        assert_eq!(kept.len(), EVENTS_MAX);
        assert_eq!((&kept[0], &kept[EVENTS_MAX - 1]), (&rare[0], &rare[1]));
        let newest = |name: &str| kept.iter().rev().find(|event| event["event"] == name).cloned();
        for name in ["RTC_CHANGE", "JOB"] {
            assert_eq!(newest(name), Some(event(name, 1999)));
        }
    }

    #[test]
    fn a_late_answer_is_not_taken_for_that_of_the_next_command() {
        let done = json!({ "return": {} });
        let (socket, mut theirs) = qemu(&[json!({ "QMP": {} }), done.clone()]);
        let mut qmp = Qmp::over(socket, LONG).unwrap();
        let mut say = |message: Value| theirs.write_all(format!("{message}\n").as_bytes()).unwrap();
        for _ in 0..2 {
            qmp.set_timeout(Duration::from_millis(1));
            assert!(qmp.run("slow", json!({})).is_err());
        }
        // One of them answers while somebody waits for events, the other one before the next.
        say(done);
        say(json!({ "event": "A", "data": {} }));
        say(json!({ "return": 1 }));
        say(json!({ "error": { "class": "GenericError", "desc": "no" } }));
        say(json!({ "return": 2 }));
        qmp.set_timeout(LONG);
        assert_eq!(qmp.event().unwrap().unwrap()["event"], "A");
        assert!(format!("{:#}", qmp.run("next", json!({})).unwrap_err()).ends_with("QEMU: no"));
        assert_eq!(qmp.run("last", json!({})).unwrap(), 2);
    }

    #[test]
    fn a_command_that_goes_on_is_waited_for() {
        let (socket, mut theirs) = qemu(&[json!({ "QMP": {} }), json!({ "return": {} })]);
        let mut qmp = Qmp::over(socket, LONG).unwrap();
        let short = Duration::from_millis(1);
        qmp.set_timeout(short);
        let mut asked = 0;
        let mut goes_on = || {
            asked += 1;
            match asked {
                // Half a line is kept.
                1 => theirs.write_all(b"{\"return\"").unwrap(),
                3 => theirs.write_all(b": 7}\n").unwrap(),
                _ => {}
            }
            true
        };
        assert_eq!(qmp.run_while("long", json!({}), short, &mut goes_on).unwrap(), 7);
        assert!(asked >= 3);
        qmp.set_timeout(short);
        let error = qmp.run_while("stuck", json!({}), LONG, &mut || false).unwrap_err();
        assert!(format!("{error:#}").contains("answer in time"), "{error:#}");
        assert_eq!(qmp.process(), Some(std::process::id()));
    }

    #[test]
    fn an_error_says_what_is_wrong() {
        let complaint = |lines: &[Value], hang_up: bool, timeout: Duration| {
            let (socket, theirs) = qemu(lines);
            let theirs = (!hang_up).then_some(theirs);
            let error = Qmp::over(socket, timeout).err().unwrap();
            drop(theirs);
            format!("{error:#}")
        };
        let greeting = json!({ "QMP": {} });
        assert!(
            complaint(&[], false, Duration::from_millis(1)).contains("does another client hold")
        );
        assert!(complaint(&[], true, LONG).contains("QEMU has gone"));
        assert!(complaint(&[json!({ "hello": 1 })], true, LONG).contains("is not QEMU"));
        let refusal = json!({ "error": { "class": "GenericError", "desc": "no" } });
        assert!(complaint(&[greeting, refusal], false, LONG).ends_with("QEMU: no"));
    }

    /// What becomes of a command with `bytes` of text, to an end that answers in its own way.
    fn outcome(
        bytes: usize,
        timeout: Duration,
        act: impl FnOnce(UnixStream) + Send + 'static,
    ) -> String {
        let (ours, theirs) = qemu(&[json!({ "QMP": {} }), json!({ "return": {} })]);
        let mut qmp = Qmp::over(ours, LONG).unwrap();
        // It ends with the connection.
        let acting = std::thread::spawn(move || act(theirs));
        qmp.set_timeout(timeout);
        let error = qmp.run("long", json!({ "text": "x".repeat(bytes) })).unwrap_err();
        drop(qmp);
        acting.join().unwrap();
        format!("{error:#}")
    }

    #[test]
    fn another_end_does_not_extend_the_time_and_takes_no_memory_without_end() {
        let short = Duration::from_millis(50);
        // More than the socket takes.
        let reads_nothing = outcome(4 << 20, short, |stream| {
            poll(&mut [PollFd::new(&stream, PollFlags::RDHUP)], None).unwrap();
        });
        assert_eq!(reads_nothing, "QEMU did not read in time");
        let dribbles = outcome(0, short, |mut stream| {
            while stream.write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        assert!(dribbles.ends_with("in time"), "{dribbles}");
        let floods = outcome(
            0,
            short,
            |mut stream| {
                while stream.write_all(b"{\"event\": \"A\"}\n").is_ok() {}
            },
        );
        assert!(floods.ends_with("in time"), "{floods}");
    }

    #[test]
    fn a_listener_that_accepts_nobody_is_not_waited_for_without_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp.sock");
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        // Those that the backlog takes.
        let mut waiting = Vec::new();
        let refused = loop {
            match connect(&path, Duration::from_millis(10)) {
                Ok(socket) => waiting.push(socket),
                Err(error) => break error,
            }
            assert!(waiting.len() < 100);
        };
        assert_eq!(refused.kind(), ErrorKind::TimedOut);
        let error = Qmp::connect(&path, Duration::from_millis(10)).err().unwrap();
        assert!(format!("{error:#}").ends_with("it accepts no client in time"), "{error:#}");
    }
}
