// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server that another process goes on with.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::{CANDIDATE, Connection, Server};
use crate::closer::Closer;
use crate::journal::{self, Found, Journal, Prepared};
use crate::listen::SocketFile;
use crate::session::{Effort, Session};
use crate::socket::{MESSAGE_MAX, Message, Receiver, Sender};
use crate::state::{
    self, BadState, ClientData, ClientPlaces, Held, Places, ReceivedData, ServerData, ServerState,
    UnsentData,
};
use crate::target::Target;
use crate::version::MAX_MSG_FDS;

/// A message whose reply, with so many descriptors, has to be made again.
struct Again {
    message: Message,
    reply: Vec<u8>,
    fds: usize,
}

impl<T: Target> Server<T> {
    /// The server as data, with duplicates of its descriptors. The target is not part of it. The
    /// server itself does not change: if nobody takes the state, it goes on.
    ///
    /// It first [settles](Self::settle), which may change the target. So the program saves the
    /// target afterwards.
    ///
    /// From this call on the program calls [`ready`](Self::ready) only if nobody has taken the
    /// state: two servers would read from one socket.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`]: the client is moving the device to another server, and
    /// would lose what it has of the device so far. Otherwise: this process has as many descriptors
    /// as it may have.
    pub fn save(&mut self, now: Instant) -> io::Result<ServerState> {
        self.settle(now);
        self.state(true)
    }

    /// Lets the target [commit](Target::commit), whether or not something has changed. No message
    /// is handled in part, as after [`settle`](Self::settle).
    pub fn commit(&mut self) {
        self.give();
        // Who has the state now may be another than the one that was given these.
        let Some(journal) = &self.journal else { return };
        let begun = self.client.as_ref().map_or(&[][..], |client| client.receiver.begun().1);
        if !begun.is_empty() {
            let fds: Vec<_> = begun.iter().map(AsFd::as_fd).collect();
            // If they are not taken, the message fails after a kill: they are missing then.
            let _ = self.target.hold(journal.number().wrapping_add(1), &fds);
            self.holds = true;
        }
    }

    /// Lets the target commit, and then drop the descriptors of a message that is in the state.
    pub(super) fn give(&mut self) {
        self.uncommitted = false;
        // A reply that was sent must not be sent again, and one that was not is lost.
        let state = self.state(false);
        self.target.commit(state);
        // A connection that is about to end was told what no state has.
        if let (Some(journal), None) = (&mut self.journal, self.ends) {
            if self.target.is_committed() {
                journal.catch_up();
            }
        }
        let begun = self.client.as_ref().is_some_and(|client| client.receiver.within_message());
        if let (Some(journal), true) = (&self.journal, self.holds && !begun) {
            self.holds = false;
            let _ = self.target.hold(journal.number().wrapping_add(1), &[]);
        }
    }

    /// The server as data, with its replies or without them. What a journal has is not in a state
    /// without replies. Nor are the descriptors of a message that has begun: they may be of
    /// anything, and to close a duplicate can take as long as the client likes.
    fn state(&self, with_replies: bool) -> io::Result<ServerState> {
        if self.is_migrating() {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let mut descriptors = vec![self.listener.try_clone()?];
        for candidate in &self.candidates {
            descriptors.push(candidate.socket.try_clone()?);
        }
        let client = match &self.client {
            None => None,
            Some(client) => {
                descriptors.push(client.socket.try_clone()?);
                Some(ClientData {
                    number: client.number,
                    others_refused: client.others_refused,
                    session: client.session.save(),
                    received: match with_replies || self.journal.is_none() {
                        true => client.receiver.save(&mut descriptors)?,
                        false => ReceivedData::default(),
                    },
                    unsent: match with_replies {
                        true => client.sender.save(&mut descriptors)?,
                        false => Vec::new(),
                    },
                })
            }
        };
        let data = ServerData {
            stats: self.stats,
            connections: self.connections,
            candidates: u32::try_from(self.candidates.len()).unwrap_or(u32::MAX),
            client,
            journal: self.journal.as_ref().map(Journal::number),
        };
        if let Some(journal) = &self.journal {
            descriptors.push(journal.duplicate()?);
        }
        Ok(ServerState { data, descriptors, held: Held::default() })
    }

    /// Whether the server has a [journal](crate::journal), by
    /// [`set_journal`](Self::set_journal) or from the state that it goes on from.
    #[must_use]
    pub fn has_journal(&self) -> bool {
        self.journal.is_some()
    }

    /// From now on the server notes what it receives and sends in a [journal](crate::journal),
    /// which [`create`](crate::journal::create) has made and no server has used. It belongs to the
    /// state of the server. Committed at once.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`]: a reply with descriptors waits until it can be sent. Try
    /// again later. Otherwise the file is no such journal, or the system
    /// refuses, for instance by `RLIMIT_MEMLOCK` (a journal locks one page). The server goes on
    /// without a journal.
    pub fn set_journal(&mut self, file: OwnedFd, now: Instant) -> io::Result<()> {
        self.settle(now);
        let unsent = match &mut self.client {
            None => Vec::new(),
            Some(client) if client.again.is_some() => {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            Some(client) => client.sender.rest().ok_or(io::ErrorKind::ResourceBusy)?,
        };
        self.journal = Some(Journal::open(file).map_err(io::Error::other)?);
        self.uncommitted = true;
        // They count as the reply to a message of the client.
        self.answered(Prepared { reply: &unsent, ..Prepared::default() });
        let (Some(journal), Some(client)) = (&mut self.journal, &self.client) else {
            return Ok(());
        };
        let (bytes, fds, lost) = client.receiver.begun();
        if !bytes.is_empty() {
            let all: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let held = all.is_empty() || self.target.hold(journal.number() + 1, &all).is_ok();
            self.holds |= !all.is_empty();
            journal.adopt(&bytes, if held { fds.len() } else { 0 }, lost || !held);
        }
        Ok(())
    }

    /// Nobody was given this server, which goes on from the journal of a former process. Whoever
    /// has that journal must not go on from it any more: its client's connection ends then. The
    /// program calls this before the first [`ready`](Self::ready).
    pub fn forsake_former(&mut self) {
        if let Some(former) = self.former.take() {
            // The system has no reason to refuse, and nobody else could be asked.
            let _ = journal::forsake(&former);
        }
    }

    /// Ends the operation that is under way, however long that takes. Afterwards no message is
    /// handled in part, and the target knows whether the client has gone.
    pub fn settle(&mut self, now: Instant) {
        self.effort = Effort::All;
        self.leave();
        // A message that is carried out again for the descriptors of its reply has not begun: the
        // journal says all of it, and nothing is sent before somebody has that journal.
        let begun = self.client.as_mut().filter(|client| client.again.is_none());
        if let Some(handling) = begun.and_then(|client| client.handling.take()) {
            // With this effort nothing of it remains.
            self.handle(handling, now);
        }
    }

    /// Serves on with the state of another server, whose program does not touch its sockets any
    /// more. `path` is where its socket listens; the file there stays when the server is dropped.
    /// `name` is the device's name in the log. `target` has the state that the former target had:
    /// it is not told of the client that is connected already.
    ///
    /// # Errors
    /// The state is wrong, or the system refuses. `target` is dropped.
    pub fn restore(
        state: ServerState,
        path: impl Into<PathBuf>,
        name: impl Into<String>,
        target: T,
        now: Instant,
    ) -> Result<Self, BadState> {
        let ServerState { data, descriptors, held } = state;
        let Places { listener, candidates, client, journal } = state::place(&data, descriptors)?;
        let file = SocketFile::foreign(path.into());
        let started = Self::start(listener, file, name.into(), target);
        let mut server = started
            .map_err(|error| BadState::Os(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
        server.stats = data.stats;
        server.connections = data.connections;
        let mut client = data.client.zip(client);
        let resumed = match data.journal.zip(journal) {
            None => {
                Closer::let_go(held.fds);
                Ok(None)
            }
            Some((committed, file)) => server.resume(committed, file, &mut client, held, now),
        };
        let adopted = resumed.and_then(|again| {
            server.adopt_all(candidates, client, now)?;
            if let (Some(client), Some(again)) = (&mut server.client, again) {
                client.handling = Some(again.message.into());
                client.again = Some((again.reply, again.fds));
            }
            Ok(())
        });
        match adopted {
            Ok(()) => Ok(server),
            Err(error) => {
                // The other server goes on with its clients.
                server.give_up();
                Err(error)
            }
        }
    }

    /// Goes on from a journal: it says what was received of the client's next message, and what
    /// was sent of the last reply. From then on the server has a journal of its own, which says the
    /// same.
    fn resume(
        &mut self,
        committed: u64,
        file: OwnedFd,
        client: &mut Option<(ClientData, ClientPlaces)>,
        held: Held,
        now: Instant,
    ) -> Result<Option<Again>, BadState> {
        let number = client.as_ref().map_or(0, |(data, _)| data.number);
        let found = journal::read(&file, committed, number)?;
        self.journal = Some(Journal::follow(&found)?);
        (self.former, self.uncommitted) = (Some(file), true);
        self.resumes_at = Some(now);
        self.ends = match found {
            Found { stale: true, .. } => Some("the state of the device was lost with its process"),
            Found { ends: true, .. } => Some("it broke the protocol, before a restart"),
            _ => None,
        };
        let Some((data, places)) = client else {
            Closer::let_go(held.fds);
            return Ok(None);
        };
        let mut fds = held.fds;
        if found.answered.checked_add(1) != Some(held.number) {
            // They are those of a message that was committed. A server that handed itself over has
            // those of the next one in its state.
            Closer::let_go(std::mem::replace(&mut fds, std::mem::take(&mut places.received)));
        }
        // They were held, but their bytes not received: they will come again.
        Closer::let_go(fds.split_off(found.received_fds.min(fds.len())));
        data.received = ReceivedData {
            bytes: found.received,
            descriptors: 0,
            lost: found.lost || fds.len() < found.received_fds,
        };
        Closer::let_go(std::mem::replace(&mut places.received, fds));
        places.unsent = vec![Vec::new()];
        let unsent = UnsentData { bytes: found.unsent, descriptors: 0 };
        data.unsent = Vec::from_iter((!unsent.bytes.is_empty()).then_some(unsent));
        let Some((message, fds)) = found.again else { return Ok(None) };
        let message = Message::parse(&message).ok_or(BadState::Journal("no whole message"))?;
        let reply = data.unsent.pop().map(|unsent| unsent.bytes).unwrap_or_default();
        Ok(Some(Again { message, reply, fds }))
    }

    fn adopt_all(
        &mut self,
        candidates: Vec<OwnedFd>,
        client: Option<(ClientData, ClientPlaces)>,
        now: Instant,
    ) -> Result<(), BadState> {
        if let Some((data, places)) = client {
            self.client = Some(self.connection(data, places, now)?);
        }
        candidates.into_iter().try_for_each(|socket| self.adopt(socket, now))
    }

    /// Takes a connection that is not the client. Nothing has been read from it.
    fn adopt(&mut self, socket: OwnedFd, now: Instant) -> Result<(), BadState> {
        let token = self.token();
        self.poller.add(&socket, token, CANDIDATE)?;
        self.admit(socket, token, now);
        Ok(())
    }

    /// The client's connection.
    fn connection(
        &mut self,
        data: ClientData,
        places: ClientPlaces,
        now: Instant,
    ) -> Result<Connection, BadState> {
        let session = Session::restore(data.session)?;
        let closer = Closer::new();
        let limits = (session.max_message(), MAX_MSG_FDS);
        let receiver = Receiver::restore(data.received, places.received, limits, closer.clone())?;
        let peer_fds = session.negotiated().map_or(0, |with| with.peer_fds);
        let sender = Sender::restore(data.unsent, places.unsent, (MESSAGE_MAX, peer_fds))?;
        let token = self.token();
        let interest = if sender.is_empty() { EventFlags::IN } else { EventFlags::OUT };
        self.poller.add(&places.socket, token, interest)?;
        Ok(Connection {
            socket: Arc::new(places.socket),
            token,
            number: data.number,
            message_by: receiver.within_message().then(|| now + self.timeouts.message),
            reply_by: (!sender.is_empty()).then(|| now + self.timeouts.reply),
            receiver,
            sender,
            session,
            handling: None,
            again: None,
            interest,
            others_refused: data.others_refused,
            closer,
        })
    }

    /// Lets go of the sockets, because another process has them now: closes this process's
    /// descriptors and does nothing else. The clients see nothing of it, the file of the socket
    /// stays, and the target is not told. The server has no client afterwards. The program only
    /// drops it.
    pub fn give_up(&mut self) {
        self.leaving = false;
        (self.journal, self.former) = (None, None);
        self.file.give_up();
        self.poller.remove(&self.listener);
        for candidate in self.candidates.drain(..) {
            self.poller.remove(&candidate.socket);
        }
        if let Some(client) = self.client.take() {
            self.poller.remove(&client.socket);
        }
    }
}
