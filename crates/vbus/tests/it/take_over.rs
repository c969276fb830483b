// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A new process takes the place of a running bus (`vbus serve --take-over`), under the eyes of
//! drivers that are at work.
//!
//! `VBUS_UPGRADES=50 cargo test -p vbus --test it take_over` takes over fifty times; the default is
//! a few.

use std::io::{BufRead as _, BufReader, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg,
    sendmsg,
};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::{Value, json};
use vbus_driver::{Function, state::Pages};
use vbus_process::{MEMORY_BYTES, Process};

use crate::support::{
    Running, Served, ServiceManager, TIMEOUT, await_bytes, end_of, exchange, has_ended, vbus,
    wait_until,
};

fn pages(name: &str) -> String {
    format!(
        "[[device]]\nname = {name:?}\nclass = \"state\"\n\
         pages = [{{ name = \"in\", bytes = 16, owner = \"device\" }}, \
         {{ name = \"out\", bytes = 16, owner = \"driver\" }}]\n"
    )
}

pub fn upgrades(default: usize) -> usize {
    std::env::var("VBUS_UPGRADES").ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// A driver that works without a break: it writes numbers that grow to its page, reads the other
/// page, whose numbers must not fall, and reads registers by message.
struct Driver {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<u64>>,
}

impl Driver {
    fn start(socket: PathBuf) -> Driver {
        let (stop, rounds) = <(Arc<AtomicBool>, Arc<AtomicU64>)>::default();
        let thread = {
            let (stop, rounds) = (stop.clone(), rounds.clone());
            std::thread::spawn(move || drive(&socket, &stop, &rounds))
        };
        Driver { stop, rounds, thread: Some(thread) }
    }

    /// Waits until the driver has done some more rounds: it lives, and so does its device.
    fn goes_on(&self, when: &str) {
        let before = self.rounds.load(Ordering::Relaxed);
        wait_until(&format!("the driver goes on {when}"), || {
            let thread = self.thread.as_ref();
            assert!(!thread.is_some_and(JoinHandle::is_finished), "the driver has failed {when}");
            self.rounds.load(Ordering::Relaxed) > before + 20
        });
    }

    /// Ends the driver. Returns its last number.
    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

fn drive(socket: &Path, stop: &AtomicBool, rounds: &AtomicU64) -> u64 {
    let process = Process::connect(socket, MEMORY_BYTES).unwrap();
    let mut pages = Pages::open(Function::probe(process).unwrap()).unwrap();
    let (input, output) = (pages.find("in").unwrap().unwrap(), pages.find("out").unwrap().unwrap());
    let reader = pages.reader(&input, 0).unwrap();
    let mut writer = pages.writer(&output, 0).unwrap();
    let incarnation = pages.function().incarnation().unwrap();
    let (mut round, mut seen) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        let mut value = [0; 16];
        value[..8].copy_from_slice(&u64::to_le_bytes(round));
        writer.write(&value);
        reader.read(&mut value).unwrap();
        let now = u64::from_le_bytes(value[..8].try_into().unwrap());
        assert!(now >= seen, "the device's page fell from {seen} to {now}");
        seen = now;
        pages.function().check().unwrap();
        assert_eq!(pages.function().incarnation(), Ok(incarnation));
        rounds.store(round, Ordering::Relaxed);
    }
    pages.finish(writer).unwrap();
    // The last value has to be seen while the page is registered.
    round
}

/// The command that takes the place of `bus`.
fn taker(bus: &Served) -> Command {
    let mut command = vbus();
    command.args(["serve", "--take-over", "--config"]).arg(bus.log.with_file_name("bus.toml"));
    command.arg("--dir").arg(&bus.dir);
    command
}

/// Another process takes over. Its log goes to the file `log`.
pub fn take_over(bus: &mut Served) {
    let log = std::fs::OpenOptions::new().append(true).open(&bus.log).unwrap();
    let next = taker(bus).args(["--ready-fd", "1"]).stdout(Stdio::piped()).stderr(log).spawn();
    let mut next = Running(next.unwrap());
    let (mut line, mut ready) = ([0; 8], next.0.stdout.take().unwrap());
    await_bytes(&ready);
    let told = ready.read_exact(&mut line);
    let log = || std::fs::read_to_string(&bus.log).unwrap();
    assert!(told.is_ok() && line == *b"READY=1\n", "{}", log());
    let status = end_of(&mut bus.child);
    assert!(status.success(), "the old bus: {status}\n{}", log());
    std::mem::swap(&mut bus.child, &mut next.0);
}

/// The pauses in the log, in order.
pub fn pauses(bus: &Served) -> Vec<Duration> {
    let log = std::fs::read_to_string(&bus.log).unwrap();
    let pause = |line: &str| {
        let text = line.split_once("they paused for ")?.1.trim();
        let number: f64 = text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok()?;
        let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let unit = match unit {
            "ns" => 1e-9,
            "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            other => panic!("{other:?} in {line}"),
        };
        Some(Duration::from_secs_f64(number * unit))
    };
    log.lines().filter_map(pause).collect()
}

#[test]
fn drivers_at_work_notice_nothing_of_many_upgrades() {
    let names: Vec<String> = (0..16).map(|number| format!("values{number}")).collect();
    let mut bus = Served::start(&names.iter().map(|name| pages(name)).collect::<String>());
    let socket = |name: &str| bus.dir.join(format!("{name}.sock"));
    // Two of the devices are under load, and the others have a client that waits.
    let drivers = [Driver::start(socket("values0")), Driver::start(socket("values1"))];
    let waits: Vec<_> = names[2..]
        .iter()
        .map(|name| Process::connect(socket(name), MEMORY_BYTES).unwrap())
        .collect();
    let metrics = |bus: &Served| {
        let mut socket = UnixStream::connect(bus.dir.join("metrics.sock")).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        assert!(text.contains("values15"), "{text}");
    };
    let count = upgrades(4);
    for round in 1..=count {
        for driver in &drivers {
            driver.goes_on("before an upgrade");
        }
        let hex = format!("{round:02x}00000000000000");
        bus.good(&["state", "set", "--hex", "values0", "in", &hex]);
        let supervisor = bus.supervisor();
        take_over(&mut bus);
        metrics(&bus);
        assert_eq!(bus.devices().len(), 16);
        wait_until("the old supervisor ends", || has_ended(supervisor));
        assert!(bus.dir.join("control.sock").exists(), "the sockets stay");
        let shown = bus.json(&["device", "show", "values0"]);
        assert_eq!((&shown["connected"], &shown["state"]), (&true.into(), &"open".into()));
        assert_eq!(shown["counters"]["opens"], 1, "the driver has opened it once");
    }
    for driver in &drivers {
        driver.goes_on("after the last upgrade");
    }
    drop(waits);
    drivers.into_iter().for_each(|driver| assert!(driver.end() > 0));
    let mut all = pauses(&bus);
    all.sort();
    assert_eq!(all.len(), count);
    println!("pauses of 16 devices, {count} upgrades: {all:?}");
    // QEMU waits for 5 seconds, on any machine.
    assert!(all.iter().all(|pause| *pause < Duration::from_secs(5)), "{all:?}");
    bus.signal(Signal::TERM);
    assert!(end_of(&mut bus.child).success());
    let left = std::fs::read_dir(&bus.dir).unwrap().count();
    assert_eq!(left, 0, "the last bus removes all sockets, also those that it has not made");
}

/// A new process that follows the protocol (spec/take-over.md) up to a step.
struct Double(UnixStream);

impl Double {
    fn ask(bus: &Served) -> Double {
        let mut socket = bus.control();
        let ask = b"{\"op\":\"take-over\",\"format\":2,\"state-format\":1,\"version\":\"test\"}\n";
        assert_eq!(exchange(&mut socket, ask), "{\"item\":{\"format\":2}}");
        Double(socket)
    }

    /// Receives a message of this kind, with all its descriptors.
    fn receive(&mut self, kind: u8) -> Vec<OwnedFd> {
        let (found, _, descriptors) = self.message();
        assert_eq!(found, kind);
        descriptors
    }

    /// Receives a message: its kind, its body and its descriptors.
    fn message(&mut self) -> (u8, Vec<u8>, Vec<OwnedFd>) {
        let mut descriptors = Vec::new();
        let mut head = [0; 16];
        let mut have = 0;
        while have < head.len() {
            have += self.some(&mut head[have..], &mut descriptors);
        }
        assert_eq!(&head[..4], b"vbto");
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap()) as usize;
        while descriptors.len() < word(12) {
            self.some(&mut [0], &mut descriptors);
        }
        let mut body = vec![0; word(8)];
        self.0.read_exact(&mut body).unwrap();
        (head[4], body, descriptors)
    }

    /// Sends a message. Its descriptors are so few that they go with the head.
    fn send(&self, kind: u8, body: &[u8], descriptors: &[OwnedFd]) {
        let word = |len: usize| u32::try_from(len).unwrap().to_le_bytes();
        let kind = [kind, 0, 0, 0];
        let head = [&b"vbto"[..], &kind, &word(body.len()), &word(descriptors.len())].concat();
        let fds: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
        let flags = SendFlags::NOSIGNAL;
        let sent = sendmsg(&self.0, &[IoSlice::new(&head)], &mut control, flags).unwrap();
        assert_eq!(sent, head.len());
        (&self.0).write_all(body).unwrap();
    }

    fn some(&self, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> usize {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(bytes)];
        let got = recvmsg(&self.0, parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        assert!(got.bytes > 0, "the bus has closed the connection");
        for message in control.drain() {
            if let rustix::net::RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        got.bytes
    }

    fn ready(&mut self) {
        self.0.write_all(b"vbto\x02\0\0\0\0\0\0\0\0\0\0\0").unwrap();
    }
}

#[test]
fn whatever_the_new_process_does_the_old_one_goes_on() {
    let mut bus = Served::start(&[pages("values0"), pages("values1")].concat());
    let driver = Driver::start(bus.dir.join("values0.sock"));
    driver.goes_on("at first");
    for step in 0..=3 {
        for end in ["killed", "half", "nonsense", "silent"] {
            let mut double = Double::ask(&bus);
            let mut held = Vec::new();
            if step > 0 {
                held.extend(double.receive(1));
            }
            if step > 1 {
                double.ready();
            }
            if step > 2 {
                held.extend(double.receive(3));
                assert!(held.len() > 6, "it has the descriptors of everything");
            }
            match end {
                "nonsense" => double.0.write_all(&[0xee; 64]).unwrap(),
                // A part of the head of `ready`, or of `taken`.
                "half" => double.0.write_all(&b"vbto\x02\0\0"[..4 + step.min(3)]).unwrap(),
                // The bus waits until its time has passed, and QEMU would wait longer.
                "silent" if step > 1 => {
                    let mut text = String::new();
                    let _ = double.0.read_to_string(&mut text);
                }
                _ => {}
            }
            drop((double, held));
            driver.goes_on(&format!("after a new process that was {end} in step {step}"));
            assert_eq!(bus.devices(), ["values0", "values1"]);
        }
    }
    assert!(bus.child.try_wait().unwrap().is_none());
    let log = std::fs::read_to_string(&bus.log).unwrap();
    assert_eq!(log.matches("has not taken over, and this bus goes on").count(), 16, "{log}");
    // After all that it can still be taken over.
    take_over(&mut bus);
    driver.goes_on("after an upgrade");
    driver.end();
}

#[test]
fn a_new_process_that_cannot_says_why_and_the_old_one_goes_on() {
    let bus = Served::start(&pages("values0"));
    let driver = Driver::start(bus.dir.join("values0.sock"));
    driver.goes_on("at first");
    let mut socket = bus.control();
    let ask = b"{\"op\":\"take-over\",\"format\":3,\"state-format\":1,\"version\":\"9.9\"}\n";
    let answer = exchange(&mut socket, ask);
    assert!(answer.contains("vbus 9.9 hands over in format 3"), "{answer}");
    let ask = b"{\"op\":\"take-over\",\"format\":2,\"state-format\":2,\"version\":\"9.9\"}\n";
    let answer = exchange(&mut bus.control(), ask);
    let both = ["with states of format 2", "restart the bus instead"];
    assert!(both.iter().all(|text| answer.contains(text)), "{answer}");
    driver.goes_on("after a program with other formats");
    // No room for the descriptors, as when a limit is too low.
    let quoted = |text: &Path| text.display().to_string();
    let script = format!(
        "ulimit -n 12; exec {} serve --take-over --dir {}",
        env!("CARGO_BIN_EXE_vbus"),
        quoted(&bus.dir)
    );
    let output = Command::new("sh").args(["-c", &script]).env_remove("NOTIFY_SOCKET").output();
    let output = output.unwrap();
    assert!(!output.status.success(), "{output:?}");
    driver.goes_on("after a process without descriptors");
    // A device whose session nobody can take over.
    let settings = ["--class", "virtio-net", "--set", "transport=vhost-user"];
    bus.good(&[&["device", "add", "vh0", "--set", "backend=null"][..], &settings].concat());
    let output = taker(&bus).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("\"vh0\"") && text.contains("over vhost-user"), "{text}");
    bus.good(&["device", "remove", "vh0"]);
    driver.goes_on("after a device that has no saved state");
    // A configuration that is wrong is found before the bus is asked for anything.
    std::fs::write(bus.log.with_file_name("bad.toml"), "[[device]]\nname = 7\n").unwrap();
    let mut command = vbus();
    command.args(["serve", "--take-over", "--config"]).arg(bus.log.with_file_name("bad.toml"));
    let output = command.arg("--dir").arg(&bus.dir).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    driver.goes_on("after a wrong configuration");
    // So is a socket that cannot be made: the new process would have no metrics.
    let nowhere = "[metrics]\nsocket = { path = \"nowhere/metrics.sock\" }\n";
    std::fs::write(bus.log.with_file_name("bad.toml"), nowhere).unwrap();
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    driver.goes_on("after a socket that cannot be made");
    driver.end();
    let nobody = tempfile::tempdir().unwrap();
    let output = vbus().args(["serve", "--take-over", "--dir"]).arg(nobody.path()).output();
    let text = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(text.contains("no bus to take over serves in"), "{text}");
}

/// The old bus is of another version, as the new one sees it: somebody between the two changes the
/// line of its answer, its offer and its state. Returns what became of the new bus. It ends if
/// `edit` leads to a failure; otherwise it serves.
fn through(bus: &mut Served, edit: impl Fn(&str, &mut Value)) -> Option<(Option<i32>, String)> {
    let (public, hidden) = (bus.dir.join("control.sock"), bus.log.with_file_name("hidden"));
    let old = bus.control();
    std::fs::rename(&public, &hidden).unwrap();
    let between = UnixListener::bind(&public).unwrap();
    let new = taker(bus).stderr(Stdio::piped()).spawn().unwrap();
    let (stream, _) = between.accept().unwrap();
    std::fs::rename(&hidden, &public).unwrap();
    // The line that the new bus sends goes on as it is. Nothing comes behind it before the answer.
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    (&old).write_all(line.as_bytes()).unwrap();
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        (&old).read_exact(&mut byte).unwrap();
        answer.extend(byte);
    }
    let edited = |what: &str, text: &[u8]| {
        let mut value = serde_json::from_slice(text).unwrap();
        edit(what, &mut value);
        value.to_string().into_bytes()
    };
    let mut answer = edited("answer", &answer);
    answer.push(b'\n');
    (&stream).write_all(&answer).unwrap();
    let (mut old, mut new_end) = (Double(old), Double(stream));
    let refused = |new: Child| {
        let output = new.wait_with_output().unwrap();
        Some((output.status.code(), String::from_utf8(output.stderr).unwrap()))
    };
    for what in ["offer", "state"] {
        if what == "offer" && !answer.starts_with(b"{\"item\":{\"format\":2}}") {
            return refused(new);
        }
        let (kind, body, descriptors) = old.message();
        new_end.send(kind, &edited(what, &body), &descriptors);
        drop(descriptors);
        // Ready, taken or failed.
        let (kind, body, _) = new_end.message();
        old.send(kind, &body, &[]);
        if kind == 5 {
            return refused(new);
        }
    }
    assert!(end_of(&mut bus.child).success());
    bus.child = new;
    None
}

/// Programs of other versions: with the same formats they hand over to each other, and with another
/// one the new bus says what it does not know, and the old one goes on.
#[test]
fn a_bus_of_another_version_is_taken_over_or_goes_on() {
    let mut bus = Served::start(&pages("values0"));
    let driver = Driver::start(bus.dir.join("values0.sock"));
    driver.goes_on("at first");
    type Edit = fn(&str, &mut Value);
    let edits: [(&str, Edit, &str); 5] = [
        (
            "a newer format",
            |what, value| {
                if what == "answer" {
                    value["item"]["format"] = json!(3);
                }
            },
            "unknown answer",
        ),
        (
            "a newer offer",
            |what, value| {
                if what == "offer" {
                    value["more"] = json!(1);
                }
            },
            "unknown field `more`",
        ),
        (
            "a newer state of the bus",
            |what, value| {
                if what == "state" {
                    value["devices"][0]["more"] = json!(1);
                }
            },
            "unknown field `more`",
        ),
        (
            "a newer state of a device",
            |what, value| {
                if what == "state" {
                    value["devices"][0]["state"]["served"]["function"]["more"] = json!(1);
                }
            },
            "unknown field `more`",
        ),
        (
            "an older state of a device",
            |what, value| {
                if what == "state" {
                    let state = &mut value["devices"][0]["state"]["served"]["function"];
                    state.as_object_mut().unwrap().remove("interrupts").unwrap();
                }
            },
            "missing field `interrupts`",
        ),
    ];
    for (what, edit, why) in edits {
        let (code, text) = through(&mut bus, edit).expect(what);
        assert!(code == Some(1) && text.contains(why), "{what}: {code:?} {text}");
        let log = || std::fs::read_to_string(&bus.log).unwrap();
        if what != "a newer format" {
            // The new bus has told the old one.
            wait_until(&format!("the log names {what}"), || {
                let said = |line: &str| line.contains("goes on") && line.contains(why);
                log().lines().any(said)
            });
        }
        driver.goes_on(what);
        assert_eq!(bus.devices(), ["values0"], "after {what}");
    }
    for version in ["0.0.1", "99.0.0"] {
        let taken = through(&mut bus, |what, value| {
            if what == "offer" {
                value["version"] = json!(version);
            }
        });
        assert_eq!(taken, None, "version {version}");
        driver.goes_on(version);
    }
    driver.end();
}

/// A new process that gets only so much memory: it takes over, or the old one goes on.
#[test]
fn a_new_process_without_memory_leaves_the_old_one_serving() {
    let mut bus = Served::start(&pages("values0"));
    let driver = Driver::start(bus.dir.join("values0.sock"));
    driver.goes_on("at first");
    let command = taker(&bus);
    let words =
        command.get_args().map(|word| format!("'{}'", word.to_str().unwrap())).collect::<Vec<_>>();
    let program = env!("CARGO_BIN_EXE_vbus");
    for mib in [4, 16, 48, 96, 160, 256] {
        let script = format!("ulimit -S -v {}; exec {program} {}", mib * 1024, words.join(" "));
        let mut new = Command::new("sh")
            .args(["-c", &script])
            .env_remove("NOTIFY_SOCKET")
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut ended = None;
        wait_until("one of the two ends", || {
            ended = new.try_wait().unwrap();
            ended.is_some() || bus.child.try_wait().unwrap().is_some()
        });
        match ended {
            Some(status) => assert!(!status.success(), "with {mib} MiB"),
            None => {
                // It has taken over. What it serves with later is not in question here.
                let (process, all) =
                    (Pid::from_child(&new), Rlimit { current: None, maximum: None });
                prlimit(Some(process), Resource::As, all).unwrap();
                bus.child = new;
            }
        }
        driver.goes_on(&format!("with {mib} MiB for the new process"));
    }
    take_over(&mut bus);
    driver.goes_on("with all memory");
    driver.end();
}

/// The sockets are the same ones afterwards. Nobody who waits at one is turned away.
#[test]
fn a_new_process_goes_on_though_nobody_waits_for_it() {
    use std::os::unix::fs::MetadataExt as _;
    let mut bus = Served::start(&pages("values0"));
    let driver = Driver::start(bus.dir.join("values0.sock"));
    driver.goes_on("at first");
    let sockets = |bus: &Served| {
        let one = |name: &str| std::fs::metadata(bus.dir.join(name)).unwrap().ino();
        ["control.sock", "metrics.sock", "values0.sock"].map(one)
    };
    let before = sockets(&bus);
    let log = std::fs::OpenOptions::new().append(true).open(&bus.log).unwrap();
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
    // `vbus serve --background`, or what had started it, has been killed.
    drop(reader);
    let next = taker(&bus).args(["--ready-fd", "1"]).stdout(writer).stderr(log).spawn().unwrap();
    assert!(end_of(&mut bus.child).success());
    bus.child = next;
    driver.goes_on("after an upgrade that nobody waits for");
    let log = || std::fs::read_to_string(&bus.log).unwrap();
    wait_until("the new process says that it could not tell", || log().contains("--ready-fd 1"));
    driver.goes_on("after that");
    assert!(bus.child.try_wait().unwrap().is_none(), "{}", log());
    assert_eq!(sockets(&bus), before);
    driver.end();
}

/// The file differs from the bus: the new process first takes the bus as it is, and then changes
/// it, as a reload does.
#[test]
fn what_the_configuration_changes_follows_the_upgrade() {
    let mut bus = Served::start(&[pages("values0"), pages("gone")].concat());
    let page = "pages=[{name = \"p\", bytes = 8, owner = \"device\"}]";
    bus.good(&["device", "add", "byhand", "--class", "state", "--set", page]);
    let driver = Driver::start(bus.dir.join("values0.sock"));
    driver.goes_on("at first");
    let config = [pages("values0"), pages("new")].concat();
    std::fs::write(bus.log.with_file_name("bus.toml"), config).unwrap();
    take_over(&mut bus);
    wait_until("the devices change", || bus.devices() == ["byhand", "new", "values0"]);
    driver.goes_on("after the change");
    driver.end();
    bus.good(&["device", "remove", "values0"]);
    assert!(!bus.dir.join("values0.sock").exists(), "its file goes with the device");
    bus.signal(Signal::TERM);
    assert!(end_of(&mut bus.child).success());
    assert_eq!(std::fs::read_dir(&bus.dir).unwrap().count(), 0);
}

/// systemd learns which process its service is, and hears of it as before.
#[test]
fn the_service_manager_follows_the_upgrade() {
    let temporary = tempfile::tempdir().unwrap();
    let notify = temporary.path().join("notify");
    let manager = ServiceManager::bind(&notify);
    let hear = |what: &str| manager.hear(what, |_| {});
    let config = temporary.path().join("bus.toml");
    std::fs::write(&config, pages("values0")).unwrap();
    let dir = temporary.path().join("bus");
    let serve = |more: &[&str]| {
        let mut command = vbus();
        command.arg("serve").args(more).arg("--config").arg(&config).arg("--dir").arg(&dir);
        command
    };
    let old = serve(&[])
        .env("NOTIFY_SOCKET", &notify)
        .env("WATCHDOG_USEC", "400000")
        .env_remove("WATCHDOG_PID")
        .spawn();
    let mut old = Running(old.unwrap());
    hear("READY=1");
    // As in ExecReload=: the command returns when the new process serves.
    let mut reload = serve(&["--take-over", "--background"]);
    assert!(reload.status().unwrap().success());
    let told = hear("MAINPID=");
    assert!(end_of(&mut old.0).success());
    let next: i32 = told.trim_start_matches("MAINPID=").trim().parse().unwrap();
    assert!(!has_ended(next));
    hear("WATCHDOG=1");
    rustix::process::kill_process(Pid::from_raw(next).unwrap(), Signal::TERM).unwrap();
    hear("STOPPING=1");
    wait_until("it ends", || has_ended(next));
    wait_until("its sockets go", || std::fs::read_dir(&dir).unwrap().count() == 0);
}
