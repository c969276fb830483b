// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One scraper's connection: a request, an answer, the end. It never blocks.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use vbus_vfio_user::{Closer, plain};

use super::openmetrics::CONTENT_TYPE;

/// The longest head of a request, in bytes.
const HEAD_MAX: usize = 8 << 10;
/// The most lines of a head.
const LINES_MAX: usize = 64;

/// A connection.
pub struct Conversation {
    socket: OwnedFd,
    until: Instant,
    step: Step,
}

enum Step {
    /// The head of the request so far.
    Ask(Vec<u8>),
    /// What is to be sent, and how much of both parts together has been sent.
    Answer { head: Vec<u8>, body: Arc<str>, sent: usize },
    /// Everything is sent. What else the scraper sends is read, so that its last bytes do not
    /// cancel the answer.
    Drain,
}

/// What a request gets.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    /// The head has not ended yet.
    Partial,
    /// The metrics. `false`: only the head of the answer.
    Metrics(bool),
    /// Status and text.
    Refused(&'static str, &'static str),
}

impl Conversation {
    /// A connection over `socket`, which is non-blocking. It ends at `until` at the latest.
    pub fn new(socket: OwnedFd, until: Instant) -> Conversation {
        Conversation { socket, until, step: Step::Ask(Vec::new()) }
    }

    /// A connection that gets this answer whatever it asks.
    pub fn refused(socket: OwnedFd, until: Instant, text: String) -> Conversation {
        let step = answer("403 Forbidden", "text/plain; charset=utf-8", text.into(), true);
        Conversation { socket, until, step }
    }

    /// When the connection ends at the latest.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// What the connection waits for.
    pub fn interest(&self) -> PollFlags {
        match self.step {
            Step::Answer { .. } => PollFlags::OUT,
            _ => PollFlags::IN,
        }
    }

    /// Goes on, if the socket is ready. `metrics` makes the text, and `closer` closes what the
    /// scraper sends along. Returns whether the connection goes on.
    pub fn ready(&mut self, metrics: &mut dyn FnMut() -> Arc<str>, closer: &Closer) -> bool {
        let done = match &mut self.step {
            Step::Ask(_) => self.ask(metrics, closer),
            Step::Answer { .. } => self.send(),
            Step::Drain => self.read(&mut [0; 4096], closer).map(|bytes| bytes > 0),
        };
        match done {
            Ok(goes_on) => goes_on,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }

    /// Ends the connection. It does not wait for what the scraper has sent along.
    pub fn end(self, closer: &Closer) {
        plain::close(self.socket, closer);
    }

    fn read(&self, buffer: &mut [u8], closer: &Closer) -> io::Result<usize> {
        Ok(plain::recv(self.socket.as_fd(), false, buffer, closer)?)
    }

    fn ask(&mut self, metrics: &mut dyn FnMut() -> Arc<str>, closer: &Closer) -> io::Result<bool> {
        let mut buffer = [0; 2048];
        let bytes = self.read(&mut buffer, closer)?;
        let Step::Ask(head) = &mut self.step else { return Ok(true) };
        head.extend_from_slice(&buffer[..bytes]);
        self.step = match request(head) {
            // The scraper has gone, or has closed its side within the head.
            Request::Partial if bytes == 0 => return Ok(false),
            Request::Partial => return Ok(true),
            Request::Metrics(body) => answer("200 OK", CONTENT_TYPE, metrics(), body),
            Request::Refused(status, text) => {
                answer(status, "text/plain; charset=utf-8", text.into(), true)
            }
        };
        self.send()
    }

    fn send(&mut self) -> io::Result<bool> {
        let Step::Answer { head, body, sent } = &mut self.step else { return Ok(true) };
        loop {
            let rest = match head.get(*sent..) {
                Some(rest) if !rest.is_empty() => rest,
                _ => &body.as_bytes()[*sent - head.len()..],
            };
            if rest.is_empty() {
                shutdown(&self.socket, Shutdown::Write)?;
                self.step = Step::Drain;
                return Ok(true);
            }
            match send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(bytes) => *sent += bytes,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Conversation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn answer(status: &str, kind: &str, body: Arc<str>, with_body: bool) -> Step {
    let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{allow}Connection: \
         close\r\n\r\n",
        body.len()
    );
    let body = if with_body { body } else { Arc::from("") };
    Step::Answer { head: head.into_bytes(), body, sent: 0 }
}

/// What a request wants that begins with `head`.
fn request(head: &[u8]) -> Request {
    let mut lines = [httparse::EMPTY_HEADER; LINES_MAX];
    let mut parsed = httparse::Request::new(&mut lines);
    match parsed.parse(head) {
        _ if head.len() > HEAD_MAX => {
            Request::Refused("431 Request Header Fields Too Large", "the head is too long\n")
        }
        Ok(httparse::Status::Partial) => Request::Partial,
        Ok(httparse::Status::Complete(_)) => {
            let path = parsed.path.unwrap_or_default().split('?').next().unwrap_or_default();
            match (parsed.method.unwrap_or_default(), path) {
                ("GET", "/metrics") => Request::Metrics(true),
                ("HEAD", "/metrics") => Request::Metrics(false),
                ("GET" | "HEAD", _) => {
                    Request::Refused("404 Not Found", "the metrics are at /metrics\n")
                }
                _ => Request::Refused("405 Method Not Allowed", "only GET and HEAD are served\n"),
            }
        }
        Err(httparse::Error::TooManyHeaders) => {
            Request::Refused("431 Request Header Fields Too Large", "the head has too many lines\n")
        }
        Err(_) => Request::Refused("400 Bad Request", "this is no request of HTTP\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(LINES_MAX + 1));
        let status = |head: &[u8]| match request(head) {
            Request::Refused(status, _) => status[..3].to_owned(),
            other => format!("{other:?}"),
        };
        for (head, expected) in [
            (&b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"[..], "Metrics(true)"),
            (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", "Metrics(true)"),
            (b"HEAD /metrics HTTP/1.1\r\n\r\n", "Metrics(false)"),
            (b"", "Partial"),
            (b"GET /met", "Partial"),
            (b"GET /metrics HTTP/1.1\r\nHost: a\r\n", "Partial"),
            (b"GET / HTTP/1.1\r\n\r\n", "404"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
            (b"{\"op\":\"list\"}\n", "400"),
            (b"\x02\0\0\0\x08", "400"),
            (b"GET /metrics HTTP/9\r\n\r\n", "400"),
            (&b"GET /".repeat(HEAD_MAX), "431"),
            (many.as_bytes(), "431"),
        ] {
            assert_eq!(status(head), expected, "{}", String::from_utf8_lossy(head));
        }
    }
}
