// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Another bus goes on with a device, its server and its client. The driver notices nothing.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::{Shutdown, shutdown};
use serde_json::{Value, json};
use vbus_core::shm::signal::Armed;
use vbus_core::{
    Bus, Connection, Device, Endpoint, ErrorCode, Executor, Identity, Open, Progress, Region,
    Tuning,
};
use vbus_driver::{Function, Hal, Memory};
use vbus_process::{MEMORY_BYTES, Process};
use vbus_test_driver::Random;
use vbus_test_driver::saved::{Verdict, forge, try_out};
use vbus_vfio_user::{DeviceServer, Held, Keep, SavedData, SavedServer};

/// How long a test waits for what must happen.
const BOUND: Duration = Duration::from_secs(60);

/// A call adds to a sum and returns it. A doorbell copies the first word of the region to the
/// second, and interrupts the driver.
struct Summer;

struct Summing {
    sum: u64,
    region: Option<Region>,
}

impl Device for Summer {
    fn identity(&self) -> Identity {
        Identity::user("summer")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Summing { sum: 0, region: None }))
    }

    fn save(&self) -> Result<Value, String> {
        Ok(json!({}))
    }

    fn restore(&self, _: &Value) -> Result<(), String> {
        Ok(())
    }

    /// The word that a doorbell copies is in memory.
    fn outlast(&self, _: &mut Value, _: Option<&mut Value>) -> Result<(), String> {
        Ok(())
    }

    fn reopen(
        &self,
        _: Open,
        mut regions: Vec<Region>,
        state: &Value,
    ) -> Result<Box<dyn Connection>, String> {
        let sum = state["sum"].as_u64().ok_or("no sum")?;
        Ok(Box::new(Summing { sum, region: regions.pop() }))
    }
}

impl Connection for Summing {
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        self.region = Some(region);
        Ok(())
    }

    fn call(&mut self, _: u32, _: u32, buffer: &mut [u8]) -> Result<u64, ErrorCode> {
        self.sum += buffer.iter().map(|&byte| u64::from(byte)).sum::<u64>();
        Ok(self.sum)
    }

    fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
        let Some(region) = &self.region else { return Ok(Progress::Idle) };
        let words = region.window.words();
        let asked = words[0].load(Ordering::Acquire);
        if words[1].load(Ordering::Relaxed) == asked {
            return Ok(Progress::Idle);
        }
        words[1].store(asked, Ordering::Release);
        region.interrupt.trigger();
        Ok(Progress::Busy)
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        Ok(Armed::Waiting)
    }

    fn save(&mut self) -> Result<Value, String> {
        Ok(json!({ "sum": self.sum }))
    }
}

/// A bus of one device.
struct One {
    bus: Bus,
    server: DeviceServer,
}

fn fresh() -> (Bus, Arc<Endpoint>) {
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let endpoint = bus.add("summer0", Arc::new(Summer)).unwrap();
    (bus, endpoint)
}

impl One {
    fn start(path: &Path) -> One {
        let (bus, endpoint) = fresh();
        let server = DeviceServer::start(endpoint, path, Default::default()).unwrap();
        One { bus, server }
    }

    fn endpoint(&self) -> Arc<Endpoint> {
        self.bus.get("summer0").unwrap()
    }

    /// Stops, and returns the state.
    fn stop(&self) -> SavedServer {
        self.server.hold(Instant::now() + BOUND).unwrap();
        self.endpoint().quiesce().unwrap();
        self.server.save().unwrap()
    }

    /// Goes on as if nobody had asked.
    fn go_on(&self) {
        self.endpoint().resume();
        self.server.release();
    }

    /// Another bus, which is ready to go on, and does not yet.
    fn next(saved: SavedServer, path: &Path) -> Result<One, String> {
        let (bus, endpoint) = fresh();
        endpoint.quiesce().unwrap();
        let server = DeviceServer::restore(&endpoint, saved, path, Default::default())?;
        Ok(One { bus, server })
    }
}

/// The data pass through a text, as between two processes.
fn through_text(saved: SavedServer) -> SavedServer {
    let text = serde_json::to_string(&saved.data).unwrap();
    let data: SavedData = serde_json::from_str(&text).unwrap();
    SavedServer { data, ..saved }
}

/// Calls, rings and waits without end, and checks every answer. Returns the number of rounds.
fn drive(path: PathBuf, stop: &AtomicBool, rounds: &AtomicU64) {
    let process = Process::connect(path, MEMORY_BYTES).unwrap();
    let mut function = Function::probe(process.clone()).unwrap();
    function.open(0).unwrap();
    let memory = process.alloc(4096).unwrap();
    let region = function.region_add(0, 0, &memory, (0, 4096), None).unwrap();
    let words = memory.words();
    let mut sum = 0;
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        sum += round % 256;
        let byte = u8::try_from(round % 256).unwrap();
        assert_eq!(function.call(1, 0, &mut [byte]), Ok(sum), "a call was lost or done twice");
        words[0].store(round, Ordering::Release);
        function.ring(region.handle());
        let begun = Instant::now();
        while words[1].load(Ordering::Acquire) != round {
            assert!(begun.elapsed() < BOUND, "the device does not answer round {round}");
            std::thread::yield_now();
        }
        rounds.store(round, Ordering::Relaxed);
    }
}

#[test]
fn a_driver_under_load_notices_nothing_of_many_buses() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let mut bus = One::start(&path);
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let driver = scope.spawn(|| drive(path.clone(), &stop, &rounds));
        for turn in 0..30 {
            let (before, begun) = (rounds.load(Ordering::Relaxed), Instant::now());
            while rounds.load(Ordering::Relaxed) < before + 20 {
                assert!(begun.elapsed() < BOUND && !driver.is_finished(), "it stands still");
                std::thread::yield_now();
            }
            let saved = through_text(bus.stop());
            match turn % 3 {
                // Nobody takes it.
                0 => bus.go_on(),
                // The other bus takes it, and fails afterwards.
                1 => {
                    drop(One::next(saved, &path).unwrap());
                    bus.go_on();
                }
                _ => {
                    let next = One::next(saved, &path).unwrap();
                    let client = &next.endpoint().inspect()["memory"]["client"]["process"];
                    assert_eq!(client.as_u64(), Some(std::process::id().into()), "whose memory");
                    let before = std::mem::replace(&mut bus, next);
                    drop(before);
                    bus.go_on();
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        driver.join().unwrap();
    });
    let endpoint = bus.endpoint();
    assert_eq!(endpoint.counters().opens.get(), 1, "the driver has opened it once");
    assert_eq!(endpoint.counters().broken.get(), 0);
    assert_eq!(bus.server.stats().clients, 1);
}

/// Has the last state, as a process would have it that outlasts the bus.
#[derive(Default)]
struct Keeper {
    last: Mutex<Option<SavedServer>>,
    states: AtomicU64,
    fails: AtomicBool,
    gone: AtomicBool,
}

impl Keep for Keeper {
    fn keep(&self, endpoint: &Endpoint, saved: SavedServer) -> Result<(), String> {
        assert!(endpoint.is_quiesced());
        if self.fails.load(Ordering::Relaxed) {
            return Err("as the test wants".into());
        }
        *self.last.lock().unwrap() = Some(saved);
        self.states.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn has_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}

/// The file of the journal in a state: its inode.
fn journal(saved: &SavedServer) -> u64 {
    const BYTES: i64 = 2_109_440;
    let stats = saved.descriptors.iter().map(|fd| rustix::fs::fstat(fd).unwrap());
    let journals: Vec<_> = stats.filter(|stat| stat.st_size == BYTES).collect();
    assert_eq!(journals.len(), 1);
    journals[0].st_ino
}

/// Whatever the client was told, the state has it that was kept before.
#[test]
fn a_bus_goes_on_from_what_was_kept_while_the_driver_worked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let (mut bus, keeper) = (One::start(&path), Arc::new(Keeper::default()));
    let soon = || Instant::now() + BOUND;
    bus.server.keep_with(keeper.clone(), soon()).unwrap();
    assert_eq!(keeper.states.load(Ordering::Relaxed), 1, "at once");
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let driver = scope.spawn(|| drive(path.clone(), &stop, &rounds));
        for _ in 0..20 {
            let (before, begun) = (rounds.load(Ordering::Relaxed), Instant::now());
            while rounds.load(Ordering::Relaxed) < before + 20 {
                assert!(begun.elapsed() < BOUND && !driver.is_finished(), "it stands still");
                std::thread::yield_now();
            }
            // From here on the bus does nothing more, as one that was killed.
            bus.server.hold(soon()).unwrap();
            bus.endpoint().quiesce().unwrap();
            let saved = keeper.last.lock().unwrap().take().unwrap();
            let former = journal(&saved);
            let next = One::next(through_text(saved), &path).unwrap();
            drop(std::mem::replace(&mut bus, next));
            bus.server.keep_with(keeper.clone(), soon()).unwrap();
            let saved = keeper.last.lock().unwrap();
            assert_ne!(journal(saved.as_ref().unwrap()), former, "a journal of its own");
            drop(saved);
            bus.go_on();
        }
        stop.store(true, Ordering::Relaxed);
        driver.join().unwrap();
    });
    let rounds = rounds.load(Ordering::Relaxed);
    let states = keeper.states.load(Ordering::Relaxed);
    assert!(states > 2 * rounds, "each call is kept: {states} states in {rounds} rounds");
    assert_eq!(bus.endpoint().counters().broken.get(), 0);
    // A doorbell by message is no change.
    let process = Process::connect(&path, MEMORY_BYTES).unwrap();
    let mut function = Function::probe(process).unwrap();
    function.open(0).unwrap();
    let before = keeper.states.load(Ordering::Relaxed);
    assert!(function.incarnation().is_ok() && function.check().is_ok());
    assert_eq!(keeper.states.load(Ordering::Relaxed), before, "reading changes nothing");
    // Without a keeper the device goes on, and the next message tries again.
    keeper.fails.store(true, Ordering::Relaxed);
    assert_eq!(function.call(1, 0, &mut [1]), Ok(1));
    assert!(bus.server.commit(soon()).unwrap_err().contains("as the test wants"));
    keeper.fails.store(false, Ordering::Relaxed);
    assert_eq!(function.check(), Ok(()));
    let kept = serde_json::to_value(&keeper.last.lock().unwrap().as_ref().unwrap().data).unwrap();
    let device = &kept["function"]["bars"][0]["state"]["device"];
    assert_eq!(device["connection"]["open"]["state"]["sum"], 1);
    let interrupts = &kept["function"]["interrupts"];
    assert_eq!((&interrupts["masked"], &interrupts["raised"]), (&json!(false), &json!(false)));
    // One that has gone is given nothing more, and no state is said to be complete.
    keeper.gone.store(true, Ordering::Relaxed);
    let before = keeper.states.load(Ordering::Relaxed);
    assert_eq!(function.call(1, 0, &mut [1]), Ok(2));
    assert!(bus.server.commit(soon()).unwrap_err().contains("has gone"));
    assert_eq!(keeper.states.load(Ordering::Relaxed), before);
}

#[test]
fn a_state_that_lies_leaves_the_first_bus_with_its_client() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let bus = One::start(&path);
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let driver = scope.spawn(|| drive(path.clone(), &stop, &rounds));
        let begun = Instant::now();
        while rounds.load(Ordering::Relaxed) < 5 {
            assert!(begun.elapsed() < BOUND, "it stands still");
            std::thread::yield_now();
        }
        for lie in 0..8 {
            let SavedServer { data, mut descriptors, held } = bus.stop();
            let mut value = serde_json::to_value(&data).unwrap();
            match lie {
                0 => drop(descriptors.pop()),
                1 => descriptors.push(descriptors[0].try_clone().unwrap()),
                // An eventfd, or the socket of the client, where something else belongs.
                2 => descriptors.reverse(),
                3 => value["files"] = json!(7),
                4 => value["maps"][0]["len"] = json!(1u64 << 60),
                5 => value["function"]["config"] = json!("00"),
                6 => value["doorbells"] = json!([9999]),
                _ => value["function"]["bars"][0]["state"]["device"]["class"] = json!("other"),
            }
            let Ok(data) = serde_json::from_value(value) else { panic!("lie {lie} is no state") };
            let next = One::next(SavedServer { data, descriptors, held }, &path);
            assert!(next.is_err(), "lie {lie} is believed");
            bus.go_on();
            let (before, begun) = (rounds.load(Ordering::Relaxed), Instant::now());
            while rounds.load(Ordering::Relaxed) < before + 5 {
                assert!(begun.elapsed() < BOUND && !driver.is_finished(), "after lie {lie}");
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
        driver.join().unwrap();
    });
}

/// A driver that has opened the device and registered a region.
fn driver(process: Process) -> (Function<Process>, impl Sized) {
    let mut function = Function::probe(process.clone()).unwrap();
    function.open(0).unwrap();
    let memory = process.alloc(4096).unwrap();
    let region = function.region_add(0, 0, &memory, (0, 4096), None).unwrap();
    (function, (memory, region))
}

/// Forges what is data, and mixes descriptors up.
fn forged(value: Value, descriptors: &[OwnedFd], random: &mut Random) -> Option<SavedServer> {
    let data: SavedData = serde_json::from_value(value).ok()?;
    let mut descriptors: Vec<_> = descriptors.iter().map(|fd| fd.try_clone().unwrap()).collect();
    match random.below(8) {
        0 => drop(descriptors.pop()),
        1 => {
            let (a, b) = (random.index(descriptors.len()), random.index(descriptors.len()));
            descriptors.swap(a, b);
        }
        _ => {}
    }
    Some(SavedServer { data, descriptors, held: Held::default() })
}

/// Whatever a forged state says, the other bus refuses it, or is safe: its device can be tried and
/// saved. The first bus goes on with its client in any case.
#[test]
fn forged_states_do_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let bus = One::start(&path);
    let process = Process::connect(&path, MEMORY_BYTES).unwrap();
    let (mut function, _region) = driver(process);
    let SavedServer { data, descriptors, .. } = bus.stop();
    let original = serde_json::to_value(&data).unwrap();
    forge(&original, 0..600, |seed, value| {
        let Some(saved) = forged(value, &descriptors, &mut Random(!seed)) else {
            return Verdict::Unread;
        };
        match One::next(saved, &path) {
            Err(why) => Verdict::Refused(why),
            Ok(next) => {
                try_out(&next.endpoint(), 8, seed, || drop(next.server.save()));
                Verdict::Taken
            }
        }
    });
    bus.go_on();
    assert_eq!(function.call(1, 0, &mut [5]), Ok(5));
}

/// A server that goes on from a forged state serves the next client, whatever becomes of the one
/// of the state.
#[test]
fn a_server_of_a_forged_state_serves_the_next_client() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let mut served = 0;
    for seed in 0..100 {
        let bus = One::start(&path);
        let process = Process::connect(&path, MEMORY_BYTES).unwrap();
        let client = driver(process.clone());
        let SavedServer { data, descriptors, .. } = bus.stop();
        let mut value = serde_json::to_value(&data).unwrap();
        let mut random = Random(seed);
        for _ in 0..=random.below(3) {
            vbus_test_driver::mutate(&mut value, &mut random);
        }
        let next = forged(value, &descriptors, &mut random);
        let next = next.and_then(|saved| One::next(saved, &path).ok());
        drop((bus, descriptors));
        // It sends no message: the server may wait for the rest of one that never was.
        shutdown(process.socket(), Shutdown::Both).unwrap();
        std::mem::forget(client);
        let Some(next) = next else { continue };
        next.go_on();
        let (tell, told) = std::sync::mpsc::channel();
        let to = path.clone();
        std::thread::spawn(move || {
            let _ = tell.send(driver(Process::connect(to, MEMORY_BYTES).unwrap()));
        });
        let (mut function, _region) = told.recv_timeout(BOUND).expect("an answer");
        assert_eq!(function.call(1, 0, &mut [5]), Ok(5), "seed {seed}");
        served += 1;
    }
    assert!(served > 10, "{served} servers");
}
