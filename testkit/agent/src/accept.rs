// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A server that says nothing and takes nothing.

use std::io;
use std::os::unix::net::UnixListener;

/// Listens at `path`, prints `connected` when the first client has come, and keeps it until this
/// program ends.
pub fn accept(path: &str) -> io::Result<()> {
    let _client = UnixListener::bind(path)?.accept()?;
    println!("connected");
    loop {
        std::thread::park();
    }
}
