// SPDX-License-Identifier: Apache-2.0 OR MIT
//! After any step of their drivers, devices are saved through their sockets and go on in a process
//! that was started for it. The former one is killed. The drivers see what they see without that.
#![allow(clippy::cast_possible_truncation)] // The numbers are small.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use serde_json::{Value, json};
use tempfile::TempDir;
use vbus_core::shm::signal::Armed;
use vbus_core::{Bus, Executor, Tuning};
use vbus_driver::pic::{Controller, Line, Nesting, Pic, Source};
use vbus_driver::sched::{Class, Cpu, Cpus};
use vbus_driver::state::{Pages, Reader, Writer};
use vbus_driver::{Error, Function};
use vbus_net::{Direct, Switches};
use vbus_sched::interview::Language;
use vbus_sched::{Held, Limits, SchedClass, Setting, TakeError, Threads};
use vbus_test_driver::saved::{World, same_when_saved};
use vbus_test_driver::{FreshProcess, Random};
use vbus_vfio_user::DeviceServer;
use vbus_virtio::net::VirtioNetClass;
use vfio_user_protocol::message::MigrationState;

use crate::migration::read_all;
use crate::migration_all::lines;
use crate::migration_net::{Card, Frames, Guest, Machine, Station, frame, until};

/// Threads that nobody has: each takes any class.
struct Nobodys;

impl Threads for Nobodys {
    fn check(&self, _: &Limits) -> Result<(), String> {
        Ok(())
    }

    fn ask_vmm(&self, _: &Path, _: Language) -> std::io::Result<(OwnedFd, i32)> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn take(&self, _: Option<i32>, _: i32) -> Result<Box<dyn Held>, TakeError> {
        Ok(Box::new(Nobodys))
    }

    fn is_privileged(&self) -> bool {
        true
    }

    fn tells_time(&self) -> bool {
        true
    }
}

impl Held for Nobodys {
    fn time(&self) -> Duration {
        Duration::ZERO
    }

    fn own_nice(&mut self) -> Result<i32, Errno> {
        Ok(0)
    }

    fn apply(&mut self, _: Setting) -> Result<(), Errno> {
        Ok(())
    }

    fn restore(&mut self) -> Result<bool, Errno> {
        Ok(true)
    }
}

/// What a process serves.
struct Served {
    bus: Bus,
    _servers: Vec<DeviceServer>,
}

/// Makes the devices `[name, class, settings, path of the socket]` of the first request.
fn make(first: Value) -> (Served, Value) {
    let (switches, opener) = (Switches::default(), Arc::new(Direct));
    let mut classes = vbus_devices::classes_on(switches.clone(), opener.clone());
    classes.push(Box::new(VirtioNetClass::on(switches, opener)));
    classes.push(Box::new(SchedClass::through(Arc::new(Nobodys))));
    let bus =
        Bus::new(Executor::start(Tuning { workers: 2, ..Tuning::default() }).unwrap(), classes);
    let serve = |device: &Value| {
        let [name, class, path] = [0, 1, 3].map(|at| device[at].as_str().unwrap());
        let endpoint = bus.create(name, class, &device[2]).unwrap();
        if class == "state" {
            endpoint.set_router("pic");
        }
        DeviceServer::start(endpoint, Path::new(path), Default::default()).unwrap()
    };
    let _servers = first.as_array().unwrap().iter().map(serve).collect();
    (Served { bus, _servers }, Value::Null)
}

/// Asks a device as a control client does; or, without `request`, for what it shows.
fn answer(served: &mut Served, question: Value) -> Value {
    let endpoint = served.bus.get(question["device"].as_str().unwrap()).unwrap();
    let Some(request) = question.get("request") else { return endpoint.inspect() };
    let mut answer = Value::Null;
    let mut reply = |value| {
        answer = value;
        true
    };
    match endpoint.device().control(request, &mut reply) {
        Ok(()) => answer,
        Err(error) => json!({ "error": error }),
    }
}

#[test]
#[ignore = "a process of the other tests here"]
fn serves_devices() {
    vbus_test_driver::serve(make, answer);
}

/// Devices in a process of their own, and the machines whose drivers use them: one for each.
struct Apart {
    devices: Vec<(&'static str, &'static str, Value)>,
    folder: TempDir,
    process: FreshProcess,
    guests: Vec<Guest>,
    /// How many processes there were.
    number: usize,
}

impl Apart {
    fn new(devices: Vec<(&'static str, &'static str, Value)>) -> Apart {
        let folder = tempfile::tempdir().unwrap();
        let (process, paths) = Self::start(&devices, folder.path(), 0);
        let guest = |path: &PathBuf| {
            let guest = Guest(Arc::default());
            guest.moves_to(0, Machine::new(path));
            guest.set_bus_master();
            guest
        };
        let guests = paths.iter().map(guest).collect();
        Apart { devices, folder, process, guests, number: 1 }
    }

    fn start(
        devices: &[(&str, &str, Value)],
        folder: &Path,
        number: usize,
    ) -> (FreshProcess, Vec<PathBuf>) {
        let path = |name: &str| folder.join(format!("{name}.{number}"));
        let all = devices
            .iter()
            .map(|(name, class, settings)| json!([name, class, settings, path(name)]));
        let first = all.collect::<Vec<_>>().into();
        let (process, _) = FreshProcess::start("fresh::serves_devices", &first);
        (process, devices.iter().map(|(name, ..)| path(name)).collect())
    }

    fn ask(&mut self, device: &str, request: Value) -> Value {
        self.process.ask(&json!({ "device": device, "request": request }))
    }

    fn show(&mut self, device: &str) -> Value {
        self.process.ask(&json!({ "device": device }))
    }

    fn set(guest: &Guest, state: MigrationState) {
        guest.machine().ask(|client| client.set_migration_state(state));
    }

    fn stop(guest: &Guest) -> Vec<u8> {
        Self::set(guest, MigrationState::StopCopy);
        guest.machine().ask(|client| Ok(read_all(client)))
    }

    /// All devices are saved, and go on in a fresh process. The drivers' memory is the same.
    fn renew(&mut self) {
        let streams: Vec<_> = self.guests.iter().map(Self::stop).collect();
        let (next, paths) = Self::start(&self.devices, self.folder.path(), self.number);
        drop(std::mem::replace(&mut self.process, next));
        let mut moving: Vec<_> = self.guests.iter().zip(paths).zip(streams).collect();
        // Each of them is the first one at times.
        let count = moving.len();
        moving.rotate_left(self.number % count);
        for ((guest, path), stream) in &moving {
            drop(guest.machine().connect(path));
            Self::set(guest, MigrationState::Resuming);
            guest.machine().ask(|client| client.migration_write(stream));
            Self::set(guest, MigrationState::Stop);
        }
        self.guests.iter().for_each(|guest| Self::set(guest, MigrationState::Running));
        self.number += 1;
    }

    fn save_in_vain(&mut self, n: u64) {
        let guest = &self.guests[n as usize % self.guests.len()];
        Self::stop(guest);
        Self::set(guest, MigrationState::Running);
    }
}

/// Frames that may wait for the second driver: its buffers are full then, and so is the first one's
/// ring, but not quite.
const MOST: u64 = 100;

/// Two NICs on a switch. The first driver sends to the second one, and sometimes back.
struct Nics {
    stations: [Box<dyn Frames>; 2],
    /// Frames that the second driver will get, and that it has not taken.
    coming: u64,
    sent: u64,
    /// Frames that each driver sent before the other one's queues were set up.
    wasted: [u64; 2],
    random: Random,
    seen: Vec<Vec<u8>>,
    /// The last field: the drivers close their devices first.
    apart: Apart,
}

impl Nics {
    fn new(seed: u64, class: &'static str, open: impl Fn(Guest) -> Box<dyn Frames>) -> Nics {
        let device = |(name, last)| {
            let mac = format!("02:00:00:00:00:0{last}");
            let mut settings = json!({
                "mac": mac, "backend": "switch", "backpressure-ms": 3_600_000,
            });
            if class == "virtio-net" {
                settings["packed"] = json!(true);
            }
            (name, class, settings)
        };
        let apart = Apart::new([("n1", 1), ("n2", 2)].map(device).into());
        let stations = [0, 1].map(|at| open(apart.guests[at].clone()));
        let (random, seen) = (Random(seed), Vec::new());
        let mut nics = Nics { apart, stations, coming: 0, sent: 0, wasted: [0; 2], random, seen };
        nics.meet();
        nics
    }

    /// Lets a frame pass each way. A worker sets the queues of a NIC up some time after its driver
    /// has started, and nobody wants the frames that come before.
    fn meet(&mut self) {
        for (from, to) in [(0, 1), (1, 0)] {
            let frame = frame(to as u8 + 1, from as u8 + 1, 0, 0);
            let mut came = false;
            while !came {
                let before = self.unwanted();
                until("a frame is sent", || self.stations[from].send(&frame));
                until("a frame comes, or nobody wants it", || {
                    came = self.stations[to].receive().is_some();
                    came || self.unwanted() > before
                });
                self.wasted[from] += u64::from(!came);
            }
        }
    }

    /// How many frames had nobody on the switch who wanted them.
    fn unwanted(&mut self) -> u64 {
        self.apart.show("n1")["device"]["backend"]["unwanted"].as_u64().unwrap()
    }

    fn send(&mut self, from: usize, to: u8) {
        let frame = frame(to, 1 + from as u8, self.sent, self.random.next());
        self.sent += 1;
        until("a frame is sent", || self.stations[from].send(&frame));
    }

    fn take(&mut self, at: usize) {
        let mut taken = None;
        until("a frame comes", || {
            taken = self.stations[at].receive();
            taken.is_some()
        });
        self.seen.extend(taken);
    }

    fn take_up_to(&mut self, frames: u64) {
        for _ in 0..frames.min(self.coming) {
            self.take(1);
            self.coming -= 1;
        }
    }
}

impl World for Nics {
    fn step(&mut self) {
        let n = self.random.next();
        match self.random.below(10) {
            0..=4 => {
                for _ in 0..(1 + n % 24).min(MOST - self.coming) {
                    self.send(0, 2);
                    self.coming += 1;
                }
            }
            5..=6 => self.take_up_to(1 + n % 24),
            7 => {
                self.send(1, 1);
                self.take(0);
            }
            _ => {
                // What changes the way of a frame comes when no frame is on its way.
                self.take_up_to(u64::MAX);
                let said = self.stations[1].choose(n);
                let link = self.apart.ask("n2", json!({ "op": "link", "up": n % 2 == 0 }));
                self.seen.push(format!("{said} {link}").into_bytes());
            }
        }
    }

    fn renew(&mut self) {
        self.apart.renew();
    }

    fn save_in_vain(&mut self, n: u64) {
        self.apart.save_in_vain(n);
    }

    fn end(mut self) -> Vec<Vec<u8>> {
        self.take_up_to(u64::MAX);
        assert_eq!(self.stations.each_mut().map(|station| station.receive()), [None, None]);
        for (name, wasted) in ["n1", "n2"].into_iter().zip(self.wasted) {
            let shown = self.apart.show(name);
            let pair = &shown["device"]["pairs"][0];
            let counts = [&pair["tx"]["frames"], &pair["rx"]["frames"]];
            let [sent, received] = counts.map(|count| count.as_u64().unwrap());
            let counts = [sent - wasted, received];
            self.seen.push(format!("{name} {counts:?}").into_bytes());
        }
        self.seen
    }
}

#[test]
fn another_process_goes_on_with_venet_devices() {
    same_when_saved(0..2, 40, |seed| {
        Nics::new(seed, "venet", |guest| Box::new(Station::new(guest)))
    });
}

#[test]
fn another_process_goes_on_with_cards_with_split_queues() {
    same_when_saved(0..2, 40, |seed| {
        Nics::new(seed, "virtio-net", |guest| Box::new(Card::new(guest, false)))
    });
}

#[test]
fn another_process_goes_on_with_cards_with_packed_queues() {
    same_when_saved(0..2, 40, |seed| {
        Nics::new(seed, "virtio-net", |guest| Box::new(Card::new(guest, true)))
    });
}

/// The value of a page that a driver reads when an interrupt comes, and not otherwise.
struct Watched {
    reader: Reader<Guest>,
    version: u64,
    _pages: Pages<Guest>,
}

/// State pages, the interrupt controller that carries their interrupt, and virtual CPUs.
struct Board {
    watched: Watched,
    writer: Writer<Guest>,
    pic: Pic<Guest>,
    cpus: [Controller<Guest>; 2],
    /// Processor and line of the page's route.
    route: Option<(u32, u16)>,
    virtual_cpus: Vec<Cpu<Guest>>,
    _sched: Cpus<Guest>,
    random: Random,
    seen: Vec<String>,
    /// The last field: the drivers close their devices first.
    apart: Apart,
}

/// Lines of each processor.
const LINES: u16 = 8;
const SOURCE: Source<'_> = Source { device: "page", vector: 0 };

impl Board {
    fn new(seed: u64) -> Board {
        let pages = json!([
            { "name": "a", "bytes": 8, "owner": "device" },
            { "name": "b", "bytes": 16, "owner": "driver" },
        ]);
        let sched = json!({
            "threads": [1, 2], "boost-ms": 60_000, "changes": 100_000, "boost-share": 100,
            "allow": ["normal", "fifo", "rr"], "priority-max": 30, "nice-min": -5,
        });
        let apart = Apart::new(vec![
            ("page", "state", json!({ "pages": pages })),
            ("pic", "pic", json!({ "cpus": 2 })),
            ("cpus", "sched", sched),
        ]);
        let function = |at: usize| Function::probe(apart.guests[at].clone()).unwrap();
        let mut pages = Pages::open(function(0)).unwrap();
        let [a, b] = ["a", "b"].map(|name| pages.find(name).unwrap().unwrap());
        let reader = pages.reader(&a, 0).unwrap();
        let writer = pages.writer(&b, 0).unwrap();
        let mut pic = Pic::open(function(1)).unwrap();
        let cpus = [0, 1].map(|cpu| pic.cpu(cpu, LINES, Nesting::Flat, 1).unwrap());
        let mut sched = Cpus::open(function(2)).unwrap();
        let virtual_cpus = [0, 1].map(|cpu| sched.cpu(cpu).unwrap()).into();
        let watched = Watched { reader, version: 0, _pages: pages };
        let (random, seen) = (Random(seed), Vec::new());
        let route = None;
        let mut board = Board {
            apart,
            watched,
            writer,
            pic,
            cpus,
            route,
            virtual_cpus,
            _sched: sched,
            random,
            seen,
        };
        board.call(|pic, to| pic.route(SOURCE, to), (1, 3));
        board
    }

    /// Takes all interrupts that have come, and looks at the page if its line is among them.
    fn take_all(&mut self) {
        let mut came = Vec::new();
        for (number, cpu) in (0..).zip(&mut self.cpus) {
            came.extend(lines(cpu).into_iter().map(|line| (number, line)));
        }
        if self.route.is_some_and(|route| came.contains(&route)) {
            self.look();
        }
    }

    fn look(&mut self) {
        let Watched { reader, version, .. } = &mut self.watched;
        loop {
            let mut value = [0; 8];
            let newest = reader.read(&mut value).unwrap();
            if newest != *version {
                *version = newest;
                self.seen.push(format!("page: {newest} {value:?}"));
            }
            if reader.arm_newer(newest) == Armed::Waiting {
                return;
            }
        }
    }

    fn call(
        &mut self,
        call: impl FnOnce(&mut Pic<Guest>, Line) -> Result<(), Error>,
        (cpu, number): (u32, u16),
    ) {
        // What is pending may be pending because the controller has begun anew.
        self.take_all();
        let result = call(&mut self.pic, Line { cpu, number });
        self.seen.push(format!("{cpu} {number}: {result:?}"));
        if result.is_ok() {
            self.route = Some((cpu, number));
        }
        self.take_all();
        // No interrupt led here before there was a route.
        self.look();
    }

    /// Asks for a class, and notes the report. The count of changes depends on whether the device
    /// was saved: the thread had its own class meanwhile.
    fn request(&mut self, n: u64) {
        let priority = self.random.below(40) as i32;
        let class = match self.random.below(5) {
            0 => Class::Own,
            1 => Class::Normal(priority - 20),
            2 => Class::Fifo(priority),
            3 => Class::RoundRobin(priority),
            _ => Class::Idle,
        };
        let cpu = &mut self.virtual_cpus[n as usize % 2];
        cpu.post(class);
        until("the report", || cpu.report().unwrap().0.version == cpu.version());
        let mut report = cpu.report().unwrap().0;
        report.changes = 0;
        self.seen.push(format!("{class:?}: {report:?}"));
    }
}

impl World for Board {
    fn step(&mut self) {
        let n = self.random.next();
        // There is a third processor, and a line too many.
        let to = (self.random.index(5) as u32 / 2, self.random.below(u64::from(LINES) + 1) as u16);
        match self.random.below(12) {
            0..=2 => {
                let request =
                    json!({ "op": "set", "page": "a", "text": format!("{:x}", n % 0xffff) });
                let said = self.apart.ask("page", request);
                self.seen.push(said.to_string());
            }
            3..=4 => self.take_all(),
            5 => self.writer.write(&[n.to_le_bytes(), (!n).to_le_bytes()].concat()),
            6 => {
                let said = self.apart.ask("page", json!({ "op": "get", "page": "b" }));
                self.seen.push(said.to_string());
            }
            7 => self.call(|pic, to| pic.route(SOURCE, to), to),
            8 => self.call(|pic, to| pic.relocate(SOURCE, to).map(drop), to),
            9 if n % 4 == 0 => {
                self.take_all();
                let result = self.pic.unroute(SOURCE);
                self.route = self.route.filter(|_| result.is_err());
                self.seen.push(format!("unroute: {result:?}"));
            }
            _ => self.request(n),
        }
    }

    fn renew(&mut self) {
        self.apart.renew();
    }

    fn save_in_vain(&mut self, n: u64) {
        self.apart.save_in_vain(n);
    }

    fn end(mut self) -> Vec<Vec<u8>> {
        self.take_all();
        if self.route.is_some() {
            let newest = self.watched.reader.version();
            assert_eq!(self.watched.version, newest, "an interrupt was lost");
        }
        let shown = self.apart.show("pic")["device"]["routes"].to_string();
        self.seen.push(shown);
        let said = self.apart.ask("page", json!({ "op": "get", "page": "b" }));
        self.seen.push(said.to_string());
        self.seen.into_iter().map(String::into_bytes).collect()
    }
}

#[test]
fn another_process_goes_on_with_pages_an_interrupt_controller_and_virtual_cpus() {
    same_when_saved(0..2, 60, Board::new);
}
