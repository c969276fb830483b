// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client of a running bus, over its control socket. `vbus device`, `vbus state` and the other
//! commands use it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use vbus_cli::progress::Progress;
use vbus_cli::rundir::{self, CONTROL};
use vbus_control::Connection;

/// How long the bus may take to accept a connection, and to answer a request that only reads.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long the bus may do nothing while a request changes something. Reports of progress count.
const LONG_TIMEOUT: Duration = Duration::from_secs(60);

/// Where the bus is.
#[derive(clap::Args, Clone, Debug)]
pub struct BusDir {
    /// Directory of the bus's sockets [default: $XDG_RUNTIME_DIR/vbus, or else /tmp/vbus-UID]
    #[arg(long = "dir", value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// A running bus. Each request has its own connection, because the bus disconnects a client that is
/// silent, and any time may pass between two requests.
pub struct Client {
    dir: PathBuf,
}

impl Client {
    /// Connects to the bus that serves in `dir` (see [`rundir::choose`]).
    ///
    /// # Errors
    /// No bus serves there now.
    pub fn connect(dir: Option<&Path>) -> Result<Client> {
        use std::io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
        let client = Client { dir: rundir::choose(dir) };
        let checked = match dir {
            // The user named the directory, so the bus in it may be that of another user.
            Some(_) => rundir::check_writers(&client.dir).map(drop),
            None => rundir::check(&client.dir),
        };
        checked.and_then(|()| client.connection(TIMEOUT).map(drop)).map_err(|error| match error
            .downcast_ref::<std::io::Error>()
            .map(std::io::Error::kind)
        {
            Some(NotFound | ConnectionRefused) => anyhow!(
                "no bus serves in {dir}; start one with `vbus serve --dir {dir}`, or name its \
                     directory with --dir",
                dir = client.dir.display()
            ),
            Some(PermissionDenied) => error.context(
                "you may not control this bus: its table [control] names the groups that may",
            ),
            _ => error,
        })?;
        Ok(client)
    }

    fn connection(&self, timeout: Duration) -> Result<Connection> {
        let path = self.dir.join(CONTROL);
        rundir::check_socket_path(&path)?;
        Connection::connect(&path, "the bus", timeout)
            .with_context(|| path.display().to_string())
            .map_err(hint)
    }

    /// The directory of the bus's sockets.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Sends a request that only reads, and returns its answer.
    pub fn ask(&self, request: &Value) -> Result<Value> {
        self.send(request, TIMEOUT, |_| {}, &mut |_| {})
    }

    /// Sends a request that may take long, and returns its answer. A terminal shows how far the bus
    /// is.
    pub fn order(&self, request: &Value) -> Result<Value> {
        let show = |connection: &mut Connection| {
            let mut progress = Progress::new();
            connection.on_progress(move |report| progress.show(&report.to_string()));
        };
        self.send(request, LONG_TIMEOUT, show, &mut |_| {})
    }

    fn send(
        &self,
        request: &Value,
        timeout: Duration,
        set_up: impl FnOnce(&mut Connection),
        item: &mut dyn FnMut(Value),
    ) -> Result<Value> {
        let mut connection = self.connection(timeout).context("the bus has gone")?;
        set_up(&mut connection);
        connection.stream(request, item).map_err(hint)
    }

    /// Asks the bus for all devices.
    pub fn list(&self) -> Result<Vec<Value>> {
        match self.ask(&json!({ "op": "list" }))? {
            Value::Array(devices) => Ok(devices),
            _ => bail!("the bus sent an answer that is no list of devices"),
        }
    }

    /// Sends `request` to the device `name` itself, passes each answer except the last to `item`,
    /// and returns the last. Behind the first answer, any time may pass until the next.
    pub fn device(
        &self,
        name: &str,
        request: &Value,
        item: &mut dyn FnMut(Value),
    ) -> Result<Value> {
        let request = json!({ "op": "device", "name": name, "request": request });
        self.send(&request, LONG_TIMEOUT, Connection::set_endless, item)
    }
}

/// Adds what to do to an error that the bus was too slow.
fn hint(error: anyhow::Error) -> anyhow::Error {
    let cause = error.downcast_ref::<std::io::Error>();
    match cause.map(std::io::Error::kind) {
        Some(std::io::ErrorKind::TimedOut) => anyhow!(
            "{error:#}; is its process stopped, or out of descriptors? Its log may say more"
        ),
        _ => error,
    }
}

/// The text of the member `key`, or "-" if `value` has none.
pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn each_request_has_its_own_connection() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let listener = UnixListener::bind(dir.path().join(CONTROL)).unwrap();
        let bus = std::thread::spawn(move || {
            // The first connection is that of `connect`, which sends no request.
            let mut asked = 0;
            while asked < 2 {
                let (mut socket, _) = listener.accept().unwrap();
                let mut line = String::new();
                if BufReader::new(&socket).read_line(&mut line).unwrap() > 0 {
                    asked += 1;
                    socket.write_all(format!("{{\"ok\":{asked}}}\n").as_bytes()).unwrap();
                }
            }
        });
        let client = Client::connect(Some(dir.path())).unwrap();
        assert_eq!(client.ask(&json!({ "op": "info" })).unwrap(), 1);
        assert_eq!(client.ask(&json!({ "op": "info" })).unwrap(), 2);
        bus.join().unwrap();
        assert!(client.ask(&json!({ "op": "info" })).unwrap_err().to_string().contains("has gone"));
    }
}
