// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connections over which no descriptor may come.
//!
//! A client can send descriptors along over any UNIX socket, and whoever reads without looking for
//! them closes them: a close that can wait for the client ([`Closer`]). Linux 6.16
//! can refuse them (`SO_PASSRIGHTS`). For older kernels these functions look for them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

use crate::closer::{Closer, PeerFds};
use crate::socket::{SocketSource, Source};

/// How often a connection is read before it is closed.
const READS: u32 = 64;

/// Reads from a socket. `wait` says whether it waits for data if there is none. Descriptors that
/// come along go to `closer`. If this process has as many as it may have, the kernel closes them
/// here.
///
/// # Errors
/// [`Errno::PROTO`]: descriptors came along, so the connection should end. [`Errno::AGAIN`]: there
/// is no data. Otherwise as for recvmsg(2); never [`Errno::INTR`].
pub fn recv(
    socket: BorrowedFd<'_>,
    wait: bool,
    buffer: &mut [u8],
    closer: &Closer,
) -> Result<usize, Errno> {
    let mut fds = PeerFds::new(closer.clone());
    let mut source = SocketSource::new(socket);
    source.wait = wait;
    let bytes = source.recv(buffer, fds.list())?;
    if fds.as_slice().is_empty() && !source.lost_fds() { Ok(bytes) } else { Err(Errno::PROTO) }
}

/// Ends a connection and closes its socket without waiting. What the peer has sent is read first,
/// because the close of a socket closes the descriptors that nobody has received. If there are
/// some, or there is much to read, `closer` closes the socket.
pub fn close(socket: OwnedFd, closer: &Closer) {
    // From here on nothing more can come.
    let _ = shutdown(&socket, Shutdown::Both);
    for _ in 0..READS {
        match recv(socket.as_fd(), false, &mut [0; 4096], closer) {
            Ok(1..) => {}
            // There may be more of them than this process can take in.
            Err(Errno::PROTO) => break,
            Ok(0) | Err(_) => return,
        }
    }
    closer.close(socket);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use vbus_test_driver::send_lingering;

    use super::*;

    #[test]
    fn descriptors_that_come_along_make_nobody_wait() {
        let closer = Closer::new();
        let (end, mut own) = UnixStream::pair().unwrap();
        own.write_all(b"ab").unwrap();
        let mut buffer = [0; 8];
        let mut read = || recv(end.as_fd(), false, &mut buffer, &closer);
        assert_eq!(read(), Ok(2));
        let first = send_lingering(&own, b"x");
        let second = send_lingering(&own, b"x");
        own.write_all(b"c").unwrap();
        assert_eq!(read(), Err(Errno::PROTO));
        close(end.into(), &closer);
        assert_eq!(closer.waiting(), 3, "both descriptors, and the socket");
        assert_eq!(own.read(&mut [0]).unwrap(), 0, "the connection has ended");
        drop((first, second));
        while closer.is_at_work() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_peer_of_a_closed_socket_gets_the_answer_and_then_the_end() {
        let (mut end, mut own) = UnixStream::pair().unwrap();
        own.write_all(b"question").unwrap();
        end.write_all(b"answer").unwrap();
        let closer = Closer::new();
        close(end.into(), &closer);
        let mut answer = String::new();
        own.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
        assert!(!closer.is_at_work());
    }
}
