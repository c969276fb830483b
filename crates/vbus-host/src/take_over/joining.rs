// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The new bus: it finds the one that is there, and takes its place.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use vbus_cli::limits::make_room_for_descriptors;
use vbus_cli::rundir::{self, CONTROL};
use vbus_control::Peer;

use super::content::{self, DeviceParcel, FORMAT, Handed};
use super::steps::{AFTER_DEATH, LIMITS, Limits, RESERVE, Taking};

/// How long the bus that is there may take to answer the request.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The longest answer, in bytes.
const ANSWER_MAX: usize = 64 << 10;

/// A bus that is about to take another's place.
pub struct Joining {
    socket: UnixStream,
    limits: Limits,
    /// The other one is no bus, but the keeper of one that has died.
    after_death: bool,
}

impl Joining {
    /// Asks the bus that serves in `dir` for its place. Returns what it hands over already. It goes
    /// on serving.
    ///
    /// # Errors
    /// No bus serves there, it is that of another user, or it cannot be handed over.
    pub fn connect(dir: &Path) -> Result<(Joining, Handed)> {
        let socket = ask(dir, "take-over", ("take over", "taken over"))?;
        Joining::begin(Joining { socket, limits: LIMITS, after_death: false })
    }

    /// Takes what a keeper has at the other end of `socket`, as from a bus.
    ///
    /// # Errors
    /// It has nothing that this bus can go on with.
    pub fn over(socket: UnixStream) -> Result<(Joining, Handed)> {
        Joining::begin(Joining { socket, limits: AFTER_DEATH, after_death: true })
    }

    fn begin(joining: Joining) -> Result<(Joining, Handed)> {
        let handed = joining.taking().offer().and_then(content::read_offer);
        // The log of the other bus shows why, too.
        let handed = handed.inspect_err(|error| joining.fail(error))?;
        Ok((joining, handed))
    }

    /// Whether the other bus has died. Nobody goes on if this one does not.
    pub fn is_after_death(&self) -> bool {
        self.after_death
    }

    fn taking(&self) -> Taking<'_> {
        Taking::new(self.socket.as_fd(), self.limits)
    }

    /// Makes room for the descriptors of so many devices before they come.
    pub fn make_room(&self, devices: usize) {
        make_room_for_descriptors(&self.socket, super::room(devices));
    }

    /// Says that everything is prepared. The other bus then stops. Returns when it did (in
    /// nanoseconds of CLOCK_MONOTONIC), and its devices.
    ///
    /// # Errors
    /// It does not, for this reason.
    pub fn ready(&self) -> Result<(u64, Vec<DeviceParcel>)> {
        content::read_state(self.taking().ready()?)
    }

    /// Whether this bus may begin with another device. The other bus stopped at `stopped`
    /// (CLOCK_MONOTONIC, in nanoseconds).
    ///
    /// # Errors
    /// It is too late: the other bus may go on before the device is made.
    pub fn check_time(&self, stopped: u64) -> Result<()> {
        let past = Duration::from_nanos(content::now().saturating_sub(stopped));
        ensure!(
            past + RESERVE < self.limits.pause,
            "the devices have paused for {past:.1?} already, which is too long"
        );
        Ok(())
    }

    /// Says that this bus has taken over. From here on it is the only one.
    ///
    /// # Errors
    /// The other bus did not wait, and goes on.
    pub fn taken(&self) -> Result<()> {
        self.taking().taken()
    }

    /// Says why this bus does not take over.
    pub fn fail(&self, error: &anyhow::Error) {
        self.taking().fail(error);
    }
}

/// Asks the bus that serves in `dir` to be kept by this process. Returns the connection, by which
/// the bus gives all that it has, and the bus's process, by id and by descriptor.
///
/// The process is the one that the kernel names, and not the one of the answer: a bus in the hands
/// of an attacker could name any, which then gets the keeper's signals.
///
/// # Errors
/// As for [`Joining::connect`]; or the process is not to be found.
pub fn adopt(dir: &Path) -> Result<(OwnedFd, i32, OwnedFd)> {
    let socket = ask(dir, "keep", ("keep", "kept"))?;
    let process = Peer::process(&socket).context("watching the bus")?;
    let (process, pid) = process.context("the bus is in another pid namespace")?;
    Ok((socket.into(), pid, process))
}

/// Sends the request `op` to the bus that serves in `dir`, which then speaks the messages of
/// `wire`. `what` says what is asked for, and what is then done.
fn ask(dir: &Path, op: &str, what: (&str, &str)) -> Result<UnixStream> {
    let (what, done) = what;
    rundir::check(dir)?;
    let path = dir.join(CONTROL);
    rundir::check_socket_path(&path)?;
    let mut socket = UnixStream::connect(&path).with_context(|| {
        format!(
            "no bus to {what} serves in {}; start one without --take-over and --adopt, or name its \
             directory with --dir",
            dir.display()
        )
    })?;
    let peer = Peer::of(&socket)?;
    let own = rustix::process::geteuid().as_raw();
    ensure!(
        peer.uid == own || peer.uid == 0,
        "the bus in {} belongs to another user (uid {})",
        dir.display(),
        peer.uid
    );
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    let request = json!({
        "op": op,
        "format": FORMAT,
        "state-format": vbus_core::state::FORMAT,
        "version": env!("CARGO_PKG_VERSION"),
    });
    socket.write_all(format!("{request}\n").as_bytes())?;
    let by = Instant::now() + TIMEOUT;
    let answer = line(&socket, by).context("the bus does not answer")?;
    let answer: Value = serde_json::from_slice(&answer)
        .map_err(|error| anyhow!("the bus sent an answer that is no JSON: {error}"))?;
    if let Some(error) = answer["error"].as_str() {
        bail!("the bus cannot be {done}: {error}");
    }
    ensure!(
        answer["item"]["format"] == FORMAT,
        "the bus cannot be {done}: it gave an unknown answer"
    );
    Ok(socket)
}

/// Reads a line, and nothing behind it. `by`: the time at which all of it must be there.
fn line(mut socket: &UnixStream, by: Instant) -> Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        let rest = by.saturating_duration_since(Instant::now());
        ensure!(!rest.is_zero(), "it was too slow");
        socket.set_read_timeout(Some(rest))?;
        ensure!(socket.read(&mut byte)? == 1, "it has closed the connection");
        if byte == *b"\n" {
            return Ok(line);
        }
        ensure!(line.len() < ANSWER_MAX, "its answer has no end");
        line.extend(byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bus that sends a byte now and then does not keep this one waiting.
    #[test]
    fn the_time_for_an_answer_is_for_all_of_it() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let dribble = std::thread::spawn(move || {
            while theirs.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let error = line(&ours, Instant::now() + Duration::from_millis(50)).unwrap_err();
        let text = error.to_string();
        assert!(text == "it was too slow" || text.contains("temporarily"), "{text}");
        drop(ours);
        dribble.join().unwrap();
    }

    #[test]
    fn a_bus_that_is_late_begins_no_device_before_the_other_one_goes_on() {
        let ago = |millis: u64| content::now() - millis * 1_000_000;
        let with = |limits| {
            let socket = UnixStream::pair().unwrap().0;
            Joining { socket, limits, after_death: false }
        };
        let joining = with(LIMITS);
        assert!(joining.check_time(ago(0)).is_ok() && joining.check_time(u64::MAX).is_ok());
        let error = joining.check_time(ago(2500)).unwrap_err().to_string();
        assert!(error.contains("paused for 2.5"), "{error}");
        // One that has died does not go on.
        let joining = with(AFTER_DEATH);
        assert!(joining.check_time(ago(2500)).is_ok() && joining.check_time(ago(29_500)).is_err());
    }
}
