// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A fresh process for a test: the test's own program once more, which runs one ignored test.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::TIMEOUT;

/// The variable of the environment that is set in such a process.
const MARK: &str = "VBUS_TEST_PROCESS";

/// A process that answers requests. It is killed when this is dropped, and ends if the test does.
#[derive(Debug)]
pub struct FreshProcess {
    child: Child,
    lines: BufReader<UnixStream>,
}

impl FreshProcess {
    /// Starts a process that runs the ignored test `test` alone, which calls [`serve`], and returns
    /// with the answer to `first`. Panics if there is none.
    pub fn start(test: &str, first: &Value) -> (FreshProcess, Value) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--ignored"])
            .env(MARK, "1")
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        ours.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut process = FreshProcess { child, lines: BufReader::new(ours) };
        let answer = process.ask(first);
        (process, answer)
    }

    /// The answer to `request`. Panics if there is none.
    pub fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.lines.get_mut(), "{request}").unwrap();
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).expect("an answer of the other process")
    }
}

impl Drop for FreshProcess {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

/// In a fresh process: makes what is asked from the first request, and answers the other ones until
/// the test needs this process no more. Panics in any other process.
pub fn serve<S>(
    make: impl FnOnce(Value) -> (S, Value),
    mut answer: impl FnMut(&mut S, Value) -> Value,
) {
    assert!(std::env::var_os(MARK).is_some(), "another test runs this one");
    let mut socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let lines = BufReader::new(socket.try_clone().unwrap()).lines();
    let mut requests = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let (mut served, first) = make(requests.next().unwrap());
    writeln!(socket, "{first}").unwrap();
    for request in requests {
        writeln!(socket, "{}", answer(&mut served, request)).unwrap();
    }
}
