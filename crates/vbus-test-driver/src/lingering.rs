// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A descriptor whose close waits.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// A TCP socket whose close waits: it lingers, its peer reads nothing, and its data is not sent.
/// Dropping the peer, which is the second value, ends the wait.
///
/// # Panics
/// If this machine has no TCP.
pub fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 65536]).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    let for_ever = Some(Duration::from_secs(24 * 3600));
    rustix::net::sockopt::set_socket_linger(&socket, for_ever).unwrap();
    (socket.into(), peer)
}
