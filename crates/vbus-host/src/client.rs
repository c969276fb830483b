// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client of a running bus, over its control socket. `vbus device`, `vbus state` and the other
//! commands use it.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use vbus_control::Connection;

use vbus_cli::rundir::{self, CONTROL};

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
        checked.and_then(|()| client.socket().map(drop)).map_err(|error| {
            match error.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
                Some(NotFound | ConnectionRefused) => anyhow!(
                    "no bus serves in {dir}; start one with `vbus serve --dir {dir}`, or name its \
                     directory with --dir",
                    dir = client.dir.display()
                ),
                Some(PermissionDenied) => error.context(
                    "you may not control this bus: its table [control] names the groups that may",
                ),
                _ => error,
            }
        })?;
        Ok(client)
    }

    fn socket(&self) -> Result<UnixStream> {
        let path = self.dir.join(CONTROL);
        rundir::check_socket_path(&path)?;
        UnixStream::connect(&path).with_context(|| path.display().to_string())
    }

    /// The directory of the bus's sockets.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Sends a request and returns its answer.
    pub fn ask(&self, request: &Value) -> Result<Value> {
        self.stream(request, &mut |_| {})
    }

    /// Sends a request, passes each answer except the last to `item`, and returns the last.
    pub fn stream(&self, request: &Value, item: &mut dyn FnMut(Value)) -> Result<Value> {
        let socket = self.socket().context("the bus has gone")?;
        Connection::new(socket, "the bus").stream(request, item)
    }

    /// Asks the bus for all devices.
    pub fn list(&self) -> Result<Vec<Value>> {
        match self.ask(&json!({ "op": "list" }))? {
            Value::Array(devices) => Ok(devices),
            _ => bail!("the bus sent an answer that is no list of devices"),
        }
    }

    /// Sends `request` to the device `name` itself.
    pub fn device(
        &self,
        name: &str,
        request: &Value,
        item: &mut dyn FnMut(Value),
    ) -> Result<Value> {
        self.stream(&json!({ "op": "device", "name": name, "request": request }), item)
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
