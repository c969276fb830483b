// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The requests of control clients to the bus (`spec/control.md`), and the control socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use vbus_control::{Client, Handler, Limits, Peer, Server, Share};

use super::host::{Held, Host};
use super::reload::Reloader;
use crate::access::Access;
use crate::config::DeviceSpec;
use crate::rights::{Level, Rights};
use crate::take_over::{Departure, FORMAT};
use vbus_cli::rundir::CONTROL;
use vbus_core::lock;

/// The limits on clients. The largest state page, in JSON, fits in a line.
const LIMITS: Limits = Limits { clients: 32, line: 4 << 20 };
/// The places of a user with full rights.
const FULL: Share = Share { user: 24, all: 32, line: LIMITS.line };
/// The places of a user who may only read. Such users leave places for the others, and need no long
/// request.
const READ: Share = Share { user: 8, all: 16, line: 64 << 10 };
/// The most clients that wait to be accepted.
pub const BACKLOG: i32 = 16;
/// The time between two looks whether the keeper is still there.
const KEEPER_PAUSE: Duration = Duration::from_secs(1);

/// A request of a client.
#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    /// Returns the version, the process, the directory and the classes.
    Info,
    /// Returns all devices with their state and counters.
    List,
    /// Returns one device with its state and counters.
    Show { name: String },
    /// Reads the configuration file again. Returns what that changed.
    Reload,
    /// Adds a device.
    Add { name: String, class: String, settings: Map<String, Value> },
    /// Removes a device.
    Remove {
        name: String,
        #[serde(default)]
        force: bool,
    },
    /// Changes settings of a device. Returns the keys that changed.
    Set { name: String, settings: Map<String, Value> },
    /// Ends the connection of a device's driver and changes the device's incarnation.
    Reincarnate { name: String },
    /// Passes a request to a device.
    Device { name: String, request: Value },
    /// Gives the bus to the client, its keeper (spec/keeper.md).
    Keep {
        format: u32,
        #[serde(rename = "state-format")]
        state_format: u32,
        version: String,
    },
    /// Hands the bus over to the client, a new process of it (spec/take-over.md).
    TakeOver {
        format: u32,
        #[serde(rename = "state-format")]
        state_format: u32,
        version: String,
    },
}

impl Request {
    /// Its name, and what a client must be allowed to do.
    fn needs(&self) -> (&'static str, Level) {
        match self {
            Request::Info => ("info", Level::Read),
            Request::List => ("list", Level::Read),
            Request::Show { .. } => ("show", Level::Read),
            Request::Reload => ("reload", Level::Full),
            Request::Add { .. } => ("add", Level::Full),
            Request::Remove { .. } => ("remove", Level::Full),
            Request::Set { .. } => ("set", Level::Full),
            Request::Reincarnate { .. } => ("reincarnate", Level::Full),
            // The class defines the request, and it may change the device.
            Request::Device { .. } => ("device", Level::Full),
            Request::TakeOver { .. } => ("take-over", Level::Full),
            Request::Keep { .. } => ("keep", Level::Full),
        }
    }
}

/// Accepts clients. Dropping it removes the socket, and may wait for what clients have sent along:
/// [`end`](Acceptor::end) does not.
pub struct Acceptor {
    server: Server<Control>,
    _held: Held,
}

impl Acceptor {
    /// Makes the control socket of `host`, with this access and these rights of clients, which may
    /// change.
    pub fn bind(
        host: Arc<Host>,
        access: &Access,
        rights: Arc<Mutex<Rights>>,
        reloader: Arc<Reloader>,
        departure: Option<Arc<Departure>>,
    ) -> Result<Acceptor> {
        let path = host.dir().join(CONTROL);
        let listening = host.listen_for_itself(&path, BACKLOG, access);
        let handler = Control { host, rights, reloader, departure };
        listening
            .and_then(|(listener, held)| {
                handler.host.be_seen()?;
                let server = Server::new(UnixListener::from(listener), LIMITS, handler)?;
                Ok(Acceptor { server, _held: held })
            })
            .with_context(|| format!("cannot make {}", path.display()))
    }

    /// Accepts the next client, if one waits. An error is a fault of this process, not of the
    /// client.
    pub fn next(&self) -> io::Result<()> {
        self.server.accept()
    }

    /// Removes the socket.
    pub fn end(self) {
        self.server.end();
    }
}

impl AsFd for Acceptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.server.as_fd()
    }
}

/// Answers the requests of clients.
struct Control {
    host: Arc<Host>,
    rights: Arc<Mutex<Rights>>,
    reloader: Arc<Reloader>,
    /// `None`: the bus cannot be handed over.
    departure: Option<Arc<Departure>>,
}

impl Control {
    /// Hands the bus over. Only the user of the bus and root may ask: the new process gets all that
    /// the bus has.
    fn take_over(
        &self,
        (format, state_format): (u32, u32),
        version: &str,
        client: &Client<'_>,
    ) -> Result<Value> {
        Self::check_heir((format, state_format), version, client)?;
        let accepted = || Ok(client.item(json!({ "format": FORMAT }))?);
        let departure = self.departure.as_ref().context("this bus cannot be handed over")?;
        match departure.leave(client.socket(), client.peer().pid, accepted)? {}
    }

    /// Gives the bus to a keeper, as long as that is there.
    fn keep(&self, formats: (u32, u32), version: &str, client: &Client<'_>) -> Result<Value> {
        Self::check_heir(formats, version, client)?;
        let accepted = || Ok(client.item(json!({ "format": FORMAT }))?);
        let departure = self.departure.as_ref().context("this bus cannot be kept")?;
        let kept = departure.be_kept(client.socket(), client.peer().pid, accepted);
        // From its acceptance on, the connection has no place for an answer.
        while kept.is_ok() && !client.gone() {
            std::thread::sleep(KEEPER_PAUSE);
        }
        kept.map(|()| Value::Null)
    }

    /// Checks that a client may have all that the bus has, and understands it.
    fn check_heir(
        (format, state_format): (u32, u32),
        version: &str,
        client: &Client<'_>,
    ) -> Result<()> {
        let peer = client.peer();
        let own = rustix::process::geteuid().as_raw();
        ensure!(
            peer.uid == own || peer.uid == 0,
            "only the user of the bus (uid {own}) and root may take it over"
        );
        ensure!(
            (format, state_format) == (FORMAT, vbus_core::state::FORMAT),
            "vbus {version} hands over in format {format} with states of format {state_format}, \
             and this bus, vbus {}, in format {FORMAT} with {}; restart the bus instead",
            env!("CARGO_PKG_VERSION"),
            vbus_core::state::FORMAT
        );
        Ok(())
    }
}

impl Handler for Control {
    type Request = Request;

    fn admit(&self, peer: &Peer) -> Result<Share> {
        Ok(match lock(&self.rights).admit(peer)? {
            Level::Full => FULL,
            Level::Read => READ,
        })
    }

    fn handle(&self, request: Request, client: &Client<'_>) -> Result<Value> {
        let (op, level) = request.needs();
        lock(&self.rights).check(client.peer(), op, level)?;
        let host = &*self.host;
        // A bus that is being handed over does not change.
        let is_change = matches!(
            request,
            Request::Add { .. }
                | Request::Remove { .. }
                | Request::Set { .. }
                | Request::Reincarnate { .. }
        );
        let _turn = is_change.then(|| host.change());
        match request {
            Request::TakeOver { format, state_format, version } => {
                self.take_over((format, state_format), &version, client)
            }
            Request::Keep { format, state_format, version } => {
                self.keep((format, state_format), &version, client)
            }
            Request::Info => Ok(json!({
                "version": env!("CARGO_PKG_VERSION"),
                "pid": std::process::id(),
                "dir": host.dir(),
                "classes": host.classes(),
                "sandbox": host.protections().inspect(),
                "keeper": host.keeping().map(|keeping| json!({
                    "present": keeping.is_open(),
                    "restarts": keeping.restarts(),
                })),
            })),
            Request::List => Ok(Value::Array(host.inspect(None)?)),
            Request::Show { name } => Ok(host.inspect(Some(&name))?.pop().unwrap_or_default()),
            Request::Reload => {
                let mut listens = true;
                let mut tell = |text: &str, done, total| {
                    // A client that has gone does not stop the reload. One that does not read is
                    // waited for once.
                    listens = listens && client.progress(text, done, total).is_ok();
                };
                Ok(serde_json::to_value(self.reloader.reload(&mut tell)?)?)
            }
            Request::Add { name, class, settings } => {
                let spec = DeviceSpec::new(name, class, settings).map_err(anyhow::Error::msg)?;
                let endpoint = host.add(spec)?;
                host.tell_keeper();
                Ok(host.inspect(Some(endpoint.name()))?.pop().unwrap_or_default())
            }
            Request::Remove { name, force } => {
                host.remove(&name, force)?;
                host.tell_keeper();
                Ok(Value::Null)
            }
            Request::Set { name, settings } => {
                let changed = host.set(&name, settings)?;
                host.tell_keeper();
                Ok(json!({ "name": name, "changed": changed }))
            }
            Request::Reincarnate { name } => {
                let endpoint = host.get(&name)?;
                endpoint.reincarnate();
                host.commit(&name)?;
                Ok(json!({ "name": name, "incarnation": endpoint.inspect()["incarnation"] }))
            }
            Request::Device { name, request } => {
                let endpoint = host.get(&name)?;
                let mut to_commit = endpoint.device().is_kept_request(&request);
                let mut kept = Ok(());
                let mut reply = |value: Value| match value {
                    Value::Null => !client.gone(),
                    value => {
                        // What the client is told is true after a kill, too. A request that
                        // changes something has one answer.
                        if std::mem::take(&mut to_commit) {
                            kept = host.commit(&name);
                        }
                        client.item(value).is_ok()
                    }
                };
                let done = endpoint.device().control(&request, &mut reply);
                if to_commit {
                    kept = host.commit(&name);
                }
                match done {
                    Ok(()) => Ok(kept.map(|()| Value::Null)?),
                    Err(text) => bail!("{name}: {text}"),
                }
            }
        }
    }
}
