//! The log, on standard error. A hostile peer decides how often some lines are due, so their number
//! is bounded.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Lines in any such time ...
const PERIOD: Duration = Duration::from_secs(10);
/// ... are at most this many.
const LINES: u32 = 1000;

/// Starts it. `VBUS_LOG` chooses what is in it (`debug`, `vfio_user_protocol=trace`, ...); `info`
/// without it.
pub fn start() {
    start_with("info");
}

/// Starts it; without `VBUS_LOG`, `level` chooses what is in it.
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

/// Writes one event, or nothing.
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
                let _ = writeln!(
                    io::stderr(),
                    "{} lines of the log were left out",
                    state.lines - LINES
                );
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
            // A log that cannot be written (a full disk, a reader that has gone) is no reason to
            // stop serving, and there is nowhere to complain of it.
            let _ = io::stderr().write_all(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
