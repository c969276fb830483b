// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sockets that the service manager has made for the bus (sd_listen_fds(3)): the control socket, or
//! sockets of devices.
#![allow(unsafe_code)] // The descriptors come as numbers.

use std::collections::HashMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{SocketAddrUnix, getsockname, sockopt};
use vbus_core::lock;

/// The first descriptor that a service manager passes.
const FIRST: RawFd = 3;
/// More than any configuration has.
const COUNT_MAX: RawFd = 4096;

/// The sockets, by path. They stay open, so that a device that is made anew finds its socket again.
#[derive(Default)]
pub struct Inherited(Mutex<HashMap<PathBuf, Socket>>);

struct Socket {
    descriptor: OwnedFd,
    /// Whoever uses it has a clone.
    user: Arc<()>,
}

/// The use of an inherited socket. While it lives, nobody else gets the socket.
pub struct Lease(#[expect(dead_code, reason = "it counts")] Arc<()>);

impl Inherited {
    /// Takes the descriptors that the environment names: LISTEN_FDS, if LISTEN_PID is this process,
    /// or its keeper, which `is_kept` says that it has. The process must call this once, before it
    /// opens any descriptor by number or closes one that it has not opened.
    pub fn of_environment(is_kept: bool) -> Inherited {
        let number = |name| std::env::var(name).ok()?.parse::<RawFd>().ok();
        let parent = rustix::process::getppid().filter(|_| is_kept);
        let of = [Some(rustix::process::getpid()), parent]
            .map(|pid| pid.map(|pid| pid.as_raw_nonzero().get()));
        let is_mine = number("LISTEN_PID").is_some_and(|pid| of.contains(&Some(pid)));
        let count = number("LISTEN_FDS").filter(|_| is_mine).unwrap_or(0).clamp(0, COUNT_MAX);
        let mut sockets = HashMap::new();
        for raw in FIRST..FIRST + count {
            // SAFETY: by sd_listen_fds(3) these descriptors are open and belong to this process.
            // The caller promises that nothing else uses them.
            let socket = unsafe { OwnedFd::from_raw_fd(raw) };
            match prepare(&socket) {
                Ok(path) => drop(sockets.insert(path, Socket::new(socket))),
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

    /// The socket that listens at `path`. `None`: there is none, or somebody uses it.
    ///
    /// # Errors
    /// This process has no more descriptors.
    pub fn take(&self, path: &Path) -> io::Result<Option<(OwnedFd, Lease)>> {
        let sockets = lock(&self.0);
        let Some(socket) = sockets.get(path).filter(|socket| Arc::strong_count(&socket.user) == 1)
        else {
            return Ok(None);
        };
        let descriptor = socket.descriptor.try_clone()?;
        Ok(Some((descriptor, Lease(socket.user.clone()))))
    }

    /// Whether the socket at `path` is one of these.
    pub fn has(&self, path: &Path) -> bool {
        lock(&self.0).contains_key(path)
    }
}

impl Inherited {
    /// Adds a socket that the service manager has made for a former process of the bus.
    pub fn add(&self, path: PathBuf, descriptor: OwnedFd) {
        lock(&self.0).entry(path).or_insert_with(|| Socket::new(descriptor));
    }

    /// Duplicates of all of them.
    ///
    /// # Errors
    /// This process has no more descriptors.
    pub fn all(&self) -> io::Result<Vec<(PathBuf, OwnedFd)>> {
        let one = |(path, socket): (&PathBuf, &Socket)| {
            Ok((path.clone(), socket.descriptor.try_clone()?))
        };
        lock(&self.0).iter().map(one).collect()
    }
}

impl Socket {
    fn new(descriptor: OwnedFd) -> Socket {
        Socket { descriptor, user: Arc::default() }
    }
}

/// Makes an inherited socket like those that the bus makes. Returns where it listens.
fn prepare(socket: &OwnedFd) -> io::Result<PathBuf> {
    fcntl_setfd(socket, FdFlags::CLOEXEC)?;
    if !sockopt::socket_acceptconn(socket)? {
        return Err(io::Error::other("it does not listen"));
    }
    let address = SocketAddrUnix::try_from(getsockname(socket)?)?;
    let path = address.path().and_then(|path| path.to_str().map(PathBuf::from).ok());
    let path = path.ok_or_else(|| io::Error::other("it has no path"))?;
    fcntl_setfl(socket, fcntl_getfl(socket)? | OFlags::NONBLOCK)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_has_one_user_at_a_time_and_outlives_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let sockets = HashMap::from([(path.clone(), Socket::new(listener.into()))]);
        let inherited = Inherited(Mutex::new(sockets));
        let (first, lease) = inherited.take(&path).unwrap().unwrap();
        assert!(inherited.take(&path).unwrap().is_none());
        drop((first, lease));
        let again = inherited.take(&path).unwrap().unwrap();
        std::os::unix::net::UnixStream::connect(&path).unwrap();
        assert!(sockopt::socket_acceptconn(&again.0).unwrap());
        assert!(inherited.take(dir.path()).unwrap().is_none());
    }
}
