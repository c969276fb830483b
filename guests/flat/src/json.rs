// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's report: one JSON object on each line.

use core::fmt::{self, Display, Write};

/// Writes one object with the fields that are added, then ends the line.
///
/// It writes without a buffer. So if the guest dies in the middle of a line, the line shows how far
/// it came.
pub struct Line<W: Write> {
    out: W,
    first: bool,
}

impl<W: Write> Line<W> {
    /// Begins an object.
    pub fn new(mut out: W) -> Self {
        // There is no way to report an error.
        let _ = out.write_char('{');
        Line { out, first: true }
    }

    /// Adds a text.
    #[must_use]
    pub fn text(mut self, key: &str, value: impl Display) -> Self {
        self.key(key);
        let _ = self.out.write_char('"');
        let _ = write!(Escaped(&mut self.out), "{value}");
        let _ = self.out.write_char('"');
        self
    }

    /// Adds a number, or `true` or `false`.
    #[must_use]
    pub fn value(mut self, key: &str, value: impl Display) -> Self {
        self.key(key);
        let _ = write!(self.out, "{value}");
        self
    }

    /// Ends the object and the line.
    pub fn end(mut self) {
        let _ = self.out.write_str("}\n");
    }

    fn key(&mut self, key: &str) {
        let comma = if core::mem::take(&mut self.first) { "" } else { "," };
        let _ = write!(self.out, "{comma}\"{key}\":");
    }
}

/// Escapes the text that passes through.
struct Escaped<'a, W: Write>(&'a mut W);

impl<W: Write> Write for Escaped<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| match c {
            '"' | '\\' => write!(self.0, "\\{c}"),
            c if u32::from(c) < 0x20 => write!(self.0, "\\u{:04x}", u32::from(c)),
            c => self.0.write_char(c),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_json_whatever_is_in_them() {
        let mut out = String::new();
        Line::new(&mut out).text("a", "x\"\\\n\u{e4}").value("b", 5).value("c", true).end();
        Line::new(&mut out).end();
        assert_eq!(out, "{\"a\":\"x\\\"\\\\\\u000a\u{e4}\",\"b\":5,\"c\":true}\n{}\n");
    }
}
