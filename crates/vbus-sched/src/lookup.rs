// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Asks a VMM for the threads of its virtual CPUs.
//!
//! The device cannot wait for the VMM: while the VMM opens this device, it may answer no other
//! client. So the connection's task asks without blocking. It asks twice, and takes the threads
//! between the two answers. If the second answer is the same, and from the same process, then the
//! task has taken the threads that the VMM means: no id has passed to another thread meanwhile.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::Value;
use vbus_core::{Interest, TaskHandle};

use crate::config::Origin;
use crate::thread::{Claims, Thread};

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

/// The search for the threads of a VMM.
pub struct Lookup {
    path: PathBuf,
    language: Language,
    claims: Claims,
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
    input: Vec<u8>,
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
    pub fn new(origin: &Origin, claims: &Claims) -> Option<Lookup> {
        let (path, language) = match origin {
            Origin::Threads(_) => return None,
            Origin::Qmp(path) => (path, Language::Qmp),
            Origin::Vmm(path) => (path, Language::Control),
        };
        let (path, claims) = (path.clone(), claims.clone());
        Some(Lookup {
            path,
            language,
            claims,
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
                self.talk.insert(Talk::begin(&self.path, self.language, now + TIMEOUT, watcher)?)
            }
        };
        while let Some(line) = talk.line()? {
            if let Some(found) = talk.hear(&line, self.language, &self.claims, wanted)? {
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
    fn begin(
        path: &Path,
        language: Language,
        until: Instant,
        watcher: &TaskHandle,
    ) -> Result<Talk, String> {
        let connect = || -> rustix::io::Result<UnixStream> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok(UnixStream::from(socket))
        };
        let socket = connect().map_err(|error| format!("cannot be reached: {error}"))?;
        let peer =
            rustix::net::sockopt::socket_peercred(&socket).map_err(|error| error.to_string())?;
        let process = peer.pid.as_raw_nonzero().get();
        watcher.watch(&socket, Interest::Read).map_err(|error| error.to_string())?;
        let stage =
            if language == Language::Qmp { Stage::Greeting } else { Stage::First(Vec::new()) };
        let mut talk =
            Talk { socket, watcher: watcher.clone(), input: Vec::new(), until, process, stage };
        if language == Language::Control {
            talk.ask(language)?;
        }
        Ok(talk)
    }

    fn say(&mut self, line: &str) -> Result<(), String> {
        // The line fits the socket's buffer, because the peer has answered everything so far.
        self.socket.write_all(line.as_bytes()).map_err(|error| format!("cannot be asked: {error}"))
    }

    fn ask(&mut self, language: Language) -> Result<(), String> {
        self.say(match language {
            Language::Qmp => "{\"execute\": \"query-cpus-fast\"}\n",
            Language::Control => "{\"op\": \"cpus\"}\n",
        })
    }

    /// The next complete line, if there is one.
    fn line(&mut self) -> Result<Option<Value>, String> {
        loop {
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|_| "sends what is not JSON".into());
            }
            let mut piece = [0; 4096];
            match self.socket.read(&mut piece) {
                Ok(0) => return Err("has closed the connection".into()),
                Ok(length) => self.input.extend_from_slice(&piece[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.to_string()),
            }
            if self.input.len() > LINE_MAX {
                return Err("sends endless lines".into());
            }
        }
    }

    /// Processes a line of the VMM. Returns the threads once they are known.
    fn hear(
        &mut self,
        line: &Value,
        language: Language,
        claims: &Claims,
        wanted: &dyn Fn(u32) -> bool,
    ) -> Result<Option<Vec<(u32, Thread)>>, String> {
        if let Some(error) = line.get("error") {
            let text = error.get("desc").unwrap_or(error).as_str().unwrap_or("no reason given");
            return Err(format!("refuses: {text}"));
        }
        match &mut self.stage {
            Stage::Greeting => {
                if line.get("QMP").is_none() {
                    return Err("is not a QMP socket".into());
                }
                self.stage = Stage::Negotiation;
                self.say("{\"execute\": \"qmp_capabilities\"}\n")?;
            }
            Stage::Negotiation => {
                if line.get("return").is_some() {
                    self.stage = Stage::First(Vec::new());
                    self.ask(language)?;
                }
            }
            Stage::First(cpus) => {
                if collect(cpus, line, language) {
                    let cpus = std::mem::take(cpus);
                    let mut threads = Vec::new();
                    for (cpu, tid) in cpus.iter().filter(|(cpu, _)| wanted(*cpu)) {
                        threads.push((
                            *cpu,
                            Thread::take(self.process, *tid, claims)
                                .map_err(|error| error.to_string())?,
                        ));
                    }
                    self.stage = Stage::Second(cpus, threads, Vec::new());
                    self.ask(language)?;
                }
            }
            Stage::Second(before, threads, cpus) => {
                if collect(cpus, line, language) {
                    if before != cpus {
                        return Err("gives another answer each time".into());
                    }
                    return Ok(Some(std::mem::take(threads)));
                }
            }
        }
        Ok(None)
    }
}

/// The most virtual CPUs in an answer.
const CPUS_MAX: usize = 4096;

/// Collects virtual CPUs and threads from a line of the answer. Returns true if that was the last
/// line.
fn collect(cpus: &mut Vec<(u32, i32)>, line: &Value, language: Language) -> bool {
    let number = |item: &Value, key: &str| item.get(key).and_then(Value::as_u64);
    let mut take = |item: &Value, cpu: &str, thread: &str| {
        let cpu = number(item, cpu).and_then(|cpu| u32::try_from(cpu).ok());
        let tid = number(item, thread).and_then(|tid| i32::try_from(tid).ok());
        if let (Some(cpu), Some(tid), true) = (cpu, tid, cpus.len() < CPUS_MAX) {
            cpus.push((cpu, tid));
        }
    };
    match language {
        // QMP events may come between the answers.
        Language::Qmp => {
            let Some(items) = line.get("return").and_then(Value::as_array) else { return false };
            items.iter().for_each(|item| take(item, "cpu-index", "thread-id"));
            true
        }
        Language::Control => {
            if let Some(item) = line.get("item") {
                take(item, "cpu", "thread");
            }
            line.get("ok").is_some()
        }
    }
}
