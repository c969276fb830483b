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
/// The most characters of a VMM's own text in [`Answer::Failed`].
const TEXT_MAX: usize = 200;

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
                Message::Error(error) => Err(refuses(&error.description)),
                Message::Event(_) | Message::Unknown => Ok(Line::Other),
            },
            Language::Control => {
                if let Some(error) = line.get("error") {
                    return Err(refuses(error.as_str().unwrap_or("no reason given")));
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

/// Says that the VMM refuses a request with the reason `text`. Logs show the reason, so it becomes
/// one line: control characters are escaped, and a long text is cut.
fn refuses(text: &str) -> String {
    let text: String = text.escape_debug().take(TEXT_MAX).collect();
    format!("refuses: {text}")
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
        limit: TIMEOUT,
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
    /// The time limit for an answer.
    limit: Duration,
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
        let until = Instant::now() + self.limit;
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

    /// Waits for the VMM's next line. Looks at the time limit and at the asker before each line,
    /// because a VMM may send lines without end.
    fn line(&mut self, until: Instant) -> Result<Line, NoAnswer> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text = "no answer; does another client hold this socket? (QEMU can have \
                            several)";
                return Err(text.to_owned().into());
            }
            self.wait(false, Duration::ZERO)?;
            if let Some(line) = self.lines.next(&self.vmm).map_err(|error| error.to_string())? {
                return Ok(self.language.parse(line)?);
            }
            self.wait(true, left)?;
        }
    }

    /// Waits for at most `limit` until the asker goes, or, with `for_vmm`, until the VMM sends.
    ///
    /// # Errors
    /// The asker has gone, or the system refuses to wait.
    fn wait(&self, for_vmm: bool, limit: Duration) -> Result<(), NoAnswer> {
        let gone = PollFlags::RDHUP | PollFlags::HUP;
        let mut fds = [PollFd::new(&self.asker, gone), PollFd::new(&self.vmm, PollFlags::IN)];
        let watched = if for_vmm { &mut fds[..] } else { &mut fds[..1] };
        match poll(watched, Timespec::try_from(limit).ok().as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.to_string().into()),
        }
        if fds[0].revents().is_empty() { Ok(()) } else { Err(NoAnswer::Gone) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// An interview of a VMM, with this time limit for an answer. Returns the VMM's end and the
    /// asker's end too.
    fn interview(limit: Duration) -> (Interview, UnixStream, OwnedFd) {
        let (vmm, far) = UnixStream::pair().unwrap();
        vmm.set_nonblocking(true).unwrap();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (asker, end) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let lines = Lines::new(LINE_MAX);
        let language = Language::Control;
        (Interview { vmm, asker, language, limit, lines, greeted: true }, far, end)
    }

    /// An answer that is there before the question.
    const ANSWER: &[u8] = b"{\"item\": {\"cpu\": 0, \"thread\": 5}}\n{\"ok\": null}\n";

    #[test]
    fn the_limit_and_the_asker_count_before_each_line() {
        let (mut asked, mut vmm, _end) = interview(TIMEOUT);
        vmm.write_all(ANSWER).unwrap();
        assert!(matches!(asked.ask(), Ok(cpus) if cpus == [(0, 5)]));

        let (mut asked, mut vmm, _end) = interview(Duration::ZERO);
        vmm.write_all(ANSWER).unwrap();
        assert!(matches!(asked.ask(), Err(NoAnswer::Failed(text)) if text.contains("no answer")));

        let (mut asked, mut vmm, end) = interview(TIMEOUT);
        vmm.write_all(ANSWER).unwrap();
        drop(end);
        assert!(matches!(asked.ask(), Err(NoAnswer::Gone)));
    }

    #[test]
    fn a_vmm_that_sends_lines_without_end_is_given_up() {
        for line in ["{\"item\": {}}\n", "{\"event\": \"RESUME\"}\n"] {
            let (mut asked, mut vmm, _end) = interview(Duration::from_millis(50));
            // A piece ends within a line, so there is always a line to read.
            let many = line.repeat(10_000);
            let flood = std::thread::spawn(move || while vmm.write_all(many.as_bytes()).is_ok() {});
            let (tell, told) = channel();
            std::thread::spawn(move || {
                let failed = matches!(asked.ask(), Err(NoAnswer::Failed(_)));
                // The flood ends with the socket.
                drop(asked);
                tell.send(failed).unwrap();
            });
            assert!(told.recv_timeout(6 * TIMEOUT).unwrap(), "{line}");
            flood.join().unwrap();
        }
    }

    #[test]
    fn a_reason_is_one_short_line() {
        for language in [Language::Qmp, Language::Control] {
            let reason = format!("\u{1b}[2J\nfirst\r\n{}", "x".repeat(100_000));
            let line = match language {
                Language::Qmp => serde_json::json!({ "error": { "class": "", "desc": reason } }),
                Language::Control => serde_json::json!({ "error": reason }),
            };
            let Err(text) = language.parse(line) else { panic!("an error") };
            assert!(text.starts_with("refuses: \\u{1b}[2J\\nfirst\\r\\nx"), "{text}");
            assert!(!text.contains(char::is_control));
            assert_eq!(text.chars().count(), "refuses: ".len() + TEXT_MAX);
        }
    }
}
