//! QEMU's control channel: commands, and the events that come in between.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take to answer: a device that says nothing holds it for 5 s.
const ANSWER: Duration = Duration::from_secs(20);

/// A connection to one QEMU.
pub struct Qmp {
    stream: UnixStream,
    lines: Receiver<Value>,
    events: Vec<Value>,
    next: u64,
}

impl Qmp {
    /// Takes over a fresh connection and leaves its negotiation mode.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let reader = BufReader::new(stream.try_clone()?);
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in reader.lines().map_while(std::result::Result::ok) {
                let Ok(value) = serde_json::from_str(&line) else { continue };
                if sender.send(value).is_err() {
                    break;
                }
            }
        });
        let mut qmp = Self { stream, lines, events: Vec::new(), next: 0 };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.next += 1;
        let id = self.next;
        let line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        self.stream
            .write_all(format!("{line}\n").as_bytes())
            .with_context(|| format!("{command}: QEMU is gone"))?;
        let until = Instant::now() + ANSWER;
        loop {
            let value = self.receive(until).with_context(|| format!("no answer to {command}"))?;
            if value.get("event").is_some() {
                self.events.push(value);
            } else if value["id"] == id {
                if let Some(error) = value.get("error") {
                    bail!("{command}: {}", error["desc"].as_str().unwrap_or("refused"));
                }
                return Ok(value["return"].clone());
            }
        }
    }

    /// Waits for an event, one that came since the last look included, that `wanted` accepts;
    /// returns its data.
    pub fn wait_event(
        &mut self,
        name: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let until = Instant::now() + limit;
        let matches = |value: &Value| value["event"] == name && wanted(&value["data"]);
        if let Some(at) = self.events.iter().position(matches) {
            return Ok(self.events.remove(at)["data"].take());
        }
        loop {
            let mut value = self.receive(until).with_context(|| format!("no event {name}"))?;
            if matches(&value) {
                return Ok(value["data"].take());
            }
            self.events.push(value);
        }
    }

    /// Forgets the events that came so far.
    pub fn forget_events(&mut self) {
        self.events.clear();
        while self.lines.try_recv().is_ok() {}
    }

    fn receive(&self, until: Instant) -> Result<Value> {
        match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(value) => Ok(value),
            Err(RecvTimeoutError::Timeout) => bail!("QEMU did not say it in time"),
            Err(RecvTimeoutError::Disconnected) => bail!("QEMU has closed its control channel"),
        }
    }
}
