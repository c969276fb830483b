//! A running bus as `vbus device`, `vbus state` and the others see it: by its control socket.

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

/// A connection to a running bus.
pub struct Client {
    connection: Connection,
    dir: PathBuf,
}

impl Client {
    /// Connects to the bus that serves in `dir` (see [`rundir::choose`]).
    pub fn connect(dir: Option<&Path>) -> Result<Client> {
        let dir = rundir::choose(dir);
        let hint = || {
            format!(
                "start one with `vbus serve --dir {}`, or say where it is with --dir",
                dir.display()
            )
        };
        rundir::check(&dir).with_context(hint)?;
        let path = dir.join(CONTROL);
        let socket = UnixStream::connect(&path).map_err(|error| {
            use std::io::ErrorKind::{ConnectionRefused, NotFound};
            match error.kind() {
                NotFound | ConnectionRefused => {
                    anyhow!("no bus serves in {}; {}", dir.display(), hint())
                }
                _ => anyhow!("{}: {error}", path.display()),
            }
        })?;
        Ok(Client { connection: Connection::new(socket, "the bus"), dir })
    }

    /// Where the bus has its sockets.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Sends a request and returns its answer.
    pub fn ask(&mut self, request: &Value) -> Result<Value> {
        self.stream(request, &mut |_| {})
    }

    /// Sends a request and hands each of its answers but the last to `item`.
    pub fn stream(&mut self, request: &Value, item: &mut dyn FnMut(Value)) -> Result<Value> {
        self.connection.stream(request, item)
    }

    /// All devices.
    pub fn list(&mut self) -> Result<Vec<Value>> {
        match self.ask(&json!({ "op": "list" }))? {
            Value::Array(devices) => Ok(devices),
            _ => bail!("the bus answers nonsense"),
        }
    }

    /// A request to a device itself.
    pub fn device(
        &mut self,
        name: &str,
        request: &Value,
        item: &mut dyn FnMut(Value),
    ) -> Result<()> {
        self.stream(&json!({ "op": "device", "name": name, "request": request }), item).map(drop)
    }
}

/// The text of a member.
pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("-")
}
