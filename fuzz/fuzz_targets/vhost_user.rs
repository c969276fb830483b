// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A front end of vhost-user that sends anything, in any order, with rings that run or do not, and
//! writes the memory of its driver. After any input, the next front end is served.
#![no_main]

use std::io::Read;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::IoSlice;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::json;
use vbus_core::{Access, Bus, Executor, MemoryContext, Tuning};
use vbus_net::{Direct, Switches};
use vbus_virtio::net::VirtioNetClass;
use vbus_virtio::vhost_user::VhostUserServer;

/// Bytes of the driver's memory, at address 0. Small numbers of the input are likely to hit it.
const BYTES: u64 = 0x1_0000;
/// Where the front end has it.
const USER: u64 = 0x7000_0000_0000;
/// How long the server may take on a loaded machine.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Requests.
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// VERSION_1, MQ, and the protocol features.
const FEATURES: u64 = 1 << 32 | 1 << 22 | 1 << 30;

/// Where ring `n` has its descriptors, its used ring and its available ring.
fn areas(n: u64) -> [u64; 3] {
    [0, 0x800, 0x400].map(|at| n * 0x1000 + at)
}

struct Served {
    path: PathBuf,
    _bus: Bus,
    _server: VhostUserServer,
}

static SERVED: LazyLock<Served> = LazyLock::new(|| {
    let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).expect("threads");
    let class = VirtioNetClass::on(Switches::default(), Arc::new(Direct));
    let bus = Bus::new(executor, vec![Box::new(class)]);
    let settings = json!({ "backend": "switch", "queue-pairs": 2, "transport": "vhost-user" });
    let endpoint = bus.create("fuzzed", "virtio-net", &settings).expect("good settings");
    let path = std::env::temp_dir().join(format!("vbus-fuzz-{}.sock", std::process::id()));
    let listener = vfio_user_protocol::bind_private(&path, 8).expect("a socket");
    let server = VhostUserServer::with_listener(&endpoint, listener, &path).expect("served");
    Served { path, _bus: bus, _server: server }
});

struct FrontEnd {
    socket: UnixStream,
    file: OwnedFd,
    eventfd: OwnedFd,
    memory: MemoryContext,
}

impl FrontEnd {
    fn connect() -> FrontEnd {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("fuzz", flags).expect("a file");
        ftruncate(&file, BYTES).expect("room");
        let memory = MemoryContext::new();
        memory.map(0, BYTES, Some((&file, 0)), Access::BOTH).expect("mapped");
        let socket = UnixStream::connect(&SERVED.path).expect("the server listens");
        socket.set_read_timeout(Some(TIMEOUT)).expect("a time");
        socket.set_write_timeout(Some(TIMEOUT)).expect("a time");
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        FrontEnd { socket, file, eventfd, memory }
    }

    /// Sends bytes. The server may have ended the connection.
    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)), "room for 40");
        }
        let _ = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL);
    }

    fn message(&self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        let header = [request, 1 | flags, body.len() as u32].map(u32::to_le_bytes);
        self.send(&[header.as_flattened(), body].concat(), fds);
    }

    fn words(&self, request: u32, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.message(request, 0, &bytes, &[]);
    }

    fn region(&self, request: u32, region: [u64; 4], fds: &[BorrowedFd<'_>]) {
        let head = if request == SET_MEM_TABLE { 1 } else { 0 };
        let body = [&[head], &region[..]].concat();
        let body: Vec<u8> = body.iter().flat_map(|number: &u64| number.to_le_bytes()).collect();
        self.message(request, 8, &body, fds);
    }

    /// Negotiates, and shares the memory.
    fn begin(&self, features: u64) {
        // All protocol features but REPLY_ACK: most replies then need not be read.
        self.message(SET_PROTOCOL_FEATURES, 0, &(1_u64 | 1 << 15 | 1 << 16).to_le_bytes(), &[]);
        self.message(SET_FEATURES, 0, &(FEATURES | features).to_le_bytes(), &[]);
        self.region(SET_MEM_TABLE, [0, BYTES, USER, 0], &[self.file.as_fd()]);
    }

    /// Sets a ring up and enables it.
    fn start(&self, ring: u32, size: u32, base: u32) {
        self.words(SET_VRING_NUM, &[ring, size]);
        self.words(SET_VRING_BASE, &[ring, base]);
        let places = areas(ring.into()).map(|at| USER + at);
        let mut body = u64::from(ring).to_le_bytes().to_vec();
        body.extend(places.into_iter().chain([0]).flat_map(u64::to_le_bytes));
        self.message(SET_VRING_ADDR, 0, &body, &[]);
        for request in [SET_VRING_CALL, SET_VRING_KICK] {
            let number = u64::from(ring).to_le_bytes();
            self.message(request, 0, &number, &[self.eventfd.as_fd()]);
        }
        self.words(SET_VRING_ENABLE, &[ring, 1]);
    }

    fn kick(&self) {
        let _ = rustix::io::write(&self.eventfd, &1_u64.to_ne_bytes());
    }

    /// Reads what has come.
    fn read(&self) {
        let _ = self.socket.set_nonblocking(true);
        let _ = (&self.socket).read(&mut [0; 4096]);
        let _ = self.socket.set_nonblocking(false);
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&[flags, ready], steps)) = input.split_first_chunk::<2>() else { return };
    let front_end = FrontEnd::connect();
    let bits: [u64; 5] = [1 << 28, 1 << 29, 1 << 34, 1 << 35, 1 << 15];
    let features = (0..).zip(bits).filter(|(at, _)| flags >> at & 1 != 0).map(|(_, bit)| bit).sum();
    front_end.begin(features);
    for ring in 0..4 {
        if ready >> ring & 1 != 0 {
            front_end.start(ring, 16, 0);
        }
    }
    for step in steps.chunks_exact(12) {
        let [action, number, low, high, value @ ..] = step else { return };
        let value: [u8; 8] = value.try_into().expect("12 bytes");
        let (word, ring) = (u64::from_le_bytes(value), u32::from(*low % 5));
        let offset = u64::from(u16::from_le_bytes([*low, *high]));
        let page = |at: usize| u64::from(value[at] % 20) << 12;
        let region = [page(0), page(1), USER + page(2), page(3)];
        match action % 16 {
            // Make buffers available more often than the rest: descriptors, and then the index.
            0..=3 => {
                let [descriptors, _, available] = areas(u64::from(ring % 4));
                let slot = u64::from(high % 16);
                let parts = [
                    u64::from(u16::from_le_bytes([value[0], value[1]])),
                    u64::from(value[2]) | u64::from(value[3]) << 32 | u64::from(value[4]) << 48,
                ];
                let view = front_end.memory.view();
                let bytes = parts.map(u64::to_le_bytes).concat();
                view.write(descriptors + 16 * slot, &bytes).expect("mapped");
                view.write(available + 4 + 2 * slot, &[value[5], 0]).expect("mapped");
                view.write(available + 2, &[value[6], 0]).expect("mapped");
                drop(view);
                front_end.kick();
            }
            4 => front_end.words(GET_VRING_BASE, &[ring, 0]),
            5 => front_end.start(ring, 1 << (number % 8), u32::from(*high)),
            6 => front_end.words(SET_VRING_ENABLE, &[ring, u32::from(number & 1)]),
            7 => front_end.region(SET_MEM_TABLE, region, &[front_end.file.as_fd()]),
            8 => front_end.region(ADD_MEM_REG, region, &[front_end.file.as_fd()]),
            9 => front_end.region(REM_MEM_REG, region, &[]),
            10 => {
                let fds = [front_end.file.as_fd(), front_end.eventfd.as_fd()];
                let which = usize::from(*high & 1);
                front_end.message((number % 48).into(), 0, &value, &fds[which..=which]);
            }
            11 => front_end.message((number % 48).into(), 8, &value, &[]),
            12 => {
                let body: Vec<u8> = value.into_iter().cycle().take((*low).into()).collect();
                let count = usize::from(high % 40);
                front_end.message(
                    (number % 48).into(),
                    0,
                    &body,
                    &vec![front_end.file.as_fd(); count],
                );
            }
            13 => front_end.send(&value[..usize::from(number % 9)], &[]),
            14 if action & 16 == 0 => front_end.read(),
            14 => drop(ftruncate(&front_end.file, word % BYTES)),
            _ => drop(front_end.memory.view().write(offset, &value)),
        }
    }
    // It goes without a word, and the next one finds the device as this one did.
    drop(front_end);
    let mut next = FrontEnd::connect();
    next.message(GET_FEATURES, 0, &[], &[]);
    let mut reply = [0; 20];
    next.socket.read_exact(&mut reply).expect("a reply");
    assert!(reply[..4] == GET_FEATURES.to_le_bytes() && reply[16] & 1 == 1, "{reply:?}");
});
