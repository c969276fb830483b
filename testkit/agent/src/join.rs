// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Joins standard input and output to a UNIX socket and passes each byte on at once.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

/// How long the socket may take to appear: its owner may just have started.
const APPEAR: Duration = Duration::from_secs(30);

/// Connects to `path` and passes bytes on until both directions have ended.
pub fn join(path: &str) -> io::Result<()> {
    let until = Instant::now() + APPEAR;
    let socket = loop {
        match UnixStream::connect(path) {
            Ok(socket) => break socket,
            Err(error) if Instant::now() > until => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    };
    let writer = socket.try_clone()?;
    // Files have no buffer. `Stdin` and `Stdout` wait for more bytes or for the end of a line.
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    thread::spawn(move || {
        let _ = pass(input, &writer);
        let _ = writer.shutdown(Shutdown::Write);
    });
    pass(&socket, output)
}

fn pass(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut piece = [0; 4096];
    loop {
        match from.read(&mut piece)? {
            0 => return Ok(()),
            length => to.write_all(&piece[..length])?,
        }
    }
}
