// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connections of which none is the server's client yet.
//!
//! A connection becomes the client with its first message, `VERSION`, and not before. So one that
//! stays silent, or stops within a message, keeps no other one out. While a server has a client,
//! the others wait for a moment: the client may be about to leave. Then their `VERSION` is answered
//! with an error.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread, retry_on_intr};
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};

use crate::closer::Closer;
use crate::message::{self, HEADER_LEN, Header, Kind};
use crate::peer::process;
use crate::session::Session;
use crate::socket::Sender;

/// The most candidates of a server.
pub(crate) const MAX: usize = 16;

/// A connection that is not the client.
pub(crate) struct Candidate {
    pub(crate) socket: OwnedFd,
    pub(crate) token: u64,
    /// The number of the connection, for the log.
    pub(crate) number: u64,
    /// The process that connected (see [`process`]).
    peer: i32,
    /// Its first message is there, or what is there is no message.
    pub(crate) has_spoken: bool,
    /// A part of its first message is there.
    pub(crate) has_begun: bool,
    /// It may be silent until then.
    pub(crate) until: Instant,
    /// Another client is waited for until then.
    pub(crate) refuse_at: Instant,
    pub(crate) closer: Closer,
}

/// What became of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It waits.
    Waits,
    /// It has gone.
    Gone,
}

impl Candidate {
    pub(crate) fn new(
        socket: OwnedFd,
        token: u64,
        number: u64,
        until: Instant,
        refuse_at: Instant,
    ) -> Candidate {
        Candidate {
            peer: process(&socket),
            socket,
            token,
            number,
            has_spoken: false,
            has_begun: false,
            until,
            refuse_at,
            closer: Closer::new(),
        }
    }

    /// Looks at what has come. It takes nothing: to take bytes is to take, and to close, what
    /// descriptors came with them.
    pub(crate) fn hear(&mut self) -> Heard {
        if self.has_spoken {
            return Heard::Waits;
        }
        match self.head() {
            Err(Errno::AGAIN) => return Heard::Waits,
            Err(_) | Ok((_, 0)) => return Heard::Gone,
            Ok((head, HEADER_LEN)) => {
                let size = Header::parse(&head).map(|header| header.size as usize);
                let whole = |size: &usize| *size <= Session::default().max_message();
                // With a header that is wrong, the session says what is wrong.
                let needed = size.ok().filter(whole).unwrap_or(0);
                let have = ioctl_fionread(&self.socket).unwrap_or(0);
                self.has_spoken = have >= needed as u64;
            }
            Ok(_) => {}
        }
        self.has_begun = true;
        if !self.has_spoken && has_hung_up(&self.socket) { Heard::Gone } else { Heard::Waits }
    }

    /// The first bytes, and how many of them are there.
    fn head(&self) -> Result<([u8; HEADER_LEN], usize), Errno> {
        let mut head = [0; HEADER_LEN];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let (_, have) = retry_on_intr(|| recv(&self.socket, &mut head[..], flags))?;
        Ok((head, have))
    }

    /// Answers the first message, if it is there, with an error: there is another client. Then
    /// closes the connection.
    pub(crate) fn refuse(self) {
        if let Ok((head, HEADER_LEN)) = self.head() {
            if let Ok(Header { id, command, .. }) = Header::parse(&head) {
                let error = Some(Errno::BUSY.raw_os_error().unsigned_abs());
                let mut sender = Sender::default();
                sender.push(message::message(id, command, Kind::Reply { error }, &[]), Vec::new());
                let _ = sender.flush(self.socket.as_fd());
            }
        }
        // The client sees the end now. The close may have to wait for others.
        let _ = shutdown(&self.socket, Shutdown::Write);
        self.closer.close_stream(self.socket);
    }

    /// Closes the connection without a word.
    pub(crate) fn close(self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
        // From now on nothing comes. Descriptors come only with bytes, and only their close waits.
        match ioctl_fionread(&self.socket) {
            Ok(0) => drop(self.socket),
            _ => self.closer.close(self.socket),
        }
    }
}

/// Whether the peer of a socket has closed its end, or the connection has ended.
pub(crate) fn has_hung_up(socket: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&socket, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let _ = retry_on_intr(|| poll(&mut fds, Some(&now)));
    !fds[0].revents().is_empty()
}

/// The one that has to go if there are too many: of the process with the most candidates, the
/// oldest. So no process drives out those of another one.
pub(crate) fn superfluous(candidates: &[Candidate]) -> Option<usize> {
    if candidates.len() <= MAX {
        return None;
    }
    let of = |peer| candidates.iter().filter(|c| c.peer == peer).count();
    let most = candidates.iter().map(|c| of(c.peer)).max();
    candidates.iter().position(|c| Some(of(c.peer)) == most)
}
