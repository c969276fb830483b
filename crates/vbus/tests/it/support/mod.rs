// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs a real `vbus serve` in its own directory, and ends it with the test.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

/// A generous bound for any wait, even on a loaded machine.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Two NICs and one worker, so that whatever blocks it stops both.
pub const TWO: &str = r#"
[bus]
workers = 1

[[device]]
name = "net0"
class = "venet"
backend = "switch"

[[device]]
name = "net1"
class = "venet"
backend = "null"
"#;

/// The program `vbus`.
pub fn vbus() -> Command {
    program(Path::new(env!("CARGO_BIN_EXE_vbus")))
}

/// The program `vbus-guest`. It belongs to another package, so this asks cargo to build it and to
/// name its path.
pub fn vbus_guest() -> Command {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    program(PATH.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--package", "vbus-guest", "--bin", "vbus-guest"]);
        cargo.args(["--message-format", "json"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let output = cargo.stderr(Stdio::inherit()).output().unwrap();
        assert!(output.status.success(), "vbus-guest does not build");
        let messages = String::from_utf8(output.stdout).unwrap();
        let executable = |line: &str| {
            let message: Value = serde_json::from_str(line).ok()?;
            Some(PathBuf::from(message["executable"].as_str()?))
        };
        messages.lines().find_map(executable).expect("cargo names the program")
    }))
}

pub fn program(path: &Path) -> Command {
    let mut command = Command::new(path);
    command.env_remove("NOTIFY_SOCKET").env("VBUS_LOG", "info").stdin(Stdio::null());
    command
}

/// Hears what systemd would: a socket for NOTIFY_SOCKET.
pub struct ServiceManager(UnixDatagram);

impl ServiceManager {
    pub fn bind(path: impl AsRef<Path>) -> ServiceManager {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        ServiceManager(socket)
    }

    /// Waits for a text that begins with `what`, and returns it. `check` gets all texts until then.
    pub fn hear(&self, what: &str, check: impl Fn(&str)) -> String {
        let begun = Instant::now();
        loop {
            let mut bytes = [0; 256];
            let count = self.0.recv(&mut bytes).unwrap();
            let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
            check(&text);
            if text.starts_with(what) {
                return text;
            }
            assert!(begun.elapsed() < TIMEOUT, "the manager does not hear {what}");
        }
    }
}

/// The output and the exit code of a command.
pub struct Done {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

/// Runs a command and waits for its end.
pub fn run(args: &[&str], dir: &Path) -> Done {
    Caller { program: vbus, dir }.run(args)
}

/// Runs one of the programs for the bus in a directory.
pub struct Caller<'a> {
    program: fn() -> Command,
    dir: &'a Path,
}

impl Caller<'_> {
    /// Runs a command against the bus.
    pub fn run(&self, args: &[&str]) -> Done {
        let Output { status, stdout, stderr } =
            (self.program)().args(args).arg("--dir").arg(self.dir).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Done { code: status.code(), out: text(stdout), err: text(stderr) }
    }

    /// Runs a command that must succeed, and returns its output.
    pub fn good(&self, args: &[&str]) -> String {
        let done = self.run(args);
        assert_eq!(done.code, Some(0), "{args:?}: {}", done.err);
        done.out
    }

    /// Runs a command that must succeed, and returns its output as JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.good(&[args, &["--json"]].concat())).unwrap()
    }

    /// Runs a command that must fail, and returns its error message.
    pub fn bad(&self, args: &[&str]) -> String {
        let done = self.run(args);
        assert_eq!(done.code, Some(1), "{args:?}: {}", done.out);
        done.err
    }
}

/// A running bus.
pub struct Served {
    pub child: Child,
    pub dir: PathBuf,
    pub log: PathBuf,
    /// The temporary folder. It is the last field, so it is removed last.
    _temporary: tempfile::TempDir,
}

impl Served {
    /// Starts a bus with this configuration.
    pub fn start(config: &str) -> Served {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("bus");
        Served::start_at(temporary, dir, config, &[])
    }

    /// Starts a bus with this configuration and a keeper, which `child` is then.
    pub fn start_kept(config: &str) -> Served {
        Served::start_kept_by(vbus(), config)
    }

    /// As [`start_kept`](Self::start_kept), by another copy of the program.
    pub fn start_kept_by(program: Command, config: &str) -> Served {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("bus");
        Served::start_by(program, temporary, dir, config, &["--keep"])
    }

    /// Starts a bus in the directory `dir`.
    pub fn start_in(dir: &Path, config: &str) -> Served {
        Served::start_at(tempfile::tempdir().unwrap(), dir.to_owned(), config, &[])
    }

    fn start_at(temporary: tempfile::TempDir, dir: PathBuf, config: &str, more: &[&str]) -> Served {
        Served::start_by(vbus(), temporary, dir, config, more)
    }

    fn start_by(
        mut program: Command,
        temporary: tempfile::TempDir,
        dir: PathBuf,
        config: &str,
        more: &[&str],
    ) -> Served {
        let (log, file) = (temporary.path().join("log"), temporary.path().join("bus.toml"));
        std::fs::write(&file, config).unwrap();
        let mut child = program
            .args(["serve", "--ready-fd", "1", "--config"])
            .arg(&file)
            .args(more)
            .arg("--dir")
            .arg(&dir)
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "READY=1\n", "{}", std::fs::read_to_string(&log).unwrap());
        Served { child, dir, log, _temporary: temporary }
    }

    /// The program `vbus` for this bus.
    fn caller(&self) -> Caller<'_> {
        Caller { program: vbus, dir: &self.dir }
    }

    /// The program `vbus-guest` for this bus.
    pub fn guest(&self) -> Caller<'_> {
        Caller { program: vbus_guest, dir: &self.dir }
    }

    /// [`Caller::run`] of `vbus`.
    pub fn run(&self, args: &[&str]) -> Done {
        self.caller().run(args)
    }

    /// [`Caller::good`] of `vbus`.
    pub fn good(&self, args: &[&str]) -> String {
        self.caller().good(args)
    }

    /// [`Caller::json`] of `vbus`.
    pub fn json(&self, args: &[&str]) -> Value {
        self.caller().json(args)
    }

    /// [`Caller::bad`] of `vbus`.
    pub fn bad(&self, args: &[&str]) -> String {
        self.caller().bad(args)
    }

    /// The names of its devices, in order.
    pub fn devices(&self) -> Vec<String> {
        let list = self.json(&["device", "list"]);
        list.as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Connects to its control socket.
    pub fn control(&self) -> UnixStream {
        let socket = UnixStream::connect(self.dir.join("control.sock")).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.set_write_timeout(Some(TIMEOUT)).unwrap();
        socket
    }

    /// Sends a signal to the bus.
    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal)
            .unwrap();
    }

    /// The process id of the supervisor, its only child.
    pub fn supervisor(&self) -> i32 {
        let children = self.children();
        assert_eq!(children.len(), 1, "{children:?}");
        children[0]
    }

    /// Its children that run.
    pub fn children(&self) -> Vec<i32> {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let parent = self.child.id().to_string();
        let is_child = |process: &i32| {
            let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
            let fields = stat.rsplit(") ").next();
            fields.and_then(|fields| fields.split_whitespace().nth(1)) == Some(&parent)
        };
        numbers.filter(is_child).filter(|process| !has_ended(*process)).collect()
    }

    /// The number in the line `key` of its `/proc/PID/status`.
    pub fn status(&self, key: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap();
        line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process that ends with a test that fails.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for the end of a process. One that does not end is a failure of the test.
pub fn end_of(child: &mut Child) -> ExitStatus {
    let mut status = None;
    wait_until("the end of the process", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

/// Waits until something can be read.
pub fn await_bytes(from: impl AsFd) {
    use rustix::event::{PollFd, PollFlags, poll};
    let limit = TIMEOUT.try_into().unwrap();
    let count =
        rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&from, PollFlags::IN)], Some(&limit)));
    assert_eq!(count, Ok(1), "nothing can be read within {TIMEOUT:?}");
}

/// Whether a process has ended. Its parent may not have waited for it yet.
pub fn has_ended(process: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_none_or(|fields| fields.is_empty() || fields.starts_with(['Z', 'X']))
}

/// Waits until `condition` holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + TIMEOUT;
    while !condition() {
        assert!(Instant::now() < until, "{what}: not within {TIMEOUT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sends bytes and reads one line.
pub fn exchange(socket: &mut UnixStream, bytes: &[u8]) -> String {
    // The bus may have refused the request before it read all of it.
    let _ = socket.write_all(bytes);
    let mut line = Vec::new();
    let mut byte = [0];
    while socket.read(&mut byte).is_ok_and(|n| n == 1) && byte != *b"\n" {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}
