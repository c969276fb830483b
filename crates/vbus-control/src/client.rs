//! The end that asks.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A connection over which requests go, and answers come back. It trusts the server to end its
/// lines.
pub struct Connection {
    reader: BufReader<UnixStream>,
    /// Who is at the other end, for people.
    peer: &'static str,
}

impl Connection {
    /// Over `socket`, to `peer`: what errors call it.
    pub fn new(socket: UnixStream, peer: &'static str) -> Connection {
        Connection { reader: BufReader::new(socket), peer }
    }

    /// The socket, whose time-outs are those of the requests.
    pub fn socket(&self) -> &UnixStream {
        self.reader.get_ref()
    }

    /// Sends a request and hands each of its answers but the last to `item`. Returns the last.
    ///
    /// # Errors
    /// The server's own text if it refuses; that it has gone, does not answer (with the
    /// [`std::io::Error`] as its cause), or answers nonsense.
    pub fn stream(&mut self, request: &Value, item: &mut dyn FnMut(Value)) -> Result<Value> {
        let peer = self.peer;
        // An answer may be there although the request was cut short.
        let sent = self.reader.get_mut().write_all(format!("{request}\n").as_bytes());
        loop {
            let mut line = String::new();
            let read = self
                .reader
                .read_line(&mut line)
                .with_context(|| format!("{peer} does not answer"))?;
            if read == 0 {
                sent.with_context(|| format!("{peer} has gone"))?;
                bail!("{peer} has gone");
            }
            let mut answer: Value =
                serde_json::from_str(&line).with_context(|| format!("{peer} answers nonsense"))?;
            if let Some(error) = answer.get("error").and_then(Value::as_str) {
                bail!("{error}");
            }
            match (answer.get_mut("item").map(Value::take), answer.get_mut("ok").map(Value::take)) {
                (Some(value), _) => item(value),
                (None, Some(value)) => return Ok(value),
                (None, None) => bail!("{peer} answers nonsense"),
            }
        }
    }
}
