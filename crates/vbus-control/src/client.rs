// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client's end.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A connection to a server. It trusts the server to end its lines.
pub struct Connection {
    reader: BufReader<UnixStream>,
    /// The name of the server in error messages.
    peer: &'static str,
}

impl Connection {
    /// Makes a connection over `socket`. Error messages call the server `peer`.
    pub fn new(socket: UnixStream, peer: &'static str) -> Connection {
        Connection { reader: BufReader::new(socket), peer }
    }

    /// The socket. Its time-outs are those of the requests.
    pub fn socket(&self) -> &UnixStream {
        self.reader.get_ref()
    }

    /// Sends a request, passes each answer except the last to `item`, and returns the last.
    ///
    /// # Errors
    /// The server refuses (the error is the server's text), has gone, does not answer (the cause is
    /// the [`std::io::Error`]), or sends something that is no answer.
    pub fn stream(&mut self, request: &Value, item: &mut dyn FnMut(Value)) -> Result<Value> {
        let peer = self.peer;
        // The server may have answered although the request was not sent completely.
        let sent = self.reader.get_mut().write_all(format!("{request}\n").as_bytes());
        loop {
            let mut line = Vec::new();
            self.reader
                .read_until(b'\n', &mut line)
                .with_context(|| format!("{peer} does not answer"))?;
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
            match (answer.get_mut("item").map(Value::take), answer.get_mut("ok").map(Value::take)) {
                (Some(value), _) => item(value),
                (None, Some(value)) => return Ok(value),
                (None, None) => bail!("{peer} sent something that is no answer"),
            }
        }
    }
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
    fn a_server_that_ends_within_a_line_has_gone() {
        // The third lacks nothing except its end; the last ends within a character.
        for part in [&b""[..], br#"{"o"#, br#"{"ok":1}"#, b"{\"ok\":\"\xc3"] {
            assert_eq!(error_after(part), "the echo has gone", "{part:?}");
        }
        assert_eq!(error_after(b"{\"item\":1}\n{"), "the echo has gone");
        assert_eq!(error_after(b"hello\n"), "the echo sent something that is no answer");
    }
}
