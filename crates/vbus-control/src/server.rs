// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server's end.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::peer::Peer;

/// How long a client may take to send a request, and to take an answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The stack of a client's thread, in bytes. The parser of JSON calls itself for each level that a
/// request is deep, up to 128 levels; a build without optimization takes more than 1 KiB for one. A
/// page that is not used costs no memory.
const STACK: usize = 1 << 20;

/// Limits on the cost of clients.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most clients at a time. A further client gets an error and is disconnected.
    pub clients: usize,
    /// The longest request, in bytes.
    pub line: u64,
}

/// Answers the requests that come to a server.
pub trait Handler: Send + Sync + 'static {
    /// The type of a request.
    type Request: DeserializeOwned;

    /// Decides whether `peer` may send requests at all. The provided method admits everybody whom
    /// the mode of the socket lets connect. Runs in the thread that accepts, so it must not wait.
    ///
    /// # Errors
    /// An error becomes the answer `error`, and the client is disconnected.
    fn admit(&self, peer: &Peer) -> Result<()> {
        let _ = peer;
        Ok(())
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
}

impl Client<'_> {
    /// Who the client is.
    pub fn peer(&self) -> &Peer {
        self.peer
    }

    /// Sends one of several answers.
    ///
    /// # Errors
    /// The client has gone, or does not take the answer within the time-out.
    pub fn item(&self, value: Value) -> io::Result<()> {
        self.answer(&json!({ "item": value }))
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
    clients: Arc<AtomicUsize>,
}

/// Counts a client until it is dropped.
struct Admission(Arc<AtomicUsize>);

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<H: Handler> Server<H> {
    /// Makes a server on `listener`, and makes `listener` non-blocking.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn new(listener: UnixListener, limits: Limits, handler: H) -> io::Result<Server<H>> {
        listener.set_nonblocking(true)?;
        Ok(Server { listener, limits, handler: Arc::new(handler), clients: Arc::default() })
    }

    /// Accepts the next client, if one waits.
    ///
    /// # Errors
    /// This process is out of descriptors or threads. The next client waits in the backlog, so the
    /// caller should pause before it tries again.
    pub fn accept(&self) -> io::Result<()> {
        let socket = match self.listener.accept() {
            Ok((socket, _)) => socket,
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
        let peer = Peer::of(&socket)?;
        if let Err(error) = self.handler.admit(&peer) {
            let _ = answer(&socket, &json!({ "error": format!("{error:#}") }));
            return Ok(());
        }
        let before = self.clients.fetch_add(1, Ordering::Relaxed);
        let admission = Admission(self.clients.clone());
        if before >= self.limits.clients {
            let text = format!("more than {} control clients", self.limits.clients);
            let _ = answer(&socket, &json!({ "error": text }));
            return Ok(());
        }
        let (handler, line_max) = (self.handler.clone(), self.limits.line);
        let thread = std::thread::Builder::new().name("control-client".into()).stack_size(STACK);
        thread.spawn(move || {
            let _admission = admission;
            serve(&*handler, line_max, &socket, &peer);
        })?;
        Ok(())
    }
}

impl<H> AsFd for Server<H> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Serves a client until it leaves, exceeds the time-out, or breaks the protocol.
fn serve<H: Handler>(handler: &H, line_max: u64, socket: &UnixStream, peer: &Peer) {
    let (mut reader, client) = (BufReader::new(socket), Client { socket, peer });
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(line_max).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            let text = format!("a request must be one line of at most {line_max} bytes");
            let _ = client.answer(&json!({ "error": text }));
            return;
        }
        let request: serde_json::Result<H::Request> = serde_json::from_slice(&line);
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
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
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
                "wait" => {
                    while !client.gone() {
                        std::thread::yield_now();
                    }
                    Ok(Value::Null)
                }
                _ => Ok(request.into()),
            }
        }
    }

    /// A server for two clients and lines of 100 bytes, with a thread that accepts clients.
    struct Setting {
        dir: tempfile::TempDir,
    }

    impl Setting {
        fn new() -> Setting {
            let dir = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
            let server = Server::new(listener, Limits { clients: 2, line: 100 }, Echo).unwrap();
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
    fn whatever_a_client_does_ends_at_worst_its_own_connection() {
        let setting = Setting::new();
        let mut honest = setting.connection();
        let check =
            |honest: &mut Connection| assert_eq!(ask(honest, "hello").unwrap(), json!("hello"));
        check(&mut honest);
        let refused = |answers: &str| answers.contains("more than 2 control clients");
        // The client before this one may still count.
        let other = |text: &[u8]| loop {
            let socket = setting.connect();
            let _ = (&socket).write_all(text);
            let answers = rest(&socket);
            if !refused(&answers) {
                return answers;
            }
        };
        assert!(other(&[b' '; 101]).contains("at most 100 bytes"));
        assert_eq!(other(b"\"panic\"\n"), "");
        // Bytes of another protocol, with a request in them.
        let answers = other(b"\x02\0\0\0\x08\x88\xb5\n\"hello\"\n");
        assert!(answers.contains("not a request") && !answers.contains("hello"), "{answers}");
        check(&mut honest);
        let mut second = loop {
            let mut second = setting.connection();
            match ask(&mut second, "hello") {
                Ok(_) => break second,
                Err(error) => assert!(refused(&error.to_string()), "{error}"),
            }
        };
        assert!(refused(&ask(&mut setting.connection(), "hello").unwrap_err().to_string()));
        assert_eq!(ask(&mut second, "refuse").unwrap_err().to_string(), "no");
        let nonsense = second.stream(&json!(17), &mut |_| {}).unwrap_err().to_string();
        assert!(nonsense.starts_with("not a request: "), "{nonsense}");
        check(&mut second);
        check(&mut honest);
    }

    #[test]
    fn a_client_that_goes_is_noticed_while_it_is_served() {
        let setting = Setting::new();
        for _ in 0..3 {
            // Only two clients may be there, so each must be noticed when it leaves.
            let socket = setting.connect();
            // One that comes before another was noticed is refused, and may find the socket closed.
            let _ = (&socket).write_all(b"\"wait\"\n");
            drop(socket);
        }
        while ask(&mut setting.connection(), "hello").is_err() {}
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
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = Server::new(listener, Limits { clients: 64, line: 4 << 20 }, Carry).unwrap();
        std::thread::spawn(move || {
            loop {
                poll(&mut [PollFd::new(&server, PollFlags::IN)], None).unwrap();
                server.accept().unwrap();
            }
        });
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            for depth in [1, 64, 120, 126, 127, 128, 200_000] {
                let deep = format!("{}1{}", open.repeat(depth), close.repeat(depth));
                let line = format!("{{\"op\":\"device\",\"request\":{deep}}}\n");
                let socket = UnixStream::connect(&path).unwrap();
                (&socket).write_all(line.as_bytes()).unwrap();
                let mut answer = String::new();
                BufReader::new(&socket).read_line(&mut answer).unwrap();
                let (ok, error) = (format!("{{\"ok\":{deep}}}\n"), "{\"error\":\"not a request");
                assert!(answer == ok || answer.starts_with(error), "{depth}: {answer:.100}");
            }
        }
    }
}
