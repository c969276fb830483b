// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server that another process goes on with.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::{CANDIDATE, Connection, Server};
use crate::closer::Closer;
use crate::listen::SocketFile;
use crate::message::{HEADER_LEN, REGION_ACCESS_LEN};
use crate::session::{Effort, Session};
use crate::socket::{Receiver, Sender};
use crate::state::{self, BadState, ClientData, ClientPlaces, Places, ServerData, ServerState};
use crate::target::Target;
use crate::version::{MAX_MSG_FDS, MAX_TRANSFER};

/// The longest reply, in bytes.
const REPLY_MAX: usize = HEADER_LEN + REGION_ACCESS_LEN + MAX_TRANSFER;

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
        self.uncommitted = false;
        // A reply that was sent must not be sent again, and one that was not is lost.
        let state = self.state(false);
        self.target.commit(state);
    }

    /// The server as data, with its replies or without them.
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
                    received: client.receiver.save(&mut descriptors)?,
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
        };
        Ok(ServerState { data, descriptors })
    }

    /// Ends the operation that is under way, however long that takes. Afterwards no message is
    /// handled in part, and the target knows whether the client has gone.
    pub fn settle(&mut self, now: Instant) {
        self.effort = Effort::All;
        self.leave();
        if let Some(handling) = self.client.as_mut().and_then(|client| client.handling.take()) {
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
        let ServerState { data, descriptors } = state;
        let Places { listener, candidates, client } = state::place(&data, descriptors)?;
        let file = SocketFile::foreign(path.into());
        let started = Self::start(listener, file, name.into(), target);
        let mut server = started
            .map_err(|error| BadState::Os(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
        server.stats = data.stats;
        server.connections = data.connections;
        let client = data.client.zip(client);
        match server.adopt_all(candidates, client, now) {
            Ok(()) => Ok(server),
            Err(error) => {
                // The other server goes on with its clients.
                server.give_up();
                Err(error)
            }
        }
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
        let sender = Sender::restore(data.unsent, places.unsent, (REPLY_MAX, peer_fds))?;
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
