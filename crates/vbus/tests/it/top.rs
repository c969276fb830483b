// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus top` on a terminal of its own.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::support::{Served, TWO, vbus, wait_until};

/// A terminal in which `vbus top` runs.
struct Terminal {
    keyboard: OwnedFd,
    line: File,
    child: Child,
    screen: vt100::Parser,
    before: LocalModes,
}

impl Terminal {
    fn start(dir: &Path) -> Terminal {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&keyboard).unwrap();
        unlockpt(&keyboard).unwrap();
        let name = ptsname(&keyboard, Vec::new()).unwrap().into_string().unwrap();
        let noctty = i32::try_from(OFlags::NOCTTY.bits()).unwrap();
        let line = File::options().read(true).write(true).custom_flags(noctty).open(name).unwrap();
        fcntl_setfl(&keyboard, fcntl_getfl(&keyboard).unwrap() | OFlags::NONBLOCK).unwrap();
        tcsetwinsize(&keyboard, size(24, 160)).unwrap();
        let before = tcgetattr(&line).unwrap().local_modes;
        // It makes the terminal that of the program, which gets its signals.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(vbus().get_program());
        command.args(["top", "--interval", "0.1", "--dir"]).arg(dir).env("TERM", "xterm-256color");
        let open = || line.try_clone().unwrap();
        let child = command.stdin(open()).stdout(open()).stderr(open()).spawn().unwrap();
        let screen = vt100::Parser::new(24, 160, 0);
        Terminal { keyboard, line, child, screen, before }
    }

    fn look(&mut self) -> String {
        let mut buffer = [0; 4096];
        while let Ok(bytes) = rustix::io::read(&self.keyboard, &mut buffer) {
            if bytes == 0 {
                break;
            }
            self.screen.process(&buffer[..bytes]);
        }
        self.screen.screen().contents()
    }

    /// Waits until the screen has this text.
    fn wait_for(&mut self, text: &str) {
        wait_until(text, || self.look().contains(text));
    }

    fn press(&self, keys: &[u8]) {
        rustix::io::write(&self.keyboard, keys).unwrap();
    }

    fn resize(&mut self, rows: u16, columns: u16) {
        self.look();
        self.screen.set_size(rows, columns);
        tcsetwinsize(&self.keyboard, size(rows, columns)).unwrap();
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Waits for the end of the program, and checks that the terminal is as before.
    fn ends_well(mut self) {
        let mut code = None;
        wait_until("vbus top ends", || {
            self.look();
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        self.look();
        assert!(code.unwrap().success(), "{code:?}: {}", self.screen.screen().contents());
        assert!(!self.screen.screen().alternate_screen(), "the second screen is still there");
        assert!(!self.screen.screen().hide_cursor(), "the cursor is hidden");
        assert_eq!(tcgetattr(&self.line).unwrap().local_modes, self.before);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

#[test]
fn it_follows_the_bus_and_the_keys_and_gives_the_terminal_back() {
    let bus = Served::start(TWO);
    let mut top = Terminal::start(&bus.dir);
    top.wait_for("2 devices, 0 open");
    top.wait_for("INTRS/s");
    assert!(top.screen.screen().alternate_screen() && top.screen.screen().hide_cursor());
    assert_ne!(tcgetattr(&top.line).unwrap().local_modes, top.before, "keys are echoed");
    top.press(b"?");
    top.wait_for("any key goes back");
    top.press(b"x");
    top.wait_for("net1");
    top.press(b"\x1b[B\r");
    top.wait_for("interrupts_suppressed");
    top.press(b"\x7f");
    top.wait_for("q end  Enter device");
    // A device that comes is there, and a bus that goes is told.
    bus.good(&["device", "add", "net2", "--class", "venet", "--set", "backend=null"]);
    top.wait_for("3 devices, 0 open");
    let dir = bus.dir.clone();
    // Only the directory of the bus stays.
    drop(bus);
    top.wait_for("The bus has not answered");
    std::fs::create_dir_all(dir.parent().unwrap()).unwrap();
    let again = Served::start_in(&dir, TWO);
    top.wait_for("2 devices, 0 open");
    wait_until("the notice goes", || !top.look().contains("has not answered"));
    // A narrow screen has fewer columns. No key follows: crossterm may keep a key that comes
    // together with a resize until the next one.
    top.resize(20, 80);
    wait_until("a narrow list", || {
        let text = top.look();
        text.contains("DEVICE*") && !text.contains("INTRS/s")
    });
    top.signal(Signal::TERM);
    top.ends_well();
    for signal in [Signal::INT, Signal::HUP] {
        let mut top = Terminal::start(&again.dir);
        top.wait_for("2 devices, 0 open");
        top.signal(signal);
        top.ends_well();
    }
    for keys in [&b"q"[..], b"\x03", b"\x1b"] {
        let mut top = Terminal::start(&again.dir);
        top.wait_for("2 devices, 0 open");
        top.press(keys);
        top.ends_well();
    }
    drop(again);
    let _ = std::fs::remove_dir_all(dir.parent().unwrap());
}

#[test]
fn without_a_terminal_it_says_what_to_use() {
    let bus = Served::start(TWO);
    let said = bus.bad(&["top"]);
    assert!(said.contains("`vbus stats --watch`"), "{said}");
}
