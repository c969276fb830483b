// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The listening socket and its file.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen as listen_on,
};

/// The most connections that wait in the backlog.
const BACKLOG: i32 = 64;

/// The file of a listening socket. Dropping this removes the file, if this process made it and no
/// other file has taken its place.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    /// A file of somebody else, who removes it.
    pub(crate) fn foreign(path: PathBuf) -> SocketFile {
        SocketFile { path, identity: None }
    }

    /// From now on the file is somebody else's.
    pub(crate) fn give_up(&mut self) {
        self.identity = None;
    }

    pub(crate) fn path(&self) -> &PathBuf {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

fn stream_socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | flags,
        None,
    )
}

/// Listens at `path`. The socket has mode 0600 from its beginning.
pub(crate) fn listen(path: &Path) -> io::Result<(OwnedFd, SocketFile)> {
    let socket = bind_private(path, BACKLOG)?;
    Ok((socket, SocketFile { path: path.to_owned(), identity: identity(path) }))
}

/// Makes a UNIX stream socket that listens at `path`. It has mode 0600 from its beginning, so that
/// only its owner can connect. It is non-blocking, and `backlog` clients can wait. It replaces a
/// socket at which nobody listens any more.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] if somebody listens there, or if the path has something other than
/// a socket. Otherwise an error of the system.
pub fn bind_private(path: &Path, backlog: i32) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket = stream_socket(SocketFlags::NONBLOCK)?;
    // The file gets the mode of the socket, without the bits of the umask.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            remove_stale(path, &address)?;
            bind(&socket, &address)?;
        }
        other => other?,
    }
    if let Err(error) = listen_on(&socket, backlog) {
        let _ = std::fs::remove_file(path);
        return Err(error.into());
    }
    Ok(socket)
}

/// Removes a socket file at which nobody listens.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> io::Result<()> {
    let in_use = |what: &str| {
        io::Error::new(io::ErrorKind::AddrInUse, format!("{}: {what}", path.display()))
    };
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(in_use("exists and is not a socket"));
    }
    // A server with a full backlog is alive. Without NONBLOCK, this call would wait for it.
    match connect(stream_socket(SocketFlags::NONBLOCK)?, address) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path),
        _ => Err(in_use("another server listens there already")),
    }
}
