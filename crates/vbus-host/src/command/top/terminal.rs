// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Takes the terminal, and gives it back however the program ends.

use std::io::{self, Stdout, stdout};
use std::sync::Once;

use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::{Hide, Show};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use ratatui::{Frame, Terminal};
use rustix::process::{Signal, getpid, kill_process};

/// The terminal, with a second screen in place of what it showed. Dropping this gives it back.
pub struct Screen(Terminal<CrosstermBackend<Stdout>>);

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    /// It cannot be changed. It is as before then.
    pub fn open() -> io::Result<Screen> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let report = std::panic::take_hook();
            // The report of a panic must not vanish with the second screen.
            std::panic::set_hook(Box::new(move |panic| {
                give_back();
                report(panic);
            }));
        });
        take().inspect_err(|_| give_back())?;
        let terminal = Terminal::new(CrosstermBackend::new(stdout()));
        Ok(Screen(terminal.inspect_err(|_| give_back())?))
    }

    /// Draws a whole screen. Only what has changed is sent.
    ///
    /// # Errors
    /// The terminal has gone.
    pub fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> io::Result<()> {
        self.0.draw(draw).map(drop)
    }

    /// Gives the terminal back, stops the process as Ctrl-Z does, and takes the terminal again when
    /// the process goes on.
    ///
    /// # Errors
    /// The terminal cannot be changed.
    pub fn suspend(&mut self) -> io::Result<()> {
        give_back();
        kill_process(getpid(), Signal::TSTP)?;
        take()?;
        self.0.clear()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

fn take() -> io::Result<()> {
    enable_raw_mode()?;
    execute!(stdout(), EnterAlternateScreen, Hide)
}

fn give_back() {
    // There is no terminal left to report an error to.
    let _ = execute!(stdout(), Show, LeaveAlternateScreen);
    let _ = disable_raw_mode();
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::io::retry_on_intr;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::tcgetattr;

    use super::*;

    /// How long a step may take before it counts as failed.
    const BOUND: Duration = Duration::from_secs(60);
    /// Says that this process is the one that panics.
    const VARIABLE: &str = "VBUS_TEST_PANIC";

    /// Runs this test once more, on a terminal of its own, where it takes the screen and panics.
    #[test]
    fn a_panic_gives_the_terminal_back() {
        if std::env::var_os(VARIABLE).is_some() {
            let _screen = Screen::open().unwrap();
            panic!("as the test wants");
        }
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let line = File::options().read(true).write(true).open(name).unwrap();
        let before = tcgetattr(&line).unwrap().local_modes;
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("command::top::terminal::tests::a_panic_gives_the_terminal_back")
            .env(VARIABLE, "1")
            .env("TERM", "xterm")
            .stdin(line.try_clone().unwrap())
            .stdout(line.try_clone().unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let until = Instant::now() + BOUND;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > until {
                let _ = child.kill();
                panic!("it has not ended within {BOUND:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(!status.success());
        let mut text = Vec::new();
        // Its output is short: it fits in the terminal's buffer.
        let mut buffer = [0; 4096];
        loop {
            let mut fds = [PollFd::new(&master, PollFlags::IN)];
            let timeout = Timespec::try_from(BOUND).unwrap();
            let ready = retry_on_intr(|| poll(&mut fds, Some(&timeout))).unwrap();
            let shown = String::from_utf8_lossy(&text);
            assert!(ready == 1, "the terminal was not given back: {shown:?}");
            let bytes = rustix::io::read(&master, &mut buffer).unwrap();
            text.extend_from_slice(&buffer[..bytes]);
            let text = String::from_utf8_lossy(&text);
            if text.contains("\x1b[?1049h") && text.contains("\x1b[?1049l") {
                assert!(text.rfind("\x1b[?1049l") > text.rfind("\x1b[?1049h"));
                assert!(text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor is hidden");
                break;
            }
        }
        assert_eq!(tcgetattr(&line).unwrap().local_modes, before);
    }
}
