// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How far a long operation is: one line on a terminal, which goes away with the operation.

use std::io::{self, IsTerminal, Write};

/// Moves to the start of the line and clears it.
const CLEAR: &str = "\r\x1b[K";

/// The line. It is on standard error, so that results on standard output stay whole. If standard
/// error is no terminal, nothing is shown.
#[derive(Debug)]
pub struct Progress {
    is_terminal: bool,
    is_shown: bool,
}

impl Progress {
    /// Nothing is shown yet.
    #[expect(clippy::new_without_default, reason = "it asks for the terminal")]
    pub fn new() -> Progress {
        Progress { is_terminal: io::stderr().is_terminal(), is_shown: false }
    }

    /// Shows `text` in the place of the last one.
    pub fn show(&mut self, text: &str) {
        if self.is_terminal {
            let text: String = text.chars().filter(|c| !c.is_control()).collect();
            let _ = write!(io::stderr(), "{CLEAR}{text}");
            self.is_shown = true;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_shown {
            let _ = write!(io::stderr(), "{CLEAR}");
        }
    }
}
