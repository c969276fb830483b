// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs a command in a guest with this process's standard input, output and error.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use testkit::guest::Guest;

/// Runs a shell command to its end and returns its exit code.
///
/// # Errors
/// The guest is lost, or the command takes longer than `limit`. In the second case it is killed.
pub fn run(guest: &Guest, command: &str, limit: Duration) -> Result<i32> {
    let running = Arc::new(guest.start(command)?);
    let input = Arc::clone(&running);
    std::thread::spawn(move || {
        let mut piece = [0; 1024];
        while let Ok(length @ 1..) = std::io::stdin().read(&mut piece) {
            if input.input(&piece[..length]).is_err() {
                return;
            }
        }
        let _ = input.input(&[]);
    });
    let code = running.stream(limit, |out, err| {
        let (mut stdout, mut stderr) = (std::io::stdout(), std::io::stderr());
        let written = stdout
            .write_all(out)
            .and_then(|()| stdout.flush())
            .and_then(|()| stderr.write_all(err));
        written.is_ok()
    });
    code.inspect_err(|_| {
        let _ = running.kill();
    })
}
