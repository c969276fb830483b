// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A process drives the interrupt controller. Interrupts of another device come through it. None is
//! lost, also while lines are masked and moved.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and its numbers are small"
)]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vbus_core::shm::Memory;
use vbus_core::shm::abi::pic::NO_ROUTE;
use vbus_core::shm::pic::DriverEnd;
use vbus_core::{
    Bus, Connection, Device, ErrorCode, Executor, Identity, Interrupt, Open, Region, Tuning,
};
use vbus_driver::pic::{Controller, Line, Nesting, Pic, Source, Wanted};
use vbus_driver::{Error, Function, Hal};
use vbus_pci::Options;
use vbus_process::{MEMORY_BYTES, Process};
use vbus_vfio_user::DeviceServer;

const TIMEOUT: Duration = Duration::from_secs(60);
const VECTORS: u16 = 64;
const LINES: u16 = 200;

/// A device that interrupts when the test wants it.
#[derive(Default)]
struct Beeper(Arc<Mutex<Vec<Interrupt>>>);

struct Beeping(Arc<Mutex<Vec<Interrupt>>>);

impl Device for Beeper {
    fn identity(&self) -> Identity {
        Identity::user("beeper").with_regions(VECTORS.into()).with_vectors(VECTORS)
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Beeping(self.0.clone())))
    }
}

impl Connection for Beeping {
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        self.0.lock().unwrap().push(region.interrupt);
        Ok(())
    }
}

impl Drop for Beeping {
    fn drop(&mut self) {
        self.0.lock().unwrap().clear();
    }
}

/// A bus with an interrupt controller and another device, and a driver process for each.
struct Setup {
    _folder: tempfile::TempDir,
    bus: Bus,
    _servers: [DeviceServer; 2],
    pic: Pic<Process>,
    /// The interrupt controller's vectors.
    messages: Vec<OwnedFd>,
    beeper: Function<Process>,
    own: Process,
    beeps: Arc<Mutex<Vec<Interrupt>>>,
}

impl Setup {
    fn new(router: Option<&str>) -> Setup {
        let folder = tempfile::tempdir().unwrap();
        let tuning = Tuning { workers: 1, ..Tuning::default() };
        let bus = Bus::new(Executor::start(tuning).unwrap(), vbus_devices::classes());
        let controller = bus.create("pic0", "pic", &serde_json::json!({ "cpus": 4 })).unwrap();
        let device = Beeper::default();
        let beeps = device.0.clone();
        let endpoint = bus.add("beeper0", Arc::new(device)).unwrap();
        router.into_iter().for_each(|name| endpoint.set_router(name));
        let place = |name: &str| folder.path().join(name);
        let options = Options { msix: true, ..Options::default() };
        let servers = [
            DeviceServer::start(controller, &place("pic0"), options).unwrap(),
            DeviceServer::start(endpoint, &place("beeper0"), Options::default()).unwrap(),
        ];
        let process = Process::connect(place("pic0"), MEMORY_BYTES).unwrap();
        let messages = process.connect_vectors(4).unwrap();
        let pic = Pic::open(Function::probe(process).unwrap()).unwrap();
        assert_eq!(pic.cpus(), 4);
        let own = Process::connect(place("beeper0"), MEMORY_BYTES).unwrap();
        let beeper = Function::probe(own.clone()).unwrap();
        let mut setup =
            Setup { _folder: folder, bus, _servers: servers, pic, messages, beeper, own, beeps };
        setup.open();
        setup
    }

    /// Opens the beeper, with a region for each vector.
    fn open(&mut self) {
        self.beeper.open(0).unwrap();
        let memory = self.own.alloc(4096).unwrap();
        for vector in 0..VECTORS {
            self.beeper.region_add(vector.into(), vector, &memory, (0, 64), None).unwrap();
        }
    }

    fn beep(&self, vector: u16) {
        self.beeps.lock().unwrap()[usize::from(vector)].trigger();
    }

    /// A new processor without routes. (A new route may raise its line once without an interrupt.)
    fn cpu(&mut self, number: u32, nesting: Nesting) -> Controller<Process> {
        let mut cpu = self.pic.cpu(number, LINES, nesting, number as u16).unwrap();
        assert_eq!(cpu.arm(), Wanted::Waiting);
        cpu
    }
}

fn source(vector: u16) -> Source<'static> {
    Source { device: "beeper0", vector }
}

/// Takes a message. Returns whether there was one.
fn taken(fd: &OwnedFd) -> bool {
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}

fn wait(fd: &OwnedFd) {
    let bound = Timespec::try_from(TIMEOUT).unwrap();
    assert_eq!(
        poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&bound)).unwrap(),
        1,
        "no message came"
    );
    assert!(taken(fd));
}

/// Handles a message. Returns the lines that it took.
fn drain(cpu: &mut Controller<Process>) -> Vec<u16> {
    let mut lines = Vec::new();
    while let Some(line) = cpu.take() {
        lines.push(line);
        cpu.end(line);
    }
    lines
}

fn status<T>(result: Result<T, Error>) -> Option<ErrorCode> {
    match result {
        Err(Error::Refused { code, .. } | Error::Class { code, .. }) => Some(code),
        Err(error) => panic!("{error}"),
        Ok(_) => None,
    }
}

#[test]
fn another_devices_interrupts_come_as_lines() {
    let mut setup = Setup::new(Some("pic0"));
    let mut cpu = setup.cpu(2, Nesting::Flat);
    for (vector, line) in [(0, 9), (1, 40), (2, 9)] {
        setup.pic.route(source(vector), Line { cpu: 2, number: line }).unwrap();
    }
    wait(&setup.messages[2]);
    assert_eq!(drain(&mut cpu), [40, 9], "each route begins with an interrupt");
    assert!(!taken(&setup.messages[2]), "one message for all");
    for vector in [2, 0, 1] {
        setup.beep(vector);
    }
    wait(&setup.messages[2]);
    assert_eq!(drain(&mut cpu), [40, 9]);
    assert!(!setup.own.wait(Duration::ZERO), "its own interrupt is silent");
    setup.beep(3);
    assert!(setup.own.wait(TIMEOUT), "a vector that is not routed");
    let shown = setup.bus.get("pic0").unwrap().inspect();
    assert_eq!(shown["device"]["pages"][0]["raised"], 6);
    assert_eq!(shown["device"]["pages"][0]["messages"], 2);
    assert_eq!(
        shown["device"]["routes"][1],
        serde_json::json!({ "device": "beeper0", "vector": 1, "line": 40, "cpu": 2 })
    );
}

#[test]
fn a_line_that_moves_while_it_is_pending_is_not_lost() {
    let mut setup = Setup::new(Some("pic0"));
    let mut cpus = [setup.cpu(0, Nesting::Flat), setup.cpu(1, Nesting::Flat)];
    let to = |cpu, number| Line { cpu, number };
    setup.pic.route(source(0), to(0, 5)).unwrap();
    wait(&setup.messages[0]);
    assert!(setup.pic.relocate(source(0), to(1, 6)).unwrap(), "pending since the route began");
    wait(&setup.messages[1]);
    assert_eq!((drain(&mut cpus[0]), drain(&mut cpus[1])), (vec![], vec![6]));
    assert!(!setup.pic.relocate(source(0), to(0, 7)).unwrap());
    setup.beep(0);
    wait(&setup.messages[0]);
    assert_eq!((drain(&mut cpus[0]), drain(&mut cpus[1])), (vec![7], vec![]));
    // Two routes share a line. If it is pending, nobody knows which of them raised it.
    setup.pic.route(source(1), to(0, 7)).unwrap();
    assert!(setup.pic.relocate(source(0), to(1, 7)).unwrap());
    assert_eq!((drain(&mut cpus[0]), drain(&mut cpus[1])), (vec![7], vec![7]));
    // Dropping a page ends its routes.
    while setup.own.wait(Duration::ZERO) {}
    let [zero, _one] = cpus;
    setup.pic.remove(zero).unwrap();
    assert!(setup.own.wait(TIMEOUT), "in case that it was pending");
    setup.beep(1);
    assert!(setup.own.wait(TIMEOUT));
    assert_eq!(status(setup.pic.relocate(source(1), to(1, 7))), Some(ErrorCode(NO_ROUTE)));
}

#[test]
fn a_route_ends_with_either_connection() {
    let mut setup = Setup::new(Some("pic0"));
    let mut cpu = setup.cpu(0, Nesting::Nested);
    let to = Line { cpu: 0, number: 1 };
    setup.pic.route(source(0), to).unwrap();
    setup.pic.unroute(source(0)).unwrap();
    assert!(setup.own.wait(TIMEOUT), "once for what may have been under way");
    assert!(drain(&mut cpu).is_empty(), "which is not pending any more");
    assert_eq!(status(setup.pic.unroute(source(0))), Some(ErrorCode(NO_ROUTE)));

    setup.pic.route(source(0), to).unwrap();
    setup.beeper.close();
    assert_eq!(status(setup.pic.route(source(0), to)), Some(ErrorCode::NOT_OPEN));
    setup.open();
    setup.beep(0);
    assert!(setup.own.wait(TIMEOUT), "a new connection, not routed");
    assert_eq!(status(setup.pic.relocate(source(0), to)), Some(ErrorCode(NO_ROUTE)));
    setup.pic.route(source(0), to).unwrap();

    // A device that has lost its connection raises the line, because its driver may wait only for
    // it.
    drain(&mut cpu);
    while taken(&setup.messages[0]) {}
    setup.bus.get("beeper0").unwrap().reincarnate();
    wait(&setup.messages[0]);
    assert_eq!(drain(&mut cpu), [1]);
    assert!(setup.beeper.events().unwrap().reincarnated());
    assert_eq!(setup.beeper.check(), Err(Error::Reincarnated));
    setup.open();
    setup.pic.route(source(0), to).unwrap();

    // A broken connection raises the line, so that its driver reads the connection's state.
    drain(&mut cpu);
    while taken(&setup.messages[0]) {}
    setup.bus.remove("beeper0").unwrap();
    wait(&setup.messages[0]);
    assert_eq!(drain(&mut cpu), [1]);
    assert!(setup.beeper.events().unwrap().removed(), "the event is pending by then");
    assert!(setup.beeper.check().is_err());
    assert_eq!(status(setup.pic.route(source(0), to)), Some(ErrorCode::DENIED), "no such device");

    let mut setup = Setup::new(Some("pic0"));
    let _cpu = setup.cpu(0, Nesting::Nested);
    setup.pic.route(source(0), to).unwrap();
    setup.pic.close();
    assert!(setup.own.wait(TIMEOUT), "the controller has gone");
    setup.beep(0);
    assert!(setup.own.wait(TIMEOUT));
}

#[test]
fn a_driver_gets_what_the_configuration_allows() {
    for router in [None, Some("pic1"), Some("beeper0")] {
        let mut setup = Setup::new(router);
        let _cpu = setup.cpu(0, Nesting::Flat);
        assert_eq!(
            status(setup.pic.route(source(0), Line { cpu: 0, number: 0 })),
            Some(ErrorCode::DENIED),
            "{router:?}"
        );
    }
    let mut setup = Setup::new(Some("pic0"));
    let mut route = |device, vector, cpu, number| {
        status(setup.pic.route(Source { device, vector }, Line { cpu, number }))
    };
    assert_eq!(route("beeper0", 0, 0, 0), Some(ErrorCode::NO_REGION), "no page yet");
    let _cpu = setup.cpu(0, Nesting::Flat);
    let mut route = |device, vector, cpu, number| {
        status(setup.pic.route(Source { device, vector }, Line { cpu, number }))
    };
    assert_eq!(route("beeper0", 0, 0, LINES), Some(ErrorCode::BAD_ARGUMENT), "no such line");
    assert_eq!(route("beeper0", VECTORS, 0, 0), Some(ErrorCode::BAD_VECTOR));
    assert_eq!(route("pic0", 0, 0, 0), Some(ErrorCode::DENIED), "itself");
    assert_eq!(
        route("a name that is longer than any name can be", 0, 0, 0),
        Some(ErrorCode::DENIED)
    );
    assert_eq!(
        (route("beeper0", 0, 0, 3), route("beeper0", 0, 0, 4)),
        (None, Some(ErrorCode::EXISTS))
    );
    assert_eq!(status(setup.pic.cpu(0, 8, Nesting::Flat, 0)), Some(ErrorCode::EXISTS));
    assert_eq!(status(setup.pic.cpu(4, 8, Nesting::Flat, 0)), Some(ErrorCode::BAD_ARGUMENT));
    assert_eq!(status(setup.pic.cpu(1, 8, Nesting::Flat, 4)), Some(ErrorCode::BAD_VECTOR));
}

#[test]
fn a_driver_that_writes_anything_anywhere_harms_itself_at_most() {
    let mut setup = Setup::new(Some("pic0"));
    setup.pic.close();
    let process = setup.pic.function().hal().clone();
    let mut function = Function::probe(process.clone()).unwrap();
    function.open(0).unwrap();
    let memory = process.alloc(4096).unwrap();
    for cpu in 0..3 {
        let page = memory.words()[cpu * 32..].as_ref();
        DriverEnd::create(page, 256, Nesting::Nested).unwrap();
        function.region_add(cpu as u32, cpu as u16, &memory, (cpu * 256, 256), None).unwrap();
    }
    let mut dice = Dice(7);
    let (mut raised, mut sent) = (0_u64, 0);
    for _ in 0..20_000 {
        match dice.roll(16) {
            0 => {
                let mut buffer = [0; 40];
                buffer.iter_mut().for_each(|byte| *byte = dice.roll(256) as u8);
                if dice.roll(8) > 0 {
                    buffer[..8].copy_from_slice(&[
                        dice.roll(65) as u8,
                        0,
                        dice.roll(256) as u8,
                        0,
                        dice.roll(5) as u8,
                        0,
                        0,
                        0,
                    ]);
                    buffer[8..].fill(0);
                    buffer[8..15].copy_from_slice(b"beeper0");
                }
                let function_number = dice.roll(5) as u32;
                raised += 2;
                let _ = function.call(
                    function_number,
                    0,
                    &mut buffer[..if dice.roll(9) == 0 { 39 } else { 40 }],
                );
            }
            1..6 => {
                raised += 1;
                setup.beep(dice.roll(VECTORS.into()) as u16);
            }
            6..8 => sent += u64::from(setup.messages.iter().any(taken)),
            _ => {
                let value = dice.roll(u64::MAX) << dice.roll(64);
                memory.words()[dice.roll(96) as usize].store(value, Ordering::Relaxed);
            }
        }
    }
    assert!(sent <= raised, "{sent} messages for {raised} raises");
    function.check().unwrap();
    assert!(setup.beeper.check().is_ok(), "the other device is not concerned");
    drop(function);
    while setup.own.wait(Duration::ZERO) {}
    setup.beep(1);
    assert!(setup.own.wait(TIMEOUT));
}

#[test]
fn what_is_routed_itself_routes_nothing() {
    let mut setup = Setup::new(Some("pic0"));
    setup.pic.close();
    setup.bus.get("pic0").unwrap().set_router("pic1");
    setup.pic = Pic::open(Function::probe(setup.pic.function().hal().clone()).unwrap()).unwrap();
    let _cpu = setup.cpu(0, Nesting::Flat);
    assert_eq!(
        status(setup.pic.route(source(0), Line { cpu: 0, number: 0 })),
        Some(ErrorCode::DENIED)
    );
}

/// The counts that devices have posted and processors have seen, by vector.
struct Books {
    posted: Vec<AtomicU64>,
    seen: Vec<AtomicU64>,
    /// Handlers that found nothing new.
    spurious: AtomicU64,
    messages: AtomicU64,
    stop: AtomicBool,
}

/// A simple generator of pseudo-random numbers.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
}

/// A processor. It runs until it has to stop, and sleeps until a message comes.
struct Processor<'a> {
    cpu: Controller<Process>,
    message: &'a OwnedFd,
    books: &'a Books,
    dice: Dice,
    in_service: Vec<u16>,
    nesting: Nesting,
}

/// Vector n raises line 2n + 1.
fn line(vector: u64) -> u16 {
    vector as u16 * 2 + 1
}

impl Processor<'_> {
    fn interrupt(&mut self) {
        while let Some(line) = self.cpu.take() {
            assert!(
                self.in_service.last().is_none_or(|other| *other < line),
                "{line} in {:?}",
                self.in_service
            );
            self.in_service.push(line);
            let vector = usize::from(line / 2);
            let posted = self.books.posted[vector].load(Ordering::Relaxed);
            if self.books.seen[vector].fetch_max(posted, Ordering::Release) >= posted {
                self.books.spurious.fetch_add(1, Ordering::Relaxed);
            }
            // With interrupts enabled, another message may come here.
            if self.nesting == Nesting::Nested && self.dice.roll(4) == 0 {
                self.message();
            }
            self.in_service.pop();
            self.cpu.end(line);
        }
    }

    fn message(&mut self) {
        if taken(self.message) {
            self.books.messages.fetch_add(1, Ordering::Relaxed);
            self.interrupt();
        }
    }

    fn run(&mut self) {
        let mut masked = None;
        while !self.books.stop.load(Ordering::Relaxed) {
            self.message();
            match masked {
                None if self.dice.roll(16) == 0 => {
                    let line = line(self.dice.roll(VECTORS.into()));
                    self.cpu.mask(line);
                    masked = Some(line);
                }
                Some(line) if self.dice.roll(4) == 0 => {
                    if self.cpu.unmask(line) == Wanted::Pending {
                        self.interrupt();
                    }
                    masked = None;
                }
                _ => std::thread::yield_now(),
            }
        }
    }
}

/// Devices raise `total` interrupts, a few at a time. They go on when processors have seen all of
/// them, so that no lost interrupt can hide behind the next one.
fn exchange(total: u64, nesting: Nesting) {
    let mut setup = Setup::new(Some("pic0"));
    let cpus = [setup.cpu(0, nesting), setup.cpu(1, nesting)];
    for vector in 0..VECTORS {
        setup
            .pic
            .route(source(vector), Line { cpu: u32::from(vector % 2), number: line(vector.into()) })
            .unwrap();
    }
    let counters = || (0..VECTORS).map(|_| AtomicU64::new(0)).collect();
    let books = Books {
        posted: counters(),
        seen: counters(),
        spurious: AtomicU64::new(0),
        messages: AtomicU64::new(0),
        stop: AtomicBool::new(false),
    };
    let beeps = setup.beeps.lock().unwrap().clone();
    let mut moves = 0;
    let (ask, asked) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let (books, beeps) = (&books, &beeps);
        for (number, cpu) in cpus.into_iter().enumerate() {
            let message = &setup.messages[number];
            let dice = Dice(0x1234_5678 + number as u64);
            let mut processor =
                Processor { cpu, message, books, dice, in_service: Vec::new(), nesting };
            scope.spawn(move || {
                processor.run();
                // The page must live as long as the connection.
                std::mem::forget(processor);
            });
        }
        // Two devices. One has the even vectors.
        let devices: Vec<_> = [0_u64, 1]
            .map(|half| {
                let ask = ask.clone();
                scope.spawn(move || {
                    let mut dice = Dice(0x9e37_79b9 + half);
                    let mut left = total / 2;
                    while left > 0 {
                        // Sometimes one interrupt comes alone, so that no other one wakes the
                        // processor.
                        let most = if dice.roll(3) == 0 { 1 } else { u64::from(VECTORS) / 2 };
                        let burst = (1 + dice.roll(most)).min(left);
                        left -= burst;
                        // A line moves in the middle of a burst.
                        if dice.roll(4) == 0 {
                            ask.send(()).unwrap();
                        }
                        let first = dice.roll(u64::from(VECTORS) / 2);
                        let vectors = (first..first + burst)
                            .map(|n| n as usize * 2 % usize::from(VECTORS) + half as usize);
                        for vector in vectors.clone() {
                            books.posted[vector].fetch_add(1, Ordering::Relaxed);
                            beeps[vector].trigger();
                        }
                        let end = Instant::now() + TIMEOUT;
                        for vector in vectors {
                            let posted = books.posted[vector].load(Ordering::Relaxed);
                            while books.seen[vector].load(Ordering::Acquire) != posted {
                                assert!(
                                    Instant::now() < end,
                                    "an interrupt of vector {vector} is lost, with {left} to go"
                                );
                                std::thread::yield_now();
                            }
                        }
                    }
                })
            })
            .into();
        drop(ask);
        let mut dice = Dice(42);
        // Serve requests until both devices have finished.
        for () in asked {
            let (vector, cpu) = (dice.roll(VECTORS.into()), dice.roll(2));
            let _ = setup
                .pic
                .relocate(source(vector as u16), Line { cpu: cpu as u32, number: line(vector) })
                .unwrap();
            moves += 1;
        }
        books.stop.store(true, Ordering::Relaxed);
        devices.into_iter().for_each(|device| device.join().unwrap());
    });
    let seen: u64 = books.seen.iter().map(|seen| seen.load(Ordering::Relaxed)).sum();
    let (spurious, messages) = (books.spurious.into_inner(), books.messages.into_inner());
    println!("{total} interrupts, {messages} messages, {moves} moves, {spurious} for nothing");
    assert_eq!(seen, total);
    assert!(messages <= total + moves + u64::from(VECTORS) + spurious);
    // A new route raises its line once, and a line may move while a processor takes it.
    assert!(spurious <= u64::from(VECTORS) + moves, "{spurious}");
}

#[test]
fn no_interrupt_is_lost_flat() {
    exchange(20_000, Nesting::Flat);
}

#[test]
fn no_interrupt_is_lost_nested() {
    exchange(20_000, Nesting::Nested);
}

/// It exists only in a release build, where it takes a minute. `cargo xtask test lost_interrupts`
/// runs it.
#[cfg(not(debug_assertions))]
#[test]
fn no_interrupt_of_ten_million_is_lost() {
    exchange(5_000_000, Nesting::Flat);
    exchange(5_000_000, Nesting::Nested);
}
