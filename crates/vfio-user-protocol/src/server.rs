// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server. It has a listening socket, one client at a time, and time-outs. It never blocks.

mod saved;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};
use serde::{Deserialize, Serialize};
use tracing::{debug, info, warn};

use crate::candidate::{Candidate, Heard, has_hung_up, superfluous};
use crate::closer::Closer;
use crate::journal::{Journal, JournalSink, JournalSource, Prepared};
use crate::listen::{self, SocketFile};
use crate::message::command;
use crate::poller::Poller;
use crate::session::{Answer, Effort, Handling, Session};
use crate::socket::{Broken, Received, Receiver, Sender, SocketSource};
use crate::target::Target;
use crate::version::MAX_MSG_FDS;

/// The most work that one call of [`Server::ready`] does, in units of [`Session::take_work`]. The
/// last message may exceed it.
const WORK_PER_CALL: u32 = 64;
/// The most connections that one call accepts.
const ACCEPTS_PER_CALL: u32 = 4;
/// How long a client that comes waits for the present one to leave, before it is refused.
const BUSY_PAUSE: Duration = Duration::from_millis(250);
/// The pause before the server looks again whether the descriptors of its client are closed.
const CLOSE_PAUSE: Duration = Duration::from_millis(20);
/// The most connections that have ended and whose descriptors are not closed yet. With more, the
/// server waits before it takes the next client.
const CLOSING_MAX: usize = 16;
/// The most descriptors that they have together, likewise.
const CLOSING_FDS_MAX: usize = 512;
/// The pause before the server accepts again, after the process ran out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// A client whose time passed longer ago than this has not been slow: this process stood still.
const STOOD_STILL: Duration = Duration::from_secs(1);

/// Time limits for a client. QEMU itself waits 5 s for a reply. If the server itself is called more
/// than a second after a limit has passed, the client gets that much time again: the process may
/// have been stopped, and the client with it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Timeouts {
    /// From the connection to the end of its `VERSION`. Until then it keeps no other client out.
    pub handshake: Duration,
    /// From the first byte of a message to its last.
    pub message: Duration,
    /// From the moment when the socket is full until it takes more of a reply.
    pub reply: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let five = Duration::from_secs(5);
        Self { handshake: Duration::from_secs(2), message: five, reply: five }
    }
}

/// Counters of a server, since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub struct Stats {
    /// Clients whose negotiation succeeded.
    pub clients: u64,
    /// Clients that the server refused because it had another one. Connections that have never
    /// said anything do not count.
    pub refused: u64,
    /// Messages.
    pub messages: u64,
    /// Commands that failed, also posted ones.
    pub failures: u64,
    /// Connections that the server ended because the client broke the protocol or was too slow.
    pub violations: u64,
}

/// The result of [`Server::ready`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// How much was done, in units of [`Session::take_work`], and 1 for each connection that was
    /// accepted, has sent something, or has become the client or was refused.
    pub work: u32,
    /// A client is connected and has negotiated.
    pub connected: bool,
    /// The server may have more work at once. The descriptor then stays readable.
    pub more: bool,
    /// [`Server::ready_long`] has something to do.
    pub long: bool,
}

/// Tells whether the client of a server has gone, also before the server has noticed it.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    socket: Weak<OwnedFd>,
    closer: Closer,
}

impl Peer {
    /// The peer at the other end of `socket`, as long as somebody has the socket. `closer` closes
    /// it, if this has it last.
    #[must_use]
    pub fn new(socket: &Arc<OwnedFd>, closer: &Closer) -> Peer {
        Peer { socket: Arc::downgrade(socket), closer: closer.clone() }
    }

    /// Whether the client has closed its end of the connection, or the connection has ended. The
    /// default value has no client.
    #[must_use]
    pub fn has_gone(&self) -> bool {
        let Some(socket) = self.socket.upgrade() else { return true };
        let has_gone = has_hung_up(&*socket);
        // The connection may have ended meanwhile.
        self.closer.close_last(socket);
        has_gone
    }
}

struct Connection {
    socket: Arc<OwnedFd>,
    token: u64,
    /// The number of the connection, counted from the start, for the log.
    number: u64,
    receiver: Receiver,
    sender: Sender,
    session: Session,
    /// A message that waits for [`Server::ready_long`].
    handling: Option<Handling>,
    /// The message was answered by a process that was killed: this reply, with so many descriptors,
    /// which its handling makes again.
    again: Option<(Vec<u8>, usize)>,
    /// The time limit of a message that has begun.
    message_by: Option<Instant>,
    /// The time until which the socket must take more of the queued replies.
    reply_by: Option<Instant>,
    /// The events for which the epoll descriptor watches the socket now.
    interest: EventFlags,
    /// How many others came and were refused because of this client.
    others_refused: u64,
    /// Closes what came from this client, and its socket.
    closer: Closer,
}

/// A vfio-user server for one device. It has one client at a time: the first whose `VERSION` is
/// there. Connections that are silent wait beside it, and keep nobody out.
///
/// Watch its one descriptor ([`AsFd`]), which is readable when the server has work, and its one
/// deadline. For both, call [`Server::ready`], which does a bounded amount of work and never waits.
///
/// If a client breaks the protocol, is too slow, or goes away, the server ends its connection with
/// one line in the log. Then it goes on with the next client.
pub struct Server<T: Target> {
    target: T,
    name: String,
    file: SocketFile,
    listener: OwnedFd,
    /// The time at which the server accepts again.
    paused_until: Option<Instant>,
    /// Why the last try to accept failed. The log has that once.
    paused_for: Option<Errno>,
    poller: Poller,
    next_token: u64,
    connections: u64,
    client: Option<Connection>,
    /// In the order in which they came.
    candidates: Vec<Candidate>,
    timeouts: Timeouts,
    stats: Stats,
    /// What may be done now.
    effort: Effort,
    /// The last client has gone, and the target does not know it yet.
    leaving: bool,
    /// Of connections that have ended, as long as something remains to be closed.
    closing: Vec<Closer>,
    /// The log has it that they are too many.
    told_closing: bool,
    /// Set while the client's closer has too much to do: when the server looks again.
    closed_at: Option<Instant>,
    /// Connections have come or gone since the last commit.
    uncommitted: bool,
    /// What was received and sent, for the server that follows if this process is killed.
    journal: Option<Journal>,
    /// The journal of the former process, until this one receives or sends anything: whoever keeps
    /// the server may still have that one.
    former: Option<OwnedFd>,
    /// The target was given descriptors to [hold](Target::hold), and has them still.
    holds: bool,
    /// The server goes on from a journal, which may have a whole message: due since then.
    resumes_at: Option<Instant>,
    /// Then the connection ends, for this reason.
    ends: Option<&'static str>,
}

const LISTENER: u64 = 0;
/// The events of a connection that is not the client. Each event comes once: what it has sent stays
/// there, as long as it is not the client.
const CANDIDATE: EventFlags = EventFlags::IN.union(EventFlags::RDHUP).union(EventFlags::ET);

impl<T: Target> Server<T> {
    /// Listens at `path` for clients of `target`. `name` is the device's name in the log.
    ///
    /// The socket file gets mode 0600. It replaces the file of a server that has ended.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] if somebody listens at `path`, or if the path has something
    /// other than a socket. Otherwise an error of the system.
    pub fn bind(path: impl AsRef<Path>, name: impl Into<String>, target: T) -> io::Result<Self> {
        let (listener, file) = listen::listen(path.as_ref())?;
        Self::start(listener, file, name.into(), target)
    }

    /// Serves clients that connect to `listener`, a non-blocking UNIX stream socket that listens at
    /// `path`. The file at `path` stays when the server is dropped. `name` is the device's name in
    /// the log.
    ///
    /// # Errors
    /// The system refuses, for instance because this process has too many descriptors.
    pub fn with_listener(
        listener: OwnedFd,
        path: impl Into<PathBuf>,
        name: impl Into<String>,
        target: T,
    ) -> io::Result<Self> {
        Self::start(listener, SocketFile::foreign(path.into()), name.into(), target)
    }

    fn start(listener: OwnedFd, file: SocketFile, name: String, target: T) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(&listener, LISTENER, EventFlags::IN)?;
        Ok(Self {
            target,
            name,
            file,
            listener,
            paused_until: None,
            paused_for: None,
            poller,
            next_token: LISTENER,
            connections: 0,
            client: None,
            candidates: Vec::new(),
            timeouts: Timeouts::default(),
            stats: Stats::default(),
            effort: Effort::All,
            leaving: false,
            closing: Vec::new(),
            told_closing: false,
            closed_at: None,
            uncommitted: false,
            journal: None,
            former: None,
            holds: false,
            resumes_at: None,
            ends: None,
        })
    }

    /// Sets the time-outs of clients that connect from now on.
    pub fn set_timeouts(&mut self, timeouts: Timeouts) {
        self.timeouts = timeouts;
    }

    /// The path of the socket.
    #[must_use]
    pub fn path(&self) -> &PathBuf {
        self.file.path()
    }

    /// The device function that this serves.
    #[must_use]
    pub fn target(&self) -> &T {
        &self.target
    }

    /// The device function that this serves.
    pub fn target_mut(&mut self) -> &mut T {
        &mut self.target
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let now = self.client.as_ref().map_or(0, |c| c.session.failures());
        Stats { failures: self.stats.failures + now, ..self.stats }
    }

    /// Whether a client is connected and has negotiated.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.client.as_ref().is_some_and(|c| c.session.negotiated().is_some())
    }

    /// Whether the client is moving the device to another server: the device is not in the state
    /// `RUNNING`, or the log of written pages is on.
    #[must_use]
    pub fn is_migrating(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.session.is_migrating())
    }

    /// Whether anybody is connected, the silent ones included.
    #[must_use]
    pub fn has_client(&self) -> bool {
        self.client.is_some() || !self.candidates.is_empty()
    }

    /// The client, for threads that do not have the server.
    #[must_use]
    pub fn peer(&self) -> Peer {
        let of = |client: &Connection| Peer::new(&client.socket, &client.closer);
        self.client.as_ref().map_or_else(Peer::default, of)
    }

    /// The time at which the program must call [`Server::ready`] even if the descriptor is not
    /// readable.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let client = self.client.iter().flat_map(|c| [c.message_by, c.reply_by]);
        let candidates = self.candidates.iter().map(|c| match c.has_spoken {
            true => self.client.is_some().then_some(c.refuse_at),
            false => Some(c.until),
        });
        let others = [self.paused_until, self.closed_at, self.resumes_at];
        client.chain(candidates).chain(others).flatten().min()
    }

    /// Does the work that is due. It accepts clients, receives and handles messages, sends replies,
    /// and ends a connection that has exceeded a time limit.
    pub fn ready(&mut self, now: Instant) -> Outcome {
        self.ready_with(now, Effort::All)
    }

    /// As [`ready`](Self::ready), but without long operations ([`Effort::Quick`]). If one is due,
    /// [`Outcome::long`] is set, and this client waits for [`ready_long`](Self::ready_long). For a
    /// thread that serves others too.
    pub fn ready_quick(&mut self, now: Instant) -> Outcome {
        self.ready_with(now, Effort::Quick)
    }

    /// As [`ready`](Self::ready), but with one long operation at most ([`Effort::One`]). For a
    /// thread on which others wait with their own long operations.
    pub fn ready_long(&mut self, now: Instant) -> Outcome {
        self.ready_with(now, Effort::One)
    }

    fn ready_with(&mut self, now: Instant, effort: Effort) -> Outcome {
        self.effort = effort;
        if self.former.take().is_some() && self.uncommitted {
            // Before anything is received or sent: the former journal would not have it.
            self.commit();
        }
        let (mut work, mut more, mut accept, mut serve) = (0, false, false, false);
        self.leave();
        // Handle the client first, because its end makes room for the next one.
        let client = self.client.as_ref().map(|c| c.token);
        let mut speaking = Vec::new();
        for token in self.poller.ready() {
            match token {
                LISTENER => accept = true,
                token if Some(token) == client => serve = true,
                token => speaking.push(token),
            }
        }
        let closed = self.closed_at.is_some_and(|at| at <= now);
        if closed {
            self.closed_at = None;
        }
        let resumes = self.resumes_at.take().is_some();
        if serve || closed || resumes || self.is_handling() {
            work += self.serve(now);
        }
        for token in speaking {
            work += 1;
            self.hear(token);
        }
        if accept {
            let accepted = self.accept(now);
            work += accepted;
            more = accepted == ACCEPTS_PER_CALL;
        }
        self.expire(now);
        work += self.choose(now);
        self.commit_if_due();
        let more = more || work >= WORK_PER_CALL;
        let long = self.leaving || self.is_handling();
        Outcome { work, connected: self.is_connected(), more, long }
    }

    /// Whether a message waits for more effort.
    fn is_handling(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.handling.is_some())
    }

    /// Tells the target that the client has gone, if that is due and may be done now.
    fn leave(&mut self) {
        if self.leaving && self.effort.take() {
            self.leaving = false;
            self.uncommitted = true;
            self.target.disconnected();
            self.answered(Prepared::default());
        }
    }

    /// Lets the target commit what has changed. No message is handled in part.
    fn commit_if_due(&mut self) {
        // Without a client that has gone, the target must not be one that has it.
        let is_whole = !self.leaving && !self.is_handling();
        if is_whole && (self.uncommitted || self.target.wants_commit()) {
            self.give();
        }
    }

    /// Serves for ever. This is for programs without an event loop.
    ///
    /// # Errors
    /// Waiting fails.
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            self.wait(None)?;
            self.ready(Instant::now());
        }
    }

    /// Serves until `stop` becomes readable. This is for tests, and for programs without an event
    /// loop.
    ///
    /// # Errors
    /// Waiting fails.
    pub fn run_until(&mut self, stop: impl AsFd) -> io::Result<()> {
        while !self.wait(Some(stop.as_fd()))? {
            self.ready(Instant::now());
        }
        Ok(())
    }

    /// Waits until the server has work. Returns true if `stop` is readable.
    fn wait(&self, stop: Option<BorrowedFd<'_>>) -> io::Result<bool> {
        loop {
            let wait = self.deadline().map(|d| d.saturating_duration_since(Instant::now()));
            let timeout = wait.and_then(|d| Timespec::try_from(d).ok());
            let stop = stop.map(|stop| PollFd::from_borrowed_fd(stop, PollFlags::IN));
            let mut fds: Vec<_> =
                [PollFd::new(&self.poller, PollFlags::IN)].into_iter().chain(stop).collect();
            match poll(&mut fds, timeout.as_ref()) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(fds.get(1).is_some_and(|stop| !stop.revents().is_empty())),
            }
        }
    }

    /// Ends the connection of the client, if there is one. The log gets `why`.
    pub fn disconnect(&mut self, why: &str) {
        self.effort = Effort::All;
        if self.client.is_some() {
            info!(device = self.name, "client disconnected: {why}");
            self.drop_client();
        }
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Accepts at most [`ACCEPTS_PER_CALL`] clients. Returns their number.
    fn accept(&mut self, now: Instant) -> u32 {
        let mut accepted = 0;
        if self.closes_too_much() {
            self.pause(now + CLOSE_PAUSE);
            return accepted;
        }
        while accepted < ACCEPTS_PER_CALL {
            let socket =
                match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                    Ok(socket) => socket,
                    Err(Errno::AGAIN) => return accepted,
                    Err(Errno::INTR | Errno::CONNABORTED) => continue,
                    Err(e) => {
                        // The connection stays in the backlog. Without a pause, the server would
                        // try without end.
                        if self.paused_for != Some(e) {
                            warn!(
                                device = self.name,
                                "accepting failed, tried again each {ACCEPT_PAUSE:?}: {e}{}",
                                remedy(e)
                            );
                        }
                        self.paused_for = Some(e);
                        self.pause(now + ACCEPT_PAUSE);
                        return accepted;
                    }
                };
            self.paused_for = None;
            accepted += 1;
            let token = self.token();
            match self.poller.add(&socket, token, CANDIDATE) {
                Ok(()) => self.admit(socket, token, now),
                Err(e) => warn!(device = self.name, "client cannot be served: {e}"),
            }
        }
        accepted
    }

    /// Whether the descriptors of too many earlier connections are not closed yet.
    fn closes_too_much(&mut self) -> bool {
        self.closing.retain(Closer::is_at_work);
        let descriptors: usize = self.closing.iter().map(Closer::waiting).sum();
        let too_much = self.closing.len() >= CLOSING_MAX || descriptors >= CLOSING_FDS_MAX;
        if too_much && !self.told_closing {
            warn!(
                device = self.name,
                "no client is taken: closing {descriptors} descriptors that {} earlier clients \
                 sent does not end",
                self.closing.len()
            );
        }
        self.told_closing = too_much;
        too_much
    }

    /// Accepts no clients until this time.
    fn pause(&mut self, until: Instant) {
        let _ = self.poller.modify(&self.listener, LISTENER, EventFlags::empty());
        self.paused_until = Some(until);
    }

    fn admit(&mut self, socket: OwnedFd, token: u64, now: Instant) {
        self.connections += 1;
        let number = self.connections;
        debug!(device = self.name, "client {number} connects");
        self.uncommitted = true;
        let (until, refuse_at) = (now + self.timeouts.handshake, now + BUSY_PAUSE);
        self.candidates.push(Candidate::new(socket, token, number, until, refuse_at));
        self.hear(token);
        if let Some(at) = superfluous(&self.candidates) {
            let candidate = self.candidates.remove(at);
            debug!(device = self.name, "client {} makes room for others", candidate.number);
            self.dismiss(candidate);
        }
    }

    /// Looks at what a candidate has sent.
    fn hear(&mut self, token: u64) {
        let Some(at) = self.candidates.iter().position(|c| c.token == token) else { return };
        if self.candidates[at].hear() == Heard::Gone {
            let candidate = self.candidates.remove(at);
            debug!(device = self.name, "client {} left before its first message", candidate.number);
            self.dismiss(candidate);
        }
    }

    /// Ends the connection of a candidate. If it has spoken, it learns that there is another
    /// client.
    fn dismiss(&mut self, candidate: Candidate) {
        self.uncommitted = true;
        self.poller.remove(&candidate.socket);
        let closer = candidate.closer.clone();
        if candidate.has_spoken {
            candidate.refuse()
        } else {
            candidate.close()
        }
        self.closes(closer);
    }

    /// Remembers what closes the descriptors of a connection that has ended.
    fn closes(&mut self, closer: Closer) {
        self.closing.retain(Closer::is_at_work);
        self.closing.extend(closer.is_at_work().then_some(closer));
    }

    /// Makes the first candidate that has spoken the client, if there is none, and refuses those
    /// that have waited long enough. Returns the amount of work.
    fn choose(&mut self, now: Instant) -> u32 {
        let mut work = 0;
        // The next client has to wait until the target has let go of the last one.
        while !self.leaving && work < WORK_PER_CALL {
            let is_due =
                |c: &Candidate| c.has_spoken && (self.client.is_none() || c.refuse_at <= now);
            let Some(at) = self.candidates.iter().position(is_due) else { break };
            let candidate = self.candidates.remove(at);
            work += 1;
            let Some(client) = &mut self.client else {
                work += self.take(candidate, now);
                continue;
            };
            self.stats.refused += 1;
            client.others_refused += 1;
            // A client that waits for its turn tries again and again. The log gets one line now and
            // the count when this client has gone.
            if client.others_refused == 1 {
                info!(
                    device = self.name,
                    "client {} refused: client {} is connected", candidate.number, client.number
                );
            }
            self.dismiss(candidate);
        }
        work
    }

    /// Makes a candidate the client, and handles its first message. Returns the amount of work.
    fn take(&mut self, candidate: Candidate, now: Instant) -> u32 {
        let Candidate { socket, token, number, closer, .. } = candidate;
        self.client = Some(Connection {
            socket: Arc::new(socket),
            token,
            number,
            receiver: Receiver::new(closer.clone()),
            sender: Sender::default(),
            session: Session::default(),
            handling: None,
            again: None,
            message_by: None,
            reply_by: None,
            interest: EventFlags::empty(),
            others_refused: 0,
            closer,
        });
        self.uncommitted = true;
        self.answered(Prepared::default());
        self.serve(now)
    }

    /// Receives, handles and answers messages until none is left, the socket is full, or the call
    /// has done its most work. Returns the amount of work.
    fn serve(&mut self, now: Instant) -> u32 {
        let mut work = 0;
        if let Some(why) = self.ends.take() {
            let _ = self.send();
            self.fail(why);
            return work;
        }
        while work < WORK_PER_CALL {
            let Some(client) = &mut self.client else { return work };
            if !client.sender.is_empty() && !self.flush(now) {
                return work;
            }
            let Some(client) = &mut self.client else { return work };
            // Replies do not pile up: while replies wait to be sent, the server receives nothing.
            if !client.sender.is_empty() {
                break;
            }
            if let Some(handling) = client.handling.take() {
                if !self.handle(handling, now) {
                    return work + self.take_work();
                }
                work += self.take_work();
                continue;
            }
            // More descriptors come only when the earlier ones are closed.
            if client.closer.is_full() {
                if has_hung_up(&*client.socket) {
                    self.has_gone();
                    return work;
                }
                self.closed_at = Some(now + CLOSE_PAUSE);
                break;
            }
            match receive(client, &mut self.journal, &mut self.target, &mut self.holds) {
                Ok(Received::Message(message)) => {
                    client.message_by = None;
                    self.stats.messages += 1;
                    if !self.handle(message.into(), now) {
                        return work + self.take_work();
                    }
                    work += self.take_work();
                }
                Ok(Received::Nothing) => {
                    if client.receiver.within_message() {
                        client.message_by.get_or_insert(now + self.timeouts.message);
                    }
                    break;
                }
                Ok(Received::End) => {
                    self.has_gone();
                    return work;
                }
                Err(Broken::Cut(_) | Broken::Socket(Errno::CONNRESET)) => {
                    self.has_gone();
                    return work;
                }
                Err(broken) => {
                    self.fail(&broken.to_string());
                    return work;
                }
            }
        }
        self.watch();
        work
    }

    /// The work of the client's session since the last call. A session that has ended has none.
    fn take_work(&mut self) -> u32 {
        self.client.as_mut().map_or(1, |client| client.session.take_work())
    }

    /// Handles a message. Returns false if the connection has ended, or the message needs more
    /// effort.
    fn handle(&mut self, mut handling: Handling, now: Instant) -> bool {
        let Some(client) = &mut self.client else { return false };
        let Connection { session, .. } = client;
        let kind = handling.command();
        let answer = session.go_on(&mut self.target, &self.name, &mut handling, &mut self.effort);
        let Some(answer) = answer else {
            client.handling = Some(handling);
            return false;
        };
        if let Some(before) = client.again.take() {
            return self.answer_again(before, answer) && self.flush(now);
        }
        // The session has changed, as it does in a negotiation.
        let maps = matches!(kind, command::DMA_MAP | command::DMA_UNMAP);
        self.uncommitted |= maps && self.journal.is_some();
        match answer {
            Answer::Silence => self.answered(Prepared::default()),
            Answer::Reply(bytes, fds) => self.reply(bytes, fds),
            Answer::Negotiated(bytes) => {
                self.stats.clients += 1;
                info!(device = self.name, "client {} connected", client.number);
                self.target.connected(client.socket.as_fd());
                self.uncommitted = true;
                self.reply(bytes, Vec::new());
            }
            Answer::End(reply, violation) => {
                let reply = reply.unwrap_or_default();
                self.answered(Prepared { reply: &reply, ends: true, ..Prepared::default() });
                if let Some(client) = self.client.as_mut().filter(|_| !reply.is_empty()) {
                    client.sender.push(reply, Vec::new());
                    let _ = self.send();
                }
                self.fail(&violation.to_string());
                return false;
            }
        }
        self.flush(now)
    }

    /// Queues the reply to a message.
    fn reply(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>) {
        self.answered(Prepared { reply: &bytes, fds: fds.len(), ..Prepared::default() });
        if let Some(client) = &mut self.client {
            client.sender.push(bytes, fds);
        }
    }

    /// Queues the reply of a process that was killed, with the descriptors of this answer, to the
    /// same message. Returns false if the connection has ended.
    fn answer_again(&mut self, (reply, count): (Vec<u8>, usize), answer: Answer) -> bool {
        match (answer, &mut self.client) {
            (Answer::Reply(bytes, fds), Some(client))
                if bytes.len() == reply.len() && fds.len() == count =>
            {
                client.sender.push(reply, fds);
                true
            }
            _ => {
                self.fail("after a restart, its reply cannot be sent with its descriptors");
                false
            }
        }
    }

    /// A message has been carried out, or a client has come or gone. Commits what has changed: the
    /// client must not be told what the next process does not know. With a journal, notes the
    /// answer, which counts once the commit is complete.
    fn answered(&mut self, answer: Prepared<'_>) {
        if let Some(journal) = &mut self.journal {
            journal.prepare(self.client.as_ref().map_or(0, |client| client.number), answer);
        }
        self.commit_if_due();
        if let Some(journal) = &mut self.journal {
            let moving = self.client.as_ref().is_some_and(|c| c.session.is_migrating());
            journal.answer(moving || !self.target.is_committed());
        }
    }

    /// Sends as much of the queued replies as the socket takes. Returns the number of bytes.
    fn send(&mut self) -> Result<usize, Errno> {
        let Some(client) = &mut self.client else { return Ok(0) };
        let socket = client.socket.as_fd();
        match &mut self.journal {
            None => client.sender.flush(socket),
            Some(journal) => client.sender.flush_to(&mut JournalSink { journal, socket }),
        }
    }

    /// Sends the queued replies. Returns false if the connection has ended.
    fn flush(&mut self, now: Instant) -> bool {
        let timeout = self.timeouts.reply;
        let sent = self.send();
        let Some(client) = &mut self.client else { return false };
        match sent {
            Ok(_) if client.sender.is_empty() => client.reply_by = None,
            Ok(0) => {
                client.reply_by.get_or_insert(now + timeout);
            }
            Ok(_) => client.reply_by = Some(now + timeout),
            Err(Errno::PIPE | Errno::CONNRESET) => {
                self.has_gone();
                return false;
            }
            Err(error) => {
                self.fail(&format!("its socket failed: {error}"));
                return false;
            }
        }
        true
    }

    /// The client has gone by itself, perhaps in the middle of a message or without the replies.
    fn has_gone(&mut self) {
        if let Some(client) = &self.client {
            info!(device = self.name, "client {} has gone", client.number);
            self.drop_client();
        }
    }

    /// Watches the client's socket for input, or for space if replies wait to be sent.
    fn watch(&mut self) {
        let Some(client) = &mut self.client else { return };
        let wanted = match () {
            () if !client.sender.is_empty() => EventFlags::OUT,
            () if self.closed_at.is_some() => EventFlags::empty(),
            () => EventFlags::IN,
        };
        if wanted != client.interest {
            match self.poller.modify(&client.socket, client.token, wanted) {
                Ok(()) => client.interest = wanted,
                Err(e) => self.fail(&format!("its socket cannot be watched: {e}")),
            }
        }
    }

    fn expire(&mut self, now: Instant) {
        if self.paused_until.is_some_and(|t| t <= now) {
            self.paused_until = None;
            let _ = self.poller.modify(&self.listener, LISTENER, EventFlags::IN);
        }
        let timeouts = self.timeouts;
        let stood_still = |t: Instant| now.saturating_duration_since(t) > STOOD_STILL;
        for candidate in self.candidates.iter_mut().filter(|c| stood_still(c.until)) {
            candidate.until = now + timeouts.handshake;
        }
        let is_late = |c: &Candidate| !c.has_spoken && c.until <= now;
        while let Some(at) = self.candidates.iter().position(is_late) {
            let candidate = self.candidates.remove(at);
            if candidate.has_begun {
                self.violation(candidate.number, "it did not negotiate a version in time");
            } else {
                debug!(device = self.name, "client {} said nothing", candidate.number);
            }
            self.dismiss(candidate);
        }
        let Some(client) = &mut self.client else { return };
        let limits =
            [(&mut client.message_by, timeouts.message), (&mut client.reply_by, timeouts.reply)];
        for (deadline, limit) in limits {
            if deadline.is_some_and(stood_still) {
                *deadline = Some(now + limit);
            }
        }
        let due = |deadline: Option<Instant>| deadline.is_some_and(|t| t <= now);
        let why = if due(client.message_by) {
            "it began a message and did not end it in time"
        } else if due(client.reply_by) {
            "it does not read the replies"
        } else {
            return;
        };
        self.fail(why);
    }

    /// Ends the connection of the current client, if there is one, because of what the client did.
    /// `why` goes to the log.
    pub fn fail(&mut self, why: &str) {
        let Some(client) = &self.client else { return };
        let number = client.number;
        self.violation(number, why);
        self.drop_client();
    }

    /// Notes that the connection `number` ends because of what its client did.
    fn violation(&mut self, number: u64, why: &str) {
        self.stats.violations += 1;
        warn!(device = self.name, "connection of client {number} ended: {why}");
    }

    fn drop_client(&mut self) {
        let Some(client) = self.client.take() else { return };
        (self.closed_at, self.uncommitted) = (None, true);
        if client.others_refused > 1 {
            info!(
                device = self.name,
                "while client {} was connected, {} others were refused",
                client.number,
                client.others_refused
            );
        }
        self.stats.failures += client.session.failures();
        // The client sees the end now. Descriptors that it has sent, and nobody has received, close
        // with the socket, which may wait for the client too.
        let _ = shutdown(&client.socket, Shutdown::Both);
        self.poller.remove(&client.socket);
        client.closer.close_last(client.socket);
        drop((client.receiver, client.handling));
        self.closes(client.closer);
        if client.session.negotiated().is_some() {
            self.leaving = true;
            self.leave();
        } else {
            self.answered(Prepared::default());
        }
    }
}

/// Receives a message of the client, or a part of one.
fn receive<T: Target>(
    client: &mut Connection,
    journal: &mut Option<Journal>,
    target: &mut T,
    holds: &mut bool,
) -> Result<Received, Broken> {
    let max_size = client.session.max_message();
    let socket = client.socket.as_fd();
    let Some(journal) = journal else {
        return client.receiver.next(&mut SocketSource::new(socket), max_size, MAX_MSG_FDS);
    };
    let hold = &mut |number, fds: &[BorrowedFd<'_>]| {
        *holds = true;
        target.hold(number, fds)
    };
    let mut source = JournalSource::new(journal, socket, max_size, hold);
    client.receiver.next(&mut source, max_size, MAX_MSG_FDS)
}

/// What the operator can do against an error of accepting.
fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::MFILE => "; raise this process's limit of descriptors (ulimit -n, LimitNOFILE=)",
        Errno::NFILE => "; raise the sysctl fs.file-max",
        _ => "",
    }
}

impl<T: Target> AsFd for Server<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }
}

impl<T: Target> Drop for Server<T> {
    fn drop(&mut self) {
        self.effort = Effort::All;
        self.leave();
        self.drop_client();
        self.candidates.drain(..).for_each(Candidate::close);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::message::{self, HEADER_LEN, command};
    use crate::target::{DeviceInfo, IrqAction, IrqInfo, RegionInfo};

    struct Nothing;

    impl Target for Nothing {
        fn device_info(&self) -> DeviceInfo {
            DeviceInfo::PCI
        }
        fn region_info(&self, _: u32) -> RegionInfo {
            RegionInfo::default()
        }
        fn irq_info(&self, _: u32) -> IrqInfo {
            IrqInfo::default()
        }
        fn read(&mut self, _: u32, _: u64, _: &mut [u8]) -> Result<(), Errno> {
            Err(Errno::IO)
        }
        fn write(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
            Err(Errno::IO)
        }
        fn set_irqs(&mut self, _: u32, _: IrqAction) -> Result<(), Errno> {
            Err(Errno::INVAL)
        }
        fn reset(&mut self) -> Result<(), Errno> {
            Ok(())
        }
        fn disconnected(&mut self) {}
    }

    /// An event loop with edge-triggered watches calls `ready` once for an event. Signals may
    /// interrupt it at any time.
    #[test]
    fn a_call_that_signals_interrupt_does_its_work_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let mut server = Server::bind(folder.path().join("s"), "test", Nothing).unwrap();
        let ready = |server: &mut Server<Nothing>| {
            server.poller.interruptions.set(3);
            server.ready(Instant::now()).work
        };
        let mut client = UnixStream::connect(server.path()).unwrap();
        assert_eq!(ready(&mut server), 1, "the client is accepted");
        let kind = message::Kind::Command { no_reply: false };
        client.write_all(&message::message(5, command::VERSION, kind, &[0; 4])).unwrap();
        assert!(ready(&mut server) > 0, "its message is handled");
        client.set_nonblocking(true).unwrap();
        client.read_exact(&mut [0; HEADER_LEN + 4]).unwrap();
        assert!(server.is_connected());
        drop(client);
        ready(&mut server);
        assert!(!server.has_client(), "its end is seen");
    }
}
