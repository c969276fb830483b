// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client of its own moves a device from one bus to another while its driver works. The memory
//! reaches the other machine by the log of written pages alone.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::{Value, json};
use vbus_core::memory::MemoryContext;
use vbus_core::shm::Memory;
use vbus_core::shm::abi::{command, reg};
use vbus_core::shm::ring::{DeviceEnd, DriverEnd, Entry, Layout, Return, Returns, SIGNAL_OFFSET};
use vbus_core::shm::signal::Armed;
use vbus_core::shm::sync::Word;
use vbus_core::{
    Access, Bus, Call, Connection, Device, ErrorCode, Executor, Identity, Interrupt, Open,
    Progress, Region, Tuning, Window, lock,
};
use vbus_vfio_user::{DeviceServer, HoldError};
use vfio_user_protocol::message::{DmaRange, MigrationState};
use vfio_user_protocol::{Client, ClientError, Errno, pci};

/// How long a test waits for what must happen.
const BOUND: Duration = Duration::from_secs(60);
const PAGE: u64 = 4096;
/// The driver's memory: 1 MiB from here on.
const BASE: u64 = 1 << 30;
const BYTES: u64 = 1 << 20;
/// The ring, in the second page and the third.
const RING: u64 = PAGE;
const ENTRIES: u32 = 256;
/// The buffers: a page for each entry of the ring.
const BUFFERS: u64 = 16 * PAGE;
const BUFFER: u64 = 2 * PAGE;

/// A device whose answers depend on all that it was asked: each is a hash of the requests so far.
/// It writes the answer into the request's buffer, which has two pages: in one or in both of them.
/// A call of it does not end.
struct Chain {
    /// Whether it can be saved.
    saved: bool,
}

struct Chaining {
    hash: u64,
    ring: Option<(DeviceEnd<Window>, Interrupt)>,
    memory: Arc<MemoryContext>,
    saved: bool,
    call: Option<Call>,
}

/// The next answer.
fn chained(hash: u64, request: u64) -> u64 {
    (hash ^ request).wrapping_mul(0x100_0000_01b3).rotate_left(23)
}

/// Where the answer goes in the buffer: sometimes over the end of its first page.
fn place(hash: u64) -> u64 {
    16 + hash % (BUFFER - 32)
}

impl Device for Chain {
    fn identity(&self) -> Identity {
        Identity::user("chain")
    }

    fn open(&self, open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        let (memory, saved) = (open.memory, self.saved);
        Ok(Box::new(Chaining { hash: 0, ring: None, memory, saved, call: None }))
    }

    fn save(&self) -> Result<Value, String> {
        Ok(json!({}))
    }

    fn restore(&self, state: &Value) -> Result<(), String> {
        vbus_core::state::is_nothing(state)
    }

    fn reopen(
        &self,
        open: Open,
        mut regions: Vec<Region>,
        state: &Value,
    ) -> Result<Box<dyn Connection>, String> {
        let hash = state["hash"].as_u64().ok_or("no hash")?;
        let region = regions.pop().ok_or("no region")?;
        let (ring, _) = DeviceEnd::resume(region.window).map_err(|e| format!("{e:?}"))?;
        let ring = Some((ring, region.interrupt));
        let (memory, saved) = (open.memory, self.saved);
        Ok(Box::new(Chaining { hash, ring, memory, saved, call: None }))
    }
}

impl Connection for Chaining {
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        self.ring = Some((DeviceEnd::attach(region.window)?, region.interrupt));
        Ok(())
    }

    fn start_call(&mut self, call: Call) {
        self.call = Some(call);
    }

    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let Some((ring, interrupt)) = &mut self.ring else { return Ok(Progress::Idle) };
        let view = self.memory.view();
        let mut done = 0;
        while done < budget {
            let Some(entry) = ring.take()? else { break };
            let mut request = [0; 8];
            view.read(entry.addr, &mut request)?;
            self.hash = chained(self.hash, u64::from_le_bytes(request));
            view.write(entry.addr + place(self.hash), &self.hash.to_le_bytes())?;
            ring.give_back(Return { len: 8, ..entry.into() });
            done += 1;
        }
        drop(view);
        interrupt.kick(ring.post());
        Ok(if done == 0 { Progress::Idle } else { Progress::Busy })
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        Ok(self.ring.as_mut().map_or(Armed::Waiting, |(ring, _)| ring.arm(0)))
    }

    fn disarm(&mut self) {
        if let Some((ring, _)) = &mut self.ring {
            ring.disarm();
        }
    }

    fn save(&mut self) -> Result<Value, String> {
        match self.saved {
            true => Ok(json!({ "hash": self.hash })),
            false => Err("a chain that cannot be saved".into()),
        }
    }
}

/// A bus with one chain.
struct One {
    bus: Bus,
    server: DeviceServer,
    path: PathBuf,
}

impl One {
    fn new(folder: &Path, name: &str, saved: bool) -> One {
        let path = folder.join(name);
        let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
        let endpoint = bus.add("chain0", Arc::new(Chain { saved })).unwrap();
        let server = DeviceServer::start(endpoint, &path, Default::default()).unwrap();
        One { bus, server, path }
    }
}

/// Connects, and waits for the client before to leave.
pub fn patiently<C>(connect: impl Fn() -> Result<C, ClientError>) -> C {
    let begun = Instant::now();
    loop {
        match connect() {
            Ok(connected) => return connected,
            Err(ClientError::Refused { errno: Errno::BUSY, .. }) if begun.elapsed() < BOUND => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// A machine: its memory, and its client at the device.
struct Machine {
    client: Mutex<Client>,
    file: OwnedFd,
    /// The same memory for the driver.
    memory: MemoryContext,
    doorbells: Mutex<Vec<OwnedFd>>,
}

impl Machine {
    fn new(one: &One) -> Machine {
        let file = memfd_create("machine", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, BYTES).unwrap();
        let memory = MemoryContext::new();
        let mapped = Some((file.try_clone().unwrap(), 0));
        memory.map(BASE, BYTES, mapped, Access::BOTH).unwrap();
        let mut client = patiently(|| Client::connect(&one.path));
        client.dma_map(file.as_fd(), 0, BASE, BYTES).unwrap();
        let machine =
            Machine { client: Mutex::new(client), file, memory, doorbells: Mutex::default() };
        machine.take_doorbells();
        machine
    }

    fn client(&self) -> MutexGuard<'_, Client> {
        lock(&self.client)
    }

    fn take_doorbells(&self) {
        let found = self.client().io_eventfds(pci::REGION_BAR0).unwrap();
        *lock(&self.doorbells) = found.into_iter().map(|found| found.fd).collect();
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.client().region_write(pci::REGION_BAR0, offset, bytes).unwrap();
    }

    fn command(&self, number: u32, arguments: &[u64]) -> Result<u64, u32> {
        for (i, argument) in (0..).zip(arguments) {
            self.write(reg::ARGUMENT + 8 * i, &argument.to_le_bytes());
        }
        self.write(reg::COMMAND, &number.to_le_bytes());
        let (mut result, mut value) = ([0; 4], [0; 8]);
        self.client().region_read(pci::REGION_BAR0, reg::RESULT, &mut result).unwrap();
        self.client().region_read(pci::REGION_BAR0, reg::VALUE, &mut value).unwrap();
        match u32::from_le_bytes(result) {
            0 => Ok(u64::from_le_bytes(value)),
            error => Err(error),
        }
    }

    /// The driver opens the device and makes its ring.
    fn open(&self) -> (DriverEnd<Place>, Place) {
        self.client().region_write(pci::REGION_CONFIG, 4, &6u16.to_le_bytes()).unwrap();
        self.memory.view().write(BASE, &77u64.to_le_bytes()).unwrap();
        assert_eq!(self.command(command::OPEN, &[1, 0, BASE, 77]), Ok(0));
        let layout = Layout::new(ENTRIES, Returns::Entries).unwrap();
        let bytes = layout.bytes() as u64;
        let window = self.memory.window(BASE + RING, bytes).unwrap();
        let place = Place(Arc::default());
        place.0.to(0, window);
        let ring = DriverEnd::create(place.clone(), layout, 0).unwrap();
        let arguments = [0, BASE + RING, bytes, SIGNAL_OFFSET as u64];
        assert_eq!(self.command(command::REGION_ADD, &arguments), Ok(0));
        (ring, place)
    }

    /// The pages that the device has written, by the log.
    fn dirty(&self) -> BTreeSet<u64> {
        let bitmap = self.client().dma_logging_report(BASE, BYTES, PAGE).unwrap();
        let pages = bitmap.len() as u64 * 64;
        (0..pages).filter(|page| bitmap[(page / 64) as usize] & 1 << (page % 64) != 0).collect()
    }

    fn copy_pages(&self, to: &Machine, pages: impl IntoIterator<Item = u64>) -> u64 {
        let mut count = 0;
        for page in pages {
            let mut bytes = [0; 4096];
            assert_eq!(rustix::io::pread(&self.file, &mut bytes, page * PAGE).unwrap(), 4096);
            assert_eq!(rustix::io::pwrite(&to.file, &bytes, page * PAGE).unwrap(), 4096);
            count += 1;
        }
        count
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(BYTES).unwrap()];
        assert_eq!(rustix::io::pread(&self.file, &mut bytes, 0).unwrap(), bytes.len());
        bytes
    }
}

/// The driver's memory of the ring. A move gives the machine other memory with the same content,
/// and the driver does not notice. Here it does, because all machines are in this process.
#[derive(Default)]
struct Moving {
    windows: [OnceLock<Window>; 8],
    now: AtomicUsize,
}

impl Moving {
    /// The machine is moved for the time number `turn`. The driver does nothing meanwhile.
    fn to(&self, turn: usize, window: Window) {
        self.windows[turn].set(window).unwrap();
        self.now.store(turn, Ordering::Relaxed);
    }
}

/// All that have it see the same memory.
#[derive(Clone)]
struct Place(Arc<Moving>);

impl Memory for Place {
    fn words(&self) -> &[Word] {
        self.0.windows[self.0.now.load(Ordering::Relaxed)].get().unwrap().words()
    }
}

/// The driver's work, which a processor of the machine does.
struct Driver {
    ring: DriverEnd<Place>,
    place: Place,
    /// The number of the next request, and of the next answer.
    next: u64,
    answered: u64,
    /// The answer before.
    hash: u64,
    /// The pages that the driver has written, as a hypervisor logs them.
    written: BTreeSet<u64>,
}

impl Driver {
    fn buffer(number: u64) -> u64 {
        BUFFERS + number % 100 * BUFFER
    }

    /// Sends up to 40 requests.
    fn send(&mut self, machine: &Machine) {
        for _ in 0..40 {
            if self.next - self.answered == 100 {
                break;
            }
            let addr = Self::buffer(self.next);
            let request = self.next.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            machine.memory.view().write(BASE + addr, &request.to_le_bytes()).unwrap();
            let id = (self.next % 100) as u16;
            self.ring.submit(Entry { addr: BASE + addr, len: 8, id, flags: 0 }).unwrap();
            self.next += 1;
            self.written.insert(addr / PAGE);
        }
        // The ring has two pages, and the driver writes in both.
        self.written.extend([RING / PAGE, RING / PAGE + 1]);
        if self.ring.post().is_wanted() {
            rustix::io::write(&lock(&machine.doorbells)[0], &1u64.to_ne_bytes()).unwrap();
        }
    }

    /// Takes the answers that are there, and checks them.
    fn receive(&mut self, machine: &Machine) {
        while let Some(back) = self.ring.reap().unwrap() {
            assert_eq!(u64::from(back.id), self.answered % 100, "answers come in order");
            let request = self.answered.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.hash = chained(self.hash, request);
            let mut answer = [0; 8];
            let at = BASE + Self::buffer(self.answered) + place(self.hash);
            machine.memory.view().read(at, &mut answer).unwrap();
            assert_eq!(u64::from_le_bytes(answer), self.hash, "answer {}", self.answered);
            self.answered += 1;
        }
    }
}

/// Stops the driver, also when a test fails while it runs.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs the driver until `stop`. It holds the lock of the driver only for one step.
fn run(machine: &Machine, driver: &Mutex<Driver>, stop: &AtomicBool, answers: &AtomicU64) {
    while !stop.load(Ordering::Relaxed) {
        let mut driver = lock(driver);
        if stop.load(Ordering::Relaxed) {
            break;
        }
        driver.receive(machine);
        driver.send(machine);
        answers.store(driver.answered, Ordering::Relaxed);
        drop(driver);
        std::thread::yield_now();
    }
}

fn wait_for(answers: &AtomicU64, more: u64) {
    let (before, begun) = (answers.load(Ordering::Relaxed), Instant::now());
    while answers.load(Ordering::Relaxed) < before + more {
        assert!(begun.elapsed() < BOUND, "the driver gets no answers");
        std::thread::yield_now();
    }
}

fn refused(result: Result<impl std::fmt::Debug, ClientError>) -> Errno {
    match result {
        Err(ClientError::Refused { errno, .. }) => errno,
        other => panic!("not refused: {other:?}"),
    }
}

/// Reads the stream of the device's state as far as it goes.
pub fn read_all(client: &mut Client) -> Vec<u8> {
    let mut stream = Vec::new();
    loop {
        let (bytes, more) = client.migration_read().unwrap();
        stream.extend(bytes);
        if !more {
            return stream;
        }
    }
}

/// Moves the machine to another bus while its driver works. Returns the other machine.
fn move_machine(
    from: &Machine,
    (one, turn): (&One, usize),
    driver: &Mutex<Driver>,
    (answers, stop): (&AtomicU64, &AtomicBool),
) -> Machine {
    let to = Machine::new(one);
    let all = [DmaRange { iova: BASE, length: BYTES }];
    assert_eq!(from.client().dma_logging_start(PAGE, &all).unwrap(), PAGE);
    from.client().set_migration_state(MigrationState::PreCopy).unwrap();
    let mut stream = read_all(&mut from.client());
    assert_eq!(stream.len(), 32, "the estimate");
    lock(driver).written.clear();
    from.copy_pages(&to, 0..BYTES / PAGE);
    let mut copied = 0;
    for _ in 0..5 {
        wait_for(answers, 200);
        // What the driver writes is the hypervisor's to log.
        let mut guard = lock(driver);
        let written = std::mem::take(&mut guard.written);
        drop(guard);
        copied += from.copy_pages(&to, written);
        copied += from.copy_pages(&to, from.dirty());
    }
    assert!(copied > 100, "{copied} pages were copied while the driver worked");

    // The processors stop, while requests are on their way.
    let mut driver = lock(driver);
    driver.send(from);
    from.copy_pages(&to, std::mem::take(&mut driver.written));
    from.client().set_migration_state(MigrationState::StopCopy).unwrap();
    from.copy_pages(&to, from.dirty());
    stream.extend(read_all(&mut from.client()));
    assert!(from.bytes() == to.bytes(), "the log has missed a page");
    assert!(from.dirty().is_empty(), "a device that has stopped writes nothing");

    to.client().set_migration_state(MigrationState::Resuming).unwrap();
    to.client().migration_write(&stream).unwrap();
    to.client().set_migration_state(MigrationState::Running).unwrap();
    to.take_doorbells();
    // The same ring, in the memory of the other machine.
    let bytes = driver.ring.layout().bytes() as u64;
    // The driver goes on at the other machine.
    stop.store(true, Ordering::Relaxed);
    driver.place.0.to(turn, to.memory.window(BASE + RING, bytes).unwrap());
    to
}

#[test]
fn a_device_is_moved_under_load_there_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let buses = ["a", "b"].map(|name| One::new(folder.path(), name, true));
    let mut machine = Machine::new(&buses[0]);
    let (ring, place) = machine.open();
    let written = BTreeSet::new();
    let driver = Mutex::new(Driver { ring, place, next: 0, answered: 0, hash: 0, written });
    let answers = AtomicU64::new(0);
    for turn in 1..=6 {
        let stop = AtomicBool::new(false);
        machine = std::thread::scope(|scope| {
            let work = scope.spawn(|| run(&machine, &driver, &stop, &answers));
            let _stop = Stop(&stop);
            wait_for(&answers, 100);
            let to = (&buses[turn % 2], turn);
            let next = move_machine(&machine, to, &driver, (&answers, &stop));
            work.join().unwrap();
            next
        });
    }
    let begun = Instant::now();
    let mut driver = lock(&driver);
    while driver.answered < driver.next {
        assert!(begun.elapsed() < BOUND, "answers are lost");
        driver.receive(&machine);
        std::thread::yield_now();
    }
    assert!(driver.answered > 6000, "{} answers", driver.answered);
    for one in &buses {
        assert_eq!(one.bus.get("chain0").unwrap().counters().broken.get(), 0);
    }
}

/// A driver that has sent its first requests and has their answers.
fn driver(machine: &Machine) -> Driver {
    let (ring, place) = machine.open();
    let written = BTreeSet::new();
    let mut driver = Driver { ring, place, next: 0, answered: 0, hash: 0, written };
    driver.send(machine);
    driver.wait(machine);
    driver
}

impl Driver {
    /// Waits for the answers to all requests.
    fn wait(&mut self, machine: &Machine) {
        let begun = Instant::now();
        while self.answered < self.next {
            assert!(begun.elapsed() < BOUND, "no answer");
            self.receive(machine);
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_device_that_has_stopped_stands_still_until_it_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let one = One::new(folder.path(), "a", true);
    let machine = Machine::new(&one);
    let mut driver = driver(&machine);
    for state in [MigrationState::Stop, MigrationState::StopCopy, MigrationState::Resuming] {
        machine.client().set_migration_state(state).unwrap();
        driver.send(&machine);
        let sent = machine.bytes();
        // Time for a device that does not stand still. One that does passes in any case.
        std::thread::sleep(Duration::from_millis(20));
        assert!(machine.bytes() == sent, "a device that has stopped writes");
        if state != MigrationState::Resuming {
            machine.client().set_migration_state(MigrationState::Running).unwrap();
            driver.wait(&machine);
        }
    }
    // A stream without a state is none: the device waits for its reset.
    let running = MigrationState::Running;
    assert_eq!(refused(machine.client().set_migration_state(running)), Errno::INVAL);
    assert_eq!(machine.client().migration_state().unwrap(), MigrationState::Error);
    machine.client().reset().unwrap();
    assert_eq!(machine.client().migration_state().unwrap(), running);
    // The reset has closed the driver's connection. The device can be used again.
    self::driver(&machine);
}

#[test]
fn a_device_that_cannot_be_saved_has_no_migration_and_runs() {
    let folder = tempfile::tempdir().unwrap();
    let one = One::new(folder.path(), "a", false);
    let machine = Machine::new(&one);
    // Nobody uses it so far, and it could be saved.
    assert!(machine.client().migration_flags().unwrap().is_some());
    drop(machine);
    let machine = Machine::new(&one);
    let mut driver = driver(&machine);
    assert_eq!(machine.client().migration_flags().unwrap(), None);
    let stop = MigrationState::Stop;
    assert_eq!(refused(machine.client().set_migration_state(stop)), Errno::NOTTY);
    assert_eq!(refused(machine.client().migration_read()), Errno::OPNOTSUPP);
    driver.send(&machine);
    driver.wait(&machine);
    // Pages are logged nevertheless.
    assert!(machine.client().logs_dma().unwrap());
    machine.client().dma_logging_start(PAGE, &[]).unwrap();
    driver.send(&machine);
    driver.wait(&machine);
    assert!(machine.dirty().len() > 10);
}

#[test]
fn a_device_that_is_busy_has_a_migration_when_its_call_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let one = One::new(folder.path(), "a", true);
    let machine = Machine::new(&one);
    drop(driver(&machine));
    assert_eq!(machine.command(command::CALL, &[1, 0, 0]), Err(ErrorCode::IN_PROGRESS.0));
    // The client gets an answer before it gives the server up.
    assert_eq!(machine.client().migration_flags().unwrap(), None);
    assert_eq!(machine.command(command::CLOSE, &[]), Ok(0));
    assert!(machine.client().migration_flags().unwrap().is_some());
    drop(driver(&machine));
    assert_eq!(machine.command(command::CALL, &[1, 0, 0]), Err(ErrorCode::IN_PROGRESS.0));
    let stop = MigrationState::Stop;
    assert_eq!(refused(machine.client().set_migration_state(stop)), Errno::BUSY);
    assert_eq!(machine.client().migration_state().unwrap(), MigrationState::Running);
}

#[test]
fn a_device_whose_connection_cannot_be_saved_any_more_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let one = One::new(folder.path(), "a", false);
    let machine = Machine::new(&one);
    machine.client().set_migration_state(MigrationState::PreCopy).unwrap();
    let mut driver = driver(&machine);
    let copy = MigrationState::StopCopy;
    assert_eq!(refused(machine.client().set_migration_state(copy)), Errno::BUSY);
    assert_eq!(machine.client().migration_state().unwrap(), MigrationState::PreCopy);
    driver.send(&machine);
    driver.wait(&machine);
}

#[test]
fn streams_that_lie_end_in_an_error_and_not_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let one = One::new(folder.path(), "a", true);
    let machine = Machine::new(&one);
    driver(&machine);
    machine.client().set_migration_state(MigrationState::StopCopy).unwrap();
    let good = read_all(&mut machine.client());
    machine.client().set_migration_state(MigrationState::Running).unwrap();
    let text = String::from_utf8(good[24..].to_vec()).unwrap();
    let with = |text: &str| {
        let len = (text.len() as u64).to_le_bytes();
        [&good[..16], &len, text.as_bytes()].concat()
    };
    assert_eq!(with(&text), good);
    let lies = [
        good[..good.len() - 1].to_vec(),
        [&good[..], &good[..]].concat(),
        vec![0; 100],
        with("{}"),
        with(&text.replace("\"chain\"", "\"other\"")),
        with(&text.replace("\"format\":1", "\"format\":9")),
        // A region where no memory is.
        with(&text.replace(&format!("\"at\":{}", BASE + RING), "\"at\":0")),
        with(&"[".repeat(100_000)),
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        assert_ne!(lie, good, "lie {number}");
        let mut client = machine.client();
        client.set_migration_state(MigrationState::Resuming).unwrap();
        client.migration_write(&lie).unwrap();
        let state = client.set_migration_state(MigrationState::Stop);
        assert_eq!(refused(state), Errno::INVAL, "lie {number}");
        assert_eq!(client.migration_state().unwrap(), MigrationState::Error);
        client.reset().unwrap();
    }
    // More than a stream may have.
    let mut client = machine.client();
    client.set_migration_state(MigrationState::Resuming).unwrap();
    let mib = vec![0; 1 << 20];
    let written = (0..100).map(|_| client.migration_write(&mib)).take_while(Result::is_ok).count();
    assert!(written <= 8, "{written} MiB are taken");
    assert_eq!(refused(client.migration_write(&mib)), Errno::FBIG);
    client.reset().unwrap();
    drop(client);
    driver(&machine);
}

#[test]
fn a_client_that_goes_away_within_a_migration_leaves_a_device_for_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let one = One::new(folder.path(), "a", true);
    for state in [MigrationState::StopCopy, MigrationState::Resuming, MigrationState::PreCopy] {
        let machine = Machine::new(&one);
        driver(&machine);
        machine.client().dma_logging_start(PAGE, &[]).unwrap();
        machine.client().set_migration_state(state).unwrap();
        // A process that takes the server over waits until the device is moved.
        assert_eq!(one.server.hold(Instant::now() + BOUND), Err(HoldError::Migrating));
        assert_eq!(machine.client().migration_state().unwrap(), state);
    }
    let machine = Machine::new(&one);
    assert_eq!(machine.client().migration_state().unwrap(), MigrationState::Running);
    let off = machine.client().dma_logging_report(BASE, BYTES, PAGE);
    assert_eq!(refused(off), Errno::INVAL);
    driver(&machine);
}
