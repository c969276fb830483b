// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The socket of a device: its listener, one front end, and those that wait.
//!
//! A connection becomes the front end with its first message, and not before. So one that stays
//! silent keeps no other one out. While there is a front end, others wait for a moment, because it
//! may be about to leave; then they are refused.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, Shutdown, SocketFlags, accept_with, recv, shutdown};
use vbus_core::{Interest, MEMORY_LOST, TaskHandle};
use vfio_user_protocol::{Closer, Peer, Stats};

use super::backend::{Answer, Backend};
use super::connection::{Connection, Message, Received};
use super::message::{HEADER_BYTES, Request, reply};

/// The most messages that one call handles.
const MESSAGES_PER_CALL: u32 = 16;
/// The most connections that one call accepts.
const ACCEPTS_PER_CALL: u32 = 4;
/// The most connections that wait.
const WAITING_MAX: usize = 16;
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(5);
/// How long a connection that has spoken waits for the present front end to leave.
const BUSY_PAUSE: Duration = Duration::from_millis(250);
/// The pause before the server accepts again after an error, and before it looks again whether
/// descriptors are closed.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
const CLOSE_PAUSE: Duration = Duration::from_millis(20);
/// The most connections that have ended and whose descriptors are not closed yet. With more, the
/// server waits before it takes the next one.
const CLOSING_MAX: usize = 16;
/// How often the device looks at rings whose driver does not wake it.
const POLL_PAUSE: Duration = Duration::from_millis(1);

/// A connection that is not the front end.
struct Waiting {
    socket: OwnedFd,
    /// It may be silent until then.
    until: Instant,
    /// The present front end is waited for until then.
    refuse_at: Instant,
}

/// What a connection that waits has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Nothing,
    Spoken,
    Gone,
}

impl Waiting {
    /// Looks at what has come. It takes nothing: to take bytes is to take, and to close, what
    /// descriptors came with them.
    fn hear(&self) -> Heard {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let mut head = [0; HEADER_BYTES];
        match retry_on_intr(|| recv(&self.socket, &mut head[..], flags)) {
            Ok((_, HEADER_BYTES)) => Heard::Spoken,
            Ok((_, 0)) => Heard::Gone,
            Ok(_) if poll_now(&self.socket, PollFlags::RDHUP) => Heard::Gone,
            Ok(_) | Err(Errno::AGAIN) => Heard::Nothing,
            Err(_) => Heard::Gone,
        }
    }
}

/// The server of a device's socket. [`ready`](Self::ready) does a bounded amount of work. It never
/// waits for a peer, but it may take as long as to map memory, or to end a session.
pub struct Server {
    backend: Backend,
    name: String,
    /// What is ready at a socket wakes this task, which watches them all.
    task: TaskHandle,
    listener: OwnedFd,
    /// The server accepts again then.
    paused_until: Option<Instant>,
    /// Why it last failed to accept.
    paused_for: Option<Errno>,
    front_end: Option<Connection>,
    /// In the order in which they came.
    waiting: VecDeque<Waiting>,
    /// Of connections that have ended, as long as something remains to be closed.
    closing: Vec<Closer>,
    stats: Stats,
    /// The log has one of this front end's failures, and of those that it kept out.
    told_failure: bool,
    told_refused: bool,
    /// When the rings are looked at whose driver does not wake the device.
    poll_at: Option<Instant>,
}

impl Server {
    /// Serves front ends that connect to `listener`, a non-blocking UNIX stream socket. What is
    /// ready at a socket wakes `task`.
    ///
    /// # Errors
    /// The system cannot watch the listener.
    pub fn new(listener: OwnedFd, backend: Backend, task: TaskHandle) -> Result<Server, Errno> {
        task.watch(&listener, Interest::Read)?;
        Ok(Server {
            name: backend.endpoint().name().to_owned(),
            backend,
            task,
            listener,
            paused_until: None,
            paused_for: None,
            front_end: None,
            waiting: VecDeque::new(),
            closing: Vec::new(),
            stats: Stats::default(),
            told_failure: false,
            told_refused: false,
            poll_at: None,
        })
    }

    pub fn is_connected(&self) -> bool {
        self.front_end.is_some()
    }

    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// The front end, for threads that do not have the server.
    pub fn peer(&self) -> Peer {
        let of = |front_end: &Connection| Peer::new(&front_end.socket, &front_end.closer);
        self.front_end.as_ref().map_or_else(Peer::default, of)
    }

    /// When [`poll_rings`](Self::poll_rings) and [`ready`](Self::ready) must be called even if no
    /// socket is ready.
    pub fn deadline(&self) -> Option<Instant> {
        self.limit().into_iter().chain(self.poll_at).min()
    }

    fn limit(&self) -> Option<Instant> {
        let waiting = self.waiting.iter().map(|waiting| match self.front_end {
            Some(_) => waiting.until.min(waiting.refuse_at),
            None => waiting.until,
        });
        let front_end = self.front_end.as_ref().and_then(Connection::deadline);
        waiting.chain(front_end).chain(self.paused_until).min()
    }

    /// Whether [`ready`](Self::ready) has something to do.
    pub fn is_due(&self, now: Instant) -> bool {
        let wanted = |front_end: &Connection| match front_end.is_sending() {
            true => PollFlags::OUT,
            false => PollFlags::IN,
        };
        let mut fds = Vec::new();
        if self.paused_until.is_none() {
            fds.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        if let Some(front_end) = &self.front_end {
            if self.paused_until.is_none() || !front_end.closer.is_full() {
                fds.push(PollFd::from_borrowed_fd(front_end.socket.as_fd(), wanted(front_end)));
            }
        }
        // One that has spoken is due as soon as there is no front end, or in its time.
        let hears = |waiting: &Waiting| match waiting.hear() {
            Heard::Nothing => false,
            Heard::Spoken => self.front_end.is_none(),
            Heard::Gone => true,
        };
        let ready = retry_on_intr(|| poll(&mut fds, Some(&Timespec::default())));
        ready.is_ok_and(|ready| ready > 0)
            || self.limit().is_some_and(|at| at <= now)
            || self.waiting.iter().any(hears)
            || self.backend.endpoint().memory().is_lost()
    }

    /// Looks at the rings whose driver does not wake the device, if that is due.
    pub fn poll_rings(&mut self, now: Instant) {
        if self.poll_at.is_none_or(|at| at <= now) {
            let mut any = false;
            for ring in self.backend.polled() {
                self.backend.endpoint().ring(ring as u64);
                any = true;
            }
            self.poll_at = any.then_some(now + POLL_PAUSE);
        }
    }

    /// Does what is due.
    pub fn ready(&mut self, now: Instant) {
        if self.front_end.is_some() && self.backend.endpoint().memory().is_lost() {
            self.fail(MEMORY_LOST);
        }
        self.serve(now);
        self.accept(now);
        self.hear(now);
        self.choose(now);
    }

    fn accept(&mut self, now: Instant) {
        if self.paused_until.is_some_and(|at| at > now) {
            return;
        }
        self.paused_until = None;
        self.closing.retain(Closer::is_at_work);
        if self.closing.len() >= CLOSING_MAX {
            self.paused_until = Some(now + CLOSE_PAUSE);
            return;
        }
        for _ in 0..ACCEPTS_PER_CALL {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match accept_with(&self.listener, flags) {
                Ok(socket) => {
                    self.paused_for = None;
                    if let Err(error) = self.task.watch(&socket, Interest::ReadWrite) {
                        tracing::warn!(device = self.name, %error, "a connection cannot be served");
                        continue;
                    }
                    let (until, refuse_at) = (now + SILENCE, now + BUSY_PAUSE);
                    self.waiting.push_back(Waiting { socket, until, refuse_at });
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    if self.paused_for.replace(error) != Some(error) {
                        tracing::warn!(
                            device = self.name,
                            %error,
                            "accepting failed, tried again each {ACCEPT_PAUSE:?}"
                        );
                    }
                    self.paused_until = Some(now + ACCEPT_PAUSE);
                    break;
                }
            }
        }
        while self.waiting.len() > WAITING_MAX {
            self.dismiss(0);
        }
    }

    /// Ends the connections that wait and have gone, or have been silent for too long.
    fn hear(&mut self, now: Instant) {
        let mut at = 0;
        while let Some(waiting) = self.waiting.get(at) {
            match waiting.hear() {
                Heard::Gone => self.dismiss(at),
                Heard::Nothing if waiting.until <= now => {
                    tracing::debug!(device = self.name, "a connection said nothing");
                    self.dismiss(at);
                }
                Heard::Nothing | Heard::Spoken => at += 1,
            }
        }
    }

    /// Makes the first connection that has spoken the front end, if there is none. Otherwise
    /// refuses those that have waited long enough.
    fn choose(&mut self, now: Instant) {
        let mut at = 0;
        while let Some(waiting) = self.waiting.get(at) {
            if waiting.hear() != Heard::Spoken {
                at += 1;
            } else if self.front_end.is_some() {
                if waiting.refuse_at > now {
                    at += 1;
                    continue;
                }
                self.stats.refused += 1;
                // One that waits for its turn tries again and again.
                if !std::mem::replace(&mut self.told_refused, true) {
                    tracing::info!(device = self.name, "a front end is refused: there is another");
                }
                self.dismiss(at);
            } else if let Some(waiting) = self.waiting.remove(at) {
                self.backend.connected(waiting.socket.as_fd());
                self.front_end = Some(Connection::new(waiting.socket));
                (self.told_failure, self.told_refused) = (false, false);
                self.stats.clients += 1;
                tracing::info!(device = self.name, "a front end has connected");
                self.serve(now);
            }
        }
    }

    fn dismiss(&mut self, at: usize) {
        let Some(waiting) = self.waiting.remove(at) else { return };
        self.task.unwatch(&waiting.socket);
        let _ = shutdown(&waiting.socket, Shutdown::Both);
        let closer = Closer::new();
        closer.close(waiting.socket);
        self.closing.push(closer);
    }

    /// Receives, handles and answers messages.
    fn serve(&mut self, now: Instant) {
        for _ in 0..MESSAGES_PER_CALL {
            let Some(front_end) = &mut self.front_end else { return };
            let sent = front_end.flush(now).and_then(|()| front_end.check_time(now));
            if let Err(broken) = sent {
                return self.fail(&broken.to_string());
            }
            // While replies wait to be sent, nothing is received. So they do not pile up.
            if front_end.is_sending() {
                return;
            }
            // More descriptors come only when the earlier ones are closed.
            if front_end.closer.is_full() {
                self.paused_until = Some(now + CLOSE_PAUSE);
                return;
            }
            match front_end.receive(now) {
                Ok(Received::Nothing) => return,
                Ok(Received::Gone) => {
                    tracing::info!(device = self.name, "the front end has gone");
                    return self.end();
                }
                Ok(Received::Message(message)) => {
                    self.stats.messages += 1;
                    if let Err(why) = self.handle(message, now) {
                        return self.fail(&why);
                    }
                }
                Err(broken) => return self.fail(&broken.to_string()),
            }
        }
    }

    /// Handles a message. An error ends the connection.
    fn handle(&mut self, message: Message, now: Instant) -> Result<(), String> {
        let Message { header, body, fds } = message;
        let number = header.request;
        let request = Request::parse(number, &body, fds.as_slice().len());
        let request = request.map_err(|malformed| malformed.to_string())?;
        tracing::trace!(device = self.name, ?request, "a message");
        let acknowledge = header.need_reply && self.backend.acknowledges();
        let answer = self.backend.handle(request, fds);
        let mut sent = Vec::new();
        let (body, failed) = match answer {
            Ok(Answer::Body(body)) => (Some(body), None),
            Ok(Answer::File(body, file)) => {
                sent.push(file);
                (Some(body), None)
            }
            Ok(Answer::Done) => (acknowledge.then(|| vec![0; 8]), None),
            Err(failure) => {
                self.stats.failures += 1;
                let ends = !acknowledge;
                let failure = failure.to_string();
                if ends {
                    return Err(failure);
                }
                (Some(1_u64.to_le_bytes().to_vec()), Some(failure))
            }
        };
        if let Some(failure) = failed {
            match std::mem::replace(&mut self.told_failure, true) {
                false => tracing::warn!(device = self.name, "a request failed: {failure}"),
                true => tracing::debug!(device = self.name, "a request failed: {failure}"),
            }
        }
        let Some((body, front_end)) = body.zip(self.front_end.as_mut()) else { return Ok(()) };
        front_end.reply(reply(number, &body), sent, now).map_err(|broken| broken.to_string())
    }

    /// The front end broke the protocol, or its memory has gone: its connection ends.
    fn fail(&mut self, why: &str) {
        if self.front_end.is_some() {
            self.stats.violations += 1;
            tracing::warn!(device = self.name, "the front end is disconnected: {why}");
            self.end();
        }
    }

    /// Ends the connection of the front end.
    fn end(&mut self) {
        let Some(front_end) = self.front_end.take() else { return };
        self.backend.disconnected();
        let Connection { socket, closer, .. } = front_end;
        self.task.unwatch(&socket);
        let _ = shutdown(&*socket, Shutdown::Both);
        closer.close_last(socket);
        self.closing.push(closer);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
        while !self.waiting.is_empty() {
            self.dismiss(0);
        }
        self.task.unwatch(&self.listener);
    }
}

/// Whether a socket has one of these events now.
fn poll_now(socket: impl AsFd, flags: PollFlags) -> bool {
    let mut fds = [PollFd::new(&socket, flags)];
    let _ = retry_on_intr(|| poll(&mut fds, Some(&Timespec::default())));
    !fds[0].revents().is_empty()
}
