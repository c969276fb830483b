// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server as data: what another process needs to serve the same socket and the same client, who
//! notices nothing.
//!
//! [`Server::save`](crate::Server::save) makes a [`ServerState`], and
//! [`Server::restore`](crate::Server::restore) makes a server of it. What is no descriptor is a
//! [`ServerData`], which serde writes and reads. The receiver may be a newer program than the
//! sender, and trusts it no more than it trusts a client: everything is checked.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, FdFlags, fcntl_setfd, ioctl_fionbio};
use rustix::net::{AddressFamily, SocketType, sockopt};
use serde::{Deserialize, Serialize};

use crate::candidate;
use crate::server::Stats;
#[cfg(doc)]
use crate::target::Target;
use crate::version::Negotiated;

/// A server: its data, and the descriptors that belong to it.
#[derive(Debug)]
pub struct ServerState {
    /// What is no descriptor.
    pub data: ServerData,
    /// In this order: the listening socket, the sockets of the connections of which none is the
    /// client yet, the client's socket, the descriptors that came with a message of which only a
    /// part is there, the descriptors of each message that is not sent yet, and the journal, if
    /// there is one.
    pub descriptors: Vec<OwnedFd>,
    /// What a process that was killed has given away for keeping ([`Target::hold`]).
    pub held: Held,
}

/// The descriptors of a message that was perhaps received before the process was killed. Which of
/// them were, the [journal](crate::journal) knows.
#[derive(Debug, Default)]
pub struct Held {
    /// The number of the message.
    pub number: u64,
    /// Its descriptors, in order. The client has chosen them.
    pub fds: Vec<OwnedFd>,
}

/// What of a server is no descriptor. For serde alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ServerData {
    pub(crate) stats: Stats,
    /// Connections since the start.
    pub(crate) connections: u64,
    /// The number of connections of which none is the client.
    pub(crate) candidates: u32,
    pub(crate) client: Option<ClientData>,
    /// The server has a journal: the number of the last message whose effects are in the state.
    pub(crate) journal: Option<u64>,
}

/// The client's connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct ClientData {
    /// The number of the connection, for the log.
    pub(crate) number: u64,
    pub(crate) others_refused: u64,
    pub(crate) session: SessionData,
    pub(crate) received: ReceivedData,
    /// The messages that the client's socket has not taken, in order.
    pub(crate) unsent: Vec<UnsentData>,
}

/// A [`Session`](crate::session::Session).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct SessionData {
    pub(crate) negotiated: Option<Negotiated>,
    /// Address and size of each mapping, by address.
    pub(crate) maps: Vec<(u64, u64)>,
    pub(crate) failures: u64,
}

/// The part of a message that has been received.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct ReceivedData {
    /// From the header on.
    pub(crate) bytes: Vec<u8>,
    /// The number of descriptors.
    pub(crate) descriptors: u32,
    /// More came, and are lost.
    pub(crate) lost: bool,
}

/// A message that is not sent yet, or not to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct UnsentData {
    /// What remains of it.
    pub(crate) bytes: Vec<u8>,
    /// The number of descriptors that go with the first byte.
    pub(crate) descriptors: u32,
}

/// Why a state is refused: nothing has changed, and its descriptors are closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadState {
    /// The state contradicts itself, or exceeds a limit of this crate.
    #[error("the state of the server is wrong: {0}")]
    Wrong(&'static str),
    /// The journal contradicts itself or the state.
    #[error("the journal is wrong: {0}")]
    Journal(&'static str),
    /// The system refuses.
    #[error("the server cannot be made from its state: {0}")]
    Os(#[from] Errno),
}

/// The highest count in a state. A server adds to it for as long as it lives, and it does not
/// overflow.
pub(crate) const COUNT_MAX: u64 = 1 << 56;

/// The most messages that can wait to be sent: a server with one such message receives no others.
const UNSENT_MAX: usize = 2;

impl ServerState {
    /// The client's socket, if a client is connected. The state may be forged: the descriptor may
    /// be of anything.
    #[must_use]
    pub fn client(&self) -> Option<BorrowedFd<'_>> {
        self.data.client.as_ref()?;
        let at = usize::try_from(self.data.candidates).ok()?.checked_add(1)?;
        self.descriptors.get(at).map(AsFd::as_fd)
    }
}

impl ServerData {
    /// How many descriptors at the front of [`ServerState::descriptors`] are the listening socket
    /// and those of connections. If the data are forged, there may be fewer.
    pub fn sockets(&self) -> usize {
        let candidates = usize::try_from(self.candidates).unwrap_or(usize::MAX);
        candidates.saturating_add(1 + usize::from(self.client.is_some()))
    }

    /// Whether no count is higher than one that a server can have reached.
    fn counts_are_possible(&self) -> bool {
        let Stats { clients, refused, messages, failures, violations } = self.stats;
        let of_client = self
            .client
            .iter()
            .flat_map(|client| [client.number, client.others_refused, client.session.failures]);
        [clients, refused, messages, failures, violations, self.connections]
            .into_iter()
            .chain(of_client)
            .all(|count| count <= COUNT_MAX)
    }

    /// The number of descriptors that belong to this.
    fn descriptors(&self) -> u64 {
        let of_client = self.client.iter().map(|client| {
            let unsent = client.unsent.iter().map(|unsent| u64::from(unsent.descriptors));
            1 + u64::from(client.received.descriptors) + unsent.sum::<u64>()
        });
        let journal = u64::from(self.journal.is_some());
        1 + u64::from(self.candidates) + of_client.sum::<u64>() + journal
    }
}

/// The descriptors of a server, in their places.
pub(crate) struct Places {
    pub(crate) listener: OwnedFd,
    pub(crate) candidates: Vec<OwnedFd>,
    pub(crate) client: Option<ClientPlaces>,
    pub(crate) journal: Option<OwnedFd>,
}

/// The descriptors of a client's connection.
pub(crate) struct ClientPlaces {
    pub(crate) socket: OwnedFd,
    pub(crate) received: Vec<OwnedFd>,
    pub(crate) unsent: Vec<Vec<OwnedFd>>,
}

/// Checks what `data` says of its own descriptors, and puts each in its place.
///
/// # Errors
/// They are too many or too few, or a socket is no socket of its kind.
pub(crate) fn place(data: &ServerData, descriptors: Vec<OwnedFd>) -> Result<Places, BadState> {
    if data.descriptors() != descriptors.len() as u64 {
        return Err(BadState::Wrong("the number of descriptors"));
    }
    if !data.counts_are_possible() {
        return Err(BadState::Wrong("a count"));
    }
    if data.candidates as usize > candidate::MAX {
        return Err(BadState::Wrong("the number of connections"));
    }
    if data.client.as_ref().is_some_and(|client| client.unsent.len() > UNSENT_MAX) {
        return Err(BadState::Wrong("the number of messages that are not sent"));
    }
    let mut rest = descriptors.into_iter();
    let mut take = |count: u32| rest.by_ref().take(count as usize).collect::<Vec<_>>();
    let mut one = take(1);
    let listener = one.pop().ok_or(BadState::Wrong("no listening socket"))?;
    check_socket(&listener, true)?;
    let candidates = take(data.candidates);
    candidates.iter().try_for_each(|socket| check_socket(socket, false))?;
    let client = match &data.client {
        None => None,
        Some(client) => {
            let socket = take(1).pop().ok_or(BadState::Wrong("no socket of the client"))?;
            check_socket(&socket, false)?;
            let received = take(client.received.descriptors);
            let unsent = client.unsent.iter().map(|unsent| take(unsent.descriptors)).collect();
            Some(ClientPlaces { socket, received, unsent })
        }
    };
    let journal = data.journal.and_then(|_| take(1).pop());
    Ok(Places { listener, candidates, client, journal })
}

/// Checks that a descriptor is a UNIX stream socket that listens, or one that does not, and makes
/// it like those that this crate makes.
fn check_socket(socket: &OwnedFd, listens: bool) -> Result<(), BadState> {
    let is = |what: Result<bool, Errno>| what.unwrap_or(false);
    if !is(sockopt::socket_domain(socket).map(|domain| domain == AddressFamily::UNIX))
        || !is(sockopt::socket_type(socket).map(|kind| kind == SocketType::STREAM))
    {
        return Err(BadState::Wrong("a descriptor that is no UNIX stream socket"));
    }
    if is(sockopt::socket_acceptconn(socket)) != listens {
        return Err(BadState::Wrong(
            "a socket that listens in the place of another, or conversely",
        ));
    }
    fcntl_setfd(socket, FdFlags::CLOEXEC)?;
    // The flag belongs to the socket, not to the descriptor: it is set already.
    ioctl_fionbio(socket.as_fd(), true)?;
    Ok(())
}
