// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Refuses a client that connects while the server has another one. The reply to its `VERSION` is
//! an error, so that the user of that client learns the reason.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, recv};

use crate::message::{self, HEADER_LEN, Header, Kind};
use crate::socket::Sender;

/// A client that the server refuses, from its connection to the reply to its `VERSION`.
pub(crate) struct Refused {
    pub(crate) socket: OwnedFd,
    pub(crate) token: u64,
    /// The time at which the server closes the socket without a reply.
    pub(crate) until: Instant,
}

impl Refused {
    pub(crate) fn new(socket: OwnedFd, token: u64, until: Instant) -> Self {
        Self { socket, token, until }
    }

    /// Replies when `VERSION` has come. Returns false when the refusal is complete, so that the
    /// caller can close the socket.
    ///
    /// It only looks at the bytes. To take them is to take, and to close, what descriptors came
    /// with them. A client that sends a header in pieces gets no reply.
    pub(crate) fn go_on(&mut self) -> bool {
        let mut head = [0; HEADER_LEN];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match retry_on_intr(|| recv(&self.socket, &mut head[..], flags)) {
            Err(Errno::AGAIN) => return true,
            Ok((_, HEADER_LEN)) => {}
            _ => return false,
        }
        if let Ok(Header { id, command, .. }) = Header::parse(&head) {
            let error = Some(Errno::BUSY.raw_os_error().unsigned_abs());
            let mut sender = Sender::default();
            sender.push(message::message(id, command, Kind::Reply { error }, &[]), Vec::new());
            let _ = sender.flush(self.socket.as_fd());
        }
        false
    }
}
