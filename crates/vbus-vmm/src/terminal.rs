//! This process's terminal as the guest's console: raw while the machine runs, and as it was
//! afterwards.

use std::io;

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// The key that begins a command to this program: Ctrl-A.
const COMMAND: u8 = 1;

/// A terminal in raw mode, until it is dropped.
pub struct Raw(Termios);

impl Raw {
    /// Makes standard input raw, if it is a terminal.
    pub fn stdin() -> io::Result<Option<Raw>> {
        if !isatty(stdin()) {
            return Ok(None);
        }
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Some(Raw(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.0);
    }
}

/// Keys on their way to the guest, but for commands to this program.
#[derive(Default)]
pub struct Escape {
    command: bool,
}

/// What became of a key.
#[derive(Debug, PartialEq, Eq)]
pub enum Escaped {
    /// It is the guest's.
    Input(u8),
    /// Nothing yet, or nothing at all.
    Nothing,
    /// Ctrl-A x: end the program.
    Quit,
}

impl Escape {
    /// The next key.
    pub fn next(&mut self, key: u8) -> Escaped {
        match (std::mem::take(&mut self.command), key) {
            (false, COMMAND) => {
                self.command = true;
                Escaped::Nothing
            }
            (false, key) | (true, key @ COMMAND) => Escaped::Input(key),
            (true, b'x' | b'X') => Escaped::Quit,
            (true, _) => Escaped::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_begin_with_control_a() {
        let mut escape = Escape::default();
        let mut keys = |keys: &[u8]| keys.iter().map(|key| escape.next(*key)).collect::<Vec<_>>();
        assert_eq!(
            keys(b"x\x01\x01\x01x"),
            [
                Escaped::Input(b'x'),
                Escaped::Nothing,
                Escaped::Input(1),
                Escaped::Nothing,
                Escaped::Quit
            ]
        );
        assert_eq!(keys(b"\x01qx"), [Escaped::Nothing, Escaped::Nothing, Escaped::Input(b'x')]);
    }
}
