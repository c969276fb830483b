// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus is killed again and again under drivers at work, and its keeper starts the next one
//! (`vbus serve --keep`): clients keep their connections, and lose what a wire may lose.
//!
//! `VBUS_KILLS=100 cargo test -p vbus --test it keeper` kills a hundred times; the default is a
//! few.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{Pid, Signal, kill_process};
use vbus_driver::pic::Nesting;
use vbus_driver::{Dma as _, Function, Hal as _, state::Pages};
use vbus_process::{MEMORY_BYTES, Process};
use vbus_shm::pic::{DriverEnd, PAGE_BYTES};
use vfio_user_protocol::Client;

use crate::support::{
    Served, ServiceManager, TIMEOUT, exchange, has_ended, program, vbus, wait_until,
};
use crate::take_over_net::{Card, ENTRIES, frame};

/// How many times a bus may die in a row that has not served for [`PROGRESS`].
const DEATHS_MAX: usize = 8;
const PROGRESS: Duration = Duration::from_secs(1);

fn kills(default: usize) -> usize {
    std::env::var("VBUS_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// A bus with a keeper.
struct Kept(Served);

impl Kept {
    fn start(config: &str) -> Kept {
        Kept(Served::start_kept(config))
    }

    /// The process of the bus.
    fn process(&self) -> i32 {
        wait_until("the keeper has a bus", || !self.0.children().is_empty());
        self.0.supervisor()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.0.log).unwrap()
    }

    /// The files in its directory.
    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0.dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// What starts another keeper, of the bus as it is.
    fn adoption(&self) -> Command {
        let log = std::fs::OpenOptions::new().append(true).open(&self.0.log).unwrap();
        let mut command = vbus();
        command.args(["serve", "--keep", "--adopt", "--config"]);
        command.arg(self.0.log.with_file_name("bus.toml"));
        command.arg("--dir").arg(&self.0.dir).stderr(log);
        command
    }

    /// Gives the bus another keeper. Returns the former one, which may be there still.
    fn adopt(&mut self) -> Child {
        let next = self.adoption().spawn().unwrap();
        let former = std::mem::replace(&mut self.0.child, next);
        wait_until("the bus is kept again", || keeper(self)["present"] == true);
        former
    }

    /// How often the keeper has started the bus because it had died.
    fn restarts(&self) -> u64 {
        self.log().matches(" has taken up ").count() as u64
    }

    /// Kills the bus. Returns when the next one has taken its place.
    fn kill(&self) {
        let (process, before) = (self.process(), self.restarts());
        kill(process);
        wait_until("the next bus takes its place", || {
            assert!(!has_ended(i32::try_from(self.0.child.id()).unwrap()), "{}", self.log());
            self.restarts() > before
        });
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let buses = self.0.children();
        let _ = self.0.child.kill();
        buses.into_iter().for_each(kill);
    }
}

fn kill(process: i32) {
    // It may have ended.
    let _ = kill_process(Pid::from_raw(process).unwrap(), Signal::KILL);
}

fn nic(last: u8) -> String {
    format!(
        "[[device]]\nname = \"net{last}\"\nclass = \"venet\"\nbackend = \"switch\"\n\
         mac = \"02:00:00:00:00:0{last}\"\nbackpressure-ms = 60000\n"
    )
}

const PAGES: &str = "[[device]]\nname = \"values\"\nclass = \"state\"\n\
                     pages = [{ name = \"in\", bytes = 16, owner = \"device\" }, \
                     { name = \"out\", bytes = 16, owner = \"driver\" }]\n";

/// What a card has had of the other one's stream.
#[derive(Debug, Default)]
struct Stream {
    /// One more than the highest number so far.
    next: u64,
    frames: u64,
    /// Frames that did not come before a later one.
    missing: u64,
    /// Frames that came after a later one: again, or late.
    again: u64,
}

impl Stream {
    fn take(&mut self, number: u64) {
        self.frames += 1;
        if number < self.next {
            self.again += 1;
            return;
        }
        self.missing += number - self.next;
        self.next = number + 1;
    }
}

/// What both ends of a stream know.
#[derive(Default)]
struct Shared {
    /// The next number to send.
    sent: AtomicU64,
    /// The number of the first frame after the end, and 0 before it.
    last: AtomicU64,
    received: AtomicU64,
    done: AtomicBool,
}

/// Sends a stream and receives that of the other card, until frames come that the other one sent
/// after `stop`.
fn run(mut card: Card, own: u8, stop: &AtomicBool, both: &[Shared; 2]) -> Stream {
    let (other, begun) = (3 - own, Instant::now());
    let [mine, theirs] = [own, other].map(|card| &both[usize::from(card) - 1]);
    let mut stream = Stream::default();
    loop {
        let mut idle = true;
        let number = mine.sent.load(Ordering::Relaxed);
        if stop.load(Ordering::Relaxed) && mine.last.load(Ordering::Relaxed) == 0 {
            mine.last.store(number.max(1), Ordering::Release);
        }
        if !theirs.done.load(Ordering::Acquire) && card.send(&frame(other, own, number)) {
            mine.sent.store(number + 1, Ordering::Relaxed);
            idle = false;
        }
        while let Some(found) = card.receive() {
            idle = false;
            let number = u64::from_le_bytes(found[14..22].try_into().unwrap());
            assert!(found == frame(own, other, number), "card {own}: {number} is not whole");
            stream.take(number);
            mine.received.store(stream.frames, Ordering::Relaxed);
        }
        let last = theirs.last.load(Ordering::Acquire);
        if last != 0 && stream.next > last {
            mine.done.store(true, Ordering::Release);
        }
        if mine.done.load(Ordering::Relaxed) && theirs.done.load(Ordering::Acquire) {
            return stream;
        }
        assert!(begun.elapsed() < 20 * TIMEOUT, "card {own}: {stream:?}");
        if idle {
            card.sleep();
        }
    }
}

/// A driver of state pages: it writes numbers that grow, the number that it reads must not fall,
/// and each message has its reply.
fn write_pages(
    mut pages: Pages<Process>,
    stop: &AtomicBool,
    written: &AtomicU64,
    seen: &AtomicU64,
) -> Pages<Process> {
    let (input, output) = (pages.find("in").unwrap().unwrap(), pages.find("out").unwrap().unwrap());
    let reader = pages.reader(&input, 0).unwrap();
    let mut writer = pages.writer(&output, 0).unwrap();
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        let mut value = [0; 16];
        value[..8].copy_from_slice(&u64::to_le_bytes(round));
        writer.write(&value);
        written.store(round, Ordering::Release);
        reader.read(&mut value).unwrap();
        let now = u64::from_le_bytes(value[..8].try_into().unwrap());
        let before = seen.swap(now, Ordering::Release);
        assert!(now >= before, "the device's page fell from {before} to {now}");
        // A register, by a message that must have exactly one reply.
        pages.function().check().unwrap();
        std::thread::yield_now();
    }
    pages.finish(writer).unwrap();
    pages
}

#[test]
fn drivers_at_work_go_on_after_many_kills() {
    let bus = Kept::start(&[&nic(1), &nic(2), PAGES].concat());
    let socket = |name: &str| bus.0.dir.join(format!("{name}.sock"));
    let cards = [1, 2].map(|last| Card::open(socket(&format!("net{last}"))));
    let process = Process::connect(socket("values"), MEMORY_BYTES).unwrap();
    let pages = Pages::open(Function::probe(process).unwrap()).unwrap();
    let (stop, both) = (AtomicBool::new(false), <[Shared; 2]>::default());
    let [written, seen] = [const { AtomicU64::new(0) }; 2];
    let count = kills(3);
    let streams = std::thread::scope(|scope| {
        let [one, two] = cards;
        let threads =
            [scope.spawn(|| run(one, 1, &stop, &both)), scope.spawn(|| run(two, 2, &stop, &both))];
        let values = scope.spawn(|| write_pages(pages, &stop, &written, &seen));
        let all = || both.each_ref().map(|card| card.received.load(Ordering::Relaxed));
        let pass = |when: &str| {
            let before = all();
            wait_until(&format!("frames pass in both directions {when}: {}", bus.log()), || {
                assert!(threads.iter().all(|card| !card.is_finished()), "a card has failed");
                assert!(!values.is_finished(), "the driver of pages has failed");
                let now = all();
                now[0] > before[0] + 200 && now[1] > before[1] + 200
            });
        };
        pass("at first");
        for round in 1..=count {
            let hex = format!("{round:02x}00000000000000");
            bus.0.good(&["state", "set", "--hex", "values", "in", &hex]);
            if count >= DEATHS_MAX {
                // A bus that dies at once so many times in a row is given up.
                std::thread::sleep(PROGRESS);
            }
            // The number of frames until the kill is a random one.
            std::thread::sleep(Duration::from_micros(written.load(Ordering::Relaxed) % 50_000));
            bus.kill();
            pass(&format!("after kill {round}"));
            wait_until("the page has its newest value", || {
                seen.load(Ordering::Acquire) == round as u64
            });
            let before = written.load(Ordering::Acquire);
            let text = bus.0.good(&["state", "get", "--hex", "values", "out"]);
            let digits: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
            let bytes: Vec<_> = (0..8)
                .map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).unwrap())
                .collect();
            let out = u64::from_le_bytes(bytes.try_into().unwrap());
            assert!(out >= before, "the bus reads {out}, and {before} was written before");
        }
        stop.store(true, Ordering::Relaxed);
        values.join().unwrap();
        threads.map(|card| card.join().unwrap())
    });
    println!("{count} kills: {streams:?}");
    let most = count as u64 * 4 * u64::from(ENTRIES);
    for Stream { missing, again, frames, .. } in streams {
        assert!(missing <= most && again <= most, "lost {missing}, again {again}, of {frames}");
        assert!(frames > 200 * count as u64);
    }
    for name in ["net1", "net2", "values"] {
        let shown = bus.0.json(&["device", "show", name]);
        assert_eq!(shown["counters"]["opens"], 1, "{name} was opened once");
        assert_eq!(shown["counters"]["broken"], 0, "{name}");
        assert_eq!(shown["connector"]["clients"], 1, "{name}");
    }
}

/// A driver of state pages at work.
struct Worker {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    seen: Arc<AtomicU64>,
    thread: Option<JoinHandle<Pages<Process>>>,
}

impl Worker {
    fn start(bus: &Kept) -> Worker {
        let process = Process::connect(bus.0.dir.join("values.sock"), MEMORY_BYTES).unwrap();
        let pages = Pages::open(Function::probe(process).unwrap()).unwrap();
        let (stop, written, seen) = <(Arc<AtomicBool>, Arc<AtomicU64>, Arc<AtomicU64>)>::default();
        let thread = {
            let (stop, written, seen) = (stop.clone(), written.clone(), seen.clone());
            std::thread::spawn(move || write_pages(pages, &stop, &written, &seen))
        };
        Worker { stop, written, seen, thread: Some(thread) }
    }

    /// A value goes to the driver, and one comes from it.
    fn exchanges(&self, bus: &Kept, number: u8, when: &str) {
        let before = self.written.load(Ordering::Acquire);
        let hex = format!("{number:02x}00000000000000");
        bus.0.good(&["state", "set", "--hex", "values", "in", &hex]);
        wait_until(&format!("the driver has the value {when}: {}", bus.log()), || {
            self.seen.load(Ordering::Acquire) == u64::from(number)
        });
        let version =
            || bus.0.json(&["device", "show", "values"])["device"]["pages"][1]["version"].clone();
        let first = version();
        wait_until(&format!("the bus has a new value {when}: {}", bus.log()), || {
            bus.0.good(&["state", "get", "--hex", "values", "out"]);
            version() != first
        });
        assert!(self.written.load(Ordering::Acquire) > before);
    }

    /// Returns the driver, which does nothing more; its connection stays.
    fn end(mut self) -> Pages<Process> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

/// Makes a copy of `vbus`. By a process of its own: a child of another test could hold this one's
/// descriptor of the copy, and the kernel runs no file that somebody can write.
fn copy_program(path: &Path) {
    assert!(Command::new("cp").arg(vbus().get_program()).arg(path).status().unwrap().success());
}

/// What the bus says of its keeper.
fn keeper(bus: &Kept) -> serde_json::Value {
    let answer = exchange(&mut bus.0.control(), b"{\"op\":\"info\"}\n");
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    answer["ok"]["keeper"].clone()
}

#[test]
fn a_bus_that_ends_in_order_ends_its_keeper() {
    let mut bus = Kept::start(PAGES);
    assert_eq!(keeper(&bus), serde_json::json!({ "present": true, "restarts": 0 }));
    bus.kill();
    assert_eq!(keeper(&bus), serde_json::json!({ "present": true, "restarts": 1 }));
    bus.0.signal(Signal::TERM);
    let status = bus.0.child.wait().unwrap();
    assert!(status.success(), "{status} {}", bus.log());
    assert_eq!(std::fs::read_dir(&bus.0.dir).unwrap().count(), 0, "no socket is left");
    // The same if the bus itself is asked.
    let mut bus = Kept::start(PAGES);
    kill_process(Pid::from_raw(bus.process()).unwrap(), Signal::TERM).unwrap();
    assert!(bus.0.child.wait().unwrap().success());
}

#[test]
fn a_device_that_cannot_be_kept_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("bus.toml");
    let capture = format!("pcap = \"{}\"", folder.path().join("frames.pcap").display());
    let card = "[[device]]\nname = \"card\"\nclass = \"virtio-net\"\nbackend = \"null\"\n";
    std::fs::write(&config, format!("{card}{capture}\n")).unwrap();
    let mut command = vbus();
    command.args(["serve", "--keep", "--config"]).arg(&config);
    let output = command.arg("--dir").arg(folder.path().join("bus")).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("\"card\" of class \"virtio-net\" cannot be kept"), "{text}");
    let bus = Kept::start(PAGES);
    let capture = format!("pcap={}", bus.0.dir.join("frames.pcap").display());
    let set = ["--set", "backend=null", "--set", &capture];
    let text = bus.0.bad(&[&["device", "add", "card", "--class", "venet"][..], &set].concat());
    assert!(text.contains("cannot be kept"), "{text}");
    assert_eq!(bus.0.devices(), ["values"], "it is not there by halves");
    // What is added and removed later is kept too.
    bus.0.good(&["device", "add", "late", "--class", "venet", "--set", "backend=null"]);
    bus.kill();
    assert_eq!(bus.0.devices(), ["late", "values"]);
    bus.0.good(&["device", "remove", "late"]);
    bus.kill();
    assert_eq!(bus.0.devices(), ["values"]);
}

/// Nobody can tell which requests of a front end of vhost-user were answered. It connects again.
#[test]
fn a_device_of_vhost_user_is_made_anew() {
    let card = "[[device]]\nname = \"card\"\nclass = \"virtio-net\"\nbackend = \"null\"\n\
                transport = \"vhost-user\"\n";
    let bus = Kept::start(&[card, PAGES].concat());
    let socket = bus.0.dir.join("card.sock");
    let mut front_end = UnixStream::connect(&socket).unwrap();
    bus.kill();
    assert_eq!(front_end.read(&mut [0]).unwrap_or(0), 0, "its connection has ended");
    // The device is there before its socket takes anybody.
    let mut front_end = None;
    wait_until("the device is there again", || {
        front_end = UnixStream::connect(&socket).ok();
        front_end.is_some()
    });
    assert_eq!(bus.0.devices(), ["card", "values"]);
    // GET_FEATURES.
    let mut front_end = front_end.unwrap();
    front_end.set_read_timeout(Some(TIMEOUT)).unwrap();
    front_end.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    front_end.read_exact(&mut [0; 20]).unwrap();
}

/// Who reads changes nothing, so nothing is given to the keeper.
#[test]
fn a_request_that_only_reads_gives_the_keeper_nothing() {
    let bus = Kept::start(PAGES);
    let keeper_process = Pid::from_raw(i32::try_from(bus.0.child.id()).unwrap()).unwrap();
    bus.0.good(&["state", "set", "--hex", "values", "in", "01"]);
    // A keeper that takes nothing is dropped, as soon as its socket is full.
    kill_process(keeper_process, Signal::STOP).unwrap();
    let mut control = bus.0.control();
    for _ in 0..2000 {
        let request = r#"{"op":"device","name":"values","request":{"op":"get","page":"in"}}"#;
        let answer = exchange(&mut control, format!("{request}\n").as_bytes());
        assert!(answer.contains("item"), "{answer}");
        // The item is followed by the answer to the request.
        exchange(&mut control, b"");
    }
    assert_eq!(keeper(&bus)["present"], true);
    let (mut failed, begun) = (String::new(), Instant::now());
    while failed.is_empty() {
        assert!(begun.elapsed() < 4 * TIMEOUT, "the keeper's socket does not fill");
        let mut command = vbus();
        command.args(["state", "set", "--hex", "values", "in", "02", "--dir"]).arg(&bus.0.dir);
        let output = command.output().unwrap();
        if !output.status.success() {
            failed = String::from_utf8(output.stderr).unwrap();
        }
    }
    assert!(failed.contains("the keeper has not got that"), "{failed}");
    kill_process(keeper_process, Signal::CONT).unwrap();
}

/// The summary and the metrics have it.
#[test]
fn the_statistics_say_how_often_the_bus_was_started_again() {
    let bus = Kept::start(PAGES);
    assert!(bus.0.good(&["stats"]).contains("keeper: the bus has not died\n"));
    bus.kill();
    assert!(bus.0.good(&["stats"]).contains("keeper: it has started the bus again once\n"));
    let mut scraper = UnixStream::connect(bus.0.dir.join("metrics.sock")).unwrap();
    scraper.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    scraper.read_to_string(&mut text).unwrap();
    assert!(
        text.contains("\nvbus_restarts_total 1\n") && text.contains("\nvbus_keeper 1\n"),
        "{text}"
    );
}

fn has_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
}

/// What a client or its guest does to its own memory is no reason to end the others' connections.
#[test]
fn a_client_that_spoils_its_memory_loses_its_own_connection_alone() {
    let bus =
        Kept::start(&[PAGES, &nic(1), "[[device]]\nname = \"pic\"\nclass = \"pic\"\n"].concat());
    let socket = |name: &str| bus.0.dir.join(format!("{name}.sock"));
    let neighbour = Worker::start(&bus);
    neighbour.exchanges(&bus, 1, "at first");
    // Its page says something else than when it was registered.
    let forger = Process::connect(socket("pic"), MEMORY_BYTES).unwrap();
    let mut function = Function::probe(forger.clone()).unwrap();
    function.open(0).unwrap();
    let page = forger.alloc(PAGE_BYTES).unwrap();
    let _ = DriverEnd::create(page.clone(), 16, Nesting::Flat).unwrap();
    let _region = function.region_add(0, 0, &page, (0, PAGE_BYTES), None).unwrap();
    page.copy_in(0, &[0xff; PAGE_BYTES]);
    // Its file is shorter than what is mapped of it.
    let file = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 1 << 20).unwrap();
    let mut shrinker = Client::connect(socket("net1")).unwrap();
    shrinker.dma_map(file.as_fd(), 0, 1 << 32, 1 << 20).unwrap();
    ftruncate(&file, 4096).unwrap();
    bus.kill();
    neighbour.exchanges(&bus, 2, "after the kill");
    for (name, connection) in [("pic", forger.socket()), ("net1", shrinker.as_fd())] {
        wait_until(&format!("the connection of {name} ends"), || has_hung_up(connection));
        let line = format!("device \"{name}\" cannot go on from what the former bus left");
        assert_eq!(bus.log().matches(&line).count(), 1, "{}", bus.log());
        // The device is there again.
        Process::connect(socket(name), MEMORY_BYTES).unwrap();
    }
    assert_eq!(bus.0.devices(), ["net1", "pic", "values"]);
    // And so is the keeper, which has nothing of it any more.
    bus.kill();
    neighbour.exchanges(&bus, 3, "after another kill");
    assert_eq!(bus.log().matches("cannot go on from what").count(), 2, "{}", bus.log());
    neighbour.end();
}

/// The program of the next bus does nothing at all. SIGTERM does not wait for it.
#[test]
fn a_keeper_ends_in_the_middle_of_a_take_up() {
    let folder = tempfile::tempdir().unwrap();
    let [path, aside] = ["vbus", "aside"].map(|name| folder.path().join(name));
    copy_program(&path);
    let mut bus = Kept(Served::start_kept_by(program(&path), PAGES));
    std::fs::rename(&path, &aside).unwrap();
    let asleep = folder.path().join("asleep");
    let script =
        format!("#!/bin/sh\necho $$ > {0}.new\nmv {0}.new {0}\nexec sleep 600\n", asleep.display());
    std::fs::write(&path, script).unwrap();
    let all = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&path, all).unwrap();
    kill(bus.process());
    wait_until("the next bus sleeps", || asleep.exists());
    let process = std::fs::read_to_string(&asleep).unwrap().trim().parse().unwrap();
    let begun = Instant::now();
    bus.0.signal(Signal::TERM);
    let status = bus.0.child.wait().unwrap();
    // The take-up alone has 60 s.
    assert!(begun.elapsed() < Duration::from_secs(50), "{}", bus.log());
    wait_until("the next bus ends with it", || has_ended(process));
    assert!(status.success(), "it was asked to end: {status} {}", bus.log());
    assert_eq!(bus.files(), [""; 0], "no socket is left");
}

#[test]
fn a_bus_that_dies_again_and_again_is_given_up() {
    let mut bus = Kept::start(PAGES);
    // As long as the keeper is there, it starts a bus.
    let begun = Instant::now();
    while bus.0.child.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < TIMEOUT, "{}", bus.log());
        bus.0.children().into_iter().for_each(kill);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(bus.0.child.wait().unwrap().code(), Some(1));
    let log = bus.log();
    assert!(log.contains("its keeper gives up"), "{log}");
    assert_eq!(log.matches("the keeper starts it again").count(), DEATHS_MAX, "{log}");
    assert_eq!(bus.files(), [""; 0], "no socket is left");
}

#[test]
fn a_file_that_is_being_edited_when_the_bus_dies_ends_no_connection() {
    let config = format!("[bus]\nguest-memory-mib = 4096\n{PAGES}");
    let bus = Kept::start(&config);
    let driver = Worker::start(&bus);
    driver.exchanges(&bus, 1, "at first");
    let bound = || bus.0.json(&["device", "show", "values"])["memory"]["pages"]["of"].as_u64();
    let bound_before = bound().unwrap();
    assert!(bound_before <= 2 << 30, "a client may have half of it: {bound_before}");
    let file = bus.0.log.with_file_name("bus.toml");
    std::fs::write(&file, "[[device").unwrap();
    bus.kill();
    driver.exchanges(&bus, 2, "without the file");
    assert!(bus.log().contains("the bus goes on with its devices"), "{}", bus.log());
    assert_eq!(bound(), Some(bound_before));
    std::fs::write(&file, config).unwrap();
    bus.0.good(&["reload"]);
    bus.kill();
    driver.exchanges(&bus, 3, "with the file");
    driver.end();
}

/// As without memory for a process: it is tried again.
#[test]
fn a_bus_that_cannot_be_started_now_is_started_later() {
    let folder = tempfile::tempdir().unwrap();
    let [path, aside] = ["vbus", "aside"].map(|name| folder.path().join(name));
    copy_program(&path);
    let bus = Kept(Served::start_kept_by(program(&path), PAGES));
    let process = bus.process();
    std::fs::rename(&path, &aside).unwrap();
    kill(process);
    wait_until("the keeper cannot start a bus", || bus.log().contains("cannot be started now"));
    std::fs::rename(&aside, &path).unwrap();
    wait_until("the next bus takes its place", || bus.restarts() == 1);
    assert_eq!(bus.0.devices(), ["values"]);
}

/// Lets the keeper stand still until the bus has dropped it. Returns its process.
fn stop_keeper(bus: &Kept) -> Pid {
    let id = Pid::from_raw(i32::try_from(bus.0.child.id()).unwrap()).unwrap();
    kill_process(id, Signal::STOP).unwrap();
    wait_until("the bus has no keeper", || {
        // The one that the keeper does not take says so, and fails.
        let mut set = vbus();
        set.args(["state", "set", "--hex", "values", "in", "02", "--dir"]).arg(&bus.0.dir);
        set.output().unwrap();
        keeper(bus)["present"] == false
    });
    id
}

/// A keeper that stands still is dropped. When it goes on and the bus has died, it must not give a
/// client a device that does not know what the client was told meanwhile.
#[test]
fn a_keeper_that_stood_still_ends_the_clients_of_a_bus_that_went_on_without_it() {
    let bus = Kept::start(PAGES);
    let driver = Worker::start(&bus);
    driver.exchanges(&bus, 1, "at first");
    let pages = driver.end();
    let keeper_process = stop_keeper(&bus);
    // A change of its connection that nobody keeps, and then a message that changes nothing.
    bus.0.good(&["device", "reincarnate", "values"]);
    assert!(matches!(pages.function().check(), Err(vbus_driver::Error::Reincarnated)));
    let process = bus.process();
    kill(process);
    kill_process(keeper_process, Signal::CONT).unwrap();
    wait_until("the next bus takes its place", || bus.restarts() == 1);
    wait_until("the connection has ended", || {
        bus.log().contains("the state of the device was lost with its process")
    });
}

/// A line of `packaging/vbus@.service`, without its key.
fn of_unit(key: &str) -> String {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/vbus@.service");
    let unit = std::fs::read_to_string(unit).unwrap();
    let mut lines = unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    lines.next().unwrap_or_else(|| panic!("the unit has no {key}")).to_owned()
}

/// The commands of the unit for systemd, with a service manager that hears of them what systemd
/// would: the bus is up, is upgraded, is killed, and ends.
#[test]
fn the_unit_of_systemd_keeps_its_bus() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("bus.toml"), PAGES).unwrap();
    let own = vbus();
    let here = |line: String| {
        let program = own.get_program().to_str().unwrap();
        line.replace("/usr/bin/vbus", program)
            .replace("/etc/vbus/%i.toml", &at("bus.toml"))
            .replace("/run/vbus/%i", &at("bus"))
    };
    let manager = ServiceManager::bind(folder.path().join("notify"));
    let hear = |what: &str| {
        manager.hear(what, |text| {
            assert!(!text.contains("MAINPID"), "the keeper stays the main process: {text}");
        })
    };
    // The bus is not the main process, and does not start it.
    assert_eq!(of_unit("NotifyAccess"), "all");
    let (name, value) = {
        let setting = of_unit("Environment");
        let (name, value) = setting.split_once('=').unwrap();
        (name.to_owned(), value.to_owned())
    };
    let start = here(of_unit("ExecStart"));
    let mut keeper = Command::new("sh")
        .args(["-c", &format!("WATCHDOG_PID=$$ exec {start}")])
        .env(name, value)
        .env("NOTIFY_SOCKET", at("notify"))
        .env("WATCHDOG_USEC", "400000")
        .spawn()
        .unwrap();
    hear("READY=1");
    let info = || {
        let mut control = UnixStream::connect(folder.path().join("bus/control.sock")).unwrap();
        control.set_read_timeout(Some(TIMEOUT)).unwrap();
        let answer = exchange(&mut control, b"{\"op\":\"info\"}\n");
        serde_json::from_str::<serde_json::Value>(&answer).unwrap()["ok"].clone()
    };
    let process = || i32::try_from(info()["pid"].as_i64().unwrap()).unwrap();
    let first = process();
    assert_eq!(info()["keeper"]["present"], true);
    hear("WATCHDOG=1");
    let reload = here(of_unit("ExecReload"));
    let script = reload.strip_prefix("/bin/sh -c '").unwrap().strip_suffix('\'').unwrap();
    assert!(Command::new("sh").args(["-c", script]).status().unwrap().success());
    wait_until("the former bus ends", || has_ended(first));
    wait_until("the keeper has the next one", || info()["keeper"]["present"] == true);
    hear("WATCHDOG=1");
    let second = process();
    assert_ne!(second, first);
    kill(second);
    wait_until("the former bus ends", || has_ended(second));
    let socket = folder.path().join("bus/control.sock");
    wait_until("the keeper has started one", || {
        let control = UnixStream::connect(&socket);
        control.is_ok() && info()["keeper"]["restarts"] == 1
    });
    hear("WATCHDOG=1");
    let id = Pid::from_raw(i32::try_from(keeper.id()).unwrap()).unwrap();
    kill_process(id, Signal::TERM).unwrap();
    hear("STOPPING=1");
    assert!(keeper.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(folder.path().join("bus")).unwrap().count(), 0);
}

/// A keeper that stood still for so long that the bus has got another one starts no second bus.
#[test]
fn of_two_keepers_one_starts_the_next_bus() {
    let mut bus = Kept::start(PAGES);
    let driver = Worker::start(&bus);
    driver.exchanges(&bus, 1, "at first");
    let process = bus.process();
    let id = stop_keeper(&bus);
    let mut first = bus.adopt();
    kill(process);
    wait_until("the next bus takes its place", || bus.restarts() == 1);
    driver.exchanges(&bus, 3, "with another keeper");
    kill_process(id, Signal::CONT).unwrap();
    wait_until("the first keeper has noticed it", || bus.log().contains("this keeper stood still"));
    wait_until("the first keeper has ended", || first.try_wait().unwrap().is_some());
    assert_eq!(bus.restarts(), 1, "{}", bus.log());
    driver.exchanges(&bus, 4, "without the first one");
    bus.kill();
    driver.exchanges(&bus, 5, "after another kill");
    driver.end();
}

/// The keeper itself dies and is replaced, under traffic: nobody notices anything.
#[test]
fn cards_at_work_lose_nothing_while_keepers_come_and_go() {
    let mut bus = Kept::start(&[nic(1), nic(2)].concat());
    let cards = [1, 2].map(|last| Card::open(bus.0.dir.join(format!("net{last}.sock"))));
    let (stop, both) = (AtomicBool::new(false), <[Shared; 2]>::default());
    let streams = std::thread::scope(|scope| {
        let [one, two] = cards;
        let threads =
            [scope.spawn(|| run(one, 1, &stop, &both)), scope.spawn(|| run(two, 2, &stop, &both))];
        let all = || both.each_ref().map(|card| card.received.load(Ordering::Relaxed));
        let pass = |when: &str| {
            let before = all();
            wait_until(&format!("frames pass in both directions {when}"), || {
                assert!(threads.iter().all(|card| !card.is_finished()), "a card has failed");
                let now = all();
                now[0] > before[0] + 200 && now[1] > before[1] + 200
            });
        };
        for _ in 0..3 {
            pass("with a keeper");
            bus.0.child.kill().unwrap();
            bus.0.child.wait().unwrap();
            wait_until("the bus notices it", || keeper(&bus)["present"] == false);
            pass("without a keeper");
            bus.adopt().wait().unwrap();
        }
        pass("with the last keeper");
        stop.store(true, Ordering::Relaxed);
        threads.map(|card| card.join().unwrap())
    });
    for Stream { missing, again, .. } in streams {
        assert_eq!((missing, again), (0, 0), "a frame was lost or came twice");
    }
    // The last one has all that it takes.
    let before = keeper(&bus)["restarts"].as_u64().unwrap();
    let info = exchange(&mut bus.0.control(), b"{\"op\":\"info\"}\n");
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    kill(i32::try_from(info["ok"]["pid"].as_i64().unwrap()).unwrap());
    wait_until("the next bus takes its place", || bus.restarts() == 1);
    assert_eq!(keeper(&bus)["restarts"], before + 1);
    assert_eq!(bus.0.json(&["device", "show", "net1"])["counters"]["broken"], 0);
}

#[test]
fn a_bus_outlives_its_keeper_and_gets_another_one() {
    let mut bus = Kept::start(PAGES);
    let driver = Worker::start(&bus);
    driver.exchanges(&bus, 1, "at first");
    let process = bus.process();
    bus.0.child.kill().unwrap();
    bus.0.child.wait().unwrap();
    driver.exchanges(&bus, 2, "without a keeper");
    // A bus that has nothing to give does, too.
    wait_until("the bus notices it", || keeper(&bus)["present"] == false);
    bus.0.good(&["state", "set", "--hex", "values", "in", "02"]);
    bus.adopt().wait().unwrap();
    // Another one is refused.
    let output = bus.adoption().stderr(std::process::Stdio::piped()).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && text.contains("has a keeper already"), "{text}");
    kill(process);
    wait_until("the next bus takes its place", || bus.restarts() == 1);
    driver.exchanges(&bus, 3, "with another keeper");
    // The bus moves to another process, and its keeper follows it.
    let before = bus.process();
    let mut command = vbus();
    command.args(["serve", "--take-over", "--config"]).arg(bus.0.log.with_file_name("bus.toml"));
    let log = std::fs::OpenOptions::new().append(true).open(&bus.0.log).unwrap();
    let mut next = command.arg("--dir").arg(&bus.0.dir).stderr(log).spawn().unwrap();
    wait_until("another process has taken over", || has_ended(before));
    wait_until("the bus is kept again", || keeper(&bus)["present"] == true);
    driver.exchanges(&bus, 4, "after a take-over");
    next.kill().unwrap();
    next.wait().unwrap();
    wait_until("the next bus takes its place", || bus.restarts() == 2);
    driver.exchanges(&bus, 5, "after the end of the bus that took over");
    driver.end();
}
