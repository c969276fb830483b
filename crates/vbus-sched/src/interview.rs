// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Asks a VMM for the threads of its virtual CPUs, for somebody who must not reach the VMM.
//!
//! Whoever holds a socket of a VMM commands the machine. So the process that serves guests does not
//! get it. It gets one end of a pair of sockets: each message that it sends there, whatever it is,
//! asks the VMM once for its threads, and the [`Answer`] comes back. A thread of its own, which may
//! wait, holds the other end and the VMM's socket.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{recv, send, socketpair};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_qmp::{Lines, Message};

/// The time limit for a VMM's answer.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);
/// The longest line of an answer, in bytes.
const LINE_MAX: usize = 1 << 20;
/// The most virtual CPUs in an answer.
const CPUS_MAX: usize = 4096;
/// The longest [`Answer`] as a message, in bytes.
const ANSWER_MAX: usize = 128 << 10;

/// The protocol of a VMM's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Language {
    /// QMP, of QEMU.
    Qmp,
    /// The control protocol of vbus-vmm.
    Control,
}

/// What a VMM says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Virtual CPUs, each with its thread.
    Cpus(Vec<(u32, i32)>),
    /// It does not say. The text is for people; its subject is the VMM.
    Failed(String),
}

/// A line of the VMM.
enum Line {
    /// QMP: the greeting.
    Greeting,
    /// Virtual CPUs with their threads. More follow.
    Cpus(Vec<(u32, i32)>),
    /// The end of an answer, with virtual CPUs and their threads.
    End(Vec<(u32, i32)>),
    /// Something else, such as an event of QMP.
    Other,
}

impl Language {
    /// Parses a line.
    ///
    /// # Errors
    /// The VMM refuses a request. The text says why.
    fn parse(self, line: Value) -> Result<Line, String> {
        let cpus = |items: &[Value], cpu: &str, thread: &str| {
            let pair = |item: &Value| {
                let number = |key: &str| item.get(key).and_then(Value::as_u64);
                Some((number(cpu)?.try_into().ok()?, number(thread)?.try_into().ok()?))
            };
            items.iter().filter_map(pair).collect()
        };
        match self {
            Language::Qmp => match Message::from(line) {
                Message::Greeting => Ok(Line::Greeting),
                Message::Return(value) => {
                    let items = value.as_array().map_or(&[][..], Vec::as_slice);
                    Ok(Line::End(cpus(items, "cpu-index", "thread-id")))
                }
                Message::Error(error) => Err(format!("refuses: {}", error.description)),
                Message::Event(_) | Message::Unknown => Ok(Line::Other),
            },
            Language::Control => {
                if let Some(error) = line.get("error") {
                    return Err(format!(
                        "refuses: {}",
                        error.as_str().unwrap_or("no reason given")
                    ));
                }
                Ok(match (line.get("item"), line.get("ok")) {
                    (Some(item), _) => {
                        Line::Cpus(cpus(std::slice::from_ref(item), "cpu", "thread"))
                    }
                    (None, Some(_)) => Line::End(Vec::new()),
                    (None, None) => Line::Other,
                })
            }
        }
    }
}

/// Begins to ask the VMM behind `vmm`, a connected non-blocking socket, in a thread of its own.
/// Returns the other end: a non-blocking socket on which each message asks, and each message that
/// comes is an [`Answer`]. The thread calls `ended` when the other end has been dropped, or behind
/// [`Answer::Failed`], and ends.
///
/// # Errors
/// The system has no more sockets or threads. `ended` was not called.
pub fn begin(
    vmm: OwnedFd,
    language: Language,
    ended: impl FnOnce() + Send + 'static,
) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let mut interview = Interview {
        vmm: vmm.into(),
        asker: ours,
        language,
        lines: Lines::new(LINE_MAX),
        greeted: language == Language::Control,
    };
    let run = move || {
        interview.run();
        ended();
    };
    std::thread::Builder::new().name("vbus-interview".into()).spawn(run)?;
    Ok(theirs)
}

/// Sends the question on an end that [`begin`] has returned.
///
/// # Errors
/// The interview has ended.
pub(crate) fn ask(end: impl AsFd) -> Result<(), Errno> {
    send(end, b"?", SendFlags::NOSIGNAL).map(drop)
}

/// Takes the next answer from an end that [`begin`] has returned. `None`: there is none yet.
///
/// # Errors
/// The interview has ended, or its answer is not understood. The text's subject is the VMM.
pub(crate) fn answer(end: impl AsFd) -> Result<Option<Answer>, String> {
    let mut bytes = vec![0; ANSWER_MAX];
    match recv(end, &mut bytes[..], RecvFlags::empty()) {
        Ok((0, _)) => Err("is not asked any more".into()),
        Ok((length, _)) => {
            serde_json::from_slice(&bytes[..length]).map(Some).map_err(|error| error.to_string())
        }
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

struct Interview {
    vmm: UnixStream,
    /// Our end of the pair.
    asker: OwnedFd,
    language: Language,
    lines: Lines,
    /// QMP: the negotiation is over.
    greeted: bool,
}

/// Why there is no answer.
enum NoAnswer {
    /// The asker has gone.
    Gone,
    Failed(String),
}

impl From<String> for NoAnswer {
    fn from(text: String) -> NoAnswer {
        NoAnswer::Failed(text)
    }
}

impl Interview {
    fn run(&mut self) {
        loop {
            // Without a limit of time: the asker ends it.
            let mut asked = [PollFd::new(&self.asker, PollFlags::IN)];
            match poll(&mut asked, None) {
                Err(Errno::INTR) => continue,
                Err(_) => return,
                Ok(_) => {}
            }
            // What the message says does not matter. An empty one ends it, as the end of the
            // stream does.
            match recv(&self.asker, &mut [0; 16], RecvFlags::empty()) {
                Ok((0, _)) => return,
                Ok(_) => {}
                Err(Errno::AGAIN | Errno::INTR) => continue,
                Err(_) => return,
            }
            let answer = match self.ask() {
                Ok(cpus) => Answer::Cpus(cpus),
                Err(NoAnswer::Failed(text)) => Answer::Failed(text),
                Err(NoAnswer::Gone) => return,
            };
            let bytes = serde_json::to_vec(&answer).unwrap_or_default();
            // An asker that takes no answers gets no more.
            if send(&self.asker, &bytes, SendFlags::NOSIGNAL).is_err() {
                return;
            }
            if matches!(answer, Answer::Failed(_)) {
                return;
            }
        }
    }

    /// Asks the VMM once.
    fn ask(&mut self) -> Result<Vec<(u32, i32)>, NoAnswer> {
        let until = Instant::now() + TIMEOUT;
        if !self.greeted {
            match self.line(until)? {
                Line::Greeting => {}
                _ => return Err("is not a QMP socket".to_owned().into()),
            }
            self.say("{\"execute\": \"qmp_capabilities\"}\n")?;
            while !matches!(self.line(until)?, Line::End(_)) {}
            self.greeted = true;
        }
        self.say(match self.language {
            Language::Qmp => "{\"execute\": \"query-cpus-fast\"}\n",
            Language::Control => "{\"op\": \"cpus\"}\n",
        })?;
        let mut cpus = Vec::new();
        loop {
            let (more, is_end) = match self.line(until)? {
                Line::Cpus(more) => (more, false),
                Line::End(more) => (more, true),
                Line::Greeting | Line::Other => continue,
            };
            let room = CPUS_MAX.saturating_sub(cpus.len());
            cpus.extend(more.into_iter().take(room));
            if is_end {
                return Ok(cpus);
            }
        }
    }

    fn say(&mut self, line: &str) -> Result<(), String> {
        // The line fits the socket's buffer, because the VMM has answered everything so far.
        self.vmm.write_all(line.as_bytes()).map_err(|error| format!("cannot be asked: {error}"))
    }

    /// Waits for the VMM's next line.
    fn line(&mut self, until: Instant) -> Result<Line, NoAnswer> {
        loop {
            if let Some(line) = self.lines.next(&self.vmm).map_err(|error| error.to_string())? {
                return Ok(self.language.parse(line)?);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text = "no answer; does another client hold this socket? (QEMU can have \
                            several)";
                return Err(text.to_owned().into());
            }
            let gone = PollFlags::RDHUP | PollFlags::HUP;
            let mut fds = [PollFd::new(&self.vmm, PollFlags::IN), PollFd::new(&self.asker, gone)];
            match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.to_string().into()),
            }
            if !fds[1].revents().is_empty() {
                return Err(NoAnswer::Gone);
            }
        }
    }
}
