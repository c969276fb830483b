// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Asks a VMM for the threads of its virtual CPUs.
//!
//! The device cannot wait for the VMM: while the VMM opens this device, it may answer no other
//! client. So the connection's task asks without blocking. It asks twice, and takes the threads
//! between the two answers. If the second answer is the same, and from the same process, then the
//! task has taken the threads that the VMM means: no id has passed to another thread meanwhile.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use vbus_core::{Interest, TaskHandle};
use vbus_qmp::{Lines, Message};

use crate::config::Origin;
use crate::thread::{Thread, Threads};

/// The time limit for a VMM's answers.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The pause before the task asks the VMM again: at first ...
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// ... and at most.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// The longest line of an answer, in bytes.
const LINE_MAX: usize = 1 << 20;

/// The protocol of the VMM's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Language {
    /// QMP, of QEMU.
    Qmp,
    /// The control protocol of vbus-vmm.
    Control,
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

/// The search for the threads of a VMM.
pub struct Lookup {
    path: PathBuf,
    language: Language,
    threads: Arc<dyn Threads>,
    talk: Option<Talk>,
    /// When the task may ask the VMM again.
    next: Option<Instant>,
    pause: Duration,
    /// Why the last attempt failed.
    error: Option<String>,
}

/// A conversation.
struct Talk {
    socket: UnixStream,
    watcher: TaskHandle,
    language: Language,
    lines: Lines,
    until: Instant,
    process: i32,
    stage: Stage,
}

enum Stage {
    /// QMP: waits for the greeting.
    Greeting,
    /// QMP: waits for the end of the negotiation.
    Negotiation,
    /// Waits for the first answer. Holds its items so far.
    First(Vec<(u32, i32)>),
    /// Waits for the second answer.
    Second(Vec<(u32, i32)>, Vec<(u32, Thread)>, Vec<(u32, i32)>),
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.watcher.unwatch(&self.socket);
    }
}

impl Lookup {
    /// Makes the search for the VMM that `origin` names. `None`: it names no VMM.
    pub fn new(origin: &Origin, threads: &Arc<dyn Threads>) -> Option<Lookup> {
        let (path, language) = match origin {
            Origin::Threads(_) => return None,
            Origin::Qmp(path) => (path, Language::Qmp),
            Origin::Vmm(path) => (path, Language::Control),
        };
        let (path, threads) = (path.clone(), threads.clone());
        Some(Lookup {
            path,
            language,
            threads,
            talk: None,
            next: None,
            pause: PAUSE_MIN,
            error: None,
        })
    }

    /// Why the last attempt failed.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Whether the task waits for an answer.
    pub fn is_talking(&self) -> bool {
        self.talk.is_some()
    }

    /// Ends the conversation, so that a new one can begin at once.
    pub fn reset(&mut self) {
        (self.talk, self.next, self.pause, self.error) = (None, None, PAUSE_MIN, None);
    }

    /// When to poll again if no event comes.
    pub fn deadline(&self) -> Option<Instant> {
        self.talk.as_ref().map(|talk| talk.until).or(self.next)
    }

    /// Continues the search. `wanted` selects the virtual CPUs whose threads are wanted. An answer
    /// wakes `watcher`.
    pub fn poll(
        &mut self,
        now: Instant,
        watcher: &TaskHandle,
        wanted: &dyn Fn(u32) -> bool,
    ) -> Vec<(u32, Thread)> {
        match self.proceed(now, watcher, wanted) {
            Ok(None) => Vec::new(),
            Ok(Some(found)) => {
                self.talk = None;
                self.error = None;
                // If an answer lacks a wanted thread, a later answer may have it, because a virtual
                // CPU may be plugged.
                self.pause_until(now);
                found
            }
            Err(text) => {
                self.talk = None;
                if self.error.as_ref() != Some(&text) {
                    tracing::warn!(
                        "{}: {text}; the threads of the virtual CPUs are not known",
                        self.path.display()
                    );
                }
                self.error = Some(text);
                self.pause_until(now);
                Vec::new()
            }
        }
    }

    fn pause_until(&mut self, now: Instant) {
        self.next = Some(now + self.pause);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    fn proceed(
        &mut self,
        now: Instant,
        watcher: &TaskHandle,
        wanted: &dyn Fn(u32) -> bool,
    ) -> Result<Option<Vec<(u32, Thread)>>, String> {
        let talk = match &mut self.talk {
            Some(talk) => talk,
            None if self.next.is_some_and(|next| now < next) => return Ok(None),
            None => {
                let connected = self.threads.connect(&self.path);
                let connected = connected.map_err(|error| format!("cannot be reached: {error}"))?;
                self.talk.insert(Talk::begin(connected, self.language, now + TIMEOUT, watcher)?)
            }
        };
        while let Some(line) = talk.next()? {
            if let Some(found) = talk.hear(line, &*self.threads, wanted)? {
                return Ok(Some(found));
            }
        }
        if now >= talk.until {
            return Err(
                "no answer; does another client hold this socket? (QEMU can have several)".into()
            );
        }
        Ok(None)
    }
}

impl Talk {
    /// Begins a conversation over a socket of the VMM, whose process is `process`.
    fn begin(
        (socket, process): (OwnedFd, i32),
        language: Language,
        until: Instant,
        watcher: &TaskHandle,
    ) -> Result<Talk, String> {
        let socket = UnixStream::from(socket);
        watcher.watch(&socket, Interest::Read).map_err(|error| error.to_string())?;
        let stage =
            if language == Language::Qmp { Stage::Greeting } else { Stage::First(Vec::new()) };
        let mut talk = Talk {
            socket,
            watcher: watcher.clone(),
            language,
            lines: Lines::new(LINE_MAX),
            until,
            process,
            stage,
        };
        if language == Language::Control {
            talk.ask()?;
        }
        Ok(talk)
    }

    fn say(&mut self, line: &str) -> Result<(), String> {
        // The line fits the socket's buffer, because the peer has answered everything so far.
        self.socket.write_all(line.as_bytes()).map_err(|error| format!("cannot be asked: {error}"))
    }

    fn ask(&mut self) -> Result<(), String> {
        self.say(match self.language {
            Language::Qmp => "{\"execute\": \"query-cpus-fast\"}\n",
            Language::Control => "{\"op\": \"cpus\"}\n",
        })
    }

    /// The next complete line, if there is one.
    fn next(&mut self) -> Result<Option<Line>, String> {
        let line = self.lines.next(&self.socket).map_err(|error| error.to_string())?;
        line.map(|line| self.language.parse(line)).transpose()
    }

    /// Processes a line of the VMM. Returns the threads once they are known.
    fn hear(
        &mut self,
        line: Line,
        threads: &dyn Threads,
        wanted: &dyn Fn(u32) -> bool,
    ) -> Result<Option<Vec<(u32, Thread)>>, String> {
        match (&mut self.stage, line) {
            (Stage::Greeting, Line::Greeting) => {
                self.stage = Stage::Negotiation;
                self.say("{\"execute\": \"qmp_capabilities\"}\n")?;
            }
            (Stage::Greeting, _) => return Err("is not a QMP socket".into()),
            (Stage::Negotiation, Line::End(_)) => {
                self.stage = Stage::First(Vec::new());
                self.ask()?;
            }
            (Stage::First(cpus) | Stage::Second(_, _, cpus), Line::Cpus(more)) => {
                extend(cpus, more);
            }
            (Stage::First(cpus), Line::End(more)) => {
                extend(cpus, more);
                let cpus = std::mem::take(cpus);
                let mut taken = Vec::new();
                for (cpu, tid) in cpus.iter().filter(|(cpu, _)| wanted(*cpu)) {
                    let thread = Thread::take(threads, Some(self.process), *tid);
                    taken.push((*cpu, thread.map_err(|error| error.to_string())?));
                }
                self.stage = Stage::Second(cpus, taken, Vec::new());
                self.ask()?;
            }
            (Stage::Second(before, taken, cpus), Line::End(more)) => {
                extend(cpus, more);
                if before != cpus {
                    return Err("gives another answer each time".into());
                }
                return Ok(Some(std::mem::take(taken)));
            }
            (Stage::Negotiation | Stage::First(_) | Stage::Second(..), _) => {}
        }
        Ok(None)
    }
}

/// The most virtual CPUs in an answer.
const CPUS_MAX: usize = 4096;

/// Adds `more` to `cpus`, up to that number.
fn extend(cpus: &mut Vec<(u32, i32)>, more: Vec<(u32, i32)>) {
    let room = CPUS_MAX.saturating_sub(cpus.len());
    cpus.extend(more.into_iter().take(room));
}
