// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The requests of control clients (`spec/vmm.md`), and the thread that accepts clients.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use serde::Deserialize;
use serde_json::{Value, json};
use vbus_control::{Client, Handler, Limits, Server};

use crate::components::Components;
use crate::counters::VcpuCounters;
use crate::events::VmEvent;
use crate::seccomp::{self, Thread};
use crate::snapshot::save::{self, Plan, Rounds};

/// Limits on the cost of clients.
const LIMITS: Limits = Limits { clients: 16, line: 64 << 10 };
/// The pause after an error of this process's own, such as a lack of descriptors.
const PAUSE: Duration = Duration::from_millis(200);

/// A request of a client.
#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    /// Shows the version, the process and the configuration.
    Info,
    /// Lists the virtual CPUs with their threads.
    Cpus,
    /// Shows the counters of KVM and of this program.
    Stats,
    /// Shows the [`Stats`](Self::Stats) of the moment of each mark.
    Marks,
    /// Lists the devices.
    Devices,
    /// Plugs a device.
    Plug { name: String, socket: PathBuf },
    /// Asks the guest to release a device. The answer comes when the guest has done it.
    Unplug { name: String },
    /// Stops the virtual CPUs for a moment, and tells what they, the interrupt controllers and the
    /// devices do.
    Dump,
    /// Copies the machine to whoever listens at the socket `to`.
    ///
    /// With `live` it runs meanwhile, as in a move, and stops for the last part only.
    Snapshot {
        to: PathBuf,
        #[serde(default)]
        live: bool,
        rounds: Option<u32>,
        down_time_ms: Option<u64>,
    },
    /// Moves the machine to the `vbus-vmm restore --listen` at the socket `to`.
    Migrate { to: PathBuf, rounds: Option<u32>, down_time_ms: Option<u64> },
    /// Presses the power button.
    PowerButton,
    /// Resets the machine.
    Reset,
    /// Ends the machine.
    Quit,
}

/// The socket. Dropping this value removes it.
pub struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Makes the socket and starts a thread that serves it.
pub fn start(path: &Path, components: &Arc<Components>, filter: bool) -> Result<Socket> {
    let listener = crate::socket::listen(path)?;
    let socket = Socket(path.to_owned());
    let server = Server::new(listener, LIMITS, Control(components.clone()))?;
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

/// Answers the requests of clients.
struct Control(Arc<Components>);

impl Handler for Control {
    type Request = Request;

    fn handle(&self, request: Request, client: &Client<'_>) -> Result<Value> {
        let components = &*self.0;
        match request {
            Request::Info => Ok(components.info.clone()),
            Request::Cpus => {
                for (cpu, thread) in components.cpus.threads() {
                    client.item(json!({ "cpu": cpu, "thread": thread.as_raw_nonzero().get() }))?;
                }
                Ok(Value::Null)
            }
            Request::Stats => {
                let mut counters = components.counters.iter().map(VcpuCounters::to_json);
                counters.try_for_each(|counters| client.item(counters))?;
                Ok(Value::Null)
            }
            Request::Marks => {
                let marks = components
                    .marks
                    .as_ref()
                    .context("this machine keeps no marks: start it with --marks")?;
                marks.list().into_iter().try_for_each(|mark| client.item(mark))?;
                Ok(Value::Null)
            }
            Request::Devices => {
                for device in components.pci.list() {
                    client.item(serde_json::to_value(device)?)?;
                }
                Ok(Value::Null)
            }
            Request::Plug { name, socket } => {
                components.pci.plug(&name, &socket)?;
                Ok(Value::Null)
            }
            Request::Unplug { name } => {
                components.pci.unplug(&name)?;
                Ok(Value::Null)
            }
            Request::Dump => {
                let (tell, told) = channel();
                send(components, VmEvent::Dump(tell))?;
                let items = told.recv().context("the machine is about to end")?;
                items.into_iter().try_for_each(|item| client.item(item))?;
                Ok(Value::Null)
            }
            Request::Snapshot { to, live, rounds, down_time_ms } => {
                let rounds = live.then(|| Rounds::new(rounds, down_time_ms));
                self.save(&to, Plan::Copy(rounds), client)
            }
            Request::Migrate { to, rounds, down_time_ms } => {
                self.save(&to, Plan::Move(Rounds::new(rounds, down_time_ms)), client)
            }
            Request::PowerButton => Ok(json!({ "heard": components.power.press() })),
            Request::Reset => send(components, VmEvent::Reset("by a control client".into())),
            Request::Quit => send(components, VmEvent::Quit),
        }
    }
}

impl Control {
    /// Saves the machine to whoever listens at `to`, as long as the client waits for it.
    fn save(&self, to: &Path, plan: Plan, client: &Client<'_>) -> Result<Value> {
        let socket = UnixStream::connect(to)
            .with_context(|| format!("nobody listens at {}", to.display()))?;
        let progress = |text: Option<&str>| {
            if let Some(text) = text {
                tracing::info!("{text}");
                client.progress(text, 0, 0)?;
            }
            ensure!(!client.gone(), "the client that asked for this has gone");
            Ok(())
        };
        let (report, moved) = save::save(&self.0, socket, plan, &progress)?;
        // The client has its answer before this process ends.
        client.keep(moved);
        Ok(serde_json::to_value(report)?)
    }
}

fn send(components: &Components, event: VmEvent) -> Result<Value> {
    components.events.send(event).map_err(|_| anyhow!("the machine is about to end"))?;
    Ok(Value::Null)
}
