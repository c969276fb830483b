//! A client of QEMU's machine protocol, QMP: lines of JSON on a UNIX socket. It runs one command at
//! a time and keeps the events that come in between.
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

/// The longest line that is taken.
const LINE_MAX: usize = 16 << 20;
/// How long QEMU may take to greet: it serves one client at a time, and lets others wait without a
/// word.
const GREETING: Duration = Duration::from_secs(5);

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
    /// Of a line that has not come to its end yet.
    partial: Vec<u8>,
    deadline: Instant,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to the socket `path`. All that is done with the connection must end within
    /// `timeout`, unless [`set_timeout`](Self::set_timeout) gives more.
    ///
    /// # Errors
    /// Nobody listens there; QEMU does not greet, since it serves another client; or it is no QEMU.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Qmp> {
        let socket = UnixStream::connect(path)
            .with_context(|| format!("cannot reach QEMU at {}", path.display()))?;
        Qmp::over(socket, timeout).with_context(|| format!("the QMP socket {}", path.display()))
    }

    /// As [`connect`](Self::connect), over a socket that is connected.
    ///
    /// # Errors
    /// Likewise.
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
        ensure!(greeting.get("QMP").is_some(), "what answers is no QEMU");
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Gives all that follows this time from now on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.deadline = Instant::now() + timeout;
    }

    /// Runs a command and returns its value.
    ///
    /// # Errors
    /// [`QemuError`] if QEMU refuses it; QEMU has gone, or does not answer in time.
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
    ///
    /// # Errors
    /// QEMU has gone, or sends nonsense.
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

    /// Forgets the events that came so far. The connection goes on.
    ///
    /// # Errors
    /// As of [`run`](Self::run).
    pub fn forget_events(&mut self) -> Result<()> {
        // Events come before the answer to whatever is asked after them.
        self.run("query-version", json!({}))?;
        self.events.clear();
        Ok(())
    }

    fn keep(&mut self, line: Value) {
        if line.get("event").is_some() {
            self.events.push_back(line);
        }
    }

    /// The next line. One that comes in part before `deadline` is not lost.
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
            .context("QEMU sends what is not JSON")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// A QEMU that writes `lines` at once.
    fn qemu(lines: &[Value]) -> (UnixStream, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for line in lines {
            theirs.write_all(format!("{line}\n").as_bytes()).unwrap();
        }
        (ours, theirs)
    }

    #[test]
    fn events_are_kept_whatever_comes_between() {
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
    fn what_is_wrong_is_said() {
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
        assert!(complaint(&[json!({ "hello": 1 })], true, LONG).contains("is no QEMU"));
        let refusal = json!({ "error": { "class": "GenericError", "desc": "no" } });
        assert!(complaint(&[greeting, refusal], false, LONG).ends_with("QEMU: no"));
    }
}
