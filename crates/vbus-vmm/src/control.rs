//! What control clients may ask of the machine (`spec/vmm.md`), and the thread that accepts them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::event::{PollFd, PollFlags, poll};
use serde::Deserialize;
use serde_json::{Value, json};
use vbus_control::{Client, Handler, Limits, Server};

use crate::machine::{Ask, Parts};
use crate::seccomp::{self, Thread};

/// What clients may cost.
const LIMITS: Limits = Limits { clients: 16, line: 64 << 10 };
/// After an error of this process's own.
const PAUSE: Duration = Duration::from_millis(200);

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
    let server = Server::new(listener, LIMITS, Control(parts.clone()))?;
    let (tell, told) = channel();
    std::thread::Builder::new().name("control".into()).spawn(move || {
        let ready = if filter { seccomp::apply(Thread::Control) } else { Ok(()) };
        let failed = ready.is_err();
        let _ = tell.send(ready);
        if !failed {
            accept(&server);
        }
    })?;
    told.recv().context("the control thread has ended at once")??;
    Ok(socket)
}

fn accept(server: &Server<Control>) {
    loop {
        let _ = poll(&mut [PollFd::new(server, PollFlags::IN)], None);
        if server.accept().is_err() {
            std::thread::sleep(PAUSE);
        }
    }
}

/// Answers clients.
struct Control(Arc<Parts>);

impl Handler for Control {
    type Request = Request;

    fn handle(&self, request: Request, client: &Client<'_>) -> Result<Value> {
        let parts = &*self.0;
        match request {
            Request::Info => Ok(parts.info.clone()),
            Request::Cpus => {
                for (cpu, thread, ..) in parts.cpus.list() {
                    client.item(json!({ "cpu": cpu, "thread": thread.as_raw_nonzero().get() }))?;
                }
                Ok(Value::Null)
            }
            Request::Stats => {
                parts.counters().into_iter().try_for_each(|counters| client.item(counters))?;
                Ok(Value::Null)
            }
            Request::Marks => {
                let marks = parts.marks.as_ref().context("there are no marks without --marks")?;
                marks.list().into_iter().try_for_each(|mark| client.item(mark))?;
                Ok(Value::Null)
            }
            Request::Devices => {
                for device in parts.pci.list() {
                    client.item(serde_json::to_value(device)?)?;
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
}

fn ask(parts: &Parts, ask: Ask) -> Result<Value> {
    parts.asks.send(ask).map_err(|_| anyhow!("the machine is about to end"))?;
    Ok(Value::Null)
}
