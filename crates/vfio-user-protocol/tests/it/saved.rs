// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Another server goes on with the state of a server. The client notices nothing.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_user_protocol::state::{Held, ServerData, ServerState};
use vfio_user_protocol::{Server, journal, pci};

use crate::support::{Device, NO_REPLY, framed, send_with, version};

/// A message with its descriptors.
struct Said {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

fn said(bytes: Vec<u8>) -> Said {
    Said { bytes, fds: Vec::new() }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn memory(bytes: u64) -> OwnedFd {
    let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, bytes).unwrap();
    file
}

/// What a client says: at least one message of every kind that leaves something behind.
fn script() -> Vec<Said> {
    let map = |id: u16, flags: u32, offset: u64, at: u64, size: u64| {
        framed(id, 2, 0, &bytes![32u32, flags, offset, at, size])
    };
    let write = |id: u16, flags: u32, at: u64, data: &[u8]| {
        let count = u32::try_from(data.len()).unwrap();
        framed(id, 10, flags, &[&bytes![at, pci::REGION_BAR0, count][..], data].concat())
    };
    let read = |id: u16, at: u64, count: u32| framed(id, 9, 0, &bytes![at, 0u32, count]);
    let irqs = bytes![20u32, 0b10_0100u32, pci::IRQ_MSI, 0u32, 4u32];
    let multi = {
        let one = |at: u64, data: u64| bytes![at, 0u32, 8u32, data];
        [bytes![2u64], one(512, 0x1122), one(520, 0x3344)].concat()
    };
    vec![
        said(framed(1, 1, 0, &version())),
        said(framed(2, 4, 0, &bytes![16u32, 0u32, 0u32, 0u32])),
        Said { bytes: map(3, 3, 0, 0x10000, 0x4000), fds: vec![memory(0x4000)] },
        said(map(4, 3, 0, 0x12000, 0x1000)),
        Said { bytes: framed(5, 8, 0, &irqs), fds: (0..4).map(|_| event()).collect() },
        said(write(6, NO_REPLY, 64, b"posted")),
        said(write(7, 0, 0, &[7; 300])),
        said(framed(8, 15, 0, &multi)),
        said(framed(9, 7, 0, &bytes![16u32, 0u32, 2u32, 0u32])),
        said(framed(10, 6, 0, &bytes![256u32, 0u32, 0u32, 0u32])),
        said(read(11, 0, 600)),
        said(framed(12, 3, 0, &bytes![24u32, 0u32, 0x10000u64, 0x4000u64])),
        said(read(13, 3800, 200)),
        said(framed(14, 13, 0, &[])),
        said(read(15, 0, 16)),
    ]
}

/// A server in turns: each turn is a server of its own, which goes on with the state of the last.
struct Relay {
    _folder: tempfile::TempDir,
    path: PathBuf,
    server: Server<Device>,
    turns: u32,
}

impl Relay {
    fn new() -> Relay {
        Relay::with(false)
    }

    /// `journal`: the servers have one.
    fn with(journal: bool) -> Relay {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let mut server = Server::bind(&path, "test", Device::new()).unwrap();
        if journal {
            server.set_journal(journal::create().unwrap(), Instant::now()).unwrap();
        }
        Relay { _folder: folder, path, server, turns: 0 }
    }

    /// The next server takes over. The data pass through a text, as between two processes.
    fn turn(&mut self) {
        let ServerState { data, descriptors, held } = self.server.save(Instant::now()).unwrap();
        let text = serde_json::to_string(&data).unwrap();
        let data: ServerData = serde_json::from_str(&text).unwrap();
        let device = std::mem::replace(self.server.target_mut(), Device::new());
        self.server.give_up();
        let state = ServerState { data, descriptors, held };
        self.server = Server::restore(state, &self.path, "test", device, Instant::now()).unwrap();
        self.turns += 1;
    }

    /// Lets the server do all that it can do now.
    fn work(&mut self) {
        while self.server.ready(Instant::now()).work > 0 {}
    }
}

/// Sends the script. After each number of bytes of which `stops` says so, the next server takes
/// over. Returns all that the server sent, and what became of the device.
fn play(stops: impl Fn(usize) -> bool) -> (Vec<u8>, String, u32) {
    play_with(Relay::new(), stops, |_| false)
}

/// As [`play`]. The server of that turn gets a journal where `begins` says so.
fn play_with(
    mut relay: Relay,
    stops: impl Fn(usize) -> bool,
    begins: impl Fn(usize) -> bool,
) -> (Vec<u8>, String, u32) {
    let mut client = UnixStream::connect(&relay.path).unwrap();
    let mut replies = Vec::new();
    let mut at = 0;
    for Said { bytes, fds } in script() {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut rest = &bytes[..];
        let mut with = &fds[..];
        while !rest.is_empty() {
            let len = (1..=rest.len()).find(|len| stops(at + len)).unwrap_or(rest.len());
            match with {
                [] => client.write_all(&rest[..len]).unwrap(),
                fds => send_with(&client, &rest[..len], fds),
            }
            with = &[];
            rest = &rest[len..];
            at += len;
            relay.work();
            if begins(at) && !relay.server.has_journal() {
                let journal = journal::create().unwrap();
                relay.server.set_journal(journal, Instant::now()).unwrap();
                relay.work();
            }
            if stops(at) {
                relay.turn();
                relay.work();
            }
            drain(&mut client, &mut replies);
        }
    }
    assert!(relay.server.is_connected(), "the client is still there");
    let Device { memory, maps, irqs, actions, connected, resets, clients, writes, .. } =
        relay.server.target();
    let irqs: Vec<_> = irqs.keys().collect();
    let device =
        format!("{memory:?} {maps:?} {irqs:?} {actions:?} {connected} {resets} {clients} {writes}");
    let stats = format!("{:?}", relay.server.stats());
    (replies, device + &stats, relay.turns)
}

/// Takes what has come.
fn drain(client: &mut UnixStream, replies: &mut Vec<u8>) {
    client.set_nonblocking(true).unwrap();
    let mut bytes = [0; 65536];
    while let Ok(count) = client.read(&mut bytes) {
        assert!(count > 0, "the server has closed the connection");
        replies.extend_from_slice(&bytes[..count]);
    }
    client.set_nonblocking(false).unwrap();
}

#[test]
fn a_stream_may_be_cut_at_every_place() {
    let (replies, device, turns) = play(|_| false);
    assert_eq!(turns, 0);
    let total: usize = script().iter().map(|said| said.bytes.len()).sum();
    for cut in 1..=total {
        let (other, then, turns) = play(|at| at == cut);
        assert_eq!(turns, 1);
        assert!(other == replies, "cut after {cut} bytes: other replies");
        assert_eq!(then, device, "cut after {cut} bytes");
    }
}

/// A server that hands itself over has its journal with it, or gets one at any time.
#[test]
fn a_stream_may_be_cut_with_a_journal() {
    let (replies, device, _) = play(|_| false);
    let total: usize = script().iter().map(|said| said.bytes.len()).sum();
    for cut in 1..=total {
        let (other, then, turns) = play_with(Relay::with(true), |at| at == cut, |_| false);
        assert_eq!(turns, 1);
        assert!(other == replies, "cut after {cut} bytes: other replies");
        assert_eq!(then, device, "cut after {cut} bytes");
    }
    for cut in (1..=total).step_by(7) {
        let (other, then, turns) =
            play_with(Relay::new(), |at| at == cut || at == cut + 20, |at| at == cut);
        assert!(turns > 0);
        assert!(other == replies, "a journal after {cut} bytes: other replies");
        assert_eq!(then, device, "a journal after {cut} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn a_stream_may_be_cut_at_many_places(every in 1..40usize, first in 0..40usize) {
        let (replies, device, _) = play(|_| false);
        let (other, then, turns) = play(|at| at % every == first % every);
        prop_assert!(turns > 0);
        prop_assert!(other == replies);
        prop_assert_eq!(then, device);
    }
}

/// The client does not read, until the server cannot send any more.
#[test]
fn a_reply_that_the_socket_did_not_take_is_sent_by_the_next_server() {
    for journal in [false, true] {
        fill_socket(Relay::with(journal));
    }
}

fn fill_socket(mut relay: Relay) {
    let mut client = UnixStream::connect(&relay.path).unwrap();
    client.write_all(&framed(0, 1, 0, &version())).unwrap();
    client.set_nonblocking(true).unwrap();
    let read = |id: u16| framed(id, 9, 0, &bytes![0u64, 0u32, 3840u32]);
    let mut asked = 0;
    // Both directions fill up.
    while client.write_all(&read(asked)).is_ok() {
        asked += 1;
        if asked % 8 == 0 {
            relay.work();
        }
    }
    relay.work();
    relay.turn();
    relay.work();
    let ServerState { data, .. } = relay.server.save(Instant::now()).unwrap();
    let text = serde_json::to_string(&data).unwrap();
    assert!(!text.contains("\"unsent\":[]"), "the test fills the socket");
    let mut replies = Vec::new();
    let reply_len = |bytes: &[u8]| {
        bytes
            .get(4..8)
            .map_or(usize::MAX / 2, |size| u32::from_ne_bytes(size.try_into().unwrap()) as usize)
    };
    let of_read = 16 + 16 + 3840;
    while replies.len() < reply_len(&replies).saturating_add(usize::from(asked) * of_read) {
        relay.work();
        drain(&mut client, &mut replies);
        relay.turn();
    }
    let of_reads = &replies[reply_len(&replies)..];
    for (id, reply) in (0..asked).zip(of_reads.chunks(of_read)) {
        assert_eq!(u16::from_ne_bytes([reply[0], reply[1]]), id, "in order, none lost, none twice");
        assert_eq!(reply_len(reply), of_read);
    }
    assert!(relay.turns > 1);
}

#[test]
fn those_who_wait_in_the_backlog_and_those_who_are_silent_are_served_by_the_next_server() {
    let mut relay = Relay::new();
    let mut silent = UnixStream::connect(&relay.path).unwrap();
    relay.work();
    let _waits = UnixStream::connect(&relay.path).unwrap();
    relay.turn();
    silent.write_all(&framed(0, 1, 0, &version())).unwrap();
    relay.work();
    assert!(relay.server.is_connected());
    drop(silent);
    relay.work();
    assert!(!relay.server.is_connected() && !relay.server.target().connected);
    // The file is still there: no server of the relay has removed it.
    relay.turn();
    assert!(UnixStream::connect(&relay.path).is_ok());
}

/// If nobody takes the state, or the other cannot, the server goes on.
#[test]
fn a_state_that_nobody_takes_changes_nothing() {
    let mut relay = Relay::new();
    let mut client = UnixStream::connect(&relay.path).unwrap();
    let mut replies = Vec::new();
    client.write_all(&framed(0, 1, 0, &version())).unwrap();
    let read = framed(1, 9, 0, &bytes![0u64, 0u32, 8u32]);
    client.write_all(&read[..20]).unwrap();
    relay.work();
    drain(&mut client, &mut replies);
    replies.clear();
    drop(relay.server.save(Instant::now()).unwrap());
    let mut state = relay.server.save(Instant::now()).unwrap();
    // The other one fails in the middle: with the client's socket, without what belongs to it.
    let text = serde_json::to_string(&state.data).unwrap();
    let text = text.replacen("\"peer-fds\":16", "\"peer-fds\":9999", 1);
    state.data = serde_json::from_str(&text).unwrap();
    let refused = Server::restore(state, Path::new("x"), "test", Device::new(), Instant::now());
    assert!(refused.is_err());
    drop(refused);
    client.write_all(&read[20..]).unwrap();
    relay.work();
    drain(&mut client, &mut replies);
    assert_eq!(replies.len(), 16 + 16 + 8);
}

/// Each change of a true state that no server can have is refused, and nothing else happens.
#[test]
fn a_state_that_lies_is_refused() {
    let mut relay = Relay::new();
    let mut client = UnixStream::connect(&relay.path).unwrap();
    client.write_all(&framed(0, 1, 0, &version())).unwrap();
    let map = framed(1, 2, 0, &bytes![32u32, 3u32, 0u64, 0x10000u64, 0x4000u64]);
    client.write_all(&map).unwrap();
    relay.work();
    let part = framed(2, 2, 0, &bytes![32u32, 3u32, 0u64, 0x20000u64, 0x4000u64]);
    send_with(&client, &part[..20], &[memory(0x4000).as_fd()]);
    relay.work();
    let state = relay.server.save(Instant::now()).unwrap();
    let text = serde_json::to_value(&state.data).unwrap();
    let duplicates =
        || state.descriptors.iter().map(|fd| fd.try_clone().unwrap()).collect::<Vec<_>>();
    let attempt = |data: &serde_json::Value, descriptors: Vec<OwnedFd>| {
        let data = serde_json::from_value(data.clone()).map_err(|error| error.to_string())?;
        let state = ServerState { data, descriptors, held: Held::default() };
        Server::restore(state, Path::new("x"), "test", Device::new(), Instant::now())
            .map(|mut server| server.give_up())
            .map_err(|error| error.to_string())
    };
    attempt(&text, duplicates()).unwrap();
    let set = |path: &str, value: serde_json::Value| {
        let mut changed = text.clone();
        *changed.pointer_mut(path).unwrap_or_else(|| panic!("no {path} in {text}")) = value;
        changed
    };
    let maps = "/client/session/maps";
    let negotiated = "/client/session/negotiated";
    for (what, data) in [
        ("a count that would overflow", set("/stats/messages", u64::MAX.into())),
        ("connections that would overflow", set("/connections", u64::MAX.into())),
        ("failures that would overflow", set("/client/session/failures", (1_u64 << 57).into())),
        ("more descriptors than there are", set("/client/received/descriptors", 2.into())),
        ("fewer", set("/client/received/descriptors", 0.into())),
        ("many connections", set("/candidates", u32::MAX.into())),
        ("maps that overlap", set(maps, serde_json::json!([[0x1000, 0x2000], [0x2000, 0x1000]]))),
        ("a map without bytes", set(maps, serde_json::json!([[0x1000, 0]]))),
        ("a map beyond the end", set(maps, serde_json::json!([[u64::MAX - 0xfff, 0x2000]]))),
        ("no whole pages", set(maps, serde_json::json!([[0x10, 0x1000]]))),
        ("maps of nobody", set(negotiated, serde_json::Value::Null)),
        ("too many descriptors", set(&format!("{negotiated}/peer-fds"), 254.into())),
        ("no page size", set(&format!("{negotiated}/page-size"), 0.into())),
        ("a message from the future", set(&format!("{negotiated}/minor"), 9.into())),
        ("descriptors of no message", set("/client/received/bytes", serde_json::json!([]))),
        ("a wrong header", set("/client/received/bytes", vec![0xff; 20].into())),
        (
            "more than a message",
            set("/client/received/bytes", {
                let mut long = part.clone();
                long.extend([0; 8]);
                long.into()
            }),
        ),
        (
            "an empty message",
            set("/client/unsent", serde_json::json!([{ "bytes": [], "descriptors": 0 }])),
        ),
        (
            "messages without end",
            set("/client/unsent", {
                serde_json::json!(vec![serde_json::json!({ "bytes": [1], "descriptors": 0 }); 99])
            }),
        ),
    ] {
        let refused = attempt(&data, duplicates());
        assert!(refused.is_err(), "{what}");
    }
    for at in 0..2 {
        let mut descriptors = duplicates();
        descriptors[at] = event();
        assert!(attempt(&text, descriptors).is_err(), "a socket that is none");
    }
    let mut descriptors = duplicates();
    descriptors.swap(0, 1);
    assert!(attempt(&text, descriptors).is_err(), "the wrong socket");
    // All that did nothing to the client.
    client.write_all(&part[20..]).unwrap();
    relay.work();
    assert_eq!(relay.server.target().maps.len(), 2);
}
