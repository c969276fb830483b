// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server's end.

use std::any::Any;
use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use vfio_user_protocol::{Closer, plain};

use crate::peer::{Peer, refuse_descriptors};

/// How long a client may take to send a request, and to take an answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How long the next client waits while there are too many threads.
const CROWDED: Duration = Duration::from_millis(1);

/// The stack of a client's thread, in bytes. The parser of JSON calls itself for each level that a
/// request is deep, up to 128 levels; a build without optimization takes more than 1 KiB for one. A
/// page that is not used costs no memory.
const STACK: usize = 1 << 20;

/// Limits on the cost of clients.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most clients at a time. If a further one comes, a client that has no request under way
    /// is disconnected. If there is none, the further one gets an error and is disconnected.
    pub clients: usize,
    /// The longest request, in bytes.
    pub line: u64,
}

/// How many of the server's places a client may count on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The most clients of this client's user.
    pub user: usize,
    /// The most clients in all that may be there when this one is admitted. Less than
    /// [`Limits::clients`] keeps places free for clients with a greater share. Such a client never
    /// gives way to one with a smaller share.
    pub all: usize,
    /// The longest request of this client, in bytes, at most [`Limits::line`]. A parsed request
    /// can take a hundred times the memory of its line.
    pub line: u64,
}

impl Share {
    /// All places, and lines as long as the server allows.
    pub const WHOLE: Share = Share { user: usize::MAX, all: usize::MAX, line: u64::MAX };
}

/// Answers the requests that come to a server.
pub trait Handler: Send + Sync + 'static {
    /// The type of a request.
    type Request: DeserializeOwned;

    /// Decides whether `peer` may send requests at all, and how many places its user gets. The
    /// provided method admits everybody whom the mode of the socket lets connect, to all places.
    /// Runs in the thread that accepts, so it must not wait.
    ///
    /// # Errors
    /// An error becomes the answer `error`, and the client is disconnected.
    fn admit(&self, peer: &Peer) -> Result<Share> {
        let _ = peer;
        Ok(Share::WHOLE)
    }

    /// Handles a request and returns its last answer. The answers before the last one go to
    /// `client`. The method runs in the client's own thread.
    ///
    /// # Errors
    /// An error becomes the answer `error`.
    fn handle(&self, request: Self::Request, client: &Client<'_>) -> Result<Value>;
}

/// The client that made the request.
pub struct Client<'a> {
    socket: &'a UnixStream,
    peer: &'a Peer,
    /// The request asked for reports of progress.
    wants_progress: bool,
    /// See [`Client::keep`].
    kept: RefCell<Vec<Box<dyn Any>>>,
}

impl Client<'_> {
    /// Keeps `value` until the last answer was sent, or cannot be, and drops it then. A handler
    /// whose process ends with its request learns by that when the client knows.
    pub fn keep(&self, value: impl Any) {
        self.kept.borrow_mut().push(Box::new(value));
    }

    /// Who the client is.
    pub fn peer(&self) -> &Peer {
        self.peer
    }

    /// The connection, for a request after which the two ends speak another protocol.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends one of several answers.
    ///
    /// # Errors
    /// The client has gone, or does not take the answer within the time-out.
    pub fn item(&self, value: Value) -> io::Result<()> {
        self.answer(&json!({ "item": value }))
    }

    /// Tells the client how far its request is, if the request asked for that: its member
    /// `progress` is true. `text` is for people. `done` of `total` steps are done.
    ///
    /// # Errors
    /// As for [`item`](Self::item).
    pub fn progress(&self, text: &str, done: usize, total: usize) -> io::Result<()> {
        if !self.wants_progress {
            return Ok(());
        }
        let report = json!({ "text": text, "done": done, "total": total });
        self.answer(&json!({ "progress": report }))
    }

    /// Whether the client has closed its end, or has sent something before it got its answer.
    pub fn gone(&self) -> bool {
        let mut fds = [PollFd::new(self.socket, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        retry_on_intr(|| poll(&mut fds, Some(&now))).is_ok_and(|n| n > 0)
    }

    fn answer(&self, value: &Value) -> io::Result<()> {
        answer(self.socket, value)
    }
}

fn answer(mut socket: &UnixStream, value: &Value) -> io::Result<()> {
    socket.write_all(format!("{value}\n").as_bytes())
}

/// Accepts clients when its descriptor is readable. Each client has its own thread.
pub struct Server<H> {
    listener: UnixListener,
    limits: Limits,
    handler: Arc<H>,
    places: Arc<Places>,
}

/// The clients that are there.
#[derive(Default)]
struct Places {
    table: Mutex<Table>,
    /// Closes what clients sent along.
    closer: Closer,
}

#[derive(Default)]
struct Table {
    clients: Vec<Occupant>,
    next: u64,
    /// The threads of clients: those in [`clients`](Self::clients), and those that had to go and
    /// whose thread has not ended yet.
    threads: usize,
}

/// A client in its place.
struct Occupant {
    number: u64,
    user: u32,
    share: Share,
    socket: Arc<UnixStream>,
    /// Since when no request is under way. `None`: one is.
    idle_since: Option<Instant>,
}

/// The place of a client. The client's thread has it to its end: dropping it leaves the place, and
/// says that the thread has ended.
struct Place {
    places: Arc<Places>,
    number: u64,
    /// Always there, except in the drop.
    socket: Option<Arc<UnixStream>>,
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Gives the client a place, if need be that of an idle client, which is disconnected.
    ///
    /// # Errors
    /// There is none. The text is for the client.
    fn enter(
        self: &Arc<Self>,
        socket: &Arc<UnixStream>,
        peer: &Peer,
        share: Share,
        limits: Limits,
    ) -> Result<Place, String> {
        let mut table = self.lock();
        let of_user = |user: u32, table: &Table| {
            table.clients.iter().filter(|client| client.user == user).count()
        };
        if of_user(peer.uid, &table) >= share.user
            && !table.evict(|c, _| (c.user == peer.uid && c.share.all <= share.all).then_some(0))
        {
            return Err(format!("more than {} of one user", clients(share.user)));
        }
        let all = share.all.min(limits.clients);
        // The user with the most clients has to give one up.
        let candidate = |client: &Occupant, table: &Table| {
            (client.share.all <= share.all).then(|| of_user(client.user, table))
        };
        if table.clients.len() >= all && !table.evict(candidate) {
            return Err(format!("more than {}", clients(all)));
        }
        table.threads += 1;
        table.next += 1;
        let number = table.next;
        table.clients.push(Occupant {
            number,
            user: peer.uid,
            share,
            socket: socket.clone(),
            idle_since: Some(Instant::now()),
        });
        Ok(Place { places: self.clone(), number, socket: Some(socket.clone()) })
    }

    /// Whether so many clients have had to go whose threads still run that nobody else may come.
    fn are_crowded(&self, limits: Limits) -> bool {
        self.lock().threads >= limits.clients.saturating_mul(2)
    }
}

fn clients(count: usize) -> String {
    format!("{count} control client{}", if count == 1 { "" } else { "s" })
}

impl Table {
    /// Disconnects an idle client: the one with the highest `rank`, and among those the one that
    /// has been idle for the longest time. A client without a rank stays. Returns whether there is
    /// such a client.
    fn evict(&mut self, rank: impl Fn(&Occupant, &Table) -> Option<usize>) -> bool {
        let candidates = self.clients.iter().enumerate().filter_map(|(at, client)| {
            Some(((rank(client, self)?, std::cmp::Reverse(client.idle_since?)), at))
        });
        let Some((_, at)) = candidates.max() else { return false };
        // Its thread sees the end of the connection. Before that it may still read what the client
        // had sent, but without a place it carries nothing out.
        let _ = self.clients.swap_remove(at).socket.shutdown(Shutdown::Both);
        true
    }
}

impl Place {
    /// Notes whether the client has a request under way. Returns whether the client still has its
    /// place. A client with a request under way keeps it.
    fn set_idle(&self, idle: bool) -> bool {
        let mut table = self.places.lock();
        let own = table.clients.iter_mut().find(|client| client.number == self.number);
        own.map(|client| client.idle_since = idle.then(Instant::now)).is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = self.places.lock();
        table.clients.retain(|client| client.number != self.number);
        table.threads -= 1;
        drop(table);
        // Nobody else has it any more, and nobody waits for its close.
        self.socket.take().into_iter().for_each(|socket| hang_up(socket, &self.places.closer));
    }
}

impl<H: Handler> Server<H> {
    /// Makes a server on `listener`, and makes `listener` non-blocking.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn new(listener: UnixListener, limits: Limits, handler: H) -> io::Result<Server<H>> {
        listener.set_nonblocking(true)?;
        refuse_descriptors(&listener);
        Ok(Server { listener, limits, handler: Arc::new(handler), places: Arc::default() })
    }

    /// Accepts the next client, if one waits. While twice as many threads run as there may be
    /// clients, it accepts nobody: it waits a millisecond and returns. These are threads of clients
    /// that had to go, so they end soon.
    ///
    /// # Errors
    /// This process is out of descriptors or threads, or clients have sent many descriptors along
    /// whose close waits for them. The next client waits in the backlog, so the caller should pause
    /// before it tries again.
    pub fn accept(&self) -> io::Result<()> {
        if self.places.closer.is_full() {
            return Err(io::Error::other("what clients have sent along cannot be closed yet"));
        }
        if self.places.are_crowded(self.limits) {
            std::thread::sleep(CROWDED);
            return Ok(());
        }
        let socket = match self.listener.accept() {
            Ok((socket, _)) => Arc::new(socket),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
                ) =>
            {
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.set_write_timeout(Some(TIMEOUT))?;
        // The texts fit the empty buffer of a new socket, so these answers cannot block.
        let peer = Peer::of(&*socket)?;
        let share = match self.handler.admit(&peer) {
            Ok(share) => share,
            Err(error) => {
                let _ = answer(&socket, &json!({ "error": format!("{error:#}") }));
                hang_up(socket, &self.places.closer);
                return Ok(());
            }
        };
        let place = match self.places.enter(&socket, &peer, share, self.limits) {
            Ok(place) => place,
            Err(text) => {
                let _ = answer(&socket, &json!({ "error": text }));
                hang_up(socket, &self.places.closer);
                return Ok(());
            }
        };
        let (handler, line_max) = (self.handler.clone(), share.line.min(self.limits.line));
        let thread = std::thread::Builder::new().name("control-client".into()).stack_size(STACK);
        drop(socket);
        thread.spawn(move || {
            // The socket is dropped before the place, which closes it.
            if let Some(socket) = place.socket.clone() {
                serve(&*handler, line_max, &socket, &peer, &place);
            }
        })?;
        Ok(())
    }

    /// Ends the server. It does not wait for what clients have sent that nobody has accepted.
    pub fn end(self) {
        self.places.closer.close(self.listener.into());
    }
}

impl<H> AsFd for Server<H> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// The socket of a client as a stream of bytes. Nobody waits for descriptors that come along; they
/// end the connection.
struct Bytes<'a> {
    socket: &'a UnixStream,
    closer: &'a Closer,
}

impl Read for Bytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(plain::recv(self.socket.as_fd(), true, buffer, self.closer)?)
    }
}

/// Ends the connection of a client, without waiting for what it has sent.
fn hang_up(socket: Arc<UnixStream>, closer: &Closer) {
    if let Some(socket) = Arc::into_inner(socket) {
        plain::close(socket.into(), closer);
    }
}

/// Serves a client until it leaves, gives way, exceeds the time-out, or breaks the protocol.
fn serve<H: Handler>(handler: &H, line_max: u64, socket: &UnixStream, peer: &Peer, place: &Place) {
    let mut reader = BufReader::new(Bytes { socket, closer: &place.places.closer });
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(line_max).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            let text = format!("a request must be one line of at most {line_max} bytes");
            let _ = answer(socket, &json!({ "error": text }));
            return;
        }
        if !place.set_idle(false) {
            return;
        }
        let mut client = Client { socket, peer, wants_progress: false, kept: RefCell::default() };
        let request = serde_json::from_slice(&line).and_then(|mut request: Value| {
            client.wants_progress = take_progress(&mut request);
            serde_json::from_value::<H::Request>(request)
        });
        // What sends no JSON is no control client. Its further bytes may be another party's, such
        // as the frames of a stream that was led here.
        let is_json = request.as_ref().err().is_none_or(serde_json::Error::is_data);
        let result = request.map_err(|error| anyhow!("not a request: {error}"));
        let last = match result.and_then(|request| handler.handle(request, &client)) {
            Ok(value) => json!({ "ok": value }),
            Err(error) => json!({ "error": format!("{error:#}") }),
        };
        if client.answer(&last).is_err() || !is_json {
            return;
        }
        place.set_idle(true);
    }
}

/// Takes the member `progress` out of a request. Every request may have it.
fn take_progress(request: &mut Value) -> bool {
    let Value::Object(members) = request else { return false };
    match members.get("progress") {
        Some(Value::Bool(wanted)) => {
            let wanted = *wanted;
            members.remove("progress");
            wanted
        }
        _ => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use vbus_test_driver::{send_lingering, take_descriptors};

    use super::*;
    use crate::Connection;

    /// Repeats each request, and panics on request.
    struct Echo;

    impl Handler for Echo {
        type Request = String;

        fn handle(&self, request: String, client: &Client<'_>) -> Result<Value> {
            match request.as_str() {
                "panic" => panic!("as asked"),
                "refuse" => Err(anyhow!("no")),
                "keep" => {
                    /// Tells the client when it is dropped.
                    struct Kept(UnixStream);
                    impl Drop for Kept {
                        fn drop(&mut self) {
                            let _ = self.0.write_all(b"dropped\n");
                        }
                    }
                    client.keep(Kept(client.socket.try_clone()?));
                    Ok(request.into())
                }
                "begin" | "wait" => {
                    if request == "begin" {
                        client.item(Value::Null)?;
                    }
                    while !client.gone() {
                        std::thread::yield_now();
                    }
                    Ok(Value::Null)
                }
                _ => Ok(request.into()),
            }
        }
    }

    /// A server, with a thread that accepts clients.
    struct Setting {
        dir: tempfile::TempDir,
    }

    impl Setting {
        /// A server for so many clients, and for lines of 100 bytes.
        fn new(clients: usize) -> Setting {
            Setting::with(Limits { clients, line: 100 }, Echo)
        }

        fn with(limits: Limits, handler: impl Handler) -> Setting {
            let dir = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
            let server = Server::new(listener, limits, handler).unwrap();
            std::thread::spawn(move || {
                loop {
                    poll(&mut [PollFd::new(&server, PollFlags::IN)], None).unwrap();
                    server.accept().unwrap();
                }
            });
            Setting { dir }
        }

        fn connect(&self) -> UnixStream {
            UnixStream::connect(self.dir.path().join("socket")).unwrap()
        }

        fn connection(&self) -> Connection {
            Connection::new(self.connect(), "the echo")
        }
    }

    fn ask(connection: &mut Connection, text: &str) -> Result<Value> {
        connection.stream(&json!(text), &mut |item| panic!("an item: {item}"))
    }

    /// Reads until the other end closes.
    fn rest(mut socket: &UnixStream) -> String {
        let mut bytes = Vec::new();
        // The server may close the socket before it has read everything, which gives an error after
        // its last byte.
        let _ = socket.read_to_end(&mut bytes);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn what_a_handler_keeps_is_dropped_after_the_answer() {
        let setting = Setting::new(1);
        let client = setting.connect();
        (&client).write_all(b"\"keep\"\n").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(rest(&client), "{\"ok\":\"keep\"}\ndropped\n");
    }

    /// The client's thread would close what comes, and a close can wait.
    #[test]
    fn descriptors_of_clients_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, limits) = (dir.path().join("socket"), Limits { clients: 4, line: 100 });
        let server = Server::new(UnixListener::bind(&path).unwrap(), limits, Echo).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        if !refuse_descriptors(&client) {
            eprintln!("skipped: this kernel cannot refuse descriptors (Linux 6.16 can)");
            return;
        }
        server.accept().unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
        let rights = [client.as_fd()];
        ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&rights));
        let flags = rustix::net::SendFlags::NOSIGNAL;
        let bytes = [io::IoSlice::new(b"\"hello\"\n")];
        let sent = rustix::net::sendmsg(&client, &bytes, &mut ancillary, flags);
        assert_eq!(sent, Err(rustix::io::Errno::PERM));
    }

    /// Before Linux 6.16 a client's descriptors cannot be refused.
    #[test]
    fn nobody_waits_for_descriptors_of_clients() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let limits = Limits { clients: 4, line: 100 };
        let server = Server::new(UnixListener::bind(&path).unwrap(), limits, Echo).unwrap();
        take_descriptors(&server);
        let accept = || {
            poll(&mut [PollFd::new(&server, PollFlags::IN)], None).unwrap();
            server.accept()
        };
        // One that is read, one that has no place, and one that waits to be accepted at the end.
        let full: Vec<_> = (0..4)
            .map(|uid| {
                let (own, socket) = UnixStream::pair().unwrap();
                let peer = Peer { pid: 1, uid: 1_000_000 + uid, groups: Vec::new() };
                let entered = server.places.enter(&Arc::new(socket), &peer, Share::WHOLE, limits);
                let place = entered.unwrap();
                place.set_idle(false);
                (own, place)
            })
            .collect();
        let refused = UnixStream::connect(&path).unwrap();
        let mut lingering = vec![send_lingering(&refused, b"x")];
        accept().unwrap();
        assert!(rest(&refused).contains("more than 4 control clients"));
        drop(full);
        let client = UnixStream::connect(&path).unwrap();
        lingering.push(send_lingering(&client, b"x"));
        accept().unwrap();
        assert_eq!(rest(&client), "", "its connection ends");
        let honest = UnixStream::connect(&path).unwrap();
        accept().unwrap();
        let mut honest = Connection::new(honest, "the echo");
        assert_eq!(ask(&mut honest, "hello").unwrap(), json!("hello"));
        // So many wait for their close that nobody else is let in.
        while !server.places.closer.is_full() {
            let client = UnixStream::connect(&path).unwrap();
            lingering.push(send_lingering(&client, b"x"));
            accept().unwrap();
            assert_eq!(rest(&client), "");
        }
        let error = server.accept().unwrap_err().to_string();
        assert!(error.contains("cannot be closed yet"), "{error}");
        let late = UnixStream::connect(&path).unwrap();
        lingering.push(send_lingering(&late, b"x"));
        let closer = server.places.closer.clone();
        server.end();
        drop(lingering);
        while closer.is_at_work() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn whatever_a_client_does_ends_at_worst_its_own_connection() {
        // The honest one, and the others, of which the last may not have left yet.
        let setting = Setting::new(3);
        let mut honest = setting.connection();
        let check =
            |honest: &mut Connection| assert_eq!(ask(honest, "hello").unwrap(), json!("hello"));
        check(&mut honest);
        let other = |text: &[u8]| {
            let socket = setting.connect();
            let _ = (&socket).write_all(text);
            let answers = rest(&socket);
            check(&mut setting.connection());
            answers
        };
        assert!(other(&[b' '; 101]).contains("at most 100 bytes"));
        assert_eq!(other(b"\"panic\"\n"), "");
        // Bytes of another protocol, with a request in them.
        let answers = other(b"\x02\0\0\0\x08\x88\xb5\n\"hello\"\n");
        assert!(answers.contains("not a request") && !answers.contains("hello"), "{answers}");
        let mut second = setting.connection();
        assert_eq!(ask(&mut second, "refuse").unwrap_err().to_string(), "no");
        let nonsense = second.stream(&json!(17), &mut |_| {}).unwrap_err().to_string();
        assert!(nonsense.starts_with("not a request: "), "{nonsense}");
        check(&mut second);
    }

    #[test]
    fn silent_clients_keep_nobody_out() {
        let setting = Setting::new(2);
        let silent: Vec<_> = (0..20).map(|_| setting.connect()).collect();
        assert_eq!(ask(&mut setting.connection(), "hello").unwrap(), json!("hello"));
        assert_eq!(rest(&silent[0]), "", "the first one had to go");
    }

    #[test]
    fn clients_with_a_request_under_way_stay() {
        let setting = Setting::new(2);
        // The clients must have been accepted, in order, and their requests read. A request that is
        // answered and one that waits are read in this order.
        let mut waiting: Vec<_> = (0..2)
            .map(|_| {
                let socket = setting.connect();
                (&socket).write_all(b"\"hello\"\n").unwrap();
                let mut answer = String::new();
                BufReader::new(&socket).read_line(&mut answer).unwrap();
                (&socket).write_all(b"\"begin\"\n").unwrap();
                BufReader::new(&socket).read_line(&mut answer).unwrap();
                socket
            })
            .collect();
        let error = ask(&mut setting.connection(), "hello").unwrap_err().to_string();
        assert_eq!(error, "more than 2 control clients");
        waiting.pop();
        while ask(&mut setting.connection(), "hello").is_err() {}
    }

    /// The places of a server for four clients, and what comes and goes there.
    #[derive(Default)]
    struct Room(Arc<Places>);

    impl Room {
        /// A client of this user enters, with this share. Returns its own end, and its place.
        fn enter(&self, uid: u32, share: Share) -> Result<(UnixStream, Place), String> {
            let (own, socket) = UnixStream::pair().unwrap();
            let peer = Peer { pid: 1, uid, groups: Vec::new() };
            let limits = Limits { clients: 4, line: 1 };
            Ok((own, self.0.enter(&Arc::new(socket), &peer, share, limits)?))
        }
    }

    fn is_disconnected((own, _): &(UnixStream, Place)) -> bool {
        own.set_nonblocking(true).unwrap();
        matches!((&*own).read(&mut [0]), Ok(0))
    }

    #[test]
    fn the_user_with_the_most_clients_gives_way() {
        let room = Room::default();
        let enter = |uid| room.enter(uid, Share::WHOLE).unwrap();
        let (first, greedy) = (enter(1), [enter(2), enter(2), enter(2)]);
        let next = enter(3);
        assert!(is_disconnected(&greedy[0]), "the one that was idle for the longest time");
        assert!(!is_disconnected(&first) && !is_disconnected(&next));
        for (_, place) in [&first, &greedy[1], &greedy[2], &next] {
            place.set_idle(false);
        }
        let error = room.enter(4, Share::WHOLE).map(drop).unwrap_err();
        assert_eq!(error, "more than 4 control clients");
        drop(first);
        enter(4);
    }

    #[test]
    fn a_small_share_leaves_places_for_others() {
        let room = Room::default();
        let small = Share { user: 1, all: 2, line: u64::MAX };
        let full = room.enter(1, Share::WHOLE).unwrap();
        let reader = room.enter(2, small).unwrap();
        let again = room.enter(2, small).unwrap();
        assert!(is_disconnected(&reader), "a user gives way to itself first");
        let other = room.enter(3, small).unwrap();
        assert!(is_disconnected(&again) && !is_disconnected(&full));
        other.1.set_idle(false);
        let error = room.enter(3, small).map(drop).unwrap_err();
        assert_eq!(error, "more than 1 control client of one user");
        let error = room.enter(2, small).map(drop).unwrap_err();
        assert_eq!(error, "more than 2 control clients");
        let more = [1, 1].map(|uid| room.enter(uid, Share::WHOLE).unwrap());
        assert!(!is_disconnected(&full) && more.iter().all(|client| !is_disconnected(client)));
    }

    #[test]
    fn a_client_does_not_give_way_to_one_of_its_user_with_a_smaller_share() {
        let room = Room::default();
        let full = room.enter(1, Share::WHOLE).unwrap();
        let small = Share { user: 1, all: 2, line: u64::MAX };
        let error = room.enter(1, small).map(drop).unwrap_err();
        assert_eq!(error, "more than 1 control client of one user");
        assert!(!is_disconnected(&full));
    }

    #[test]
    fn a_client_that_had_to_go_has_no_request_carried_out() {
        /// Counts the requests.
        #[derive(Default)]
        struct Count(Mutex<usize>);

        impl Handler for Count {
            type Request = Value;

            fn handle(&self, _: Value, _: &Client<'_>) -> Result<Value> {
                *self.0.lock().unwrap() += 1;
                Ok(Value::Null)
            }
        }

        let peer = Peer { pid: 1, uid: 1, groups: Vec::new() };
        let limits = Limits { clients: 1, line: 100 };
        for goes in [false, true] {
            let (places, count) = (Arc::<Places>::default(), Count::default());
            let (own, socket) = UnixStream::pair().unwrap();
            let socket = Arc::new(socket);
            let place = places.enter(&socket, &peer, Share::WHOLE, limits).unwrap();
            // The request waits in the socket, where the server can read it also later.
            (&own).write_all(b"17\n").unwrap();
            let next = Arc::new(UnixStream::pair().unwrap().1);
            let _next = goes.then(|| places.enter(&next, &peer, Share::WHOLE, limits).unwrap());
            own.shutdown(Shutdown::Write).unwrap();
            serve(&count, limits.line, &socket, &peer, &place);
            assert_eq!(*count.0.lock().unwrap(), usize::from(!goes));
            drop((socket, place));
            assert_eq!(rest(&own), if goes { "" } else { "{\"ok\":null}\n" });
        }
    }

    #[test]
    fn clients_wait_while_too_many_threads_have_not_ended() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let server = Server::new(listener, Limits { clients: 4, line: 100 }, Echo).unwrap();
        let room = Room(server.places.clone());
        let mut threads: Vec<_> = (0..8).map(|_| room.enter(1, Share::WHOLE).unwrap()).collect();
        let setting = Setting { dir };
        let mut connection = setting.connection();
        let waits = || {
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::new(&server, PollFlags::IN)], Some(&now)).unwrap() == 1
        };
        server.accept().unwrap();
        assert!(waits(), "four clients had to go, and their threads are there");
        threads.remove(0);
        server.accept().unwrap();
        assert!(!waits());
        assert_eq!(ask(&mut connection, "hello").unwrap(), json!("hello"));
    }

    /// Gives everybody short lines.
    struct Short;

    impl Handler for Short {
        type Request = Value;

        fn admit(&self, _: &Peer) -> Result<Share> {
            Ok(Share { line: 20, ..Share::WHOLE })
        }

        fn handle(&self, request: Value, _: &Client<'_>) -> Result<Value> {
            Ok(request)
        }
    }

    #[test]
    fn a_share_limits_the_length_of_a_request() {
        let setting = Setting::with(Limits { clients: 4, line: 100 }, Short);
        let mut connection = setting.connection();
        assert_eq!(ask(&mut connection, "hello").unwrap(), json!("hello"));
        let error = ask(&mut connection, &"a".repeat(30)).unwrap_err().to_string();
        assert!(error.contains("at most 20 bytes"), "{error}");
    }

    #[test]
    fn a_client_that_goes_is_noticed_while_it_is_served() {
        let setting = Setting::new(2);
        for _ in 0..3 {
            // Only two clients may be there, so each must be noticed when it leaves.
            let socket = setting.connect();
            // One that comes before another was noticed is refused, and may find the socket closed.
            let _ = (&socket).write_all(b"\"wait\"\n");
            drop(socket);
        }
        while ask(&mut setting.connection(), "hello").is_err() {}
    }

    /// Reports two steps of progress.
    struct Steps;

    #[derive(serde::Deserialize)]
    #[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
    enum Step {
        Go {},
    }

    impl Handler for Steps {
        type Request = Step;

        fn handle(&self, _: Step, client: &Client<'_>) -> Result<Value> {
            client.progress("one", 0, 2)?;
            client.progress("two", 1, 2)?;
            Ok(json!("done"))
        }
    }

    #[test]
    fn progress_is_reported_to_those_who_ask_for_it() {
        let setting = Setting::with(Limits { clients: 4, line: 100 }, Steps);
        let go = json!({ "op": "go" });
        let mut plain = setting.connection();
        let mut none = |item| panic!("an item: {item}");
        assert_eq!(plain.stream(&go, &mut none).unwrap(), json!("done"));
        let told = Arc::new(Mutex::new(Vec::new()));
        let mut asking = setting.connection();
        let theirs = told.clone();
        asking.on_progress(move |report| theirs.lock().unwrap().push(report.to_string()));
        assert_eq!(asking.stream(&go, &mut none).unwrap(), json!("done"));
        assert_eq!(*told.lock().unwrap(), ["one (1 of 2)", "two (2 of 2)"]);
        let wrong = json!({ "op": "go", "progress": 7 });
        let error = plain.stream(&wrong, &mut none).unwrap_err().to_string();
        assert!(error.contains("unknown field `progress`"), "{error}");
    }

    /// Gives back what a request carries, as the request of a device is carried.
    struct Carry;

    #[derive(serde::Deserialize)]
    #[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
    enum Carried {
        Device { request: Value },
    }

    impl Handler for Carry {
        type Request = Carried;

        fn handle(&self, Carried::Device { request }: Carried, _: &Client<'_>) -> Result<Value> {
            Ok(request)
        }
    }

    #[test]
    fn a_request_of_any_depth_leaves_the_stack_whole() {
        let setting = Setting::with(Limits { clients: 64, line: 4 << 20 }, Carry);
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            for depth in [1, 64, 120, 126, 127, 128, 200_000] {
                let deep = format!("{}1{}", open.repeat(depth), close.repeat(depth));
                let line = format!("{{\"op\":\"device\",\"request\":{deep}}}\n");
                let socket = setting.connect();
                (&socket).write_all(line.as_bytes()).unwrap();
                let mut answer = String::new();
                BufReader::new(&socket).read_line(&mut answer).unwrap();
                let (ok, error) = (format!("{{\"ok\":{deep}}}\n"), "{\"error\":\"not a request");
                assert!(answer == ok || answer.starts_with(error), "{depth}: {answer:.100}");
            }
        }
    }
}
