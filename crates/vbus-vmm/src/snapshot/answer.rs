// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the receiver of a machine answers to its sender, over the same socket: lines of JSON.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

/// The longest line in bytes.
const LINE: usize = 4096;
/// How long to wait before looking whether to go on.
pub(super) const LOOK: Duration = Duration::from_millis(200);

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// A machine of the description is there. The memory can come.
    Ready,
    /// The machine has its whole state.
    Loaded,
    /// The machine runs here from now on.
    Running,
    /// The receiver gives up. The text is for people.
    Error(String),
}

/// Sends an answer.
///
/// # Errors
/// The sender has gone, or has closed its end.
pub(crate) fn send(mut to: &UnixStream, answer: &Answer) -> io::Result<()> {
    to.write_all(format!("{}\n", serde_json::to_string(answer)?).as_bytes())
}

/// Waits for an answer, `patience` long. `go_on` is asked now and then.
///
/// # Errors
/// The receiver answers something else, has gone, or says nothing, or `go_on` fails.
pub(crate) fn expect(
    from: &UnixStream,
    answer: &Answer,
    patience: Duration,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<()> {
    expect_after(&mut Vec::new(), from, answer, patience, go_on)
}

/// As [`expect`]. `line` is the beginning of the answer, also of one that does not come in time.
fn expect_after(
    line: &mut Vec<u8>,
    from: &UnixStream,
    answer: &Answer,
    patience: Duration,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<()> {
    from.set_read_timeout(Some(LOOK))?;
    let until = Instant::now() + patience;
    match read(line, from, &|| {
        go_on()?;
        if Instant::now() > until {
            bail!("the receiver does not answer within {patience:?}")
        }
        Ok(())
    })? {
        said if said == *answer => Ok(()),
        Answer::Error(text) => Err(says(&text)),
        said => Err(anyhow!("the receiver says {said:?} where {answer:?} is due")),
    }
}

/// Waits until the machine runs at the receiver, or never will. Exactly one of sender and receiver
/// has the machine afterwards: if there is no answer within `patience`, this closes the socket, and
/// then the receiver cannot say any more that the machine runs there. It must not let the machine
/// run before it has said so.
///
/// # Errors
/// The machine does not run at the receiver, and never will. The text says why.
pub(crate) fn expect_running(from: &UnixStream, patience: Duration) -> Result<()> {
    let mut line = Vec::new();
    let waited = expect_after(&mut line, from, &Answer::Running, patience, &|| Ok(()));
    let Err(error) = waited else { return Ok(()) };
    let _ = from.shutdown(Shutdown::Both);
    // What the receiver had sent before is still there, and some of it was read.
    match read(&mut line, from, &|| Ok(())) {
        Ok(Answer::Running) => Ok(()),
        _ => Err(error),
    }
}

/// Why writing to the receiver has failed with `error`: what it has said before it went.
pub(crate) fn explain(from: &UnixStream, error: anyhow::Error) -> anyhow::Error {
    let gone = |error: &io::Error| {
        matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
    };
    if !error.downcast_ref().is_some_and(gone) {
        return error;
    }
    // What it has said is there already.
    let until = Instant::now() + LOOK;
    let go_on = || if Instant::now() < until { Ok(()) } else { bail!("it says nothing") };
    let _ = from.set_read_timeout(Some(LOOK));
    match read(&mut Vec::new(), from, &go_on) {
        Ok(Answer::Error(text)) => says(&text),
        _ => error.context("the receiver has gone"),
    }
}

fn says(text: &str) -> anyhow::Error {
    anyhow!("the receiver says: {}", printable(text))
}

/// Reads the rest of a line. `go_on` is asked at each byte, and whenever the time-out of the socket
/// is over, so a receiver that sends slowly wins no time.
fn read(
    line: &mut Vec<u8>,
    mut from: &UnixStream,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<Answer> {
    loop {
        // One byte at a time: what follows the line is not this function's. Answers are few.
        let mut byte = [0];
        match from.read(&mut byte) {
            Ok(0) => bail!("the receiver has gone"),
            Ok(_) if byte == *b"\n" => break,
            Ok(_) if line.len() < LINE => {
                line.push(byte[0]);
                go_on()?;
            }
            Ok(_) => bail!("the receiver sends something that is no answer"),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                go_on()?;
            }
            Err(error) => return Err(error).context("the receiver has gone"),
        }
    }
    let line = std::mem::take(line);
    serde_json::from_slice(&line).context("the receiver sends something that is no answer")
}

/// A text from outside, for a terminal.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(1);

    fn go_on() -> Result<()> {
        Ok(())
    }

    #[test]
    fn answers_are_told_apart() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        send(&theirs, &Answer::Ready).unwrap();
        expect(&ours, &Answer::Ready, LONG, &go_on).unwrap();
        send(&theirs, &Answer::Error("no\x1b room".into())).unwrap();
        let fault = || format!("{:#}", expect(&ours, &Answer::Loaded, LONG, &go_on).unwrap_err());
        assert_eq!(fault(), "the receiver says: no room");
        send(&theirs, &Answer::Ready).unwrap();
        assert!(fault().contains("Ready where Loaded"));
        theirs.write_all(b"{}\n").unwrap();
        assert!(fault().contains("no answer"));
        theirs.write_all(&[b'x'; LINE + 1]).unwrap();
        assert!(fault().contains("no answer"));
        let stop = || bail!("Ctrl-C");
        let stopped = expect(&ours, &Answer::Ready, LONG, &stop).unwrap_err();
        assert_eq!(stopped.to_string(), "Ctrl-C");
        // Nor does a receiver keep the sender that goes on with a line and on.
        theirs.write_all(&[b'x'; LINE + 1]).unwrap();
        let stopped = expect(&ours, &Answer::Ready, LONG, &stop).unwrap_err();
        assert_eq!(stopped.to_string(), "Ctrl-C");
        drop(theirs);
        assert!(fault().contains("has gone"));
    }

    /// A receiver that goes in the middle has said why, or not.
    #[test]
    fn a_write_that_fails_has_a_reason() {
        let fault = |said: Option<&str>| {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            // The receiver has not read all when it goes.
            ours.write_all(b"pages").unwrap();
            if let Some(text) = said {
                send(&theirs, &Answer::Error(text.into())).unwrap();
            }
            drop(theirs);
            let error = ours.write_all(b"more").unwrap_err();
            format!("{:#}", explain(&ours, error.into()))
        };
        assert_eq!(fault(Some("no room")), "the receiver says: no room");
        assert!(fault(None).starts_with("the receiver has gone: "), "{}", fault(None));
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(explain(&ours, anyhow!("Ctrl-C")).to_string(), "Ctrl-C");
    }

    /// Whatever happens between the two, the machine runs at one end and only there.
    #[test]
    fn exactly_one_end_has_the_machine() {
        // The receiver has said it in time, and died, or only too late for the sender's patience.
        for says in [true, false] {
            for dies in [true, false] {
                let (ours, theirs) = UnixStream::pair().unwrap();
                let said = says && send(&theirs, &Answer::Running).is_ok();
                let kept = if dies { None } else { Some(theirs) };
                assert_eq!(expect_running(&ours, SHORT).is_ok(), said, "{says} {dies}");
                if let Some(theirs) = kept.filter(|_| !said) {
                    send(&theirs, &Answer::Running).unwrap_err();
                }
            }
        }
    }

    /// The sender's patience ends within the line.
    #[test]
    fn what_was_read_before_the_end_counts() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&theirs, &Answer::Running).unwrap();
        expect_running(&ours, Duration::ZERO).unwrap();
    }

    /// The receiver says it at the moment at which the sender's patience ends.
    #[test]
    fn a_race_has_one_winner() {
        for _ in 0..50 {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let receiver = std::thread::spawn(move || send(&theirs, &Answer::Running).is_ok());
            let moved = expect_running(&ours, SHORT).is_ok();
            assert_eq!(receiver.join().unwrap(), moved);
        }
    }
}
