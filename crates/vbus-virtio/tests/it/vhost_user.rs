// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Network cards behind vhost-user, with a front end of our own.

use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::IoSlice;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use vbus_core::{Bus, ConnectionState, DeviceClass as _, Endpoint};
use vbus_net::{Direct, Opener, Switches};
use vbus_test_driver::{Memory, TIMEOUT};
use vbus_virtio::net::VirtioNetClass;
use vbus_virtio::vhost_user::{Stats, VhostUserServer, has_front};

use crate::driver::{Queue, Signal, VERSION_1, eventually};

mod in_flight;
mod log;

/// Requests.
mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const NET_SET_MTU: u32 = 20;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

const PROTOCOL_FEATURES: u64 = 1 << 30;
const MQ: u64 = 1 << 22;
const CTRL_VQ: u64 = 1 << 17;
const MRG_RXBUF: u64 = 1 << 15;
const RING_PACKED: u64 = 1 << 34;
const ACCESS_PLATFORM: u64 = 1 << 33;
/// Protocol features: a reply to every message.
const REPLY_ACK: u64 = 1 << 3;
/// Flags of a header: version 1, and a reply is wanted.
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;
/// No descriptor comes with the message.
const NO_FD: u64 = 1 << 8;

const HEADER: usize = 12;
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
/// Where the front end has the driver's address 0.
const USER: u64 = 0x7f12_3456_0000;
const MEMORY: u64 = 4 << 20;

/// A bus with the class, and a folder for the sockets.
struct Lab {
    bus: Bus,
    folder: tempfile::TempDir,
}

/// A device and the server of its socket.
struct Served {
    endpoint: Arc<Endpoint>,
    server: VhostUserServer,
}

impl Served {
    /// Waits until the server's statistics are as `wanted`: it publishes them after its replies.
    fn counts(&self, what: &str, wanted: impl Fn(Stats) -> bool) {
        eventually(what, || wanted(self.server.stats()).then_some(()));
    }
}

impl Lab {
    fn new() -> Lab {
        let opener: Arc<dyn Opener> = Arc::new(Direct);
        let class = VirtioNetClass::on(Switches::default(), opener);
        let folder = tempfile::tempdir().unwrap();
        Lab { bus: vbus_test_driver::bus(2, vec![Box::new(class)]), folder }
    }

    fn serve(&self, number: usize, more: Value) -> Served {
        let mac = vbus_net::show_mac(MACS[number]);
        let mut settings = json!({ "mac": mac, "transport": "vhost-user" });
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let name = format!("net{number}");
        let endpoint = self.bus.create(&name, "virtio-net", &settings).unwrap();
        assert!(has_front(&endpoint));
        let path = self.folder.path().join(name);
        let listener = vfio_user_protocol::bind_private(&path, 8).unwrap();
        let server = VhostUserServer::with_listener(&endpoint, listener, &path).unwrap();
        Served { endpoint, server }
    }
}

/// A ring as its driver and the front end have it.
struct Ring {
    index: u32,
    queue: Queue,
    kick: OwnedFd,
    call: Signal,
}

/// A front end and its driver.
struct FrontEnd {
    socket: UnixStream,
    memory: Memory,
    /// Whether each message wants a reply.
    acknowledge: bool,
}

fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

impl FrontEnd {
    fn connect(served: &Served) -> FrontEnd {
        FrontEnd::connect_with(served, Memory::alone(MEMORY))
    }

    fn connect_with(served: &Served, memory: Memory) -> FrontEnd {
        let socket = UnixStream::connect(served.server.path()).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        FrontEnd { socket, memory, acknowledge: false }
    }

    /// Sends bytes, with descriptors.
    fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        let parts = [IoSlice::new(bytes)];
        let sent = sendmsg(&self.socket, &parts, &mut ancillary, SendFlags::NOSIGNAL).unwrap();
        (&self.socket).write_all(&bytes[sent..]).unwrap();
    }

    fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
        let size = u32::try_from(body.len()).unwrap();
        let header = [request, VERSION | flags, size].map(u32::to_le_bytes);
        [header.as_flattened(), body].concat()
    }

    /// Sends a request that has no reply of its own. Returns whether it succeeded; if replies are
    /// not negotiated, nobody knows.
    fn tell(&mut self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let flags = if self.acknowledge { NEED_REPLY } else { 0 };
        self.send_raw(&FrontEnd::message(request, flags, body), fds);
        !self.acknowledge || self.answer(request) == 0_u64.to_le_bytes()
    }

    fn tell_words(&mut self, request: u32, words: &[u32]) -> bool {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.tell(request, &bytes, &[])
    }

    fn tell_number(&mut self, request: u32, number: u64) -> bool {
        self.tell(request, &number.to_le_bytes(), &[])
    }

    /// The body of the reply to `request`.
    fn answer(&mut self, request: u32) -> Vec<u8> {
        let mut header = [0; 12];
        self.socket.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (request, 5));
        let mut body = vec![0; usize::try_from(word(8)).unwrap()];
        self.socket.read_exact(&mut body).unwrap();
        body
    }

    /// Asks.
    fn ask(&mut self, request: u32, body: &[u8]) -> Vec<u8> {
        self.send_raw(&FrontEnd::message(request, 0, body), &[]);
        self.answer(request)
    }

    fn ask_number(&mut self, request: u32) -> u64 {
        u64::from_le_bytes(self.ask(request, &[]).try_into().unwrap())
    }

    /// Waits until the device ends the connection.
    fn wait_for_end(&mut self) {
        let mut rest = Vec::new();
        // A connection that is reset has ended too.
        let _ = self.socket.read_to_end(&mut rest);
    }

    /// Negotiates: features, and protocol features, a reply to every message among them.
    fn agree(&mut self, features: u64) {
        let offered = self.ask_number(request::GET_FEATURES);
        assert_eq!(offered & PROTOCOL_FEATURES, PROTOCOL_FEATURES);
        let protocol = self.ask_number(request::GET_PROTOCOL_FEATURES);
        assert!(self.tell_number(request::SET_PROTOCOL_FEATURES, protocol));
        self.acknowledge = protocol & REPLY_ACK != 0;
        assert!(self.tell(request::SET_OWNER, &[], &[]));
        assert!(self.tell_number(request::SET_FEATURES, features | PROTOCOL_FEATURES));
    }

    /// Shares the memory, as one region.
    fn share(&mut self) -> bool {
        let file = self.memory.file();
        self.tell(request::SET_MEM_TABLE, &table(&[(0, MEMORY, USER, 0)]), &[file.as_fd()])
    }

    /// A ring of `size` descriptors that the device does not know yet.
    fn ring(&mut self, index: u32, size: u16) -> Ring {
        let queue = Queue::new(&mut self.memory, size);
        Ring { index, queue, kick: new_eventfd(), call: Signal(new_eventfd()) }
    }

    /// Lets the device begin with `ring` at `base`, and enables it.
    fn start(&mut self, ring: &Ring, base: u32) {
        let Ring { index, queue, kick, call } = ring;
        assert!(self.tell_words(request::SET_VRING_NUM, &[*index, queue.size.into()]));
        assert!(self.tell_words(request::SET_VRING_BASE, &[*index, base]));
        assert!(self.tell(request::SET_VRING_ADDR, &addresses(*index, queue), &[]));
        let number = u64::from(*index).to_le_bytes();
        assert!(self.tell(request::SET_VRING_CALL, &number, &[call.0.as_fd()]));
        assert!(self.tell(request::SET_VRING_KICK, &number, &[kick.as_fd()]));
        assert!(self.tell_words(request::SET_VRING_ENABLE, &[*index, 1]));
    }

    /// Stops a ring. Returns its base.
    fn stop(&mut self, index: u32) -> u32 {
        let body = [index, 0].map(u32::to_le_bytes);
        let reply = self.ask(request::GET_VRING_BASE, body.as_flattened());
        assert_eq!(reply[..4], index.to_le_bytes());
        u32::from_le_bytes(reply[4..].try_into().unwrap())
    }

    /// A front end with one pair of rings that work.
    fn card(served: &Served, features: u64) -> (FrontEnd, Ring, Ring) {
        let mut front_end = FrontEnd::connect(served);
        front_end.agree(features | VERSION_1);
        assert!(front_end.share());
        let (rx, tx) = (front_end.ring(0, 64), front_end.ring(1, 64));
        front_end.start(&rx, 0);
        front_end.start(&tx, 0);
        (front_end, rx, tx)
    }

    /// Gives the device a buffer of `len` bytes. Returns where it is.
    fn post(&mut self, rx: &mut Ring, len: u32) -> u64 {
        let addr = self.memory.alloc(len as usize);
        rx.queue.add(&self.memory, &[(addr, len, true)]);
        rx.kick();
        addr
    }

    /// Makes a frame available, without a wait.
    fn put(&mut self, tx: &mut Ring, frame: &[u8]) {
        let addr = self.memory.alloc(HEADER + frame.len());
        self.memory.write(addr, &[&[0; HEADER][..], frame].concat());
        let len = u32::try_from(HEADER + frame.len()).unwrap();
        tx.queue.add(&self.memory, &[(addr, len, false)]);
        tx.kick();
    }

    /// Sends a frame, and waits until the device has taken it.
    fn send(&mut self, tx: &mut Ring, frame: &[u8]) {
        self.put(tx, frame);
        tx.queue.wait(&self.memory);
    }

    /// Waits for a frame in the buffer at `addr`.
    fn receive(&mut self, rx: &mut Ring, addr: u64) -> Vec<u8> {
        let (_, len) = rx.queue.wait(&self.memory);
        self.memory.read(addr + HEADER as u64, len as usize - HEADER)
    }
}

impl Ring {
    fn kick(&self) {
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).unwrap();
    }
}

/// A table of memory: guest address, bytes, address in the front end, offset in the file.
fn table(regions: &[(u64, u64, u64, u64)]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).unwrap();
    let mut body = [count, 0].map(u32::to_le_bytes).concat();
    for &(guest, size, user, offset) in regions {
        body.extend([guest, size, user, offset].map(u64::to_le_bytes).concat());
    }
    body
}

/// One region, for ADD_MEM_REG and REM_MEM_REG.
fn one_region(region: (u64, u64, u64, u64)) -> Vec<u8> {
    let (guest, size, user, offset) = region;
    [0, guest, size, user, offset].map(u64::to_le_bytes).concat()
}

/// The body of SET_VRING_ADDR.
fn addresses(index: u32, queue: &Queue) -> Vec<u8> {
    let mut body = [index, 0].map(u32::to_le_bytes).concat();
    let places = [queue.desc, queue.device, queue.driver].map(|addr| USER + addr);
    body.extend(places.map(u64::to_le_bytes).concat());
    body.extend([0; 8]);
    body
}

fn frame(to: usize, from: usize, text: &[u8]) -> Vec<u8> {
    let mut frame = [&MACS[to][..], &MACS[from], &[0x88, 0xb5], text].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

#[test]
fn a_front_end_finds_what_the_card_offers() {
    let lab = Lab::new();
    let served = lab.serve(0, json!({ "queue-pairs": 3, "mtu": 2000 }));
    let mut front_end = FrontEnd::connect(&served);
    let offered = front_end.ask_number(request::GET_FEATURES);
    let all = VERSION_1 | MQ | MRG_RXBUF | PROTOCOL_FEATURES;
    assert_eq!(offered & all, all);
    // The front end has the control queue, and its IOMMU.
    assert_eq!(offered & (CTRL_VQ | ACCESS_PLATFORM), 0);
    front_end.agree(VERSION_1);
    assert_eq!(front_end.ask_number(request::GET_QUEUE_NUM), 3);
    assert_eq!(front_end.ask_number(request::GET_MAX_MEM_SLOTS), 509);
    assert!(front_end.tell_number(request::NET_SET_MTU, 1500));
    assert!(!front_end.tell_number(request::NET_SET_MTU, 2001));
    let read = |offset: u32, size: u32| {
        let mut body = [offset, size, 0].map(u32::to_le_bytes).concat();
        body.resize(12 + size as usize, 0);
        body
    };
    let config = front_end.ask(request::GET_CONFIG, &read(0, 6));
    assert_eq!(config[12..], MACS[0]);
    assert_eq!(front_end.ask(request::GET_CONFIG, &read(8, 2))[12..], [3, 0]);
    assert!(front_end.ask(request::GET_CONFIG, &read(20, 5)).is_empty(), "there are 24 bytes");
    assert!(!front_end.tell(request::SET_CONFIG, &read(0, 6), &[]));
    assert!(!front_end.tell_number(request::SET_FEATURES, VERSION_1 | CTRL_VQ));
    assert!(front_end.tell_number(request::SET_STATUS, 0xb));
    assert_eq!(front_end.ask_number(request::GET_STATUS), 0xb);
    served.counts("the failures", |stats| (stats.clients, stats.failures) == (1, 3));
}

#[test]
fn frames_pass_between_two_front_ends() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, MRG_RXBUF);
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, MRG_RXBUF);
    assert_eq!(one.endpoint.state(), ConnectionState::Open);
    rx.call.take(); // A new eventfd is signalled once.
    for number in 0..200_u8 {
        let addr = second.post(&mut rx, 2048);
        let sent = frame(1, 0, &[number; 40]);
        first.send(&mut tx, &sent);
        rx.call.wait();
        assert_eq!(second.receive(&mut rx, addr), sent);
    }
    assert_eq!(first.stop(1), 200);
    assert_eq!(second.stop(0), 200);
}

#[test]
fn a_ring_that_is_stopped_goes_on_where_it_was() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, 0);
    // The device has taken buffers that are not filled. They are not lost.
    let places: Vec<_> = (0..4).map(|_| second.post(&mut rx, 2048)).collect();
    first.send(&mut tx, &frame(1, 0, b"before"));
    assert_eq!(second.receive(&mut rx, places[0]), frame(1, 0, b"before"));
    let base = second.stop(0);
    assert_eq!(base, 1);
    // While it is stopped, nothing is delivered, and a kick wakes nobody.
    first.send(&mut tx, &frame(1, 0, b"lost"));
    rx.kick();
    assert_eq!(rx.queue.used(&second.memory), None);
    second.start(&rx, base);
    first.send(&mut tx, &frame(1, 0, b"after"));
    assert_eq!(second.receive(&mut rx, places[1]), frame(1, 0, b"after"));
    // A base that another back end left too far ahead: what is not finished is taken again.
    assert_eq!(second.stop(0), 2);
    second.start(&rx, 4);
    first.send(&mut tx, &frame(1, 0, b"again"));
    assert_eq!(second.receive(&mut rx, places[2]), frame(1, 0, b"again"));
}

/// The used half of a packed ring's base does not count: some front ends leave it 0.
#[test]
fn a_packed_ring_begins_at_the_available_place() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, 0);
    let mut first = FrontEnd::connect(&one);
    first.agree(VERSION_1 | RING_PACKED);
    assert!(first.share());
    let tx = first.ring(1, 64);
    let mut base = 0x8000;
    for slot in 0..3_u16 {
        first.start(&tx, base & 0xffff);
        let sent = frame(1, 0, &slot.to_le_bytes());
        let addr = first.memory.alloc(HEADER + sent.len());
        first.memory.write(addr, &[&[0; HEADER][..], &sent].concat());
        let there = tx.queue.desc + 16 * u64::from(slot);
        let len = u32::try_from(HEADER + sent.len()).unwrap();
        let descriptor = [&addr.to_le_bytes()[..], &len.to_le_bytes(), &[7, 0]].concat();
        first.memory.write(there, &descriptor);
        let buffer = second.post(&mut rx, 2048);
        // Available, in the first lap.
        first.memory.write(there + 14, &0x80_u16.to_le_bytes());
        tx.kick();
        assert_eq!(second.receive(&mut rx, buffer), sent);
        let used = || (first.memory.read(there + 14, 2) == [0x80, 0x80]).then_some(());
        eventually("the used descriptor", used);
        base = first.stop(1);
        let place = u32::from(slot + 1) | 0x8000;
        assert_eq!(base, place | place << 16);
    }
}

#[test]
fn a_ring_that_is_disabled_carries_nothing() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, 0);
    let addr = second.post(&mut rx, 2048);
    assert!(second.tell_words(request::SET_VRING_ENABLE, &[0, 0]));
    first.send(&mut tx, &frame(1, 0, b"disabled"));
    assert_eq!(rx.queue.used(&second.memory), None);
    assert!(second.tell_words(request::SET_VRING_ENABLE, &[0, 1]));
    first.send(&mut tx, &frame(1, 0, b"enabled"));
    assert_eq!(second.receive(&mut rx, addr), frame(1, 0, b"enabled"));
}

#[test]
fn memory_changes_while_rings_run() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, 0);
    // One more region of the same file, at another address.
    let more = (1 << 30, 1 << 20, USER + (1 << 30), 1 << 20);
    let file = second.memory.file();
    assert!(second.tell(request::ADD_MEM_REG, &one_region(more), &[file.as_fd()]));
    let place = second.memory.alloc(4096).max(1 << 20);
    let there = (1 << 30) + place - (1 << 20);
    rx.queue.add(&second.memory, &[(there, 2048, true)]);
    rx.kick();
    first.send(&mut tx, &frame(1, 0, b"far"));
    assert_eq!(second.receive(&mut rx, place), frame(1, 0, b"far"));
    assert!(second.tell(request::REM_MEM_REG, &one_region(more), &[]));
    assert!(!second.tell(request::REM_MEM_REG, &one_region(more), &[]), "it is gone");
    // The whole table anew, with the region that has the rings in two halves.
    let halves =
        [(0, MEMORY / 2, USER, 0), (MEMORY / 2, MEMORY / 2, USER + MEMORY / 2, MEMORY / 2)];
    let fds = [file.as_fd(), file.as_fd()];
    assert!(second.tell(request::SET_MEM_TABLE, &table(&halves), &fds));
    let addr = second.post(&mut rx, 2048);
    first.send(&mut tx, &frame(1, 0, b"halves"));
    assert_eq!(second.receive(&mut rx, addr), frame(1, 0, b"halves"));
    assert_eq!(second.stop(0), 2);
}

#[test]
fn a_driver_that_polls_needs_no_eventfd() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, 0);
    for (front_end, index) in [(&mut first, 1_u64), (&mut second, 0)] {
        assert!(front_end.tell_number(request::SET_VRING_KICK, index | NO_FD));
        assert!(front_end.tell_number(request::SET_VRING_CALL, index | NO_FD));
    }
    let addr = second.post(&mut rx, 2048);
    // The device may look at the transmit ring before the receive ring's buffer.
    eventually("a frame", || {
        first.send(&mut tx, &frame(1, 0, b"polled"));
        rx.queue.used(&second.memory)
    });
    let header = HEADER as u64;
    assert_eq!(second.memory.read(addr + header, 60), frame(1, 0, b"polled"));
}

#[test]
fn each_pair_that_is_enabled_is_in_use() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({ "queue-pairs": 2 })), lab.serve(1, json!({})));
    let (mut first, _rx0, _tx0) = FrontEnd::card(&one, MQ);
    let (rx1, mut tx1) = (first.ring(2, 64), first.ring(3, 64));
    first.start(&rx1, 0);
    first.start(&tx1, 0);
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, 0);
    let addr = second.post(&mut rx, 2048);
    first.send(&mut tx1, &frame(1, 0, b"second pair"));
    assert_eq!(second.receive(&mut rx, addr), frame(1, 0, b"second pair"));
    assert_eq!(first.stop(3), 1);
}

#[test]
fn the_next_front_end_takes_the_device_over_when_the_last_has_gone() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let (mut second, mut rx, tx2) = FrontEnd::card(&two, 0);
    let _silent = UnixStream::connect(two.server.path()).unwrap();
    // While there is one, another is refused.
    let mut other = FrontEnd::connect(&two);
    other.send_raw(&FrontEnd::message(request::GET_FEATURES, 0, &[]), &[]);
    other.wait_for_end();
    two.counts("the refusal", |stats| stats.refused == 1);
    // It goes without a word. Its successor knows only the driver's memory.
    second.post(&mut rx, 2048);
    second.post(&mut rx, 2048);
    let FrontEnd { socket, memory, .. } = second;
    drop(socket);
    let mut third = FrontEnd::connect_with(&two, memory);
    third.agree(VERSION_1);
    assert!(third.share());
    third.start(&rx, 0);
    third.start(&tx2, 0);
    first.send(&mut tx, &frame(1, 0, b"hello"));
    let (head, len) = rx.queue.wait(&third.memory);
    assert_eq!((head, len), (0, 72));
    two.counts("the successor", |stats| stats.clients == 2);
}

#[test]
fn a_driver_of_old_does_not_start() {
    let lab = Lab::new();
    let served = lab.serve(0, json!({}));
    let mut front_end = FrontEnd::connect(&served);
    front_end.agree(0);
    assert!(front_end.share());
    let ring = front_end.ring(0, 64);
    front_end.start(&ring, 0);
    assert_eq!(served.endpoint.state(), ConnectionState::Closed);
    assert_eq!(front_end.stop(0), 0);
    assert!(front_end.tell_number(request::SET_STATUS, 0xb));
    assert_eq!(front_end.ask_number(request::GET_STATUS), 3, "without FEATURES_OK");
}

#[test]
fn a_fault_of_the_driver_is_told_and_a_reset_ends_it() {
    let lab = Lab::new();
    let served = lab.serve(0, json!({}));
    let (mut front_end, _rx, mut tx) = FrontEnd::card(&served, 0);
    let error = Signal(new_eventfd());
    let number = 1_u64.to_le_bytes();
    assert!(front_end.tell(request::SET_VRING_ERR, &number, &[error.0.as_fd()]));
    front_end.send(&mut tx, &frame(1, 0, b"good"));
    tx.queue.add(&front_end.memory, &[(MEMORY, 64, false)]);
    tx.kick();
    error.wait();
    assert!(matches!(served.endpoint.state(), ConnectionState::Broken(_)));
    assert_eq!(front_end.ask_number(request::GET_STATUS), 0x40);
    // The front end stops the rings, as for a reset of its driver.
    assert_eq!((front_end.stop(0), front_end.stop(1)), (0, 1));
    assert_eq!(served.endpoint.state(), ConnectionState::Closed);
    assert_eq!(front_end.ask_number(request::GET_STATUS), 0);
    let mut again = front_end.ring(1, 64);
    front_end.start(&again, 0);
    front_end.send(&mut again, &frame(1, 0, b"good"));
    assert!(front_end.tell(request::RESET_DEVICE, &[], &[]));
    assert_eq!(served.endpoint.state(), ConnectionState::Closed);
}

#[test]
fn what_a_device_cannot_do_is_refused_and_the_connection_goes_on() {
    let lab = Lab::new();
    let served = lab.serve(0, json!({}));
    let (mut front_end, rx, _tx) = FrontEnd::card(&served, 0);
    let eventfd = new_eventfd();
    let file = front_end.memory.file();
    // Of a ring that is running.
    assert!(!front_end.tell_words(request::SET_VRING_NUM, &[0, 32]));
    assert!(!front_end.tell_words(request::SET_VRING_BASE, &[0, 7]));
    assert!(
        !front_end.tell_number(request::SET_FEATURES, VERSION_1 | MRG_RXBUF | PROTOCOL_FEATURES)
    );
    // Of a ring that is not there, or that cannot be.
    assert!(!front_end.tell_words(request::SET_VRING_ENABLE, &[2, 1]));
    assert!(!front_end.tell(request::SET_VRING_KICK, &9_u64.to_le_bytes(), &[eventfd.as_fd()]));
    front_end.stop(0);
    for size in [0, 40_000, u32::MAX] {
        assert!(!front_end.tell_words(request::SET_VRING_NUM, &[0, size]));
    }
    // A descriptor that is no eventfd.
    for what in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
        assert!(!front_end.tell(what, &0_u64.to_le_bytes(), &[file.as_fd()]));
    }
    // A ring that is in no memory.
    for outside in [MEMORY - 64, MEMORY, u64::MAX - USER - 8] {
        let mut wrong = Queue::new(&mut front_end.memory, 64);
        wrong.device = outside;
        assert!(front_end.tell(request::SET_VRING_ADDR, &addresses(0, &wrong), &[]));
        let kick = &0_u64.to_le_bytes();
        assert!(!front_end.tell(request::SET_VRING_KICK, kick, &[eventfd.as_fd()]));
        front_end.stop(0);
    }
    // Memory that cannot be.
    let page = 4096;
    for region in [
        (1 << 30, 0, 1 << 30, 0),
        (u64::MAX - page + 1, 2 * page, 1 << 30, 0),
        (1 << 30, page, u64::MAX - 2, 0),
        (page, page, 1 << 30, 0),
        (1 << 30, page, USER + page, 0),
        (1 << 30, page, 1 << 30, MEMORY),
        (1 << 30, page, 1 << 30, 1),
        (1 << 30, u64::MAX - (1 << 31), 1 << 30, 0),
    ] {
        let done = front_end.tell(request::ADD_MEM_REG, &one_region(region), &[file.as_fd()]);
        assert!(!done, "{region:x?}");
    }
    let add = request::ADD_MEM_REG;
    let far = one_region((1 << 30, page, 1 << 30, 0));
    assert!(!front_end.tell(add, &far, &[eventfd.as_fd()]), "no file");
    // What the device does not do at all.
    assert!(!front_end.tell_number(22, 0) && !front_end.tell_number(1000, 0));
    front_end.start(&rx, 0);
    served.counts("the failures", |stats| stats.failures >= 22);
    assert_eq!(served.server.stats().violations, 0);
}

/// Each of these ends the connection, and the next front end is served.
#[test]
fn a_front_end_that_breaks_the_protocol_is_disconnected() {
    type Attack = Box<dyn Fn(&mut FrontEnd)>;
    let raw = |bytes: Vec<u8>| -> Attack { Box::new(move |f| f.send_raw(&bytes, &[])) };
    let message = |number: u32, body: usize| raw(FrontEnd::message(number, 0, &vec![0; body]));
    let mut no_version = FrontEnd::message(request::GET_FEATURES, 0, &[]);
    no_version[4] = 0;
    let mut long = FrontEnd::message(request::SET_MEM_TABLE, 0, &[]);
    long[8..].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut many = table(&[]);
    many[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let attacks: Vec<Attack> = vec![
        raw(no_version),
        raw(long),
        raw(FrontEnd::message(request::GET_FEATURES, 4, &[])),
        raw(FrontEnd::message(request::SET_MEM_TABLE, 0, &many)),
        message(request::GET_FEATURES, 8),
        message(request::SET_FEATURES, 7),
        message(request::SET_VRING_ADDR, 39),
        message(request::SET_VRING_KICK, 8),
        message(request::GET_CONFIG, 11),
        message(request::SET_VRING_NUM, 4096),
        // Without a reply there is no other way to say no.
        raw(FrontEnd::message(request::SET_FEATURES, 0, &u64::MAX.to_le_bytes())),
        raw(FrontEnd::message(500, 0, &[])),
        Box::new(|front_end| {
            let file = front_end.memory.file();
            let body = table(&[(0, MEMORY, USER, 0)]);
            let message = FrontEnd::message(request::SET_MEM_TABLE, 0, &body);
            front_end.send_raw(&message, &[file.as_fd(), file.as_fd()]);
        }),
        Box::new(|front_end| {
            let file = front_end.memory.file();
            let message = FrontEnd::message(request::GET_FEATURES, 0, &[]);
            front_end.send_raw(&message, &[file.as_fd(); 60]);
        }),
    ];
    let lab = Lab::new();
    let served = lab.serve(0, json!({}));
    for (number, attack) in (1..).zip(&attacks) {
        let mut front_end = FrontEnd::connect(&served);
        attack(&mut front_end);
        front_end.wait_for_end();
        served.counts("the end", |stats| stats.violations == number);
    }
    // One that is slow, or goes within a message, or sends its messages byte by byte.
    let front_end = FrontEnd::connect(&served);
    front_end.send_raw(&FrontEnd::message(request::SET_FEATURES, 0, &[0; 8])[..15], &[]);
    drop(front_end);
    let mut front_end = FrontEnd::connect(&served);
    for byte in FrontEnd::message(request::GET_FEATURES, 0, &[]) {
        front_end.send_raw(&[byte], &[]);
    }
    front_end.answer(request::GET_FEATURES);
    assert_eq!(served.server.stats().violations, attacks.len() as u64);
}

/// The server does not read on while its replies are not taken, and serves the others meanwhile.
#[test]
fn a_front_end_that_reads_no_replies_is_not_waited_for() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let front_end = FrontEnd::connect(&one);
    let ask = FrontEnd::message(request::GET_FEATURES, 0, &[]);
    front_end.socket.set_nonblocking(true).unwrap();
    // Until both directions of the socket are full.
    let mut sent = 0;
    while (&front_end.socket).write(&ask).is_ok_and(|bytes| bytes == ask.len()) {
        sent += 1;
        if sent % 1000 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let (mut other, _rx, mut tx) = FrontEnd::card(&two, 0);
    other.send(&mut tx, &frame(0, 1, b"works"));
    assert!(one.server.stats().messages <= sent);
    drop(front_end);
    let mut next = FrontEnd::connect(&one);
    next.ask_number(request::GET_FEATURES);
}

#[test]
fn memory_that_is_taken_away_ends_the_connection() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, 0);
    second.post(&mut rx, 2048);
    rustix::fs::ftruncate(second.memory.file(), 0).unwrap();
    rx.kick();
    // The device finds out when it looks.
    first.put(&mut tx, &frame(1, 0, b"into nothing"));
    second.wait_for_end();
    two.counts("the end", |stats| stats.violations == 1);
    tx.queue.wait(&first.memory);
    let (mut third, mut rx, _tx) = FrontEnd::card(&two, 0);
    let addr = third.post(&mut rx, 2048);
    first.send(&mut tx, &frame(1, 0, b"good"));
    assert_eq!(third.receive(&mut rx, addr), frame(1, 0, b"good"));
}

#[test]
fn the_devices_of_one_front_end_process_have_one_budget() {
    // The front ends of the other tests are of this process too: a process of its own has none.
    const ALONE: &str = "VBUS_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = "vhost_user::the_devices_of_one_front_end_process_have_one_budget";
        let own = std::env::current_exe().unwrap();
        let alone =
            std::process::Command::new(own).args([name, "--exact"]).env(ALONE, "1").status();
        assert!(alone.unwrap().success());
        return;
    }
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let memory = |served: &Served| served.endpoint.inspect()["memory"].clone();
    let maps = |served: &Served| {
        let maps = &memory(served)["maps"];
        ["used", "client_used"].map(|key| maps[key].as_u64().unwrap())
    };
    let cards = [&one, &two].map(|served| FrontEnd::card(served, 0));
    assert_eq!([maps(&one), maps(&two)], [[1, 2], [1, 2]]);
    let client = json!({ "process": std::process::id(), "devices": ["net0", "net1"] });
    assert_eq!([&memory(&one)["client"], &memory(&two)["client"]], [&client, &client]);
    let [gone, _stays] = cards;
    drop(gone);
    eventually("the end of the first", || {
        (maps(&two) == [1, 1] && memory(&one)["client"] == Value::Null).then_some(())
    });
    assert_eq!(maps(&one), [0, 0]);
}

#[test]
fn a_device_with_a_session_is_not_saved_without_it() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, 0);
    for served in [&one, &two] {
        served.endpoint.quiesce().unwrap();
        let error = served.endpoint.save().unwrap_err().to_string();
        assert!(error.contains(&format!("{:?}", served.endpoint.name())), "{error}");
        assert!(error.contains("vhost-user, whose session has no saved state"), "{error}");
        served.endpoint.resume();
    }
    // It goes on as if nobody had asked.
    let addr = second.post(&mut rx, 2048);
    first.send(&mut tx, &frame(1, 0, b"after it"));
    assert_eq!(second.receive(&mut rx, addr), frame(1, 0, b"after it"));
}

#[test]
fn settings_that_a_front_end_cannot_have_are_refused() {
    let class = VirtioNetClass::on(Switches::default(), Arc::new(Direct));
    let check = |more: Value| {
        let mut settings = json!({ "backend": "tap", "transport": "vhost-user" });
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        class.check("net0", &settings).map_err(|error| error.to_string())
    };
    for more in [json!({}), json!({ "packed": true }), json!({ "vhost": false, "rss": false })] {
        assert_eq!(check(more), Ok(()));
    }
    for (more, text) in [
        (json!({ "vhost": true }), "\"vhost\" is true, but the front end of vhost-user"),
        (json!({ "rss": true }), "\"rss\" is true, but a front end of vhost-user"),
    ] {
        let error = check(more).unwrap_err();
        assert!(error.starts_with(text), "{error}");
    }
}

#[test]
fn a_server_that_ends_disconnects_its_front_end() {
    let lab = Lab::new();
    let Served { endpoint, server } = lab.serve(0, json!({}));
    let served = Served { endpoint, server };
    let (mut front_end, _rx, _tx) = FrontEnd::card(&served, 0);
    let Served { endpoint, server } = served;
    drop(server);
    front_end.wait_for_end();
    assert_eq!(endpoint.state(), ConnectionState::Closed);
}
