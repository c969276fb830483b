// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client's end.

use std::fmt;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::Deserialize;
use serde_json::Value;

/// A connection to a server. It trusts the server to end its lines.
pub struct Connection {
    reader: BufReader<UnixStream>,
    /// The name of the server in error messages.
    peer: &'static str,
    on_progress: Option<Box<dyn FnMut(Progress)>>,
    is_endless: bool,
}

/// How far the server is with a request.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Progress {
    /// What it does now, for people.
    pub text: String,
    /// How many steps are done.
    #[serde(default)]
    pub done: u64,
    /// How many steps there are.
    #[serde(default)]
    pub total: u64,
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        match self.total {
            0 | 1 => Ok(()),
            total => write!(f, " ({} of {total})", self.done.saturating_add(1).min(total)),
        }
    }
}

impl Connection {
    /// Makes a connection over `socket`. Error messages call the server `peer`.
    pub fn new(socket: UnixStream, peer: &'static str) -> Connection {
        Connection { reader: BufReader::new(socket), peer, on_progress: None, is_endless: false }
    }

    /// Connects to the socket at `path`. This, each request and each answer fail with
    /// [`ErrorKind::TimedOut`] if the server does nothing for `timeout`.
    ///
    /// # Errors
    /// Nobody listens there, the server does not accept the connection in time, or the system
    /// refuses.
    pub fn connect(path: &Path, peer: &'static str, timeout: Duration) -> io::Result<Connection> {
        let timeout = timeout.max(Duration::from_millis(1));
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // A server that is stopped, or short of descriptors, leaves clients in its backlog. When
        // that is full, the next one would wait for ever.
        set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(timeout))?;
        let address = SocketAddrUnix::new(path)?;
        match retry_on_intr(|| connect(&socket, &address)) {
            Ok(()) => Ok(Connection::new(socket.into(), peer)),
            Err(Errno::AGAIN) => Err(late(peer, "accept a client", Some(timeout))),
            Err(error) => Err(error.into()),
        }
    }

    /// The socket. Its time-outs are those of the requests.
    pub fn socket(&self) -> &UnixStream {
        self.reader.get_ref()
    }

    /// Asks for reports of progress in the requests that are objects, and passes them to `show`.
    pub fn on_progress(&mut self, show: impl FnMut(Progress) + 'static) {
        self.on_progress = Some(Box::new(show));
    }

    /// Once a request has its first answer, the next one may take any time.
    pub fn set_endless(&mut self) {
        self.is_endless = true;
    }

    /// Sends a request, passes each answer except the last to `item`, and returns the last.
    ///
    /// # Errors
    /// The server refuses (the error is the server's text), has gone, does not answer (the error is
    /// an [`io::Error`] of kind [`TimedOut`](ErrorKind::TimedOut)), or sends something that is no
    /// answer.
    pub fn stream(&mut self, request: &Value, item: &mut dyn FnMut(Value)) -> Result<Value> {
        let peer = self.peer;
        let mut line = request.clone();
        if let (Some(_), Value::Object(members)) = (&self.on_progress, &mut line) {
            members.insert("progress".into(), true.into());
        }
        // The server may have answered although the request was not sent completely.
        let sent = self.reader.get_mut().write_all(format!("{line}\n").as_bytes());
        loop {
            let mut line = Vec::new();
            if let Err(error) = self.reader.read_until(b'\n', &mut line) {
                return Err(match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                        late(peer, "answer", self.socket().read_timeout().ok().flatten()).into()
                    }
                    _ => Error::from(error).context(format!("{peer} has gone")),
                });
            }
            // A server that ends in the middle of a line leaves a part of it behind.
            if line.last() != Some(&b'\n') {
                sent.with_context(|| format!("{peer} has gone"))?;
                bail!("{peer} has gone");
            }
            let mut answer: Value = serde_json::from_slice(&line)
                .with_context(|| format!("{peer} sent something that is no answer"))?;
            if let Some(error) = answer.get("error").and_then(Value::as_str) {
                bail!("{error}");
            }
            if let Some(report) = answer.get_mut("progress").map(Value::take) {
                let report = serde_json::from_value(report)
                    .with_context(|| format!("{peer} sent something that is no answer"))?;
                if let Some(show) = &mut self.on_progress {
                    show(report);
                }
                continue;
            }
            if self.is_endless {
                self.socket().set_read_timeout(None)?;
            }
            match (answer.get_mut("item").map(Value::take), answer.get_mut("ok").map(Value::take)) {
                (Some(value), _) => item(value),
                (None, Some(value)) => return Ok(value),
                (None, None) => bail!("{peer} sent something that is no answer"),
            }
        }
    }
}

/// The error that the server did not do something within `timeout`.
fn late(peer: &str, what: &str, timeout: Option<Duration>) -> io::Error {
    let time = timeout.unwrap_or_default();
    io::Error::new(ErrorKind::TimedOut, format!("{peer} does not {what} within {time:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a client says of a server that sends `bytes` and ends.
    fn error_after(bytes: &[u8]) -> String {
        let (client, mut server) = UnixStream::pair().unwrap();
        server.write_all(bytes).unwrap();
        server.shutdown(std::net::Shutdown::Write).unwrap();
        let mut connection = Connection::new(client, "the echo");
        connection.stream(&Value::Null, &mut drop).unwrap_err().to_string()
    }

    #[test]
    fn a_server_that_does_nothing_is_waited_for_no_longer_than_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        // A backlog of 0 has room for one.
        rustix::net::listen(&listener, 0).unwrap();
        let connect = || Connection::connect(&path, "the echo", Duration::from_millis(20));
        let mut silent = connect().unwrap();
        let error = connect().map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(error.to_string(), "the echo does not accept a client within 20ms");
        let error = silent.stream(&Value::Null, &mut drop).unwrap_err();
        assert_eq!(error.to_string(), "the echo does not answer within 20ms");
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        assert_eq!(kind, Some(ErrorKind::TimedOut));
    }

    #[test]
    fn a_server_that_ends_within_a_line_has_gone() {
        // The third lacks nothing except its end; the last ends within a character.
        for part in [&b""[..], br#"{"o"#, br#"{"ok":1}"#, b"{\"ok\":\"\xc3"] {
            assert_eq!(error_after(part), "the echo has gone", "{part:?}");
        }
        assert_eq!(error_after(b"{\"item\":1}\n{"), "the echo has gone");
        assert_eq!(error_after(b"hello\n"), "the echo sent something that is no answer");
    }
}
