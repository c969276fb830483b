// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A descriptor whose close waits.
#![allow(unsafe_code)] // The option of a socket has no wrapper.

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

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

/// Sends `bytes` over a UNIX socket, and [`lingering`] along with them. Whoever closes that last
/// waits until the result is dropped.
///
/// # Panics
/// If the socket takes no descriptors, or not all of `bytes`.
pub fn send_lingering(socket: impl AsFd, bytes: &[u8]) -> TcpStream {
    let (fd, peer) = lingering();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let rights = [fd.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&rights));
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL);
    assert_eq!(sent, Ok(bytes.len()));
    // The receiver may have closed it already. Then this close is the last, and waits.
    std::thread::spawn(move || drop(fd));
    peer
}

/// Lets a UNIX socket take descriptors again that was told to refuse them (`SO_PASSRIGHTS`), and a
/// listening one those of its clients: as a kernel before Linux 6.16 does.
pub fn take_descriptors(socket: impl AsFd) {
    const SO_PASSRIGHTS: i32 = 83;
    let (yes, raw) = (1_i32, socket.as_fd().as_raw_fd());
    let size = libc::socklen_t::try_from(size_of_val(&yes)).unwrap();
    // SAFETY: the kernel reads the bytes of an `i32`. A kernel that does not know the option takes
    // descriptors anyway.
    unsafe {
        libc::setsockopt(raw, libc::SOL_SOCKET, SO_PASSRIGHTS, (&raw const yes).cast(), size)
    };
}
