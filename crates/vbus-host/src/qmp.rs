//! A client of QEMU's machine protocol: lines of JSON on a UNIX socket.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// The longest line that is taken.
const LINE_MAX: u64 = 16 << 20;

/// A failure that QEMU itself reported.
#[derive(Debug, thiserror::Error)]
#[error("QEMU: {description}")]
pub struct QemuError {
    /// `DeviceNotFound`, `GenericError`, ...
    pub class: String,
    /// In words.
    pub description: String,
}

/// A connection to one QEMU, ready for commands.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    /// Until when everything must be done.
    deadline: Instant,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and leaves the negotiation behind. All that is done with the connection must end
    /// within `patience`.
    pub fn connect(path: &Path, patience: Duration) -> Result<Qmp> {
        let socket = UnixStream::connect(path)
            .with_context(|| format!("cannot reach QEMU at {}", path.display()))?;
        socket.set_write_timeout(Some(patience.max(Duration::from_millis(1))))?;
        let deadline = Instant::now() + patience;
        let mut qmp = Qmp { reader: BufReader::new(socket), deadline, events: VecDeque::new() };
        // QEMU serves one client at a time, and lets others wait without a word.
        let greeting_by = deadline.min(Instant::now() + Duration::from_secs(5));
        let greeting = qmp.line(greeting_by).with_context(|| {
            format!(
                "no greeting from {}; does another client hold this QMP socket? (QEMU can have several)",
                path.display()
            )
        })?;
        ensure!(greeting.get("QMP").is_some(), "{} is not a QMP socket", path.display());
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its value.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.reader.get_mut().write_all(line.as_bytes()).context("QEMU has gone")?;
        loop {
            let mut answer = self
                .line(self.deadline)
                .with_context(|| format!("waiting for the answer to {command}"))?;
            if let Some(error) = answer.get("error") {
                let text =
                    |key| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
                return Err(QemuError { class: text("class"), description: text("desc") }.into());
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            self.keep(answer);
        }
    }

    /// The next event, also one that came before; `None` once the time is up.
    pub fn event(&mut self) -> Result<Option<Value>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.line(self.deadline) {
                Ok(line) => self.keep(line),
                Err(error) if Instant::now() >= self.deadline => {
                    tracing::debug!("no event: {error:#}");
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn keep(&mut self, line: Value) {
        if line.get("event").is_some() {
            self.events.push_back(line);
        }
    }

    fn line(&mut self, deadline: Instant) -> Result<Value> {
        let mut line = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "QEMU did not answer in time");
            self.reader.get_ref().set_read_timeout(Some(left))?;
            // What was read before the time-out stays in `line`.
            match (&mut self.reader).take(LINE_MAX).read_until(b'\n', &mut line) {
                Ok(0) => bail!("QEMU has gone"),
                Ok(_) if line.last() == Some(&b'\n') => break,
                Ok(_) => ensure!((line.len() as u64) < LINE_MAX, "QEMU sends endless lines"),
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(e) => return Err(e).context("reading from QEMU"),
            }
        }
        serde_json::from_slice(&line).context("QEMU sends what is not JSON")
    }
}
