// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sockets that the service manager has made for the bus (sd_listen_fds(3)): the control socket, or
//! sockets of devices.
#![allow(unsafe_code)] // The descriptors come as numbers.

use std::collections::HashMap;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{SocketAddrUnix, getsockname, sockopt};
use vbus_core::lock;

/// The first descriptor that a service manager passes.
const FIRST: RawFd = 3;
/// More than any configuration has.
const COUNT_MAX: RawFd = 4096;

/// The sockets that nobody has taken yet, by path.
#[derive(Default)]
pub struct Inherited(Mutex<HashMap<PathBuf, OwnedFd>>);

impl Inherited {
    /// Takes the descriptors that the environment names: LISTEN_FDS, if LISTEN_PID is this process.
    /// The process must call this once, before it opens any descriptor by number or closes one that
    /// it has not opened.
    pub fn of_environment() -> Inherited {
        let number = |name| std::env::var(name).ok()?.parse::<RawFd>().ok();
        let is_mine = number("LISTEN_PID")
            .is_some_and(|pid| pid == rustix::process::getpid().as_raw_nonzero().get());
        let count = number("LISTEN_FDS").filter(|_| is_mine).unwrap_or(0).clamp(0, COUNT_MAX);
        let mut sockets = HashMap::new();
        for raw in FIRST..FIRST + count {
            // SAFETY: by sd_listen_fds(3) these descriptors are open and belong to this process.
            // The caller promises that nothing else uses them.
            let socket = unsafe { OwnedFd::from_raw_fd(raw) };
            match prepare(&socket) {
                Ok(path) => drop(sockets.insert(path, socket)),
                Err(error) => {
                    tracing::warn!(
                        descriptor = raw, %error,
                        "the service manager passed what is no listening UNIX socket; it is ignored"
                    );
                }
            }
        }
        Inherited(Mutex::new(sockets))
    }

    /// Takes the socket that listens at `path`.
    pub fn take(&self, path: &Path) -> Option<OwnedFd> {
        lock(&self.0).remove(path)
    }
}

/// Makes an inherited socket like those that the bus makes. Returns where it listens.
fn prepare(socket: &OwnedFd) -> std::io::Result<PathBuf> {
    fcntl_setfd(socket, FdFlags::CLOEXEC)?;
    if !sockopt::socket_acceptconn(socket)? {
        return Err(std::io::Error::other("it does not listen"));
    }
    let address = SocketAddrUnix::try_from(getsockname(socket)?)?;
    let path = address.path().and_then(|path| path.to_str().map(PathBuf::from).ok());
    let path = path.ok_or_else(|| std::io::Error::other("it has no path"))?;
    fcntl_setfl(socket, fcntl_getfl(socket)? | OFlags::NONBLOCK)?;
    Ok(path)
}
