// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Functions behind vfio-user sockets. This process takes the place of a guest, without a virtual
//! machine and without root.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::inotify;
use rustix::io::Errno;
use serde_json::{Value, json};
use vbus_control::Connection;
use vbus_process::{ClientError, Patience, Process};

use crate::source::{Found, InUse, Interrupt, Source};
use vbus_cli::rundir;

/// The bytes of memory that a device can reach. The system allocates a page when it is first used.
const MEMORY_BYTES: u64 = 256 << 20;
/// How long a bus may take to answer a request.
const ANSWER: Duration = Duration::from_secs(1);

/// The vfio-user sockets of devices.
#[derive(Debug)]
pub enum SocketSource {
    /// One socket.
    One(PathBuf),
    /// The sockets in the directory of a bus.
    Dir(PathBuf),
}

impl Source for SocketSource {
    type Hal = Process;

    fn scan(&self) -> Result<Vec<Found>> {
        let found = |path: &Path| Found { id: path.display().to_string(), class: None };
        let dir = match self {
            SocketSource::One(path) => {
                return Ok(path.exists().then(|| found(path)).into_iter().collect());
            }
            SocketSource::Dir(dir) => dir,
        };
        let mut sockets = Vec::new();
        for entry in fs::read_dir(dir).with_context(|| format!("no bus in {}", dir.display()))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default();
            let is_socket = path.metadata().is_ok_and(|meta| meta.file_type().is_socket());
            let is_own = rundir::OWN.iter().any(|own| name == *own);
            if is_socket && !is_own && path.extension().is_some_and(|e| e == "sock") {
                sockets.push(found(&path));
            }
        }
        sockets.sort();
        Ok(sockets)
    }

    fn in_use(&self) -> Vec<InUse> {
        let SocketSource::Dir(dir) = self else { return Vec::new() };
        // Who may not ask the bus asks the devices.
        let listed = Connection::connect(&dir.join(rundir::CONTROL), "the bus", ANSWER)
            .map_err(anyhow::Error::from)
            .and_then(|mut bus| bus.stream(&json!({ "op": "list" }), &mut drop));
        let Ok(Value::Array(devices)) = listed else { return Vec::new() };
        let here = fs::canonicalize(dir).ok();
        let used = |device: &Value| {
            let text = |key: &str| device[key].as_str().map(str::to_owned);
            let socket = PathBuf::from(text("socket")?);
            // A socket in another folder may have the name of one in this folder.
            let is_here = fs::canonicalize(socket.parent()?).ok() == here;
            let used = is_here && device["connected"].as_bool()?;
            used.then_some(InUse {
                id: dir.join(socket.file_name()?).display().to_string(),
                name: text("name")?,
                class: text("class")?,
                state: text("state")?,
            })
        };
        devices.iter().filter_map(used).collect()
    }

    fn look(&self, id: &str) -> Result<Process> {
        match Process::connect(id, MEMORY_BYTES) {
            Ok(process) => Ok(process),
            Err(ClientError::Refused { errno: Errno::BUSY, .. }) => {
                bail!("in use by another driver")
            }
            Err(error) => Err(error.into()),
        }
    }

    fn claim(&self, id: &str) -> Result<(Process, Box<dyn Interrupt>)> {
        let process = self.look(id)?;
        Ok((process.clone(), Box::new(ProcessInterrupt(process))))
    }

    fn changes(&self) -> Option<OwnedFd> {
        let SocketSource::Dir(dir) = self else { return None };
        let watch = || {
            let inotify =
                inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
            let flags = inotify::WatchFlags::CREATE
                | inotify::WatchFlags::DELETE
                | inotify::WatchFlags::MOVE;
            inotify::add_watch(&inotify, dir, flags).map(|_| inotify)
        };
        watch().inspect_err(|error| tracing::debug!(%error, "cannot watch {}", dir.display())).ok()
    }

    fn has_left(&self, _id: &str) -> bool {
        match self {
            SocketSource::One(_) => true,
            SocketSource::Dir(dir) => has_bus(dir),
        }
    }

    fn comes_back(&self) -> bool {
        // A bus that starts again makes its sockets again.
        true
    }
}

/// Whether a bus that has made all its devices serves in `dir`. It then answers requests, if only
/// by an error.
fn has_bus(dir: &Path) -> bool {
    let ask = || {
        let mut socket = UnixStream::connect(dir.join(rundir::CONTROL))?;
        socket.set_read_timeout(Some(ANSWER))?;
        socket.set_write_timeout(Some(ANSWER))?;
        socket.write_all(b"{\"op\":\"info\"}\n")?;
        socket.read(&mut [0])
    };
    ask().is_ok_and(|bytes| bytes > 0)
}

/// The interrupt of a device behind a socket: an eventfd.
struct ProcessInterrupt(Process);

impl Interrupt for ProcessInterrupt {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.interrupt()
    }

    fn lifeline(&self) -> BorrowedFd<'_> {
        self.0.socket()
    }

    fn take(&mut self) -> Result<()> {
        self.0.take_interrupt();
        Ok(())
    }

    fn enable(&mut self) -> Result<()> {
        // The eventfd is always enabled: the device writes it whenever the driver has armed a
        // signal.
        Ok(())
    }

    fn set_patience(&self, patience: Patience) {
        self.0.set_patience(patience);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_device_has_left_only_if_its_bus_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let source = SocketSource::Dir(dir.path().to_owned());
        assert!(!source.has_left("nic"), "there is no bus");
        let listener = UnixListener::bind(dir.path().join(rundir::CONTROL)).unwrap();
        assert!(!source.has_left("nic"), "the bus makes its devices first");
        let bus = std::thread::spawn(move || {
            for socket in listener.incoming() {
                let mut socket = socket.unwrap();
                let mut answer = || {
                    socket.read_exact(&mut [0])?;
                    socket.write_all(b"{\"error\":\"no\"}\n")?;
                    // The client closes when it has the answer.
                    std::io::copy(&mut socket, &mut std::io::sink())
                };
                // A client that gave up is no reason to end.
                let _ = answer();
            }
        });
        let began = Instant::now();
        while !source.has_left("nic") {
            assert!(began.elapsed() < Duration::from_secs(60));
            assert!(!bus.is_finished());
        }
    }
}
