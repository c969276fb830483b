// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The connection of a front end: bytes and descriptors in, replies out. Nothing here waits.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_user_protocol::socket::{Sender, SocketSource, Source};
use vfio_user_protocol::{Closer, PeerFds};

use super::message::{FDS_MAX, HEADER_BYTES, Header, Malformed};

/// From the first byte of a message to its last, and from the moment when the socket is full until
/// it takes more of a reply.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// A front end whose time passed longer ago than this has not been slow: this process stood still.
const STOOD_STILL: Duration = Duration::from_secs(1);

/// A message.
pub struct Message {
    pub header: Header,
    pub body: Vec<u8>,
    pub fds: PeerFds,
}

/// What [`Connection::receive`] found.
pub enum Received {
    Message(Message),
    /// No whole message.
    Nothing,
    /// The front end has gone.
    Gone,
}

/// Why a connection has to end.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A message makes no sense.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// More descriptors than any message has.
    #[error("more than {FDS_MAX} descriptors in one message")]
    Descriptors,
    /// Descriptors were lost.
    #[error("descriptors that it sent are lost: this process has as many as it may have")]
    Lost,
    /// A limit of time has passed.
    #[error("it was too slow with {0}")]
    Slow(&'static str),
    /// The socket failed.
    #[error("its socket failed: {0}")]
    Socket(Errno),
}

/// A front end.
pub struct Connection {
    pub socket: Arc<OwnedFd>,
    /// Closes what came from it, and its socket.
    pub closer: Closer,
    head: [u8; HEADER_BYTES],
    have: usize,
    header: Option<Header>,
    body: Vec<u8>,
    fds: PeerFds,
    sender: Sender,
    message_by: Option<Instant>,
    reply_by: Option<Instant>,
}

impl Connection {
    pub fn new(socket: OwnedFd) -> Connection {
        let closer = Closer::new();
        Connection {
            socket: Arc::new(socket),
            fds: PeerFds::new(closer.clone()),
            closer,
            head: [0; HEADER_BYTES],
            have: 0,
            header: None,
            body: Vec::new(),
            sender: Sender::default(),
            message_by: None,
            reply_by: None,
        }
    }

    /// Reads as far as a message is whole.
    pub fn receive(&mut self, now: Instant) -> Result<Received, Broken> {
        loop {
            let needed = HEADER_BYTES + self.header.map_or(0, |header| header.size);
            if self.have == needed {
                let Some(header) = self.header.take() else {
                    let header = Header::parse(&self.head)?;
                    self.body = vec![0; header.size];
                    self.header = Some(header);
                    continue;
                };
                (self.have, self.message_by) = (0, None);
                let (body, fds) = (std::mem::take(&mut self.body), self.fds.take());
                return Ok(Received::Message(Message { header, body, fds }));
            }
            let to = match self.have.checked_sub(HEADER_BYTES) {
                None => &mut self.head[self.have..],
                Some(inside) => &mut self.body[inside..],
            };
            let mut source = SocketSource::new(self.socket.as_fd());
            let read = source.recv(to, self.fds.list());
            let lost = source.lost_fds();
            if self.fds.as_slice().len() > FDS_MAX {
                return Err(Broken::Descriptors);
            }
            match read {
                Ok(0) | Err(Errno::CONNRESET) => return Ok(Received::Gone),
                Ok(_) if lost => return Err(Broken::Lost),
                Ok(bytes) => self.have += bytes,
                Err(Errno::AGAIN) if self.have == 0 => return Ok(Received::Nothing),
                Err(Errno::AGAIN) => {
                    self.message_by.get_or_insert(now + PATIENCE);
                    return Ok(Received::Nothing);
                }
                Err(Errno::TOOMANYREFS) => return Err(Broken::Descriptors),
                Err(error) => return Err(Broken::Socket(error)),
            }
        }
    }

    /// Sends `reply` after what is still to be sent, as far as the socket takes it now. `fds` go
    /// with it.
    pub fn reply(&mut self, reply: Vec<u8>, fds: Vec<OwnedFd>, now: Instant) -> Result<(), Broken> {
        self.sender.push(reply, fds);
        self.flush(now)
    }

    /// Sends what is to be sent, as far as the socket takes it now.
    pub fn flush(&mut self, now: Instant) -> Result<(), Broken> {
        match self.sender.flush(self.socket.as_fd()) {
            Ok(_) if self.sender.is_empty() => self.reply_by = None,
            Ok(0) => _ = self.reply_by.get_or_insert(now + PATIENCE),
            Ok(_) => self.reply_by = Some(now + PATIENCE),
            // The next read finds that it has gone.
            Err(Errno::PIPE | Errno::CONNRESET) => self.sender = Sender::default(),
            Err(error) => return Err(Broken::Socket(error)),
        }
        Ok(())
    }

    /// Whether replies wait for the socket. Nothing is received meanwhile.
    pub fn is_sending(&self) -> bool {
        !self.sender.is_empty()
    }

    /// When a limit of time passes.
    pub fn deadline(&self) -> Option<Instant> {
        [self.message_by, self.reply_by].into_iter().flatten().min()
    }

    /// Fails if a limit of time has passed at `now`.
    pub fn check_time(&mut self, now: Instant) -> Result<(), Broken> {
        for (by, what) in
            [(&mut self.message_by, "a message"), (&mut self.reply_by, "taking a reply")]
        {
            let Some(at) = by else { continue };
            let late = now.saturating_duration_since(*at);
            if late > STOOD_STILL {
                *at = now + PATIENCE;
            } else if *at <= now {
                return Err(Broken::Slow(what));
            }
        }
        Ok(())
    }
}
