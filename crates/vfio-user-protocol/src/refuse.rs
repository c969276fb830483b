// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client that connects while another one is served. Its `VERSION` gets an error as reply, so
//! that its user learns the reason.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::io::Errno;

use crate::message::{self, HEADER_LEN, Header, Kind};
use crate::socket::Sender;

/// A client that is refused, from its connection to the reply to its `VERSION`.
pub(crate) struct Refused {
    socket: OwnedFd,
    pub(crate) token: u64,
    head: [u8; HEADER_LEN],
    have: usize,
    /// The time at which the socket is closed without a reply.
    pub(crate) until: Instant,
}

impl Refused {
    pub(crate) fn new(socket: OwnedFd, token: u64, until: Instant) -> Self {
        Self { socket, token, head: [0; HEADER_LEN], have: 0, until }
    }

    /// Reads on, and replies once the header of the `VERSION` is there. `false`: the refusal is
    /// done, and the socket can be closed.
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
            // A close with unread data would look like a failure and not like an end.
            let _ = rustix::io::read(&self.socket, &mut [0; 4096]);
        }
        false
    }
}
