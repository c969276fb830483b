// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A socket that the bus listens at, and its file.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::permits::{Permits, Purpose};
use super::place::{Place, Places};
use crate::access::Access;

/// The file of a socket. Dropping this removes the file, unless another one has taken its place.
pub struct SocketFile {
    place: Place,
    identity: Option<(u64, u64)>,
}

/// Makes a non-blocking socket that listens at `place`, for the clients that `access` allows.
/// Nobody else can connect at any time. `backlog` clients can wait. Replaces a socket there that
/// has no listener. Returns the socket and its file.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] if somebody listens there, or if something else than a socket is
/// there; what `access` says cannot be set; or the system refuses.
pub fn listen(place: Place, backlog: i32, access: &Access) -> io::Result<(OwnedFd, SocketFile)> {
    let path = place.path();
    let listener = vbus_vfio_user::bind_private(&path, backlog)?;
    let file = SocketFile { place, identity: identity(&path) };
    access.apply(&path)?;
    Ok((listener, file))
}

/// Takes charge of the socket at `place`, which a former bus has left.
///
/// # Errors
/// There is none.
pub fn inherit(place: Place) -> io::Result<SocketFile> {
    let path = place.path();
    if !std::fs::symlink_metadata(&path)?.file_type().is_socket() {
        return Err(io::Error::other("it is no socket"));
    }
    Ok(SocketFile { place, identity: identity(&path) })
}

/// Removes the files of sockets that a bus has left which nobody goes on with. Those that `permits`
/// does not allow stay, and so does what is no socket: a bus that was taken over has named them.
pub fn remove_left(permits: Permits, paths: impl IntoIterator<Item = PathBuf>) {
    let places = Places::new(permits);
    for path in paths {
        let Some(text) = path.to_str() else { continue };
        let found = places.find(text, Purpose::Listen).and_then(inherit);
        if let Err(error) = found {
            tracing::debug!(%error, "{text} stays");
        }
    }
}

impl SocketFile {
    /// Leaves the file as it is, for another bus.
    pub fn leave(mut self) {
        self.identity = None;
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let path = self.place.path();
        if self.identity.is_some() && identity(&path) == self.identity {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|data| (data.dev(), data.ino()))
}
