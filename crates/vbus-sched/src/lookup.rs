// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The search for the threads of a VMM's virtual CPUs.
//!
//! The device cannot wait for the VMM: while the VMM opens this device, it may answer no other
//! client. So an [interview](crate::interview) asks, and the connection's task looks for the answer
//! without blocking. The task asks twice, and takes the threads between the two answers. If the
//! second answer is the same, and from the same process, then the task has taken the threads that
//! the VMM means: no id has passed to another thread meanwhile.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vbus_core::{Interest, TaskHandle};

use crate::config::Origin;
use crate::interview::{self, Answer, Language};
use crate::thread::{Thread, Threads};

/// How long the task waits for both answers. The interview itself ends before.
const BOUND: Duration = Duration::from_secs(2 * interview::TIMEOUT.as_secs() + 5);
/// The pause before the task asks the VMM again: at first ...
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// ... and at most.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// The search for the threads of a VMM.
pub struct Lookup {
    /// The device's name, for the log.
    device: Arc<str>,
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

/// An interview.
struct Talk {
    socket: OwnedFd,
    watcher: TaskHandle,
    until: Instant,
    process: i32,
    stage: Stage,
}

enum Stage {
    /// Waits for the first answer.
    First,
    /// Waits for the second answer. Holds the first one, and the threads that were taken.
    Second(Vec<(u32, i32)>, Vec<(u32, Thread)>),
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.watcher.unwatch(&self.socket);
    }
}

impl Lookup {
    /// Makes the search for the VMM that `origin` names, for the device with this name. `None`: it
    /// names no VMM.
    pub fn new(device: Arc<str>, origin: &Origin, threads: &Arc<dyn Threads>) -> Option<Lookup> {
        let (path, language) = match origin {
            Origin::Threads(_) => return None,
            Origin::Qmp(path) => (path, Language::Qmp),
            Origin::Vmm(path) => (path, Language::Control),
        };
        let (path, threads) = (path.clone(), threads.clone());
        Some(Lookup {
            device,
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

    /// Ends the interview, so that a new one can begin at once.
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
                        device = &*self.device,
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
                let asked = self.threads.ask_vmm(&self.path, self.language);
                let asked = asked.map_err(|error| format!("cannot be reached: {error}"))?;
                self.talk.insert(Talk::begin(asked, now + BOUND, watcher)?)
            }
        };
        while let Some(answer) = interview::answer(&talk.socket)? {
            if let Some(found) = talk.hear(answer, &*self.threads, wanted)? {
                return Ok(Some(found));
            }
        }
        if now >= talk.until {
            return Err("is asked, but no answer comes".into());
        }
        Ok(None)
    }
}

impl Talk {
    /// Begins with the end of an interview of the VMM whose process is `process`.
    fn begin(
        (socket, process): (OwnedFd, i32),
        until: Instant,
        watcher: &TaskHandle,
    ) -> Result<Talk, String> {
        watcher.watch(&socket, Interest::Read).map_err(|error| error.to_string())?;
        let talk = Talk { socket, watcher: watcher.clone(), until, process, stage: Stage::First };
        talk.ask()?;
        Ok(talk)
    }

    fn ask(&self) -> Result<(), String> {
        interview::ask(&self.socket).map_err(|error| format!("cannot be asked: {error}"))
    }

    /// Processes an answer of the VMM. Returns the threads once they are known.
    fn hear(
        &mut self,
        answer: Answer,
        threads: &dyn Threads,
        wanted: &dyn Fn(u32) -> bool,
    ) -> Result<Option<Vec<(u32, Thread)>>, String> {
        let cpus = match answer {
            Answer::Cpus(cpus) => cpus,
            Answer::Failed(text) => return Err(text),
        };
        match &mut self.stage {
            Stage::First => {
                let mut taken = Vec::new();
                for (cpu, tid) in cpus.iter().filter(|(cpu, _)| wanted(*cpu)) {
                    let thread = Thread::take(threads, Some(self.process), *tid);
                    taken.push((*cpu, thread.map_err(|error| error.to_string())?));
                }
                self.stage = Stage::Second(cpus, taken);
                self.ask()?;
                Ok(None)
            }
            Stage::Second(before, _) if *before != cpus => {
                Err("gives another answer each time".into())
            }
            Stage::Second(_, taken) => Ok(Some(std::mem::take(taken))),
        }
    }
}
