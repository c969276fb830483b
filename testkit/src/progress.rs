//! How far long work has come, on standard error: on a terminal one line that is written anew,
//! elsewhere plain lines now and then.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// The least time between two plain lines.
const PLAIN: Duration = Duration::from_secs(5);

/// The least time between two changes of a line on a terminal.
const MOVING: Duration = Duration::from_millis(50);

/// The progress of one piece of work. Dropping it removes the line that moves.
pub struct Progress {
    topic: &'static str,
    terminal: bool,
    shown: Option<Instant>,
}

impl Progress {
    /// Says what begins now: `TOPIC: WORK`, at once and as a line of its own.
    pub fn begin(topic: &'static str, work: &str) -> Self {
        eprintln!("{topic}: {work}");
        Self { topic, terminal: std::io::stderr().is_terminal(), shown: None }
    }

    /// Says how far it has come. What follows too soon on what was said before is not shown.
    pub fn at(&mut self, how_far: &str) {
        let pause = if self.terminal { MOVING } else { PLAIN };
        // The first plain line has to wait too: what takes no time needs no line.
        let since = *self.shown.get_or_insert_with(|| {
            let now = Instant::now();
            if self.terminal { now.checked_sub(pause).unwrap_or(now) } else { now }
        });
        if since.elapsed() < pause {
            return;
        }
        self.shown = Some(Instant::now());
        if self.terminal {
            // To the first column, and what stood there is cleared; a long line must not wrap.
            let line: String = format!("{}:   {how_far}", self.topic).chars().take(79).collect();
            eprint!("\r\x1b[K{line}");
            // Standard error has no buffer, so there is nothing that could fail here.
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
