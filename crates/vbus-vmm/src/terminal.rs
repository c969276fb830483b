// SPDX-License-Identifier: Apache-2.0 OR MIT
//! This process's terminal as the guest's console. It is in raw mode while the machine runs.

use std::io;

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// The key that begins a command to this program, Ctrl-A.
const COMMAND: u8 = 1;

/// A terminal in raw mode. Dropping this value restores the former mode.
pub struct Raw(Termios);

impl Raw {
    /// Puts standard input into raw mode, if it is a terminal.
    ///
    /// # Errors
    /// The terminal refuses.
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
        // This fails if the terminal is gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.0);
    }
}

/// Separates commands to this program from the keys for the guest.
#[derive(Default)]
pub struct Escape {
    command: bool,
}

/// The meaning of a key.
#[derive(Debug, PartialEq, Eq)]
pub enum Escaped {
    /// A key for the guest.
    Input(u8),
    /// The first key of a command, or an unknown command.
    Nothing,
    /// The command that ends the program, Ctrl-A x.
    Quit,
}

impl Escape {
    /// Takes the next key.
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
