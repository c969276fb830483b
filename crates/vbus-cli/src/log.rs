// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log, on standard error. The number of its lines is bounded, because a hostile peer can cause
//! some of them as often as it likes.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// In each period of this length ...
const PERIOD: Duration = Duration::from_secs(10);
/// ... the log has at most this many lines.
const LINES: u32 = 1000;

/// Starts the log. The environment variable `VBUS_LOG` sets its level (`debug`,
/// `vfio_user_protocol=trace`, ...). The default is `info`.
pub fn start() {
    start_with("info");
}

/// Starts the log. `level` is its level without `VBUS_LOG`.
pub fn start_with(level: &str) {
    let filter = EnvFilter::try_from_env("VBUS_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let ansi = io::stderr().is_terminal();
    let bounded = Bounded { state: Mutex::new(State { since: Instant::now(), lines: 0 }) };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(ansi)
        .with_target(false)
        .with_writer(bounded)
        .init();
}

struct State {
    since: Instant,
    lines: u32,
}

struct Bounded {
    state: Mutex<State>,
}

/// The writer of one event. It writes the event or drops it.
enum Line {
    Write,
    Drop,
}

impl<'a> MakeWriter<'a> for Bounded {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        if state.since.elapsed() >= PERIOD {
            if state.lines > LINES {
                let _ =
                    writeln!(io::stderr(), "{} lines of the log were omitted", state.lines - LINES);
            }
            *state = State { since: Instant::now(), lines: 0 };
        }
        state.lines = state.lines.saturating_add(1);
        if state.lines <= LINES { Line::Write } else { Line::Drop }
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Line::Write = self {
            // The program goes on when it cannot write its log, because the disk is full or the
            // reader has gone. There is nowhere else to report that.
            let _ = io::stderr().write_all(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
