// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One bus with its clients, from its start to its end, in which a system call may fail.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use vbus_driver::venet::{BUFFER_MIN, HEADER_BYTES, Nic, Piece, Rx, Tx};
use vbus_driver::{Dma, Function, Hal};
use vbus_process::Process as Hold;

use super::inject::{Fault, Injector, Kind};
use crate::process::Process;

/// Longer than anything here takes, even on a loaded machine.
const BOUND: Duration = Duration::from_secs(30);
/// How long a client waits once a call has failed. What it waits for may be lost then. A client
/// that gives up too early on a slow machine does no harm: what it says is an effect, no failure.
/// Whether the bus hangs shows afterwards, when clients wait for [`BOUND`].
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a client that waits for an answer looks whether a call has failed.
const LOOK: Duration = Duration::from_millis(100);
/// Entries of a ring.
const ENTRIES: u16 = 32;

const CONFIG: &str = r#"
[bus]
workers = 2

[[device]]
name = "net0"
class = "venet"
backend = "switch"

[[device]]
name = "net1"
class = "venet"
backend = "switch"

[[device]]
name = "page"
class = "state"
pages = [{ name = "p", bytes = 64, owner = "device" }]

[[device]]
name = "peer"
class = "venet"
backend = "stream"
listen = "@/peer.stream"
"#;

/// Which part of the bus's life a fault may hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The start, and the work of clients.
    Work,
    /// The end.
    End,
}

/// What came of a trial.
#[derive(Debug)]
pub struct Outcome {
    /// How many calls of each kind were made in the part.
    pub counts: BTreeMap<Kind, u32>,
    /// How many calls failed.
    pub hits: u32,
    /// What the fault has done: errors of clients, lines of the log.
    pub effects: Vec<String>,
}

/// A started bus.
struct Served<'a> {
    process: Process,
    injector: Injector,
    dir: PathBuf,
    log: &'a Path,
}

/// How long clients wait for one thing.
#[derive(Clone, Copy)]
enum Bound<'a> {
    /// [`BOUND`].
    Full,
    /// [`BOUND`] as long as no call has failed, and [`PATIENCE`] after that.
    UntilFault(&'a Injector),
}

impl<'a> Bound<'a> {
    fn begin(self) -> Wait<'a> {
        Wait { bound: self, began: Instant::now(), failed: None }
    }
}

/// A client waits.
struct Wait<'a> {
    bound: Bound<'a>,
    began: Instant,
    /// When the client saw that a call had failed.
    failed: Option<Instant>,
}

impl Wait<'_> {
    fn is_over(&mut self) -> bool {
        if let (Bound::UntilFault(injector), None) = (self.bound, self.failed) {
            self.failed = (injector.hits() > 0).then(Instant::now);
        }
        self.began.elapsed() > BOUND || self.failed.is_some_and(|at| at.elapsed() > PATIENCE)
    }
}

/// A NIC that a client drives.
struct Driven {
    process: Hold,
    nic: Nic<Hold>,
    tx: Tx<Hold>,
    rx: Rx<Hold>,
}

/// Runs a bus of the program `vbus` in the empty folder `folder`. `fault` happens in `part`.
///
/// # Errors
/// The bus panicked, hung, ended by a signal, ended although it had started, did not recover, or
/// left something behind.
pub fn run(vbus: &Path, folder: &Path, part: Part, fault: Option<Fault>) -> Result<Outcome> {
    let (dir, log) = (folder.join("bus"), folder.join("log"));
    let config = folder.join("bus.toml");
    fs::write(&config, CONFIG.replace('@', &folder.display().to_string()))?;
    let mut command = Command::new(vbus);
    command.args(["serve", "--ready-fd", "1", "--config"]).arg(&config).arg("--dir").arg(&dir);
    command.env_remove("NOTIFY_SOCKET").env("VBUS_LOG", "info").env("RUST_BACKTRACE", "0");
    let injector = Injector::prepare(&mut command, fault)?;
    if part == Part::End {
        injector.pause();
    }
    let (process, ready) = Process::start_with_lines(command, "vbus serve", &log)?;
    let mut served = Served { process, injector, dir, log: &log };
    let mut effects = Vec::new();
    match ready.recv_timeout(BOUND) {
        Ok(line) => {
            ensure!(line == "READY=1", "the bus says {line:?} in place of READY=1");
            served.work(part, folder, &mut effects)?;
            served.end(part, &mut effects)?;
        }
        Err(_) => effects.push(served.refused()?),
    }
    served.check_rest(folder, &mut effects)?;
    Ok(Outcome { counts: served.injector.counts(), hits: served.injector.hits(), effects })
}

impl Served<'_> {
    fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log).unwrap_or_default()).into_owned()
    }

    /// The bound of clients that work while a call may fail.
    fn patience(&self) -> Bound<'_> {
        Bound::UntilFault(&self.injector)
    }

    /// The bus has not started. Returns why.
    fn refused(&mut self) -> Result<String> {
        let status = self.process.wait(BOUND)?;
        ensure!(self.injector.hits() > 0, "the bus does not start: {}", self.log());
        ensure!(status.code() == Some(1), "the bus ends with {status}: {}", self.log());
        let log = self.log();
        let error = log.lines().find(|line| line.starts_with("error: "));
        Ok(error.with_context(|| format!("the bus ends without a word: {log}"))?.to_owned())
    }

    /// Lets clients work. Afterwards no call fails, and everything must work.
    fn work(&mut self, part: Part, folder: &Path, effects: &mut Vec<String>) -> Result<()> {
        if part == Part::Work {
            self.try_all(folder, effects)?;
        }
        let failed = self.injector.hits();
        self.injector.pause();
        // Whatever has failed before, other devices and new clients work.
        let mut bound = Instant::now() + BOUND;
        let mut pair = loop {
            // A driver whose connection the bus has not seen to end keeps the next one out.
            if let Some(status) = self.process.ended()? {
                bail!("the bus has ended with {status}: {}; {}", effects.join("; "), self.log());
            }
            match (self.driven("net0"), self.driven("net1")) {
                (Ok(first), Ok(second)) => break (first, second),
                (first, second) if Instant::now() > bound => {
                    let why = first.and(second).err().map(|error| format!("{error:#}"));
                    bail!("{failed} calls failed, and a driver cannot connect: {why:?}");
                }
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        exchange(&mut pair.0, &mut pair.1, Bound::Full).context("after the fault")?;
        self.control(Bound::Full).context("after the fault")?;
        // What a client asked for before may be under way. Then only the device is not there yet.
        bound = Instant::now() + BOUND;
        loop {
            let remove = json!({ "op": "remove", "name": "new", "force": true });
            let _ = ask(&self.dir, &remove, Bound::Full);
            let names = devices(&self.dir, Bound::Full)?;
            if names == ["net0", "net1", "page", "peer"] {
                break;
            }
            ensure!(Instant::now() < bound, "the bus has the devices {names:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Lets clients do everything once. Nothing may fail before a call has failed.
    fn try_all(&self, folder: &Path, effects: &mut Vec<String>) -> Result<()> {
        let mut pair = None;
        let mut drive = || {
            pair = Some((self.driven("net0")?, self.driven("net1")?));
            Ok(())
        };
        let mut steps: Vec<(&str, Result<()>)> = Vec::new();
        steps.push(("control", self.control(self.patience())));
        steps.push(("a driver", drive()));
        if let Some((first, second)) = &mut pair {
            steps.push(("frames", exchange(first, second, self.patience())));
        }
        // What fails for good fails here too, and each time-out takes its time.
        if steps.iter().all(|(_, result)| result.is_ok()) {
            steps.push(("the stream", self.stream(folder)));
            steps.push(("a new device", self.new_device()));
        }
        for (name, result) in steps {
            match result {
                Err(error) if self.injector.hits() > 0 => {
                    effects.push(format!("{name}: {error:#}"))
                }
                result => result.with_context(|| format!("{name}, without a fault"))?,
            }
        }
        Ok(())
    }

    /// Ends the bus.
    fn end(&mut self, part: Part, effects: &mut Vec<String>) -> Result<()> {
        if part == Part::End {
            self.injector.resume();
        }
        let status = self.process.terminate(BOUND)?;
        let code = status.code();
        let failed = part == Part::End && self.injector.hits() > 0;
        ensure!(
            code == Some(0) || code == Some(1) && failed,
            "the bus ends with {status} (signal {:?}): {}",
            status.signal(),
            self.log()
        );
        if code == Some(1) {
            effects.push("exit code 1".into());
        }
        Ok(())
    }

    /// Checks what a bus has left that has ended.
    fn check_rest(&mut self, folder: &Path, effects: &mut Vec<String>) -> Result<()> {
        let until = Instant::now() + BOUND;
        while !self.injector.all_ended() {
            ensure!(Instant::now() < until, "a process of the bus is left");
            std::thread::sleep(Duration::from_millis(2));
        }
        let log = self.log();
        ensure!(!log.contains("panic"), "a thread panicked: {log}");
        let signs = [" WARN ", " ERROR "];
        effects
            .extend(log.lines().filter(|l| signs.iter().any(|s| l.contains(s))).map(str::to_owned));
        for dir in [folder, &*self.dir] {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                let is_socket = entry.file_type()?.is_socket();
                ensure!(!is_socket, "{} is left; {effects:?}", path.display());
            }
        }
        Ok(())
    }

    fn control(&self, bound: Bound) -> Result<()> {
        ask(&self.dir, &json!({ "op": "info" }), bound)?;
        let names = devices(&self.dir, bound)?;
        ensure!(names.iter().any(|name| name == "net0"), "the devices are {names:?}");
        let set = json!({ "op": "set", "page": "p", "text": "value" });
        ask(&self.dir, &json!({ "op": "device", "name": "page", "request": set }), bound).map(drop)
    }

    /// Connects a driver.
    fn driven(&self, name: &str) -> Result<Driven> {
        drive(&self.dir.join(format!("{name}.sock"))).with_context(|| name.to_owned())
    }

    /// Connects to the stream of `peer`.
    fn stream(&self, folder: &Path) -> Result<()> {
        let mut socket = UnixStream::connect(folder.join("peer.stream"))?;
        let mut driven = self.driven("peer")?;
        socket.write_all(&[&60_u32.to_be_bytes()[..], &[0xff; 60]].concat())?;
        receive(&mut driven, self.patience())
    }

    /// Adds a device with a capture, sends a frame, and removes it.
    fn new_device(&self) -> Result<()> {
        let capture = self.dir.join("new.pcap");
        let settings = json!({ "backend": "null", "pcap": capture });
        let add = json!({ "op": "add", "name": "new", "class": "venet", "settings": settings });
        ask(&self.dir, &add, self.patience())?;
        let mut driven = self.driven("new")?;
        send(&mut driven, self.patience())?;
        drop(driven);
        ask(&self.dir, &json!({ "op": "remove", "name": "new", "force": true }), self.patience())?;
        ensure!(capture.exists(), "there is no capture");
        Ok(())
    }
}

/// Sends a request and returns the last answer.
fn ask(dir: &Path, request: &Value, bound: Bound) -> Result<Value> {
    let mut socket = UnixStream::connect(dir.join("control.sock"))?;
    socket.set_read_timeout(Some(LOOK))?;
    socket.write_all(format!("{request}\n").as_bytes())?;
    let (mut answers, mut line) = (BufReader::new(&socket), Vec::new());
    let mut wait = bound.begin();
    loop {
        match answers.read_until(b'\n', &mut line) {
            // What has come of a line stays in it.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                ensure!(!wait.is_over(), "no answer comes");
                continue;
            }
            Ok(0) => bail!("the connection ended without an answer"),
            read => read?,
        };
        let answer: Value = serde_json::from_slice(&line)?;
        if let Some(error) = answer["error"].as_str() {
            bail!("{error}");
        }
        if let Some(value) = answer.get("ok") {
            return Ok(value.clone());
        }
        line.clear();
    }
}

fn devices(dir: &Path, bound: Bound) -> Result<Vec<String>> {
    let list = ask(dir, &json!({ "op": "list" }), bound)?;
    let names = list.as_array().into_iter().flatten().map(|device| device["name"].as_str());
    Ok(names.flatten().map(str::to_owned).collect())
}

fn drive(socket: &Path) -> Result<Driven> {
    let process = Hold::connect(socket, 1 << 20)?;
    let function = Function::probe(process.clone())?;
    let mut nic = Nic::open(function, 0, 0)?;
    let (tx, mut rx) = nic.queue_pair(0, ENTRIES.into(), BUFFER_MIN, 0)?;
    (0..ENTRIES).try_for_each(|id| rx.give(id))?;
    nic.start()?;
    rx.post();
    Ok(Driven { process, nic, tx, rx })
}

/// Sends a broadcast frame and waits until the device has taken it.
fn send(driven: &mut Driven, bound: Bound) -> Result<()> {
    let mac = driven.nic.config().mac;
    let mut bytes = [0; HEADER_BYTES + 60];
    bytes[HEADER_BYTES..][..6].fill(0xff);
    bytes[HEADER_BYTES + 6..][..6].copy_from_slice(&mac);
    bytes[HEADER_BYTES + 12..][..2].copy_from_slice(&[0x88, 0xb5]);
    let memory = driven.process.alloc(4096).map_err(|_| anyhow::anyhow!("no memory"))?;
    memory.copy_in(0, &bytes);
    let len = u32::try_from(bytes.len())?;
    driven.tx.submit(&[Piece { addr: memory.address(0), len }])?;
    driven.tx.post();
    let mut wait = bound.begin();
    while driven.tx.reclaim()? == 0 {
        ensure!(!wait.is_over(), "a frame is not taken");
        driven.nic.function().check()?;
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// Waits for a frame.
fn receive(driven: &mut Driven, bound: Bound) -> Result<()> {
    let mut wait = bound.begin();
    while driven.rx.receive()?.is_none() {
        ensure!(!wait.is_over(), "no frame comes");
        driven.nic.function().check()?;
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// Sends a frame each way.
fn exchange(first: &mut Driven, second: &mut Driven, bound: Bound) -> Result<()> {
    for _ in 0..3 {
        send(first, bound)?;
        receive(second, bound)?;
        send(second, bound)?;
        receive(first, bound)?;
    }
    Ok(())
}
