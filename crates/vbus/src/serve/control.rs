//! The control socket: one request a line, in JSON, and its answers.
//!
//! A request is an object with a member `op`. Its answers are lines with one of: `item`, one of several; `ok`, the last one; `error`, the
//! last one too, with a text for people. A client is served by a thread of its own, at most [`CLIENTS_MAX`] at a time. Whatever one of them
//! does ends at worst its own connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, poll};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::host::Host;
use crate::config::DeviceSpec;
use crate::rundir::CONTROL;

/// Clients at a time.
pub const CLIENTS_MAX: usize = 32;
/// The longest request, in bytes: enough for the largest state page in JSON.
pub const LINE_MAX: u64 = 4 << 20;
/// Clients that wait to be accepted.
const BACKLOG: i32 = 16;
/// How long a client may take for its request, and for taking an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a client may ask for.
#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    /// Version, process, directory, classes.
    Info,
    /// All devices with everything there is to tell.
    List,
    /// One device likewise.
    Show { name: String },
    /// Adds a device.
    Add { name: String, class: String, settings: Map<String, Value> },
    /// Removes one.
    Remove {
        name: String,
        #[serde(default)]
        force: bool,
    },
    /// A request to a device itself.
    Device { name: String, request: Value },
}

/// Accepts clients. Dropping it removes the socket.
pub struct Acceptor {
    listener: UnixListener,
    path: PathBuf,
    host: Arc<Host>,
    clients: Arc<AtomicUsize>,
}

/// Counts a client as long as it is there.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Acceptor {
    /// Makes the control socket of `host`, with mode 0600 from the first moment on.
    pub fn bind(host: Arc<Host>) -> Result<Acceptor> {
        let path = host.dir().join(CONTROL);
        let socket = vbus_vfio_user::bind_private(&path, BACKLOG);
        let listener = socket.map(UnixListener::from).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Acceptor { listener, path, host, clients: Arc::default() })
    }

    /// Accepts the next client, if there is one. An error is one of this process, not of the client.
    pub fn next(&self) -> io::Result<()> {
        let socket = match self.listener.accept() {
            Ok((socket, _)) => socket,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => return Ok(()),
            Err(e) => return Err(e),
        };
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let before = self.clients.fetch_add(1, Ordering::Relaxed);
        let slot = Slot(self.clients.clone());
        if before >= CLIENTS_MAX {
            // Fits the empty buffer of a fresh socket, so it cannot block.
            let _ = answer(&socket, &json!({ "error": format!("more than {CLIENTS_MAX} control clients") }));
            return Ok(());
        }
        let host = self.host.clone();
        let thread = std::thread::Builder::new().name("vbus-control".into()).stack_size(256 << 10);
        thread.spawn(move || {
            let _slot = slot;
            serve(&host, &socket);
        })?;
        Ok(())
    }
}

impl AsFd for Acceptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn answer(mut socket: &UnixStream, value: &Value) -> io::Result<()> {
    let mut line = value.to_string();
    line.push('\n');
    socket.write_all(line.as_bytes())
}

/// Serves a client until it ends, takes too long, or breaks the form.
fn serve(host: &Host, socket: &UnixStream) {
    let mut reader = BufReader::new(socket);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(LINE_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            let _ =
                answer(socket, &json!({ "error": format!("a request must be one line of at most {LINE_MAX} bytes") }));
            return;
        }
        let result = serde_json::from_slice(&line)
            .map_err(|e| anyhow!("not a request: {e}"))
            .and_then(|request| handle(host, request, socket));
        let last = match result {
            Ok(value) => json!({ "ok": value }),
            Err(error) => json!({ "error": format!("{error:#}") }),
        };
        if answer(socket, &last).is_err() {
            return;
        }
    }
}

fn handle(host: &Host, request: Request, socket: &UnixStream) -> Result<Value> {
    match request {
        Request::Info => Ok(json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "dir": host.dir(),
            "classes": host.classes(),
        })),
        Request::List => Ok(Value::Array(host.inspect(None)?)),
        Request::Show { name } => Ok(host.inspect(Some(&name))?.pop().unwrap_or_default()),
        Request::Add { name, class, settings } => {
            let spec = DeviceSpec::new(name, class, settings).map_err(anyhow::Error::msg)?;
            let endpoint = host.add(spec)?;
            Ok(host.inspect(Some(endpoint.name()))?.pop().unwrap_or_default())
        }
        Request::Remove { name, force } => host.remove(&name, force).map(|()| Value::Null),
        Request::Device { name, request } => {
            let endpoint = host.get(&name)?;
            let mut reply = |value: Value| match value {
                Value::Null => !gone(socket),
                value => answer(socket, &json!({ "item": value })).is_ok(),
            };
            match endpoint.device().control(&request, &mut reply) {
                Ok(()) => Ok(Value::Null),
                Err(text) => bail!("{name}: {text}"),
            }
        }
    }
}

/// Whether the client has closed its end, or sends what nobody asked for.
fn gone(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0)
}
