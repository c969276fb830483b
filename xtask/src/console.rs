// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask console` connects this terminal to the console of a running guest: one of `cargo
//! xtask guest` or of `cargo xtask demo --keep`.

use std::io::{IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, ensure};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use testkit::process::run_dirs;

/// Control and ], as in telnet.
const LEAVE: u8 = 0x1d;

/// The console sockets of the running guests, by guest.
fn sockets() -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    for run in run_dirs() {
        for scene in std::fs::read_dir(run).into_iter().flatten().flatten() {
            for file in std::fs::read_dir(scene.path()).into_iter().flatten().flatten() {
                let name = file.file_name().to_string_lossy().into_owned();
                if let Some(guest) = name.strip_suffix(".console") {
                    found.push((guest.to_owned(), file.path()));
                }
            }
        }
    }
    found
}

/// Connects this terminal to the console of `guest` until either ends or the user leaves.
pub fn run(guest: &str) -> Result<()> {
    let known = sockets();
    let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
    let (_, path) = known.iter().rev().find(|(name, _)| name == guest).with_context(|| {
        format!(
            "no guest {guest} is running ({}); `cargo xtask guest` starts one, `cargo xtask demo \
             --keep` two",
            if names.is_empty() {
                "none is".into()
            } else {
                format!(
                    "these are: \
                {}",
                    names.join(", ")
                )
            }
        )
    })?;
    ensure!(std::io::stdin().is_terminal(), "standard input is no terminal");
    attach(guest, path)
}

/// Connects this terminal to the console behind the socket `path` until either ends or the user
/// leaves.
pub fn attach(guest: &str, path: &Path) -> Result<()> {
    let mut socket = UnixStream::connect(path)
        .with_context(|| format!("cannot connect to {}", path.display()))?;
    eprintln!("the console of guest {guest}; control and ] leaves");
    let _raw = RawMode::enter()?;

    let mut output = socket.try_clone()?;
    socket.write_all(b"\n")?;
    let mut input = socket.try_clone()?;
    thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(length @ 1..) = std::io::stdin().read(&mut buffer) {
            if buffer[..length].contains(&LEAVE) || input.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        // This ends the loop below.
        let _ = input.shutdown(std::net::Shutdown::Both);
    });
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = output.read(&mut buffer) {
        let mut terminal = std::io::stdout();
        terminal.write_all(&buffer[..length])?;
        terminal.flush()?;
    }
    Ok(())
}

/// Raw mode: the terminal passes every key on. Dropping this restores the terminal.
struct RawMode(Termios);

impl RawMode {
    fn enter() -> Result<Self> {
        let before = tcgetattr(std::io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Flush, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Flush, &self.0);
        eprintln!();
    }
}
