// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shows the progress of long work on standard error. On a terminal it rewrites one line; elsewhere
//! it prints a plain line now and then.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// The least time between two plain lines.
const PLAIN: Duration = Duration::from_secs(5);

/// The least time between two updates of the line on a terminal.
const MOVING: Duration = Duration::from_millis(50);

/// The progress of one piece of work. Dropping it clears the line on the terminal.
pub struct Progress {
    topic: &'static str,
    terminal: bool,
    shown: Option<Instant>,
}

impl Progress {
    /// Prints `TOPIC: WORK` at once, as a line of its own.
    pub fn begin(topic: &'static str, work: &str) -> Self {
        eprintln!("{topic}: {work}");
        Self { topic, terminal: std::io::stderr().is_terminal(), shown: None }
    }

    /// Shows how far the work has come. A call too soon after the last update shows nothing.
    pub fn at(&mut self, how_far: &str) {
        let pause = if self.terminal { MOVING } else { PLAIN };
        // The first plain line waits too: short work needs no line.
        let since = *self.shown.get_or_insert_with(|| {
            let now = Instant::now();
            if self.terminal { now.checked_sub(pause).unwrap_or(now) } else { now }
        });
        if since.elapsed() < pause {
            return;
        }
        self.shown = Some(Instant::now());
        if self.terminal {
            // This goes to the first column and clears the line. A long line must not wrap.
            let line: String = format!("{}:   {how_far}", self.topic).chars().take(79).collect();
            eprint!("\r\x1b[K{line}");
            // Standard error has no buffer, so the flush has nothing to do.
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{}:   {how_far}", self.topic);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal && self.shown.is_some() {
            eprint!("\r\x1b[K");
        }
    }
}
