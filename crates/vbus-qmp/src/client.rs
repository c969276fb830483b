// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client of QEMU's machine protocol, QMP: lines of JSON on a UNIX socket. It runs one command at
//! a time, and keeps the events that arrive meanwhile.
//!
//! ```no_run
//! use std::time::Duration;
//! use serde_json::json;
//! use vbus_qmp::Qmp;
//!
//! # fn main() -> anyhow::Result<()> {
//! let mut qmp = Qmp::connect("/run/vm/qmp".as_ref(), Duration::from_secs(30))?;
//! qmp.run("device_del", json!({ "id": "net0" }))?;
//! while let Some(event) = qmp.event()? {
//!     if event["event"] == "DEVICE_DELETED" && event["data"]["device"] == "net0" {
//!         break;
//!     }
//! }
//! # Ok(())
//! # }
//! ```

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// The longest line that the client accepts, in bytes.
const LINE_MAX: usize = 16 << 20;
/// How long QEMU may take to send its greeting. QEMU serves one client at a time. Other clients
/// wait without an answer.
const GREETING: Duration = Duration::from_secs(5);

/// A failure that QEMU itself reported.
#[derive(Debug, thiserror::Error)]
#[error("QEMU: {description}")]
pub struct QemuError {
    /// QEMU's class of the error: `DeviceNotFound`, `GenericError`, ...
    pub class: String,
    /// QEMU's description of the error.
    pub description: String,
}

/// A connection to one QEMU, ready for commands.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    /// The first part of a line whose end has not arrived yet.
    partial: Vec<u8>,
    deadline: Instant,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to the socket `path`. All commands on the connection together must end within
    /// `timeout`, unless [`set_timeout`](Self::set_timeout) gives more time.
    ///
    /// # Errors
    /// Nobody listens there, QEMU serves another client, or the other end is not QEMU.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Qmp> {
        let socket = UnixStream::connect(path)
            .with_context(|| format!("cannot reach QEMU at {}", path.display()))?;
        Qmp::over(socket, timeout).with_context(|| format!("the QMP socket {}", path.display()))
    }

    /// Makes a connection as [`connect`](Self::connect) does, over a connected socket.
    ///
    /// # Errors
    /// QEMU serves another client, or the other end is not QEMU.
    pub fn over(socket: UnixStream, timeout: Duration) -> Result<Qmp> {
        socket.set_write_timeout(Some(timeout.max(Duration::from_millis(1))))?;
        let now = Instant::now();
        let mut qmp = Qmp {
            reader: BufReader::new(socket),
            partial: Vec::new(),
            deadline: now + timeout,
            events: VecDeque::new(),
        };
        let greeting = qmp.line(qmp.deadline.min(now + GREETING)).context(
            "no greeting; does another client hold this QMP socket? (QEMU can have several)",
        )?;
        ensure!(greeting.get("QMP").is_some(), "the other end is not QEMU");
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Sets the time, from now on, within which all later commands must end.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.deadline = Instant::now() + timeout;
    }

    /// Runs a command and returns its value.
    ///
    /// # Errors
    /// [`QemuError`] if QEMU refuses the command. Another error if QEMU has gone, or does not
    /// answer in time.
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

    /// Returns the oldest event that it has kept, or waits for the next. Returns `None` once the
    /// time is up.
    ///
    /// # Errors
    /// QEMU has gone, or sends a line that is not JSON.
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

    fn keep(&mut self, line: Value) {
        if line.get("event").is_some() {
            self.events.push_back(line);
        }
    }

    /// Returns the next line. Keeps a part of a line that arrived before `deadline`.
    fn line(&mut self, deadline: Instant) -> Result<Value> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "QEMU did not answer in time");
            self.reader.get_ref().set_read_timeout(Some(left))?;
            let room = LINE_MAX.saturating_sub(self.partial.len()) as u64;
            match (&mut self.reader).take(room).read_until(b'\n', &mut self.partial) {
                Ok(_) if self.partial.last() == Some(&b'\n') => break,
                Ok(_) if self.partial.len() >= LINE_MAX => bail!("QEMU sends endless lines"),
                Ok(0) => bail!("QEMU has gone"),
                Ok(_) => {}
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(e) => return Err(e).context("reading from QEMU"),
            }
        }
        serde_json::from_slice(&std::mem::take(&mut self.partial))
            .context("QEMU sends a line that is not JSON")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
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
}
