// SPDX-License-Identifier: Apache-2.0 OR MIT
//! UNIX sockets that this program makes.

use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result};

/// Clients that wait to be accepted.
const BACKLOG: i32 = 16;

/// Listens on `path` as [`vfio_user_protocol::bind_private`] does.
pub fn listen(path: &Path) -> Result<UnixListener> {
    let socket = vfio_user_protocol::bind_private(path, BACKLOG);
    socket
        .map(UnixListener::from)
        .with_context(|| format!("cannot make the socket {}", path.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let first = listen(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(format!("{:#}", listen(&path).unwrap_err()).contains("already"));
        drop(first);
        listen(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "a file").unwrap();
        assert!(listen(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    }
}
