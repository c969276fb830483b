// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A socket that the bus listens at, and its file.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::access::Access;

/// A listening socket with its file.
pub struct Socket {
    listener: OwnedFd,
    file: SocketFile,
}

/// The file of a socket. Dropping this removes the file, unless another one has taken its place.
pub struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Socket {
    /// Makes a non-blocking socket that listens at `path`, for the clients that `access` allows.
    /// Nobody else can connect at any time. `backlog` clients can wait. Replaces a socket there
    /// that has no listener.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] if somebody listens there, or if something else than a socket
    /// is there; what `access` says cannot be set; or the system refuses.
    pub fn listen(path: &Path, backlog: i32, access: &Access) -> io::Result<Socket> {
        let listener = vbus_vfio_user::bind_private(path, backlog)?;
        let file = SocketFile { path: path.to_owned(), identity: identity(path) };
        access.apply(path)?;
        Ok(Socket { listener, file })
    }

    /// The listener and the file.
    pub fn into_parts(self) -> (OwnedFd, SocketFile) {
        (self.listener, self.file)
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
    std::fs::symlink_metadata(path).ok().map(|data| (data.dev(), data.ino()))
}
