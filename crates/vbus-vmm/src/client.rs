// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The commands `snapshot` and `migrate`. They ask a running machine, by its control socket.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vbus_cli::output::{emit, emit_json};
use vbus_cli::progress::Progress;
use vbus_control::Connection;

use crate::cli::{Migrate, Snapshot};

/// What error messages call the machine.
const PEER: &str = "the machine";
/// How long the machine may take to begin.
const PATIENCE: Duration = Duration::from_secs(30);

/// Sends a request to the machine at a control socket, and returns the answer. Progress is shown on
/// standard error. A signal ends the request, and the machine notices.
fn ask(control: &Path, request: &Value) -> Result<Value> {
    let signals = vbus_cli::signals::descriptor(&[SIGINT, SIGTERM, SIGHUP])?;
    let mut connection = Connection::connect(control, PEER, PATIENCE)
        .with_context(|| format!("no machine can be asked at {}", control.display()))?;
    // The machine limits how long each part of the work may take.
    connection.socket().set_read_timeout(None)?;
    let mut progress = Progress::new();
    connection.on_progress(move |report| progress.show(&report.to_string()));
    let socket = connection.socket().try_clone()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut signals = File::from(signals);
        if signals.read_exact(&mut [0]).is_ok() {
            // Pairs with the load below.
            flag.store(true, Ordering::Release);
            let _ = socket.shutdown(Shutdown::Both);
        }
    })?;
    connection.stream(request, &mut drop).map_err(|error| {
        // Pairs with the store above.
        if interrupted.load(Ordering::Acquire) { anyhow!("ended by a signal") } else { error }
    })
}

/// Moves a machine.
pub fn migrate(options: &Migrate) -> Result<()> {
    let to = absolute(&options.to)?;
    let request = json!({
        "op": "migrate", "to": to, "rounds": options.rounds, "down_time_ms": options.down_time,
    });
    let report = ask(&options.control, &request)?;
    if options.json {
        emit_json(&report);
    } else {
        let of = |name: &str| report[name].as_u64().unwrap_or(0);
        let (rounds, mib, millis) = (of("rounds"), of("bytes") >> 20, of("down_time_ms"));
        let s = if rounds == 1 { "" } else { "s" };
        emit(&format!(
            "moved after {rounds} round{s}, {mib} MiB; it stood still for {millis} ms\n"
        ));
    }
    Ok(())
}

/// Saves a machine to a file.
pub fn snapshot(options: &Snapshot) -> Result<()> {
    fs::metadata(&options.control)
        .with_context(|| format!("no machine can be asked at {}", options.control.display()))?;
    let target = Target::new(&options.file)?;
    let meeting = Meeting::new(&options.control)?;
    let receiver = meeting.receive(target.file.try_clone()?)?;
    let request = json!({
        "op": "snapshot", "to": meeting.path, "live": options.live, "rounds": options.rounds,
        "down_time_ms": options.down_time,
    });
    let asked = ask(&options.control, &request);
    // If the machine has not come to the meeting, this ends the waiting.
    meeting.call_off();
    let received = receiver.join().unwrap_or_else(|_| Err(io::Error::other("panicked")));
    let name = || format!("cannot write {}", options.file.display());
    // If the file cannot be written, the machine knows only that nobody takes it any more.
    let bytes = received.with_context(name)?;
    let report = asked?;
    ensure!(report["bytes"] == bytes, "the machine has sent {report}, but {bytes} bytes came");
    target.finish().with_context(name)?;
    show(options, &report);
    Ok(())
}

fn show(options: &Snapshot, report: &Value) {
    let of = |name: &str| report[name].as_u64().unwrap_or(0);
    if options.json {
        let mut told = report.clone();
        told["file"] = json!(options.file);
        emit_json(&told);
    } else {
        let (mib, millis) = (of("bytes") >> 20, of("down_time_ms"));
        let file = options.file.display();
        emit(&format!("saved to {file}: {mib} MiB; the machine stood still for {millis} ms\n"));
    }
}

/// The machine has another working directory.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("no path: {}", path.display()))
}

/// A file that has its name only once it is whole. Dropping this value removes what is not.
struct Target {
    file: File,
    part: PathBuf,
    name: PathBuf,
}

impl Target {
    fn new(name: &Path) -> Result<Target> {
        let base = name.file_name().with_context(|| format!("no file: {}", name.display()))?;
        let mut base = base.to_owned();
        base.push(format!(".{}.part", std::process::id()));
        let part = name.with_file_name(base);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part);
        let file = file.with_context(|| format!("cannot make {}", part.display()))?;
        Ok(Target { file, part, name: name.to_owned() })
    }

    fn finish(&self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.part, &self.name)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // After it has its name, there is nothing to remove.
        let _ = fs::remove_file(&self.part);
    }
}

/// A socket to which the machine sends itself. Dropping this value removes it.
struct Meeting {
    listener: UnixListener,
    path: PathBuf,
}

impl Meeting {
    /// Makes the socket beside that of the machine, which can reach it there.
    fn new(control: &Path) -> Result<Meeting> {
        let control = absolute(control)?;
        let mut name = control.file_name().context("no socket")?.to_owned();
        name.push(format!(".{}", std::process::id()));
        let path = control.with_file_name(name);
        let listener = vfio_user_protocol::bind_private(&path, 1)
            .with_context(|| format!("cannot make the socket {}", path.display()))?;
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(false)?;
        Ok(Meeting { listener, path })
    }

    /// Starts a thread that writes what the first caller sends to `file`, and counts the bytes.
    fn receive(&self, mut file: File) -> Result<JoinHandle<io::Result<u64>>> {
        let listener = self.listener.try_clone()?;
        Ok(std::thread::Builder::new().name("receive".into()).spawn(move || {
            let (mut socket, _) = listener.accept()?;
            io::copy(&mut socket, &mut file)
        })?)
    }

    /// Ends the waiting for a caller that does not come.
    fn call_off(&self) {
        drop(UnixStream::connect(&self.path));
    }
}

impl Drop for Meeting {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_has_its_name_only_once_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("saved");
        fs::write(&name, "older").unwrap();
        let count = || fs::read_dir(dir.path()).unwrap().count();
        let mut target = Target::new(&name).unwrap();
        target.file.write_all(b"half").unwrap();
        assert_eq!((fs::read(&name).unwrap(), count()), (b"older".to_vec(), 2));
        drop(target);
        assert_eq!((fs::read(&name).unwrap(), count()), (b"older".to_vec(), 1));
        let mut target = Target::new(&name).unwrap();
        target.file.write_all(b"whole").unwrap();
        target.finish().unwrap();
        drop(target);
        assert_eq!((fs::read(&name).unwrap(), count()), (b"whole".to_vec(), 1));
    }

    #[test]
    fn what_is_sent_is_written_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let target = Target::new(&dir.path().join("saved")).unwrap();
        let meeting = Meeting::new(&dir.path().join("control")).unwrap();
        let receiver = meeting.receive(target.file.try_clone().unwrap()).unwrap();
        UnixStream::connect(&meeting.path).unwrap().write_all(&[7; 100_000]).unwrap();
        assert_eq!(receiver.join().unwrap().unwrap(), 100_000);
        let receiver = meeting.receive(target.file.try_clone().unwrap()).unwrap();
        // The receiver waits, however late the caller comes.
        std::thread::sleep(Duration::from_millis(50));
        meeting.call_off();
        assert_eq!(receiver.join().unwrap().unwrap(), 0);
        drop((meeting, target));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
    }
}
