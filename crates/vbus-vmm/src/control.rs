//! The control socket: one request a line, in JSON, and its answers (`spec/vmm.md`).
//!
//! A client is served by a thread of its own, at most [`CLIENTS_MAX`] at a time. Whatever one of them does ends at worst its own connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::event::{PollFd, PollFlags, poll};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::machine::{Ask, Parts};
use crate::seccomp::{self, Thread};

/// Clients at a time.
const CLIENTS_MAX: usize = 16;
/// The longest request, in bytes.
const LINE_MAX: u64 = 64 << 10;
/// How long a client may take for its request, and for taking an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a client may ask for.
#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    /// Version, process, what the machine is made of.
    Info,
    /// The virtual CPUs with their threads.
    Cpus,
    /// KVM's counters and this program's own.
    Stats,
    /// What [`Stats`](Self::Stats) was at each mark.
    Marks,
    /// The devices.
    Devices,
    /// Plugs a device.
    Plug { name: String, socket: PathBuf },
    /// Asks the guest to let a device go; answered when it has.
    Unplug { name: String },
    /// Presses the power button.
    PowerButton,
    /// Resets the machine.
    Reset,
    /// Ends it.
    Quit,
}

/// The socket, which is removed when this is dropped.
pub struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Makes the socket and serves it from a thread.
pub fn start(path: &Path, parts: &Arc<Parts>, filter: bool) -> Result<Socket> {
    let listener = crate::socket::listen(path)?;
    let socket = Socket(path.to_owned());
    let (parts, (tell, told)) = (parts.clone(), channel());
    std::thread::Builder::new().name("control".into()).spawn(move || {
        let ready = if filter { seccomp::apply(Thread::Control) } else { Ok(()) };
        let failed = ready.is_err();
        let _ = tell.send(ready);
        if !failed {
            accept(&listener, &parts);
        }
    })?;
    told.recv().context("the control thread has ended at once")??;
    Ok(socket)
}

/// Counts a client as long as it is there.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn accept(listener: &UnixListener, parts: &Arc<Parts>) {
    let clients = Arc::new(AtomicUsize::new(0));
    loop {
        let _ = poll(&mut [PollFd::new(listener, PollFlags::IN)], None);
        match listener.accept() {
            Ok((socket, _)) => {
                let slot = Slot(clients.clone());
                let full = clients.fetch_add(1, Ordering::Relaxed) >= CLIENTS_MAX;
                if begin(socket, slot, full, parts).is_err() {
                    pause();
                }
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {}
            Err(_) => pause(),
        }
    }
}

/// Out of descriptors or threads: trying again at once would only burn time.
fn pause() {
    std::thread::sleep(Duration::from_millis(200));
}

fn begin(socket: UnixStream, slot: Slot, full: bool, parts: &Arc<Parts>) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    if full {
        // Fits the empty buffer of a fresh socket, so it cannot block.
        return answer(&socket, &json!({ "error": format!("more than {CLIENTS_MAX} control clients") }));
    }
    let parts = parts.clone();
    std::thread::Builder::new().name("client".into()).stack_size(256 << 10).spawn(move || {
        let _slot = slot;
        serve(&parts, &socket);
    })?;
    Ok(())
}

fn answer(mut socket: &UnixStream, value: &Value) -> io::Result<()> {
    socket.write_all(format!("{value}\n").as_bytes())
}

/// Serves a client until it ends, takes too long, or breaks the form.
fn serve(parts: &Parts, socket: &UnixStream) {
    let mut reader = BufReader::new(socket);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(LINE_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            let text = format!("a request must be one line of at most {LINE_MAX} bytes");
            let _ = answer(socket, &json!({ "error": text }));
            return;
        }
        let mut item = |value: Value| Ok(answer(socket, &json!({ "item": value }))?);
        let result = serde_json::from_slice(&line)
            .map_err(|e| anyhow!("not a request: {e}"))
            .and_then(|request| handle(parts, request, &mut item));
        let last = match result {
            Ok(value) => json!({ "ok": value }),
            Err(error) => json!({ "error": format!("{error:#}") }),
        };
        if answer(socket, &last).is_err() {
            return;
        }
    }
}

fn handle(parts: &Parts, request: Request, item: &mut dyn FnMut(Value) -> Result<()>) -> Result<Value> {
    match request {
        Request::Info => Ok(parts.facts.clone()),
        Request::Cpus => {
            for (cpu, thread, ..) in parts.cpus.list() {
                item(json!({ "cpu": cpu, "thread": thread.as_raw_nonzero().get() }))?;
            }
            Ok(Value::Null)
        }
        Request::Stats => {
            parts.counters().into_iter().try_for_each(item)?;
            Ok(Value::Null)
        }
        Request::Marks => {
            let marks = parts.marks.as_ref().context("there are no marks without --marks")?;
            marks.list().into_iter().try_for_each(item)?;
            Ok(Value::Null)
        }
        Request::Devices => {
            for device in parts.pci.list() {
                item(serde_json::to_value(device)?)?;
            }
            Ok(Value::Null)
        }
        Request::Plug { name, socket } => {
            parts.pci.plug(&name, &socket)?;
            Ok(Value::Null)
        }
        Request::Unplug { name } => {
            parts.pci.unplug(&name)?;
            Ok(Value::Null)
        }
        Request::PowerButton => Ok(json!({ "heard": parts.power.press() })),
        Request::Reset => ask(parts, Ask::Reset("by a control client".into())),
        Request::Quit => ask(parts, Ask::Quit),
    }
}

fn ask(parts: &Parts, ask: Ask) -> Result<Value> {
    parts.asks.send(ask).map_err(|_| anyhow!("the machine is about to end"))?;
    Ok(Value::Null)
}
