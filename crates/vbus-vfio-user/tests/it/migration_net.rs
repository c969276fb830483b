// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client moves a NIC from one bus to another while frames pass. After the machine's processors
//! have stopped, the memory reaches the other machine by the log of written pages alone.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::json;
use vbus_core::memory::MemoryContext;
use vbus_core::shm::Memory;
use vbus_core::shm::sync::Word;
use vbus_core::{Access, Bus, Executor, Tuning, Window, lock};
use vbus_driver::venet::{
    Coalesce, F_COALESCE, F_VLAN, FRAME_MAX, HEADER_BYTES, Nic, Piece, Rx, Tx, VLAN_MAP_BYTES,
};
use vbus_driver::{Dma, Function, Hal, HeapTable, NoMemory};
use vbus_net::{Direct, Switches};
use vbus_process::Process;
use vbus_vfio_user::DeviceServer;
use vbus_virtio::net::VirtioNetClass;
use vfio_user_protocol::message::MigrationState;
use vfio_user_protocol::{Client, ClientError, pci};

use crate::migration::{patiently, read_all};

/// How long a test waits for what must happen.
const BOUND: Duration = Duration::from_secs(60);
pub const PAGE: u64 = 4096;
/// The machine's memory: from here on.
const BASE: u64 = 1 << 30;
pub const BYTES: u64 = 16 << 20;
const ENTRIES: u32 = 64;
const BUFFER: usize = 4096;
const SLOT: usize = FRAME_MAX.next_multiple_of(64);
/// How many frames are on their way at most.
const WINDOW: u64 = 24;

/// A bus with the NIC of a machine and the NIC of somebody else, on one switch.
struct Host {
    _bus: Bus,
    _servers: Vec<DeviceServer>,
    nic: PathBuf,
    other: PathBuf,
}

impl Host {
    /// `class` is that of the machine's NIC.
    fn new(folder: &Path, name: &str, class: &str) -> Host {
        let tuning = Tuning { workers: 2, ..Tuning::default() };
        let (switches, opener) = (Switches::default(), Arc::new(Direct));
        let mut classes = vbus_devices::classes_on(switches.clone(), opener.clone());
        classes.push(Box::new(VirtioNetClass::on(switches, opener)));
        let bus = Bus::new(Executor::start(tuning).unwrap(), classes);
        let serve = |last: u8, class: &str| {
            let config = json!({
                "mac": format!("02:00:00:00:00:{last:02x}"),
                "backend": "switch",
                "backpressure-ms": 60_000,
            });
            let endpoint = bus.create(&format!("n{last}"), class, &config).unwrap();
            let path = folder.join(format!("{name}{last}"));
            (DeviceServer::start(endpoint, &path, Default::default()).unwrap(), path)
        };
        let ((a, nic), (b, other)) = (serve(1, class), serve(2, "venet"));
        Host { _bus: bus, _servers: vec![a, b], nic, other }
    }
}

/// The machine at one host: its memory, for the device and for the driver, and its client.
pub struct Machine {
    /// `None`: the machine has left this host.
    pub client: Mutex<Option<Client>>,
    file: OwnedFd,
    context: MemoryContext,
    memory: Window,
}

impl Machine {
    pub fn new(path: &Path) -> Machine {
        let file = memfd_create("machine", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, BYTES).unwrap();
        let context = MemoryContext::new();
        let mapped = Some((file.try_clone().unwrap(), 0));
        context.map(BASE, BYTES, mapped, Access::BOTH).unwrap();
        let memory = context.window(BASE, BYTES).unwrap();
        let machine = Machine { client: Mutex::default(), file, context, memory };
        machine.connect(path);
        machine
    }

    /// The device of this machine is the one at `path` from now on. Returns the client of the
    /// former one.
    pub fn connect(&self, path: &Path) -> Option<Client> {
        let mut client = patiently(|| Client::connect(path));
        client.dma_map(self.file.as_fd(), 0, BASE, BYTES).unwrap();
        lock(&self.client).replace(client)
    }

    pub fn ask<R>(&self, ask: impl FnOnce(&mut Client) -> Result<R, ClientError>) -> R {
        ask(lock(&self.client).as_mut().unwrap()).unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(BYTES).unwrap()];
        assert_eq!(rustix::io::pread(&self.file, &mut bytes, 0).unwrap(), bytes.len());
        bytes
    }

    pub fn copy_page(&self, to: &Machine, page: u64) {
        let mut bytes = [0; 4096];
        assert_eq!(rustix::io::pread(&self.file, &mut bytes, page * PAGE).unwrap(), 4096);
        assert_eq!(rustix::io::pwrite(&to.file, &bytes, page * PAGE).unwrap(), 4096);
    }

    /// Copies the pages that the device has written, by the log. Returns their number.
    pub fn copy_dirty(&self, to: &Machine) -> usize {
        let bitmap = self.ask(|client| client.dma_logging_report(BASE, BYTES, PAGE));
        let pages = (0..BYTES / PAGE).filter(|page| {
            let word = usize::try_from(page / 64).unwrap();
            bitmap[word] & 1 << (page % 64) != 0
        });
        pages.inspect(|page| self.copy_page(to, *page)).count()
    }
}

/// The environment of the machine's driver, at whichever host the machine is.
#[derive(Clone)]
pub struct Guest(pub Arc<Inner>);

#[derive(Default)]
pub struct Inner {
    machines: [OnceLock<Machine>; 8],
    now: AtomicUsize,
    /// The next free byte of the memory.
    next: AtomicU64,
}

impl Guest {
    pub fn machine(&self) -> &Machine {
        self.0.machines[self.0.now.load(Ordering::Acquire)].get().unwrap()
    }

    /// The machine is at another host now. Its driver does nothing meanwhile.
    pub fn moves_to(&self, turn: usize, machine: Machine) {
        assert!(self.0.machines[turn].set(machine).is_ok());
        self.0.now.store(turn, Ordering::Release);
    }

    /// The system lets the device use its memory.
    pub fn set_bus_master(&self) {
        let command = 6u16.to_le_bytes();
        self.machine().ask(|client| client.region_write(pci::REGION_CONFIG, 4, &command));
    }

    fn read(&self, region: u32, offset: u64, bytes: &mut [u8]) {
        self.machine().ask(|client| client.region_read(region, offset, bytes));
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.machine().ask(|client| client.region_post(pci::REGION_BAR0, offset, bytes));
    }
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guest")
    }
}

impl Hal for Guest {
    type Dma = Part;
    type Regions = HeapTable<Part>;

    fn config_read32(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(pci::REGION_CONFIG, offset.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn read32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(pci::REGION_BAR0, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn read64(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(pci::REGION_BAR0, offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn write32(&self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    fn write64(&self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    fn alloc(&self, bytes: usize) -> Result<Part, NoMemory> {
        let pages = (bytes as u64).next_multiple_of(PAGE);
        let at = self.0.next.fetch_add(pages, Ordering::Relaxed);
        let len = bytes.next_multiple_of(8);
        (at + pages <= BYTES).then(|| Part { guest: self.clone(), at, len }).ok_or(NoMemory)
    }

    fn now(&self) -> u64 {
        vbus_process::clock::now()
    }

    fn pause(&self, waited: u64) -> bool {
        vbus_process::clock::pause(waited)
    }
}

/// A part of the machine's memory.
#[derive(Clone, Debug)]
pub struct Part {
    guest: Guest,
    at: u64,
    len: usize,
}

impl Memory for Part {
    fn words(&self) -> &[Word] {
        let first = usize::try_from(self.at).unwrap() / 8;
        &self.guest.machine().memory.words()[first..first + self.len / 8]
    }
}

impl Dma for Part {
    fn page_shift(&self) -> u8 {
        0
    }

    fn address(&self, offset: usize) -> u64 {
        BASE + self.at + offset as u64
    }
}

/// A NIC and its driver.
pub trait Frames {
    /// Sends a frame. False: the ring is full.
    fn send(&mut self, frame: &[u8]) -> bool;

    /// Takes a frame that has come.
    fn receive(&mut self) -> Option<Vec<u8>>;

    /// The driver says anew what it wants, as `n` has it. It wants all frames to it in any case.
    /// Returns what came of it.
    fn choose(&mut self, n: u64) -> String {
        n.to_string()
    }
}

/// A venet with one queue pair and its buffers.
pub struct Station<H: Hal> {
    nic: Nic<H>,
    tx: Tx<H>,
    rx: Rx<H>,
    sending: H::Dma,
    sent: usize,
}

impl<H: Hal> Station<H> {
    pub fn new(hal: H) -> Station<H> {
        let function = Function::probe(hal.clone()).unwrap();
        let mut nic = Nic::open(function, F_COALESCE | F_VLAN, 0).unwrap();
        let buffer = u32::try_from(BUFFER).unwrap();
        let (tx, mut rx) = nic.queue_pair(0, ENTRIES, buffer, 0).unwrap();
        (0..rx.space()).for_each(|id| rx.give(u16::try_from(id).unwrap()).unwrap());
        rx.post();
        nic.start().unwrap();
        let sending = hal.alloc(SLOT * ENTRIES as usize).unwrap();
        Station { nic, tx, rx, sending, sent: 0 }
    }
}

impl<H: Hal> Frames for Station<H> {
    fn send(&mut self, frame: &[u8]) -> bool {
        self.tx.reclaim().unwrap();
        if self.tx.space() < 2 {
            return false;
        }
        let slot = self.sent % ENTRIES as usize * SLOT;
        self.sent += 1;
        let bytes = [&[0; HEADER_BYTES], frame].concat();
        self.sending.copy_in(slot, &bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        assert!(self.tx.submit(&[Piece { addr: self.sending.address(slot), len }]).unwrap());
        self.tx.post();
        true
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        let pieces = self.rx.receive().unwrap()?.to_vec();
        let mut frame = Vec::new();
        for piece in pieces {
            let mut bytes = vec![0; usize::try_from(piece.len).unwrap()];
            self.rx.buffers().copy_out(usize::from(piece.id) * BUFFER, &mut bytes);
            frame.extend(bytes);
            self.rx.give(piece.id).unwrap();
        }
        self.rx.post();
        Some(frame.split_off(self.rx.header_bytes()))
    }

    fn choose(&mut self, n: u64) -> String {
        let word = u32::try_from(n % 256).unwrap();
        let result = match n / 256 % 4 {
            0 => {
                let [rx, tx] = [word, word % 4].map(|frames| Coalesce { usecs: 100, frames });
                self.nic.set_coalesce(None, rx, tx)
            }
            1 => self.nic.set_vlans(Some(&[n.to_le_bytes()[1]; VLAN_MAP_BYTES])),
            2 => self.nic.set_vlans(None),
            _ => self.nic.filter(word % 8, &[[3, 0, 0, 0, 1, n.to_le_bytes()[0]]]),
        };
        format!("{result:?}")
    }
}

/// A virtio-net card with a queue of each kind. Each buffer has one descriptor.
pub struct Card {
    guest: Guest,
    rx: Queue,
    tx: Queue,
}

/// The driver's end of a queue of `SIZE` descriptors, and their buffers.
struct Queue {
    /// The queue is packed, and not split: `desc` is its ring.
    packed: bool,
    /// Offsets in the machine's memory.
    desc: u64,
    avail: u64,
    used: u64,
    buffers: u64,
    /// The offset in BAR 0 by which the device is told.
    notify: u64,
    next: u16,
    seen: u16,
}

const SIZE: u16 = 64;
/// The flags of a descriptor of a packed queue that say whose it is.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// The wrap counter of a packed queue at its descriptor `number`, counted from its start.
fn wraps(number: u16) -> bool {
    number / SIZE % 2 == 0
}

const ROOM: u64 = 4096;
/// The header of virtio-net.
const HEAD: usize = 12;

impl Guest {
    fn store(&self, at: u64, bytes: &[u8]) {
        self.machine().context.view().write(BASE + at, bytes).unwrap();
    }

    fn load(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.machine().context.view().read(BASE + at, &mut bytes).unwrap();
        bytes
    }

    fn load16(&self, at: u64) -> u16 {
        u16::from_le_bytes(*self.load(at, 2).first_chunk().unwrap())
    }
}

impl Queue {
    /// Gives the device the buffer `id`, with `len` bytes, to write or to read.
    fn add(&mut self, guest: &Guest, id: u16, len: u32, write: bool) {
        let flags = if write { 2u16 } else { 0 };
        let addr = (BASE + self.buffers + u64::from(id) * ROOM).to_le_bytes();
        let entry = [&addr[..], &len.to_le_bytes()].concat();
        if self.packed {
            let at = self.desc + 16 * u64::from(self.next % SIZE);
            guest.store(at, &[&entry[..], &id.to_le_bytes()].concat());
            let marks = if wraps(self.next) { AVAIL } else { USED };
            self.next = self.next.wrapping_add(1);
            fence(Ordering::SeqCst);
            guest.store(at + 14, &(flags | marks).to_le_bytes());
            return guest.write(self.notify, &[0; 2]);
        }
        let entry = [&entry[..], &flags.to_le_bytes(), &[0; 2]].concat();
        guest.store(self.desc + 16 * u64::from(id), &entry);
        guest.store(self.avail + 4 + 2 * u64::from(self.next % SIZE), &id.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        fence(Ordering::SeqCst);
        guest.store(self.avail + 2, &self.next.to_le_bytes());
        guest.write(self.notify, &[0; 2]);
    }

    /// The buffer that came back: its number, and how many bytes the device has written.
    fn take(&mut self, guest: &Guest) -> Option<(u16, usize)> {
        if self.packed {
            let at = self.desc + 16 * u64::from(self.seen % SIZE);
            let marks = if wraps(self.seen) { AVAIL | USED } else { 0 };
            if self.seen == self.next || guest.load16(at + 14) & (AVAIL | USED) != marks {
                return None;
            }
            fence(Ordering::SeqCst);
            self.seen = self.seen.wrapping_add(1);
            return Some((guest.load16(at + 12), guest.load16(at + 8).into()));
        }
        if guest.load16(self.used + 2) == self.seen {
            return None;
        }
        fence(Ordering::SeqCst);
        let at = self.used + 4 + 8 * u64::from(self.seen % SIZE);
        self.seen = self.seen.wrapping_add(1);
        Some((guest.load16(at), guest.load16(at + 4).into()))
    }
}

impl Card {
    pub fn new(guest: Guest, packed: bool) -> Card {
        let mut space = [0; 256];
        guest.read(pci::REGION_CONFIG, 0, &mut space);
        let word = |at: usize| u32::from_le_bytes(*space[at..].first_chunk().unwrap());
        let (mut common, mut notify, mut stride) = (0, 0, 0);
        let mut at = usize::from(space[0x34]);
        while at != 0 {
            match (space[at], space[at + 3]) {
                (9, 1) => common = word(at + 8).into(),
                (9, 2) => (notify, stride) = (u64::from(word(at + 8)), u64::from(word(at + 16))),
                _ => {}
            }
            at = space[at + 1].into();
        }
        let set = |field: u64, bytes: &[u8]| guest.write(common + field, bytes);
        // Reset, found, VIRTIO_F_VERSION_1 and perhaps VIRTIO_F_RING_PACKED, agreed.
        set(0x14, &[0]);
        set(0x14, &[3]);
        for (half, features) in [(0u32, 0u32), (1, 1 | u32::from(packed) << 2)] {
            set(0x08, &half.to_le_bytes());
            set(0x0c, &features.to_le_bytes());
        }
        set(0x14, &[11]);
        let mut status = [0];
        guest.read(pci::REGION_BAR0, common + 0x14, &mut status);
        assert_eq!(status, [11], "the device does not agree");
        let queue = |index: u16| {
            let room = |bytes: u64| guest.alloc(usize::try_from(bytes).unwrap()).unwrap().at;
            let (desc, avail, used) = (room(16 * 64), room(6 + 2 * 64), room(6 + 8 * 64));
            let buffers = room(ROOM * u64::from(SIZE));
            set(0x16, &index.to_le_bytes());
            set(0x18, &SIZE.to_le_bytes());
            for (field, at) in [(0x20, desc), (0x28, avail), (0x30, used)] {
                set(field, &(BASE + at).to_le_bytes());
            }
            set(0x1c, &1u16.to_le_bytes());
            let mut off = [0; 2];
            guest.read(pci::REGION_BAR0, common + 0x1e, &mut off);
            let notify = notify + u64::from(u16::from_le_bytes(off)) * stride;
            Queue { packed, desc, avail, used, buffers, notify, next: 0, seen: 0 }
        };
        let (mut rx, tx) = (queue(0), queue(1));
        set(0x14, &[15]);
        let room = u32::try_from(ROOM).unwrap();
        (0..SIZE).for_each(|id| rx.add(&guest, id, room, true));
        Card { guest, rx, tx }
    }
}

impl Frames for Card {
    fn send(&mut self, frame: &[u8]) -> bool {
        while self.tx.take(&self.guest).is_some() {}
        if self.tx.next.wrapping_sub(self.tx.seen) == SIZE {
            return false;
        }
        let id = self.tx.next % SIZE;
        let bytes = [&[0; HEAD], frame].concat();
        self.guest.store(self.tx.buffers + u64::from(id) * ROOM, &bytes);
        self.tx.add(&self.guest, id, u32::try_from(bytes.len()).unwrap(), false);
        true
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        let (id, len) = self.rx.take(&self.guest)?;
        let mut bytes = self.guest.load(self.rx.buffers + u64::from(id) * ROOM, len);
        self.rx.add(&self.guest, id, u32::try_from(ROOM).unwrap(), true);
        Some(bytes.split_off(HEAD))
    }
}

/// A frame to one station from the other, with a number and a content that depends on `value`.
pub fn frame(to: u8, from: u8, number: u64, value: u64) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5];
    frame.extend(number.to_le_bytes());
    frame.extend(value.to_le_bytes());
    let len = 60 + usize::try_from(number * 37 % 1400).unwrap();
    frame.extend((frame.len()..len).map(|i| ((i as u64 * 31 + value) % 251) as u8));
    frame
}

fn number(frame: &[u8]) -> u64 {
    frame[14..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn hashed(hash: u64, frame: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (hash, frame).hash(&mut hasher);
    hasher.finish()
}

/// The machine's program: it takes the frames in their order, and answers each with the hash of all
/// so far.
struct Program {
    station: Box<dyn Frames>,
    next: u64,
    hash: u64,
    answers: Vec<Vec<u8>>,
}

impl Program {
    fn run(&mut self) {
        while let Some(frame) = self.station.receive() {
            if number(&frame) == self.next {
                self.hash = hashed(self.hash, &frame);
                self.answers.push(self::frame(2, 1, self.next, self.hash));
                self.next += 1;
            }
        }
        let station = &mut self.station;
        let sent = self.answers.iter().take_while(|answer| station.send(answer)).count();
        self.answers.drain(..sent);
    }
}

/// Somebody who sends numbered frames, and checks the answers. What is lost with a host is sent
/// again: the answers begin at any number that was not answered.
struct Sender {
    station: Station<Process>,
    next: u64,
    answered: u64,
    /// How many frames may be on their way.
    window: u64,
    /// The hash of all frames up to each number.
    hashes: Vec<u64>,
}

impl Sender {
    fn run(&mut self) {
        while self.next < self.answered + self.window {
            let frame = frame(1, 2, self.next, self.next * 7);
            if !self.station.send(&frame) {
                break;
            }
            if self.hashes.len() as u64 == self.next {
                let before = self.hashes.last().copied().unwrap_or(0);
                self.hashes.push(hashed(before, &frame));
            }
            self.next += 1;
        }
        while let Some(answer) = self.station.receive() {
            let number = number(&answer);
            if number < self.answered {
                continue;
            }
            let hash = self.hashes[usize::try_from(number).unwrap()];
            assert!(answer == frame(2, 1, number, hash), "the answer to frame {number}");
            self.answered = number + 1;
        }
        // Answers may be lost with a host. A later one says that the frames have come.
        self.next = self.next.max(self.answered);
    }

    /// The frames without an answer are lost, or their answers are: sends from the first that the
    /// other end has not got.
    fn again(&mut self, from: u64) {
        (self.next, self.answered, self.window) = (from, from, WINDOW);
    }
}

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < BOUND, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_venet_connection_is_moved_while_frames_pass() {
    moves("venet", |guest| Box::new(Station::new(guest)));
}

#[test]
fn a_virtio_card_is_moved_while_frames_pass() {
    moves("virtio-net", |guest| Box::new(Card::new(guest, false)));
}

#[test]
fn a_virtio_card_with_packed_queues_is_moved_while_frames_pass() {
    moves("virtio-net", |guest| Box::new(Card::new(guest, true)));
}

fn moves(class: &str, open: impl Fn(Guest) -> Box<dyn Frames>) {
    let folder = tempfile::tempdir().unwrap();
    let hosts = ["a", "b"].map(|name| Host::new(folder.path(), name, class));
    let guest = Guest(Arc::default());
    guest.moves_to(0, Machine::new(&hosts[0].nic));
    guest.set_bus_master();
    let station = open(guest.clone());
    let mut program = Program { station, next: 0, hash: 0, answers: Vec::new() };
    let at = |host: &Host| Station::new(patiently(|| Process::connect(&host.other, 16 << 20)));
    let station = at(&hosts[0]);
    let mut sender = Sender { station, next: 0, answered: 0, window: WINDOW, hashes: Vec::new() };
    let exchange = |program: &mut Program, sender: &mut Sender, frames: u64| {
        let goal = sender.answered + frames;
        until("frames are answered", || {
            sender.run();
            program.run();
            sender.answered >= goal
        });
    };
    for turn in 1..=4 {
        let from = guest.machine();
        exchange(&mut program, &mut sender, 300);
        let host = &hosts[turn % 2];
        let to = Machine::new(&host.nic);
        from.ask(|client| client.dma_logging_start(PAGE, &[]));
        from.ask(|client| client.set_migration_state(MigrationState::PreCopy));
        for _ in 0..3 {
            exchange(&mut program, &mut sender, 100);
            assert!(from.copy_dirty(&to) > 10);
        }
        // The processors stop. All that they have written is copied, and what the device writes
        // from here on is in the log alone: the frames that come, and the rings that they use.
        (0..BYTES / PAGE).for_each(|page| from.copy_page(&to, page));
        let mut copied = 0;
        sender.window = 2 * WINDOW;
        until("the device writes while the processors stand still", || {
            sender.run();
            copied += from.copy_dirty(&to);
            copied >= usize::try_from(WINDOW).unwrap()
        });
        from.ask(|client| client.set_migration_state(MigrationState::StopCopy));
        let stream = read_all(lock(&from.client).as_mut().unwrap());
        from.copy_dirty(&to);
        assert!(from.bytes() == to.bytes(), "turn {turn}: the log has missed a page");

        to.ask(|client| client.set_migration_state(MigrationState::Resuming));
        to.ask(|client| client.migration_write(&stream));
        to.ask(|client| client.set_migration_state(MigrationState::Running));
        guest.moves_to(turn, to);
        *lock(&from.client) = None;
        // The network leads to the other host now. The machine has the frames that had come.
        sender.station = at(host);
        program.run();
        sender.again(program.next);
    }
    exchange(&mut program, &mut sender, 300);
    assert_eq!(program.hash, sender.hashes[usize::try_from(program.next).unwrap() - 1]);
    assert!(program.next > 2000, "{} frames", program.next);
}
