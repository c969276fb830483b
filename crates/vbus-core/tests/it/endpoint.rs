// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Endpoints with a small device. The tests drive it without a connector, through mapped memory.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vbus_core::shm::ring::{DeviceEnd, DriverEnd, Entry, Layout, Return, Returns, SIGNAL_OFFSET};
use vbus_core::shm::signal::Armed;
use vbus_core::{
    Access, Bus, Call, Called, Connection, ConnectionState, Device, Endpoint, ErrorCode, Executor,
    Identity, InterruptSink, MapError, MemoryContext, Open, OpenRequest, Progress, Region,
    RegionRequest, Task, Tuning, Window,
};

const SIZE: u64 = 64 << 20;
/// The address of the driver's memory in the driver's address space.
const BASE: u64 = 0x10_0000;
const BOUND: Duration = Duration::from_secs(60);

/// Gives back each entry with its length doubled. An entry of length 0 is a violation. Region 13
/// and function 13 cause a panic. A call of function 99 does not end.
struct Doubler;

struct Doubling {
    ring: Option<(DeviceEnd<Window>, Region)>,
    endless: Option<Call>,
}

impl Device for Doubler {
    fn identity(&self) -> Identity {
        Identity::user("doubler").with_features(0b11)
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Doubling { ring: None, endless: None }))
    }
}

impl Connection for Doubling {
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        assert_ne!(region.id, 13, "as asked");
        if region.id != 0 || self.ring.is_some() {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        self.ring = Some((DeviceEnd::attach(region.window.clone())?, region));
        Ok(())
    }

    fn region_dropped(&mut self, _: u32) -> Result<(), ErrorCode> {
        self.ring = None;
        Ok(())
    }

    fn start_call(&mut self, mut call: Call) {
        if call.function() == 99 {
            self.endless = Some(call);
            return;
        }
        let (function, flags) = (call.function(), call.flags());
        let result = self.call(function, flags, call.buffer());
        call.finish(result);
    }

    fn call(&mut self, function: u32, flags: u32, buffer: &mut [u8]) -> Result<u64, ErrorCode> {
        match function {
            7 => {
                buffer.reverse();
                Ok(u64::from(flags))
            }
            13 => panic!("as asked"),
            _ => Err(ErrorCode::BAD_FUNCTION),
        }
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let Some((ring, region)) = &mut self.ring else { return Ok(Progress::Idle) };
        let mut progress = Progress::Idle;
        for _ in 0..budget {
            let Some(entry) = ring.take()? else { break };
            if entry.len == 0 {
                return Err(ErrorCode::CORRUPT);
            }
            ring.give_back(Return { len: entry.len.wrapping_mul(2), ..entry.into() });
            progress = Progress::Busy;
        }
        region.interrupt.kick(ring.post());
        Ok(progress)
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        Ok(self.ring.as_mut().map_or(Armed::Waiting, |(ring, _)| ring.arm(0)))
    }

    fn disarm(&mut self) {
        if let Some((ring, _)) = &mut self.ring {
            ring.disarm();
        }
    }
}

struct Interrupts(Mutex<Sender<u16>>);

impl InterruptSink for Interrupts {
    fn trigger(&self, vector: u16) {
        let _ = self.0.lock().unwrap().send(vector);
    }
}

/// A driver: the memory that it shares with the device, and its interrupts.
struct Driver {
    endpoint: Arc<Endpoint>,
    /// The same file, mapped a second time.
    mine: MemoryContext,
    interrupts: Receiver<u16>,
    _bus: Bus,
}

fn memory() -> OwnedFd {
    let fd = memfd_create("driver", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, SIZE).unwrap();
    fd
}

impl Driver {
    fn new() -> Driver {
        let executor = Executor::start(Tuning::default()).unwrap();
        let bus = Bus::new(executor, Vec::new());
        let endpoint = bus.add("doubler", Arc::new(Doubler)).unwrap();
        let fd = memory();
        let mine = MemoryContext::new();
        mine.map(BASE, SIZE, Some((fd.try_clone().unwrap(), 0)), Access::BOTH).unwrap();
        endpoint.map(BASE, SIZE, Some((fd, 0)), Access::BOTH).unwrap();
        let (sender, interrupts) = channel();
        endpoint.set_interrupt_sink(Arc::new(Interrupts(Mutex::new(sender))));
        Driver { endpoint, mine, interrupts, _bus: bus }
    }

    fn open(&self) -> Result<(), ErrorCode> {
        self.mine.view().write(BASE, &77u64.to_le_bytes()).unwrap();
        self.endpoint.open(OpenRequest::new((BASE, 77)))
    }

    fn ring(&self, addr: u64, entries: u32) -> (DriverEnd<Window>, RegionRequest) {
        let layout = Layout::new(entries, Returns::Entries).unwrap();
        let len = layout.bytes() as u64;
        let ring = DriverEnd::create(self.mine.window(addr, len).unwrap(), layout, 0).unwrap();
        let signal = Some(SIGNAL_OFFSET as u64);
        (ring, RegionRequest::new(0, addr, len).with_signal(signal))
    }

    /// Sends `count` entries and checks what comes back. It sleeps when it has nothing to do.
    fn exchange(&self, ring: &mut DriverEnd<Window>, handle: u32, count: u32) {
        let (mut sent, mut back) = (0, 0);
        while back < count {
            while sent < count
                && ring.submit(Entry { addr: 0, len: sent + 1, id: 0, flags: 0 }).is_ok()
            {
                sent += 1;
            }
            if ring.post().is_wanted() {
                self.endpoint.ring(u64::from(handle));
            }
            let before = back;
            while let Some(entry) = ring.reap().unwrap() {
                back += 1;
                assert_eq!(entry.len, back * 2);
            }
            if before == back && ring.arm(0) == Armed::Waiting {
                self.interrupts.recv_timeout(BOUND).expect("an armed interrupt comes");
            }
            ring.disarm();
        }
    }
}

#[test]
fn entries_pass_with_both_ends_sleeping() {
    let driver = Driver::new();
    driver.open().unwrap();
    let (mut ring, request) = driver.ring(BASE + 4096, 16);
    let handle = driver.endpoint.region_add(request).unwrap();
    driver.exchange(&mut ring, handle, 100_000);
    // Each end has slept at some time.
    let counters = driver.endpoint.counters();
    let end = Instant::now() + BOUND;
    while counters.doorbells.get() == 0 || counters.interrupts.get() == 0 {
        assert!(Instant::now() < end, "{counters:?}");
        std::thread::sleep(Duration::from_millis(1));
        driver.exchange(&mut ring, handle, 100);
    }
    driver.endpoint.region_drop(u64::from(handle)).unwrap();
    assert_eq!(driver.endpoint.region_drop(u64::from(handle)), Err(ErrorCode::NO_REGION));
}

#[test]
fn scattered_pages_make_one_region() {
    let driver = Driver::new();
    driver.open().unwrap();
    // The ring is in a window of pages in reverse order. The driver sees it in the same way.
    let pages: Vec<u64> = (0..4).map(|i| BASE + 0x10_0000 - i * 4096).collect();
    let layout = Layout::new(256, Returns::Entries).unwrap();
    let len = layout.bytes() as u64;
    let mine = driver.mine.window_of_pages(&pages, 12, len).unwrap();
    let mut ring = DriverEnd::create(mine, layout, 0).unwrap();
    let list: Vec<u8> = pages.iter().flat_map(|p| p.to_le_bytes()).collect();
    driver.mine.view().write(BASE + 4096, &list).unwrap();
    let request = RegionRequest::new(0, BASE + 4096, len)
        .with_page_shift(12)
        .with_signal(Some(SIGNAL_OFFSET as u64));
    let handle = driver.endpoint.region_add(request).unwrap();
    driver.exchange(&mut ring, handle, 10_000);
}

#[test]
fn an_eventfd_is_a_doorbell() {
    let driver = Driver::new();
    let early = driver.endpoint.doorbell_eventfd(0).unwrap();
    driver.open().unwrap();
    let (mut ring, request) = driver.ring(BASE + 4096, 16);
    assert_eq!(driver.endpoint.region_add(request), Ok(0));
    let mut rung = 0;
    for round in 1..1000 {
        ring.submit(Entry { len: 5, ..Entry::default() }).unwrap();
        let _ = ring.arm(0);
        if ring.post().is_wanted() {
            rustix::io::write(early.as_fd(), &1u64.to_ne_bytes()).unwrap();
            rung += 1;
        }
        // The counter loses none of them.
        assert_eq!(driver.endpoint.inspect()["counters"]["doorbells"], rung);
        // An interrupt of the previous round may still be pending, if the driver saw its entry
        // without it.
        let entry = loop {
            match ring.reap().unwrap() {
                Some(entry) => break entry,
                None => driver
                    .interrupts
                    .recv_timeout(BOUND)
                    .unwrap_or_else(|_| panic!("round {round}")),
            };
        };
        assert_eq!(entry.len, 10);
    }
}

#[test]
fn a_fault_breaks_the_connection_and_the_next_one_works() {
    let driver = Driver::new();
    driver.open().unwrap();
    let (mut ring, request) = driver.ring(BASE + 4096, 16);
    let handle = driver.endpoint.region_add(request).unwrap();
    ring.submit(Entry::default()).unwrap();
    let _ = ring.post();
    driver.endpoint.ring(u64::from(handle));
    driver.interrupts.recv_timeout(BOUND).expect("the driver is woken to see the fault");
    assert_eq!(driver.endpoint.state(), ConnectionState::Broken(ErrorCode::CORRUPT));
    assert_eq!(driver.open(), Err(ErrorCode::ALREADY_OPEN));
    driver.endpoint.close();
    driver.open().unwrap();
    let (mut ring, request) = driver.ring(BASE + 4096, 16);
    let handle = driver.endpoint.region_add(request).unwrap();
    driver.exchange(&mut ring, handle, 100);
}

#[test]
fn a_class_that_panics_at_a_command_ends_its_connection_and_no_more() {
    let driver = Driver::new();
    let endpoint = &driver.endpoint;
    for by_call in [true, false] {
        driver.open().unwrap();
        let panics = match by_call {
            true => endpoint.call(13, 0, 0, 0).map(drop),
            false => endpoint.region_add(RegionRequest::new(13, BASE + 4096, 4096)).map(drop),
        };
        assert_eq!(panics, Err(ErrorCode::FAILED));
        assert_eq!(endpoint.state(), ConnectionState::Broken(ErrorCode::FAILED));
        driver.interrupts.recv_timeout(BOUND).expect("the driver is told");
        endpoint.close();
    }
    driver.open().unwrap();
    let (mut ring, request) = driver.ring(BASE + 4096, 16);
    let handle = endpoint.region_add(request).unwrap();
    driver.exchange(&mut ring, handle, 100);
}

#[test]
fn unmapping_a_region_ends_its_connection_and_nothing_else_does() {
    let driver = Driver::new();
    driver.endpoint.map(0x1_0000_0000, 4096, Some((memory(), 0)), Access::BOTH).unwrap();
    driver.endpoint.map(0x2_0000_0000, 4096, None::<(OwnedFd, u64)>, Access::BOTH).unwrap();
    driver.open().unwrap();
    let (mut ring, request) = driver.ring(BASE + 4096, 16);
    let handle = driver.endpoint.region_add(request).unwrap();
    assert_eq!(driver.endpoint.unmap(0x1_0000_0000, 4096), 4096);
    assert_eq!(driver.endpoint.unmap(0x2_0000_0000, 4096), 4096);
    assert_eq!(driver.endpoint.unmap(0x3_0000_0000, 4096), 0);
    driver.exchange(&mut ring, handle, 100);
    assert_eq!(driver.endpoint.unmap(BASE, SIZE), SIZE);
    assert_eq!(driver.endpoint.state(), ConnectionState::Broken(ErrorCode::REVOKED));
}

#[test]
fn unmapping_races_with_traffic() {
    for _ in 0..50 {
        let driver = Driver::new();
        driver.open().unwrap();
        let (mut ring, request) = driver.ring(BASE + 4096, 16);
        let handle = driver.endpoint.region_add(request).unwrap();
        let endpoint = driver.endpoint.clone();
        let thread = std::thread::spawn(move || endpoint.unmap(BASE, SIZE));
        while !thread.is_finished() {
            let _ = ring.submit(Entry { len: 1, ..Entry::default() });
            let _ = ring.post();
            driver.endpoint.ring(u64::from(handle));
            while let Ok(Some(_)) = ring.reap() {}
        }
        assert_eq!(thread.join().unwrap(), SIZE);
    }
}

#[test]
fn commands_name_what_is_wrong() {
    let driver = Driver::new();
    let e = &driver.endpoint;
    let (_, good) = driver.ring(BASE + 4096, 16);
    assert_eq!(e.region_add(good), Err(ErrorCode::NOT_OPEN));
    assert_eq!(e.call(7, 0, BASE, 8).and_then(Called::now), Err(ErrorCode::NOT_OPEN));
    let ask = OpenRequest::new((BASE, 0));
    for (request, error) in [
        (ask.with_version(2), ErrorCode::BAD_VERSION),
        (ask.with_version(0), ErrorCode::BAD_VERSION),
        (ask.with_vector(1), ErrorCode::BAD_VECTOR),
        (ask.with_features(0b100), ErrorCode::BAD_FEATURES),
        (OpenRequest::new((BASE + 4, 0)), ErrorCode::BAD_ALIGNMENT),
        (OpenRequest::new((0, 0)), ErrorCode::BAD_ADDRESS),
        (OpenRequest::new((BASE, 78)), ErrorCode::NOT_SHARED),
    ] {
        assert_eq!(e.open(request), Err(error), "{request:?}");
    }
    driver.open().unwrap();
    assert_eq!(driver.open(), Err(ErrorCode::ALREADY_OPEN));
    let bad = |change: fn(&mut RegionRequest), code| {
        let mut request = good;
        change(&mut request);
        assert_eq!(e.region_add(request), Err(code), "{request:?}");
    };
    bad(|r| r.vector = 1, ErrorCode::BAD_VECTOR);
    bad(|r| r.len = 0, ErrorCode::BAD_LENGTH);
    bad(|r| r.len = u64::MAX - 7, ErrorCode::BAD_LENGTH);
    bad(|r| r.len += 4, ErrorCode::BAD_ALIGNMENT);
    bad(|r| r.addr += 8, ErrorCode::BAD_ALIGNMENT);
    bad(|r| r.addr = 0, ErrorCode::BAD_ADDRESS);
    bad(|r| r.addr = u64::MAX - 63, ErrorCode::BAD_ADDRESS);
    bad(|r| r.addr = BASE + SIZE - 64, ErrorCode::BAD_ADDRESS);
    bad(|r| r.signal = Some(1), ErrorCode::BAD_ALIGNMENT);
    bad(|r| r.signal = Some(r.len - 192), ErrorCode::BAD_SIGNAL);
    bad(|r| r.signal = Some(u64::MAX - 63), ErrorCode::BAD_SIGNAL);
    bad(|r| r.page_shift = 11, ErrorCode::BAD_ARGUMENT);
    bad(|r| r.page_shift = 31, ErrorCode::BAD_ARGUMENT);
    bad(|r| r.id = 1, ErrorCode::BAD_ARGUMENT);
    bad(|r| r.addr += 64, ErrorCode::BAD_LAYOUT);
    assert_eq!(e.call(8, 0, BASE, 8).and_then(Called::now), Err(ErrorCode::BAD_FUNCTION));
    assert_eq!(e.call(7, 0, BASE, 65537).and_then(Called::now), Err(ErrorCode::BAD_LENGTH));
    assert_eq!(e.call(7, 0, 0, 8).and_then(Called::now), Err(ErrorCode::BAD_ADDRESS));
    driver.mine.view().write(BASE, b"abcd").unwrap();
    assert_eq!(e.call(7, 9, BASE, 4).and_then(Called::now), Ok(9));
    let mut out = [0; 4];
    driver.mine.view().read(BASE, &mut out).unwrap();
    assert_eq!(&out, b"dcba");
    e.ring(5);
    e.ring(u64::MAX);
}

#[test]
fn maps_are_checked() {
    let context = MemoryContext::new();
    let map = |start, len, offset| context.map(start, len, Some((memory(), offset)), Access::BOTH);
    assert!(matches!(map(0, 0, 0), Err(MapError::Range(..))));
    assert!(matches!(map(u64::MAX - 4095, 8192, 0), Err(MapError::Range(..))));
    assert!(matches!(map(4096, 100, 0), Err(MapError::Range(..))));
    assert!(matches!(map(0, 4096, SIZE), Err(MapError::FileTooSmall)));
    assert!(matches!(map(0, 4096, u64::MAX - 4095), Err(MapError::FileTooSmall)));
    map(8192, 8192, 0).unwrap();
    for (start, len) in [(4096, 8192), (8192, 4096), (12288, 8192), (4096, 65536)] {
        assert!(matches!(map(start, len, 0), Err(MapError::Overlap(..))), "{start} {len}");
    }
    map(4096, 4096, 0).unwrap();
    // A directory, an eventfd, a device: files that cannot be mapped permanently.
    for path in ["/", "/dev/zero"] {
        let file = OwnedFd::from(std::fs::File::open(path).unwrap());
        let refused = context.map(0, 4096, Some((file, 0)), Access::READ);
        assert!(matches!(refused, Err(MapError::NoFile)), "{path}: {refused:?}");
    }
    // The bus has changed neither the refused nor the accepted files.
    for file in [memory(), memory()] {
        let copy = file.try_clone().unwrap();
        let _ = context.map(0, 4096, Some((copy, 0)), Access::BOTH);
        assert_eq!(rustix::fs::fcntl_get_seals(&file).unwrap(), rustix::fs::SealFlags::empty());
    }
}

#[test]
fn removed_devices_are_gone() {
    let driver = Driver::new();
    driver.open().unwrap();
    assert!(driver._bus.add("doubler", Arc::new(Doubler)).is_err());
    driver._bus.remove("doubler").unwrap();
    assert!(driver._bus.remove("doubler").is_err());
    assert_eq!(driver.endpoint.state(), ConnectionState::Broken(ErrorCode::REMOVED));
    assert_eq!(driver.open(), Err(ErrorCode::REMOVED));
    driver.endpoint.close();
    assert_eq!(driver.open(), Err(ErrorCode::REMOVED));
    assert!(driver._bus.add("bad/name", Arc::new(Doubler)).is_err());
}

/// Counts its polls. Only its deadlines cause polls.
struct Ticker(Arc<AtomicU64>, Sender<()>);

impl Task for Ticker {
    fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
        if self.0.fetch_add(1, Ordering::Relaxed) >= 20 {
            let _ = self.1.send(());
        }
        Ok(Progress::Idle)
    }

    fn deadline(&self) -> Option<Instant> {
        Some(Instant::now() + Duration::from_millis(2))
    }

    fn adaptive(&self) -> bool {
        false
    }
}

#[test]
fn deadlines_wake_tasks_and_stop_ends_them() {
    let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
    let (sender, receiver) = channel();
    let polls = Arc::new(AtomicU64::new(0));
    let task = executor.spawn(0, Box::new(Ticker(polls.clone(), sender)), Arc::default(), |_| {});
    receiver.recv_timeout(BOUND).unwrap();
    task.stop();
    let after = polls.load(Ordering::Relaxed);
    // The task owns the sender. The sender is dropped, so the task is, and has no more polls.
    while receiver.recv_timeout(BOUND).is_ok() {}
    assert_eq!(polls.load(Ordering::Relaxed), after);
}

struct Panics;

impl Task for Panics {
    fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
        panic!("a fault of this task, which the test wants");
    }
}

#[test]
fn a_task_that_panics_takes_no_other_with_it() {
    let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
    let (sender, ended) = channel();
    let sender = Mutex::new(sender);
    executor.spawn(0, Box::new(Panics), Arc::default(), move |code| {
        sender.lock().unwrap().send(code).unwrap()
    });
    assert_eq!(ended.recv_timeout(BOUND), Ok(ErrorCode::FAILED));
    let (sender, receiver) = channel();
    executor.spawn(0, Box::new(Ticker(Arc::default(), sender)), Arc::default(), |_| {});
    receiver.recv_timeout(BOUND).expect("the worker goes on");
}

#[test]
fn page_lists_do_not_use_up_the_mappings_of_the_process() {
    let driver = Driver::new();
    let pages: Vec<u64> = vec![BASE; 4096];
    let one = || driver.mine.window_of_pages(&pages, 12, 4096 * 4096);
    // The number depends on the machine's limit. A peer gets less than half of it.
    let mut windows: Vec<_> = std::iter::from_fn(|| one().ok()).take(1000).collect();
    assert!((1..1000).contains(&windows.len()), "{}", windows.len());
    assert_eq!(one().unwrap_err(), ErrorCode::LIMIT);
    windows.pop();
    // A thread unmaps the window.
    let begun = Instant::now();
    while one().is_err() {
        assert!(begun.elapsed() < BOUND, "what was given back can be taken again");
        std::thread::yield_now();
    }
}

#[test]
fn a_peer_cannot_make_the_counting_of_doorbells_wait() {
    let driver = Driver::new();
    let bell = driver.endpoint.doorbell_eventfd(0).unwrap();
    // The peer holds the same open file, and can change its flags.
    let flags = rustix::fs::fcntl_getfl(&bell).unwrap();
    rustix::fs::fcntl_setfl(&bell, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    let (done, told) = channel();
    let endpoint = driver.endpoint.clone();
    std::thread::spawn(move || {
        rustix::io::write(&bell, &5u64.to_ne_bytes()).unwrap();
        let rung = endpoint.inspect()["counters"]["doorbells"].as_u64();
        endpoint.inspect();
        done.send(rung).unwrap();
    });
    assert_eq!(told.recv_timeout(BOUND).expect("inspecting the device never ends"), Some(5));
}

/// Fails its first poll. When it is dropped, it checks whether the failure has already been
/// reported.
struct Failing {
    dropping: Sender<()>,
    stopped: Mutex<Receiver<()>>,
    early: Sender<bool>,
}

impl Task for Failing {
    fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
        Err(ErrorCode::FAILED)
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        self.dropping.send(()).unwrap();
        let early = self.stopped.lock().unwrap().recv_timeout(Duration::from_millis(200)).is_ok();
        self.early.send(early).unwrap();
    }
}

#[test]
fn stopping_a_task_that_fails_just_then_waits_until_it_is_gone() {
    let executor = Executor::start(Tuning::default()).unwrap();
    let ((dropping, drops), (stop, stopped), (early, was_early)) =
        (channel(), channel(), channel());
    let task = Failing { dropping, stopped: Mutex::new(stopped), early };
    let task = executor.spawn(0, Box::new(task), Arc::default(), |_| {});
    drops.recv_timeout(BOUND).unwrap();
    task.stop();
    let _ = stop.send(());
    assert!(
        !was_early.recv_timeout(BOUND).unwrap(),
        "stop has returned while the task still held what it holds"
    );
}

/// A device with any identity, which does nothing.
struct Claims(Identity, usize);

impl Device for Claims {
    fn identity(&self) -> Identity {
        self.0.clone()
    }

    fn config(&self) -> Vec<u8> {
        vec![0; self.1]
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Err(ErrorCode::FAILED)
    }
}

#[test]
fn a_device_that_says_what_cannot_be_does_not_join() {
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let fine = || Identity::user("claims");
    let most = fine().with_regions(1024).with_vectors(256).with_features((1 << 48) - 1);
    bus.add("most", Arc::new(Claims(most, 1024))).unwrap();
    for (identity, config, says) in [
        (fine().with_class(0), 0, "class number 0"),
        (Identity::user(""), 0, "class name"),
        (Identity::user("seventeen-letters"), 0, "class name"),
        (Identity::user("caf\u{e9}"), 0, "class name"),
        (Identity::new(0x8000, "claims", 1 << 24), 0, "PCI class"),
        (fine().with_features(1 << 48), 0, "features"),
        (fine().with_regions(1025), 0, "1025 regions"),
        (fine().with_vectors(0), 0, "0 vectors"),
        (fine().with_vectors(257), 0, "257 vectors"),
        (fine(), 1025, "config area of 1025 bytes"),
    ] {
        let error = bus.add("claims", Arc::new(Claims(identity, config))).err().unwrap();
        assert!(error.to_string().contains(says), "{error} for {says}");
    }
    assert!(bus.get("claims").is_err());
}

/// Brings what ends a connection out to the test. While a connection ends, another of its tasks
/// fails too.
struct Broken(Sender<vbus_core::Fail>);

impl Device for Broken {
    fn identity(&self) -> Identity {
        Identity::user("broken")
    }

    fn open(&self, open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        self.0.send(open.fail.clone()).unwrap();
        Ok(Box::new(Breaking(open.fail)))
    }
}

struct Breaking(vbus_core::Fail);

impl Connection for Breaking {
    fn region_added(&mut self, _: Region) -> Result<(), ErrorCode> {
        Ok(())
    }

    fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
        Ok(Progress::Idle)
    }
}

impl Drop for Breaking {
    fn drop(&mut self) {
        let fail = self.0.clone();
        std::thread::spawn(move || fail.fail(ErrorCode::FAILED)).join().unwrap();
    }
}

#[test]
fn a_second_failure_does_not_wait_for_the_end_that_the_first_causes() {
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let (sender, receiver) = channel();
    let endpoint = bus.add("broken", Arc::new(Broken(sender))).unwrap();
    let file = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 4096).unwrap();
    endpoint.memory().map(0, 4096, Some((file, 0)), Access::BOTH).unwrap();
    for round in 0..2 {
        endpoint.memory().view().write(0, &77u64.to_le_bytes()).unwrap();
        endpoint.open(OpenRequest::new((0, 77))).unwrap();
        let fail = receiver.recv().unwrap();
        // It returns only because the failure in between returns at once.
        fail.fail(ErrorCode::CORRUPT);
        let state = endpoint.state();
        assert_eq!(state, ConnectionState::Broken(ErrorCode::CORRUPT), "round {round}");
        endpoint.close();
    }
}

#[test]
fn a_call_that_does_not_end_keeps_nobody_waiting_for_longer_than_he_says() {
    let driver = Driver::new();
    driver.open().unwrap();
    let (mut ring, request) = driver.ring(BASE + 4096, 16);
    let handle = driver.endpoint.region_add(request).unwrap();
    assert!(matches!(driver.endpoint.call(99, 0, 0, 0), Ok(Called::Later(_))));
    let begun = Instant::now();
    let error = driver.endpoint.quiesce_by(begun + Duration::from_millis(30)).unwrap_err();
    assert!((Duration::from_millis(30)..Duration::from_secs(5)).contains(&begun.elapsed()));
    assert!(error.why.starts_with("a call of its driver has not ended within 0.0 s"), "{error}");
    assert!(!driver.endpoint.is_quiesced());
    driver.exchange(&mut ring, handle, 100);
    driver.endpoint.close();
    driver.endpoint.quiesce_by(Instant::now()).unwrap();
}

/// The class has no saved state: whoever asks is told which device of which class, whether a driver
/// has it open or not, and the driver notices nothing.
#[test]
fn a_device_of_a_class_without_state_is_refused_by_name_and_goes_on() {
    let driver = Driver::new();
    let refused = || {
        driver.endpoint.quiesce().unwrap();
        let error = driver.endpoint.save().unwrap_err();
        driver.endpoint.resume();
        let text =
            "device \"doubler\" of class \"doubler\" cannot be saved: the class has no saved state";
        assert_eq!(error.to_string(), text);
        assert_eq!((error.device, error.class), ("doubler".into(), "doubler".into()));
    };
    refused();
    driver.open().unwrap();
    let (mut ring, request) = driver.ring(BASE + 4096, 16);
    let handle = driver.endpoint.region_add(request).unwrap();
    driver.exchange(&mut ring, handle, 100);
    refused();
    driver.exchange(&mut ring, handle, 100);
}
