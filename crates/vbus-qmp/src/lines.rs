// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lines of JSON from a stream of bytes.

use std::io::{self, ErrorKind, Read};

use serde_json::Value;

/// Bytes that one read takes at most.
const PIECE: usize = 4096;

/// Why there is no next line. The texts continue a sentence whose subject is the other end.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The other end closed the connection.
    #[error("has closed the connection")]
    Closed,
    /// A line is longer than the limit.
    #[error("sends a line of more than {0} bytes")]
    TooLong(usize),
    /// A line is not JSON.
    #[error("sends a line that is not JSON")]
    NotJson,
    /// Reading failed.
    #[error(transparent)]
    Io(io::Error),
}

/// Splits a stream of bytes into lines of JSON. It keeps the part of a line that has arrived, so
/// the source may be non-blocking or have a time-out.
#[derive(Debug)]
pub struct Lines {
    bytes: Vec<u8>,
    /// The first bytes, which are known to have no line's end among them.
    searched: usize,
    max: usize,
}

impl Lines {
    /// Accepts lines of at most `max` bytes. It never keeps more than `max` bytes and one read.
    pub fn new(max: usize) -> Lines {
        Lines { bytes: Vec::new(), searched: 0, max }
    }

    /// Returns the next line, and reads from `source` as long as there is none. Returns `None` when
    /// `source` has no more bytes now ([`ErrorKind::WouldBlock`], [`ErrorKind::TimedOut`]).
    ///
    /// # Errors
    /// See [`LineError`].
    pub fn next(&mut self, mut source: impl Read) -> Result<Option<Value>, LineError> {
        loop {
            let new = self.bytes.get(self.searched..).unwrap_or_default();
            if let Some(end) = new.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=self.searched + end).collect();
                self.searched = 0;
                return serde_json::from_slice(&line).map(Some).map_err(|_| LineError::NotJson);
            }
            self.searched = self.bytes.len();
            if self.searched > self.max {
                return Err(LineError::TooLong(self.max));
            }
            let mut piece = [0; PIECE];
            match source.read(&mut piece) {
                Ok(0) => return Err(LineError::Closed),
                Ok(length) => self.bytes.extend_from_slice(&piece[..length]),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => return Ok(None),
                    ErrorKind::Interrupted => {}
                    _ => return Err(LineError::Io(error)),
                },
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    /// Gives the pieces one by one, and has no bytes after each; then the stream ends.
    struct Pieces<'a>(&'a [&'a str], bool);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            match self.0 {
                [first, rest @ ..] if self.1 => {
                    buffer[..first.len()].copy_from_slice(first.as_bytes());
                    self.0 = rest;
                    Ok(first.len())
                }
                [] => Ok(0),
                _ => Err(ErrorKind::WouldBlock.into()),
            }
        }
    }

    #[test]
    fn a_line_may_arrive_in_parts() {
        let mut source = Pieces(&["{\"a\":", "1}\n[2]\n", "no"], false);
        let mut lines = Lines::new(100);
        assert_eq!(lines.next(&mut source).unwrap(), None);
        assert_eq!(lines.next(&mut source).unwrap().unwrap()["a"], 1);
        assert_eq!(lines.next(&mut source).unwrap().unwrap()[0], 2);
        assert_eq!(lines.next(&mut source).unwrap(), None);
        assert!(matches!(lines.next(&mut source), Err(LineError::Closed)));
    }

    #[test]
    fn a_long_line_and_other_text_are_errors() {
        let endless = || io::repeat(b'1');
        assert!(matches!(Lines::new(50).next(endless()), Err(LineError::TooLong(50))));
        assert!(matches!(Lines::new(50).next(&b"hello\n"[..]), Err(LineError::NotJson)));
    }
}
