// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device of the bus with its socket, on the event loop. Clients come, crowd, break the protocol
//! and go.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vbus_core::{
    Bus, Connection, ConnectionState, Device, ErrorCode, Executor, Identity, Open, Region, Tuning,
};
use vbus_driver::{Error, Function, Hal, Memory};
use vbus_process::{MEMORY_BYTES, Patience, Process};
use vbus_vfio_user::DeviceServer;
use vfio_user_protocol::message::command;
use vfio_user_protocol::{Client, ClientError, Errno};

/// How long a test waits for what must happen.
const BOUND: Duration = Duration::from_secs(60);

/// A call returns the sum of its buffer's bytes.
struct Adder;

impl Device for Adder {
    fn identity(&self) -> Identity {
        Identity::user("adder")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Adding))
    }
}

struct Adding;

impl Connection for Adding {
    fn region_added(&mut self, _: Region) -> Result<(), ErrorCode> {
        Ok(())
    }

    fn call(&mut self, function: u32, _: u32, buffer: &mut [u8]) -> Result<u64, ErrorCode> {
        Ok(buffer.iter().map(|&b| u64::from(b)).sum::<u64>() + u64::from(function))
    }

    fn poll(&mut self, _: u32) -> Result<vbus_core::Progress, ErrorCode> {
        Ok(vbus_core::Progress::Idle)
    }

    fn arm(&mut self) -> Result<vbus_core::shm::signal::Armed, ErrorCode> {
        Ok(vbus_core::shm::signal::Armed::Waiting)
    }

    fn disarm(&mut self) {}
}

struct Setup {
    _folder: tempfile::TempDir,
    bus: Bus,
    server: DeviceServer,
}

fn setup() -> Setup {
    let folder = tempfile::tempdir().unwrap();
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let endpoint = bus.add("adder0", Arc::new(Adder)).unwrap();
    let server =
        DeviceServer::start(endpoint, &folder.path().join("s"), Default::default()).unwrap();
    Setup { _folder: folder, bus, server }
}

/// Connects as soon as the previous client has gone.
fn process(setup: &Setup) -> Process {
    let start = Instant::now();
    loop {
        match Process::connect(setup.server.path(), MEMORY_BYTES) {
            Ok(process) => return process,
            Err(ClientError::Refused { errno: Errno::BUSY, .. })
                if start.elapsed() < Duration::from_secs(20) =>
            {
                std::thread::yield_now();
            }
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn a_driver_that_goes_without_a_word_leaves_nothing_behind() {
    let setup = setup();
    let endpoint = setup.bus.get("adder0").unwrap();
    for round in 1..=50u32 {
        let process = process(&setup);
        let mut function = Function::probe(process.clone()).unwrap();
        function.open(0).unwrap();
        assert_eq!(function.call(round, 0, &mut [1, 2, 3]), Ok(u64::from(round) + 6));
        let memory = process.alloc(8192).unwrap();
        function.region_add(0, 0, &memory, (0, 8192), None).unwrap();
        assert_eq!(endpoint.state(), ConnectionState::Open);
        // As when a process is killed, only its socket closes.
        rustix::net::shutdown(process.socket(), rustix::net::Shutdown::Both).unwrap();
        std::mem::forget(function);
    }
    drop(process(&setup));
    assert_eq!(endpoint.counters().opens.get(), 50);
    assert_eq!(endpoint.counters().broken.get(), 0);
}

/// A device that finds its driver at fault when a region is zero.
struct Strict;

struct Looking(Option<vbus_core::Window>);

impl Device for Strict {
    fn identity(&self) -> Identity {
        Identity::user("strict")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Looking(None)))
    }
}

impl Connection for Looking {
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        self.0 = Some(region.window);
        Ok(())
    }

    fn poll(&mut self, _: u32) -> Result<vbus_core::Progress, ErrorCode> {
        let is_zero = |window: &vbus_core::Window| window.words()[0].load(Ordering::Acquire) == 0;
        match self.0.as_ref().is_some_and(is_zero) {
            true => Err(ErrorCode::CORRUPT),
            false => Ok(vbus_core::Progress::Idle),
        }
    }
}

/// A driver that leaves gives its memory back, as zeros. The device may look at it before its
/// server has noticed that the driver has gone.
#[test]
fn what_a_driver_leaves_behind_is_no_fault_of_its() {
    use std::sync::atomic::Ordering::Release;
    let folder = tempfile::tempdir().unwrap();
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let endpoint = bus.add("strict", Arc::new(Strict)).unwrap();
    let path = folder.path().join("s");
    let server = DeviceServer::start(endpoint.clone(), &path, Default::default()).unwrap();
    let setup = Setup { _folder: folder, bus, server };
    for round in 0..50u32 {
        let process = process(&setup);
        let mut function = Function::probe(process.clone()).unwrap();
        function.open(0).unwrap();
        let memory = process.alloc(64).unwrap();
        memory.words()[0].store(1, Release);
        let region = function.region_add(0, 0, &memory, (0, 64), None).unwrap();
        let leaves = round < 49;
        if leaves {
            rustix::net::shutdown(process.socket(), rustix::net::Shutdown::Both).unwrap();
        }
        memory.words()[0].store(0, Release);
        function.ring(region.handle());
        if !leaves {
            // The last one stays, and is at fault.
            let began = Instant::now();
            while endpoint.state() != ConnectionState::Broken(ErrorCode::CORRUPT) {
                assert!(began.elapsed() < BOUND, "the driver at fault: {:?}", endpoint.state());
                std::thread::yield_now();
            }
        }
        std::mem::forget(function);
    }
    assert_eq!(endpoint.counters().broken.get(), 1);
}

#[test]
fn a_crowd_is_served_or_refused_but_nobody_waits() {
    let setup = setup();
    let (served, refused) = (AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                for _ in 0..40 {
                    match Client::connect(setup.server.path()) {
                        Ok(mut client) => {
                            assert_eq!(client.device_info().unwrap().regions, 9);
                            served.fetch_add(1, Ordering::Relaxed);
                        }
                        // The server closes all but a few of them without an answer.
                        Err(
                            ClientError::Refused { errno: Errno::BUSY, .. } | ClientError::Closed,
                        ) => {
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(ClientError::Broken(e)) if e.to_string().contains("reset") => {
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(e) => panic!("{e}"),
                    }
                }
            });
        }
    });
    assert_eq!(served.load(Ordering::Relaxed) + refused.load(Ordering::Relaxed), 480);
    assert!(served.load(Ordering::Relaxed) > 0);
    drop(process(&setup));
}

#[test]
fn a_hostile_client_is_ended_and_the_next_one_served() {
    let setup = setup();
    for bytes in [&[0u8; 16][..], &[0xff; 64], &[1, 0, 4, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
        let mut stream = UnixStream::connect(setup.server.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        // The client reads the end of the stream, or a reset.
        assert!(
            !matches!(stream.read_to_end(&mut rest), Err(e) if e.kind() == std::io::ErrorKind::WouldBlock)
        );
        drop(process(&setup));
    }
    // The timer of the event loop ends a silent client.
    let mut silent = UnixStream::connect(setup.server.path()).unwrap();
    silent.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(silent.read(&mut [0; 16]).unwrap(), 0);
    drop(process(&setup));
}

#[test]
fn memory_is_taken_as_it_is() {
    let setup = setup();
    let mut client = Client::connect(setup.server.path()).unwrap();
    let refused = |result| match result {
        Err(ClientError::Refused { errno, .. }) => errno,
        other => panic!("{other:?}"),
    };
    let file = memfd_create("memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    assert_eq!(refused(client.dma_map(file.as_fd(), 0, 0, 8192)), Errno::INVAL, "too short");
    ftruncate(&file, 8192).unwrap();
    client.dma_map(file.as_fd(), 0, 0, 8192).unwrap();
    assert_eq!(refused(client.dma_map(file.as_fd(), 0, 4096, 4096)), Errno::EXIST);
    assert_eq!(
        refused(client.dma_map(file.as_fd(), 8192, 8192, 4096)),
        Errno::INVAL,
        "behind the end"
    );
    assert_eq!(rustix::fs::fcntl_get_seals(&file), Ok(rustix::fs::SealFlags::empty()));
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    assert_eq!(
        refused(client.dma_map(event.as_fd(), 0, 65536, 4096)),
        Errno::INVAL,
        "no memory at all"
    );
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    assert_eq!(refused(client.connect_irqs(1, 0, &[pipe.as_fd()])), Errno::INVAL, "no eventfd");
    client.connect_irqs(1, 0, &[event.as_fd()]).unwrap();
    client.dma_unmap_all().unwrap();
}

#[test]
fn a_client_that_takes_its_memory_away_is_ended_alone() {
    let setup = setup();
    let path = setup.server.path().with_file_name("good");
    let good = setup.bus.add("good", Arc::new(Adder)).unwrap();
    let good = DeviceServer::start(good, &path, Default::default()).unwrap();
    let mut neighbour = Client::connect(good.path()).unwrap();
    let endpoint = setup.bus.get("adder0").unwrap();
    for round in 1..=3 {
        // The end of the client before may not be known yet.
        let begun = Instant::now();
        let mut client = loop {
            match Client::connect(setup.server.path()) {
                Ok(client) => break client,
                Err(error) => assert!(begun.elapsed() < Duration::from_secs(60), "{error}"),
            }
        };
        let file = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 1 << 20).unwrap();
        client.dma_map(file.as_fd(), 0, 0, 1 << 20).unwrap();
        endpoint.memory().view().write(8192, b"here").unwrap();
        ftruncate(&file, 4096).unwrap();
        let mut bytes = [1; 4];
        endpoint.memory().view().read(8192, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4]);
        let start = Instant::now();
        while client.device_info().is_ok() {
            assert!(start.elapsed() < Duration::from_secs(60), "the client is never ended");
        }
        // The next client has other memory.
        while setup.server.stats().violations < round || endpoint.memory().is_lost() {
            assert!(start.elapsed() < Duration::from_secs(60), "nobody was blamed");
            std::thread::yield_now();
        }
    }
    assert_eq!(neighbour.device_info().unwrap().regions, 9);
    assert_eq!(good.stats().violations, 0);
}

#[test]
fn the_devices_of_one_process_have_one_budget() {
    const PAGE: u64 = 4096;
    let setup = setup();
    let folder = tempfile::tempdir().unwrap();
    let second = setup.bus.add("adder1", Arc::new(Adder)).unwrap();
    let server =
        DeviceServer::start(second.clone(), &folder.path().join("s"), Default::default()).unwrap();
    let first = setup.bus.get("adder0").unwrap();
    let ram = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&ram, 8 * PAGE).unwrap();
    let maps = |endpoint: &vbus_core::Endpoint| {
        let maps = &endpoint.inspect()["memory"]["maps"];
        ["used", "client_used"].map(|key| maps[key].as_u64().unwrap())
    };
    let client = |endpoint: &vbus_core::Endpoint| endpoint.inspect()["memory"]["client"].clone();
    let mut clients = [&setup.server, &server].map(|s| Client::connect(s.path()).unwrap());
    for (client, pages) in clients.iter_mut().zip([3, 5]) {
        for page in 0..pages {
            client.dma_map(ram.as_fd(), page * PAGE, 2 * page * PAGE, PAGE).unwrap();
        }
    }
    assert_eq!([maps(&first), maps(&second)], [[3, 8], [5, 8]]);
    let devices = serde_json::json!(["adder0", "adder1"]);
    let expected = serde_json::json!({ "process": std::process::id(), "devices": devices });
    assert_eq!([client(&first), client(&second)], [expected.clone(), expected]);
    let [gone, _stays] = clients;
    drop(gone);
    let start = Instant::now();
    while maps(&second) != [5, 5] || client(&first) != serde_json::Value::Null {
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", first.inspect());
        std::thread::yield_now();
    }
    assert_eq!(maps(&first), [0, 0]);
}

/// What a guest with an IOMMU makes QEMU send: its buffers are mapped page by page, at addresses
/// and from places in its memory that follow no order, and some come and go all the time.
#[test]
fn twenty_thousand_single_pages_are_mapped_beside_work() {
    const MAPS: u64 = 20_000;
    /// Shares no divisor with `MAPS / 2`: its multiples come to every page of a half.
    const STEP: u64 = 7919;
    const PAGE: u64 = 4096;
    const RAM: u64 = 1 << 30;
    let place = |page: u64| page * 40_503 % (RAM / PAGE) * PAGE;
    let address = |page: u64| (1 << 36) + page * PAGE;
    let setup = setup();
    let endpoint = setup.bus.get("adder0").unwrap();
    let ram = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&ram, RAM).unwrap();
    let mut client = Client::connect(setup.server.path()).unwrap();
    client.dma_map(ram.as_fd(), 0, 0, PAGE).unwrap();
    for page in (0..MAPS).map(|n| n * STEP % MAPS) {
        client.dma_map(ram.as_fd(), place(page), address(page), PAGE).unwrap();
    }
    let used = |resource: &str| endpoint.inspect()["memory"][resource]["used"].as_u64().unwrap();
    assert_eq!((used("maps"), used("mappings"), used("descriptors")), (MAPS + 1, 1, 1));
    endpoint.memory().view().write(0, &77u64.to_le_bytes()).unwrap();
    endpoint.open(vbus_core::OpenRequest::new((0, 77))).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The upper half comes and goes, as buffers of a driver do. QEMU also unmaps what was
            // never mapped.
            for page in (0..MAPS / 2).map(|n| MAPS / 2 + n * STEP % (MAPS / 2)) {
                client.dma_unmap(address(page), PAGE).unwrap();
                client.dma_unmap(address(2 * MAPS + page), PAGE).unwrap();
                client.dma_map(ram.as_fd(), place(page + 1), address(page), PAGE).unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
        // Meanwhile the device works on buffers in the lower half, each in two maps.
        let (mut n, mut longest) = (0, Duration::ZERO);
        while !done.load(Ordering::Relaxed) || n < 2000 {
            let begun = Instant::now();
            let page = n * STEP % (MAPS / 2 - 1);
            let at = address(page) + PAGE - 8;
            endpoint.memory().view().write(at, &[(n % 251) as u8; 16]).unwrap();
            let sum = endpoint.call(0, 0, at, 16).and_then(vbus_core::Called::now);
            assert_eq!(sum, Ok(16 * (n % 251)));
            longest = longest.max(begun.elapsed());
            n += 1;
        }
        eprintln!("{n} buffers beside {} maps and unmaps: {longest:?} the longest", 3 * MAPS / 2);
    });
    assert_eq!(used("maps"), MAPS + 1);
    // All at once, as at a reset of the guest.
    client.dma_unmap(0, 1 << 40).unwrap();
    assert_eq!(used("maps"), 0);
}

#[test]
fn a_device_that_is_removed_is_gone_for_its_driver() {
    let Setup { _folder, bus, server } = setup();
    let process = Process::connect(server.path(), MEMORY_BYTES).unwrap();
    let mut function = Function::probe(process.clone()).unwrap();
    function.open(0).unwrap();
    let path = server.path().to_owned();
    drop(server);
    bus.remove("adder0").unwrap();
    assert!(!path.exists());
    assert!(!process.wait(Duration::from_secs(20)), "no interrupt");
    process.set_patience(Patience::limit(BOUND));
    let began = Instant::now();
    assert_eq!(function.check(), Err(Error::Gone));
    assert_eq!(function.call(1, 0, &mut []), Err(Error::Gone));
    assert!(began.elapsed() < BOUND, "an access waits for its limit");
    drop(function);
}

/// Its connections end when the test lets them.
struct Lingering(Arc<(Barrier, Barrier)>);

impl Device for Lingering {
    fn identity(&self) -> Identity {
        Identity::user("lingering")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Lingers(self.0.clone())))
    }
}

struct Lingers(Arc<(Barrier, Barrier)>);

impl Connection for Lingers {
    fn region_added(&mut self, _: Region) -> Result<(), ErrorCode> {
        Ok(())
    }

    fn poll(&mut self, _: u32) -> Result<vbus_core::Progress, ErrorCode> {
        Ok(vbus_core::Progress::Idle)
    }
}

impl Drop for Lingers {
    fn drop(&mut self) {
        self.0.0.wait();
        self.0.1.wait();
    }
}

#[test]
fn a_client_that_has_lost_its_memory_gets_no_further_long_operation() {
    const RESETS: u16 = 8;
    let message = |id: u16, command: u16, body: &[u8]| {
        let size = 16 + u32::try_from(body.len()).unwrap();
        let mut message = [id.to_ne_bytes(), command.to_ne_bytes()].concat();
        message.extend(size.to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        message
    };
    let folder = tempfile::tempdir().unwrap();
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let barriers = Arc::new((Barrier::new(2), Barrier::new(2)));
    let endpoint = bus.add("lingering", Arc::new(Lingering(barriers.clone()))).unwrap();
    let path = folder.path().join("s");
    let server = DeviceServer::start(endpoint.clone(), &path, Default::default()).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(&message(0, command::VERSION, b"\0\0\0\0{}\0")).unwrap();
    client.read_exact(&mut [0; 16]).unwrap();
    let file = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 1 << 20).unwrap();
    let shared = file.try_clone().unwrap();
    endpoint.memory().map(0, 1 << 20, Some((shared, 0)), vbus_core::Access::BOTH).unwrap();
    endpoint.memory().view().write(0, &77u64.to_le_bytes()).unwrap();
    endpoint.open(vbus_core::OpenRequest::new((0, 77))).unwrap();
    // The first reset ends the connection, and waits for that.
    for id in 1..=RESETS {
        client.write_all(&message(id, command::DEVICE_RESET, &[])).unwrap();
    }
    barriers.0.wait();
    ftruncate(&file, 4096).unwrap();
    endpoint.memory().view().read(8192, &mut [0; 4]).unwrap();
    assert!(endpoint.memory().is_lost());
    barriers.1.wait();
    while server.stats().violations == 0 {
        std::thread::yield_now();
    }
    assert_eq!(server.stats().messages, 3, "the version, a reset, one that waits");
}
