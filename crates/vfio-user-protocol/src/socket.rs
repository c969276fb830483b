// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages over a stream socket. The receiver finds them in the byte stream. The sender queues
//! them until the socket takes them.
//!
//! Descriptors arrive together with the byte that they were sent with. So the receiver never reads
//! past the end of a message. The descriptors that arrive meanwhile belong to this message. QEMU
//! gives up a connection when a header arrives in two pieces. So the sender passes each message to
//! the kernel in a call of its own, and the kernel splits only messages that are far longer than a
//! header.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::closer::{Closer, PeerFds};
use crate::message::{BadHeader, HEADER_LEN, Header, REGION_ACCESS_LEN};
use crate::state::{BadState, ReceivedData, UnsentData};
use crate::version::{KERNEL_MSG_FDS, MAX_TRANSFER};

/// The longest message of either direction, in bytes.
pub(crate) const MESSAGE_MAX: usize = HEADER_LEN + REGION_ACCESS_LEN + MAX_TRANSFER;

/// The receiver reads a body in steps of this many bytes. So it allocates memory for bytes that
/// have arrived, and not for bytes that a header announces.
const READ_STEP: usize = 64 << 10;

/// A source of bytes and descriptors: a socket, or a slice in tests.
pub trait Source {
    /// Reads at most `buf.len()` bytes, and appends the descriptors that came with them to `fds`.
    /// Returns the number of bytes. 0: the stream has ended.
    ///
    /// # Errors
    /// [`Errno::AGAIN`] if no byte has arrived; [`Errno::TOOMANYREFS`] if there were more
    /// descriptors than one read takes.
    fn recv(&mut self, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, Errno>;

    /// Whether descriptors were lost in the last read because this process has as many as it may
    /// have.
    fn lost_fds(&self) -> bool {
        false
    }
}

/// A socket as a [`Source`].
#[derive(Debug)]
pub struct SocketSource<'a> {
    /// The socket.
    pub socket: BorrowedFd<'a>,
    /// Whether a read waits for data instead of returning [`Errno::AGAIN`].
    pub wait: bool,
    lost_fds: bool,
}

impl<'a> SocketSource<'a> {
    /// A socket whose reads do not wait.
    #[must_use]
    pub fn new(socket: BorrowedFd<'a>) -> SocketSource<'a> {
        SocketSource { socket, wait: false, lost_fds: false }
    }
}

impl Source for SocketSource<'_> {
    fn recv(&mut self, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, Errno> {
        // Room for all that a peer can send at a time. The kernel would close the others here and
        // now, and a close can wait for the peer.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_MSG_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = if self.wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        let mut parts = [IoSliceMut::new(buf)];
        let received = loop {
            match recvmsg(self.socket, &mut parts, &mut ancillary, flags | RecvFlags::CMSG_CLOEXEC)
            {
                Err(Errno::INTR) => {}
                other => break other?,
            }
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        // The process has no room for them.
        self.lost_fds = received.flags.contains(ReturnFlags::CTRUNC);
        Ok(received.bytes)
    }

    fn lost_fds(&self) -> bool {
        self.lost_fds
    }
}

/// Where messages go: a socket.
pub(crate) trait Sink {
    /// Sends as many of `bytes` as the socket takes, without waiting. The descriptors go with the
    /// first byte. Returns the number of bytes.
    ///
    /// # Errors
    /// [`Errno::AGAIN`] if the socket is full; [`Errno::INTR`].
    fn send(&mut self, bytes: &[u8], fds: &[OwnedFd]) -> Result<usize, Errno>;
}

/// A socket as a [`Sink`].
impl Sink for BorrowedFd<'_> {
    fn send(&mut self, bytes: &[u8], fds: &[OwnedFd]) -> Result<usize, Errno> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_MSG_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        if !borrowed.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(Errno::TOOMANYREFS);
        }
        sendmsg(*self, &[IoSlice::new(bytes)], &mut ancillary, flags)
    }
}

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its body, [`Header::body_len`] bytes.
    pub body: Vec<u8>,
    /// The descriptors that came with it. They close with the message, unless its handler takes
    /// them.
    pub fds: PeerFds,
    /// More descriptors came with it, and are lost: this process has as many as it may have.
    pub lost_fds: bool,
}

impl Message {
    /// The message of these bytes, without descriptors. `None`: they are no whole message.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Message> {
        let (head, body) = bytes.split_first_chunk::<HEADER_LEN>()?;
        let header = Header::parse(head).ok().filter(|header| header.body_len() == body.len())?;
        Some(Message { header, body: body.to_vec(), fds: PeerFds::default(), lost_fds: false })
    }
}

/// The result of [`Receiver::next`].
#[derive(Debug)]
pub enum Received {
    /// A complete message.
    Message(Message),
    /// No complete message yet. The receiver may have read a part of one.
    Nothing,
    /// The peer has closed the connection between two messages.
    End,
}

/// The reason why the stream is broken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Broken {
    /// The header is not valid.
    #[error(transparent)]
    Header(#[from] BadHeader),
    /// The message is longer than negotiated.
    #[error("{header}: longer than the limit of {limit} bytes")]
    TooLong {
        /// The header.
        header: Header,
        /// The longest message that this end accepts, in bytes.
        limit: usize,
    },
    /// The message has more descriptors than negotiated.
    #[error("more than {0} descriptors in one message")]
    Descriptors(usize),
    /// The stream ended within a message.
    #[error("connection closed within a message, after {0} bytes of it")]
    Cut(usize),
    /// The socket failed.
    #[error("socket: {0}")]
    Socket(#[from] Errno),
}

/// Finds the messages in a byte stream.
#[derive(Debug, Default)]
pub struct Receiver {
    head: [u8; HEADER_LEN],
    have: usize,
    header: Option<Header>,
    body: Vec<u8>,
    fds: PeerFds,
    lost_fds: bool,
}

impl Receiver {
    /// Nothing received yet. `closer` closes the descriptors that nobody takes.
    #[must_use]
    pub fn new(closer: Closer) -> Receiver {
        Receiver { fds: PeerFds::new(closer), ..Receiver::default() }
    }

    /// Reads until a message is complete, the source has no more bytes, or the stream is broken.
    ///
    /// `max_size` limits the bytes of a message with its header, and `max_fds` its descriptors.
    ///
    /// # Errors
    /// The stream is broken. The connection has to end.
    pub fn next(
        &mut self,
        source: &mut impl Source,
        max_size: usize,
        max_fds: usize,
    ) -> Result<Received, Broken> {
        while self.have < HEADER_LEN {
            match source.recv(&mut self.head[self.have..], self.fds.list()) {
                Ok(0) if self.have == 0 => return Ok(Received::End),
                Ok(0) => return Err(Broken::Cut(self.have)),
                Ok(n) => self.have += n,
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(Errno::TOOMANYREFS) => return Err(Broken::Descriptors(max_fds)),
                Err(Errno::CONNRESET) if self.have == 0 => return Ok(Received::End),
                Err(e) => return Err(e.into()),
            }
            self.lost_fds |= source.lost_fds();
            self.check_fds(max_fds)?;
        }
        let header = match self.header {
            Some(header) => header,
            None => {
                let header = Header::parse(&self.head)?;
                if header.size as usize > max_size {
                    return Err(Broken::TooLong { header, limit: max_size });
                }
                *self.header.insert(header)
            }
        };
        let body_len = header.body_len();
        while self.body.len() < body_len {
            let have = self.body.len();
            self.body.resize(body_len.min(have + READ_STEP), 0);
            let result = source.recv(&mut self.body[have..], self.fds.list());
            self.body.truncate(have + *result.as_ref().unwrap_or(&0));
            match result {
                Ok(0) => return Err(Broken::Cut(HEADER_LEN + have)),
                Ok(_) => {}
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(Errno::TOOMANYREFS) => return Err(Broken::Descriptors(max_fds)),
                Err(e) => return Err(e.into()),
            }
            self.lost_fds |= source.lost_fds();
            self.check_fds(max_fds)?;
        }
        self.have = 0;
        self.header = None;
        Ok(Received::Message(Message {
            header,
            body: std::mem::take(&mut self.body),
            fds: self.fds.take(),
            lost_fds: std::mem::take(&mut self.lost_fds),
        }))
    }

    /// Whether a message has begun and is not complete.
    #[must_use]
    pub fn within_message(&self) -> bool {
        self.have > 0
    }

    /// The part of a message that is there, its descriptors, and whether more are lost.
    pub(crate) fn begun(&self) -> (Vec<u8>, &[OwnedFd], bool) {
        ([&self.head[..self.have], &self.body].concat(), self.fds.as_slice(), self.lost_fds)
    }

    /// The part of a message that is there, and duplicates of its descriptors.
    ///
    /// # Errors
    /// This process has as many descriptors as it may have.
    pub(crate) fn save(&self, descriptors: &mut Vec<OwnedFd>) -> std::io::Result<ReceivedData> {
        let (bytes, fds, lost) = self.begun();
        for fd in fds {
            descriptors.push(fd.try_clone()?);
        }
        let descriptors = u32::try_from(fds.len()).unwrap_or(u32::MAX);
        Ok(ReceivedData { bytes, descriptors, lost })
    }

    /// A receiver that has received this part of a message, with these descriptors. The limits are
    /// those of [`next`](Self::next). `closer` closes the descriptors that nobody takes.
    ///
    /// # Errors
    /// No receiver with these limits can have it.
    pub(crate) fn restore(
        data: ReceivedData,
        descriptors: Vec<OwnedFd>,
        (max_size, max_fds): (usize, usize),
        closer: Closer,
    ) -> Result<Receiver, BadState> {
        let mut receiver = Receiver::new(closer);
        *receiver.fds.list() = descriptors;
        let ReceivedData { bytes, lost, .. } = data;
        let (head, body) = bytes.split_at(bytes.len().min(HEADER_LEN));
        receiver.head[..head.len()].copy_from_slice(head);
        receiver.have = head.len();
        receiver.lost_fds = lost;
        if receiver.fds.as_slice().len() > max_fds {
            return Err(BadState::Wrong("the descriptors of a message"));
        }
        if bytes.is_empty() && (lost || !receiver.fds.as_slice().is_empty()) {
            return Err(BadState::Wrong("descriptors without a message"));
        }
        // A header that is wrong ends the connection, here as there: only with its last byte.
        if let (Some(head), false) = (head.first_chunk::<HEADER_LEN>(), body.is_empty()) {
            let header = Header::parse(head).map_err(|_| BadState::Wrong("a header"))?;
            if header.size as usize > max_size || body.len() > header.body_len() {
                return Err(BadState::Wrong("the length of a message"));
            }
        }
        receiver.body = body.to_vec();
        Ok(receiver)
    }

    fn check_fds(&self, max_fds: usize) -> Result<(), Broken> {
        if self.fds.as_slice().len() > max_fds { Err(Broken::Descriptors(max_fds)) } else { Ok(()) }
    }
}

struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

/// Messages to send, in order.
#[derive(Default)]
pub struct Sender {
    queue: VecDeque<Outgoing>,
}

impl Sender {
    /// Queues a message. [`Sender::flush`] sends it.
    pub fn push(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>) {
        self.queue.push_back(Outgoing { bytes, sent: 0, fds });
    }

    /// What remains to be sent, and duplicates of its descriptors.
    ///
    /// # Errors
    /// This process has as many descriptors as it may have.
    pub(crate) fn save(&self, descriptors: &mut Vec<OwnedFd>) -> std::io::Result<Vec<UnsentData>> {
        let one = |message: &Outgoing| {
            for fd in &message.fds {
                descriptors.push(fd.try_clone()?);
            }
            Ok(UnsentData {
                bytes: message.bytes[message.sent..].to_vec(),
                descriptors: u32::try_from(message.fds.len()).unwrap_or(u32::MAX),
            })
        };
        self.queue.iter().map(one).collect()
    }

    /// What remains to be sent, as one message from now on. `None`: descriptors go with it, or it
    /// is longer than a message.
    pub(crate) fn rest(&mut self) -> Option<Vec<u8>> {
        let rest: Vec<&[u8]> =
            self.queue.iter().map(|message| &message.bytes[message.sent..]).collect();
        let bytes = rest.concat();
        if self.queue.iter().any(|message| !message.fds.is_empty()) || bytes.len() > MESSAGE_MAX {
            return None;
        }
        self.queue.clear();
        if !bytes.is_empty() {
            self.push(bytes.clone(), Vec::new());
        }
        Some(bytes)
    }

    /// A sender that has these messages to send, each with its descriptors. A message has at most
    /// `max_size` bytes and `max_fds` descriptors.
    ///
    /// # Errors
    /// A message exceeds that.
    pub(crate) fn restore(
        unsent: Vec<UnsentData>,
        descriptors: Vec<Vec<OwnedFd>>,
        (max_size, max_fds): (usize, usize),
    ) -> Result<Sender, BadState> {
        let mut sender = Sender::default();
        for (UnsentData { bytes, .. }, fds) in unsent.into_iter().zip(descriptors) {
            if bytes.is_empty() || bytes.len() > max_size || fds.len() > max_fds {
                return Err(BadState::Wrong("a message that is not sent"));
            }
            sender.push(bytes, fds);
        }
        Ok(sender)
    }

    /// Whether the kernel has taken all messages.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Sends as much as the socket takes, without waiting. Returns the number of bytes.
    ///
    /// # Errors
    /// The socket fails. A full socket is no error.
    pub fn flush(&mut self, mut socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        self.flush_to(&mut socket)
    }

    /// As [`flush`](Self::flush), to any sink.
    pub(crate) fn flush_to(&mut self, sink: &mut impl Sink) -> Result<usize, Errno> {
        let mut total = 0;
        while let Some(next) = self.queue.front_mut() {
            match sink.send(&next.bytes[next.sent..], &next.fds) {
                Ok(n) => {
                    // The descriptors have gone with the first byte.
                    next.fds.clear();
                    next.sent += n;
                    total += n;
                    if next.sent >= next.bytes.len() {
                        self.queue.pop_front();
                    }
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(total)
    }
}
