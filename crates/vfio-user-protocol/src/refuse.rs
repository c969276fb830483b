// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Refuses a client that connects while the server has another one. The reply to its `VERSION` is
//! an error, so that the user of that client learns the reason.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::io::Errno;

use crate::message::{self, HEADER_LEN, Header, Kind};
use crate::socket::Sender;

/// A client that the server refuses, from its connection to the reply to its `VERSION`.
pub(crate) struct Refused {
    socket: OwnedFd,
    pub(crate) token: u64,
    head: [u8; HEADER_LEN],
    have: usize,
    /// The time at which the server closes the socket without a reply.
    pub(crate) until: Instant,
}

impl Refused {
    pub(crate) fn new(socket: OwnedFd, token: u64, until: Instant) -> Self {
        Self { socket, token, head: [0; HEADER_LEN], have: 0, until }
    }

    /// Reads more bytes, and replies when the header of `VERSION` is complete. Returns false when
    /// the refusal is complete, so that the caller can close the socket.
    pub(crate) fn go_on(&mut self) -> bool {
        while self.have < HEADER_LEN {
            match rustix::io::read(&self.socket, &mut self.head[self.have..]) {
                Ok(0) => return false,
                Ok(n) => self.have += n,
                Err(Errno::AGAIN) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        if let Ok(Header { id, command, .. }) = Header::parse(&self.head) {
            let error = Some(Errno::BUSY.raw_os_error().unsigned_abs());
            let mut sender = Sender::default();
            sender.push(message::message(id, command, Kind::Reply { error }, &[]), Vec::new());
            let _ = sender.flush(self.socket.as_fd());
            // If the socket closes with unread data, the client gets an error instead of the end of
            // the stream.
            let _ = rustix::io::read(&self.socket, &mut [0; 4096]);
        }
        false
    }
}
