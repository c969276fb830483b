// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which process is at the other end of a socket.
#![allow(unsafe_code)] // rustix reads the credentials into a type that cannot hold the process 0.

use std::os::fd::{AsFd, AsRawFd};

/// The id of the process that connected to this UNIX socket. 0: it is in another pid namespace, or
/// the kernel does not tell.
pub(crate) fn process(socket: impl AsFd) -> i32 {
    let mut own = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut size = libc::socklen_t::try_from(size_of_val(&own)).unwrap_or(0);
    let (level, name, raw) = (libc::SOL_SOCKET, libc::SO_PEERCRED, socket.as_fd().as_raw_fd());
    // SAFETY: the kernel writes at most `size` bytes to `own`, and any bytes are a valid `ucred`.
    unsafe { libc::getsockopt(raw, level, name, (&raw mut own).cast(), &raw mut size) };
    own.pid
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_kernel_tells_who_connected() {
        let (one, _other) = UnixStream::pair().expect("sockets");
        assert_eq!(process(one), i32::try_from(std::process::id()).expect("an id"));
    }
}
