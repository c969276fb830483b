//! The end that answers.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// How long a client may take for its request, and for taking an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What clients may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Clients at a time; another one gets an error and is disconnected.
    pub clients: usize,
    /// The longest request, in bytes.
    pub line: u64,
}

/// What a server is asked, and who answers.
pub trait Handler: Send + Sync + 'static {
    /// What a client may ask for.
    type Request: DeserializeOwned;

    /// Answers a request: with its last answer. Those before it go to `client`. Runs in the
    /// client's own thread.
    ///
    /// # Errors
    /// Become the answer `error`.
    fn handle(&self, request: Self::Request, client: &Client<'_>) -> Result<Value>;
}

/// Whoever made the request that is being handled.
pub struct Client<'a>(&'a UnixStream);

impl Client<'_> {
    /// Sends one of several answers.
    ///
    /// # Errors
    /// The client has gone, or takes nothing.
    pub fn item(&self, value: Value) -> io::Result<()> {
        self.answer(&json!({ "item": value }))
    }

    /// Whether the client has closed its end, or sends what nobody asked for.
    pub fn gone(&self) -> bool {
        let mut fds = [PollFd::new(self.0, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n| n > 0)
    }

    fn answer(&self, value: &Value) -> io::Result<()> {
        let mut socket = self.0;
        socket.write_all(format!("{value}\n").as_bytes())
    }
}

/// Accepts clients, when its descriptor is readable, and serves each from a thread of its own.
pub struct Server<H> {
    listener: UnixListener,
    limits: Limits,
    handler: Arc<H>,
    clients: Arc<AtomicUsize>,
}

/// Counts a client as long as it is there.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<H: Handler> Server<H> {
    /// On `listener`, which does not block from here on.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(listener: UnixListener, limits: Limits, handler: H) -> io::Result<Server<H>> {
        listener.set_nonblocking(true)?;
        Ok(Server { listener, limits, handler: Arc::new(handler), clients: Arc::default() })
    }

    /// Accepts the next client, if there is one.
    ///
    /// # Errors
    /// Those of this process, not of the client: it is out of descriptors or threads. The next
    /// client waits in the backlog, so trying again at once would only burn time.
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
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let before = self.clients.fetch_add(1, Ordering::Relaxed);
        let place = Place(self.clients.clone());
        if before >= self.limits.clients {
            // Fits the empty buffer of a fresh socket, so it cannot block.
            let text = format!("more than {} control clients", self.limits.clients);
            let _ = Client(&socket).answer(&json!({ "error": text }));
            return Ok(());
        }
        let (handler, line_max) = (self.handler.clone(), self.limits.line);
        let thread =
            std::thread::Builder::new().name("control-client".into()).stack_size(256 << 10);
        thread.spawn(move || {
            let _place = place;
            serve(&*handler, line_max, &socket);
        })?;
        Ok(())
    }
}

impl<H> AsFd for Server<H> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Serves a client until it ends, takes too long, or breaks the form.
fn serve<H: Handler>(handler: &H, line_max: u64, socket: &UnixStream) {
    let (mut reader, client) = (BufReader::new(socket), Client(socket));
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
        let result = serde_json::from_slice(&line)
            .map_err(|e| anyhow!("not a request: {e}"))
            .and_then(|request| handler.handle(request, &client));
        let last = match result {
            Ok(value) => json!({ "ok": value }),
            Err(error) => json!({ "error": format!("{error:#}") }),
        };
        if client.answer(&last).is_err() {
            return;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::Connection;

    /// Says what it is told, and panics on request.
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

    /// A server of two clients with lines of 100 bytes, which accepts all along.
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

    /// What is left to be read until the other end closes.
    fn rest(mut socket: &UnixStream) -> String {
        let mut bytes = Vec::new();
        // It may close with something of ours unread, which is an error behind its last byte.
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
        // Until the one before it has left its place.
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
            // Two places, and each of those who wait gives its own back.
            let socket = setting.connect();
            (&socket).write_all(b"\"wait\"\n").unwrap();
            drop(socket);
        }
        while ask(&mut setting.connection(), "hello").is_err() {}
    }
}
