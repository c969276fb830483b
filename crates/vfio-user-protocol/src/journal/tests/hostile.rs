// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Journals that no server has written: whoever keeps a journal may have changed it.

use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{Errno, pread, pwrite};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::journal::layout::{HEAD_LEN, Line, MESSAGE, REPLY, slot};
use crate::journal::read;
use crate::message::{Kind, command, message};
use crate::state::{BadState, Held, ServerData, ServerState};
use crate::{IoEventFd, IrqAction, IrqInfo, RegionInfo, Server, Target};

struct Quiet;

impl Target for Quiet {
    fn region_info(&self, _: u32) -> RegionInfo {
        RegionInfo::read_write(64)
    }
    fn irq_info(&self, _: u32) -> IrqInfo {
        IrqInfo::messages(4)
    }
    fn read(&mut self, _: u32, _: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.fill(1);
        Ok(())
    }
    fn write(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }
    fn set_irqs(&mut self, _: u32, _: IrqAction) -> Result<(), Errno> {
        Ok(())
    }
    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }
    fn io_eventfd_count(&mut self, _: u32) -> usize {
        1
    }
    fn io_eventfds(&mut self, _: u32, _: usize) -> Vec<IoEventFd> {
        let flags = rustix::event::EventfdFlags::CLOEXEC;
        vec![IoEventFd::new(rustix::event::eventfd(0, flags).unwrap(), 0)]
    }
    fn disconnected(&mut self) {}
}

/// A server with a client in the middle of a message, and what its journal has.
struct Genuine {
    _folder: tempfile::TempDir,
    client: UnixStream,
    state: ServerState,
    /// The head, and the begin of both buffers.
    content: [Vec<u8>; 3],
}

impl Genuine {
    /// `asks`: the last message that the server answers has descriptors in its reply.
    fn new(asks: bool) -> Genuine {
        let folder = tempfile::tempdir().unwrap();
        let mut server = Server::bind(folder.path().join("s"), "test", Quiet).unwrap();
        server.set_journal(crate::journal::create().unwrap(), Instant::now()).unwrap();
        let mut client = UnixStream::connect(server.path()).unwrap();
        let say = |number, body: &[u8]| message(7, number, Kind::Command { no_reply: false }, body);
        client.write_all(&say(command::VERSION, &[0; 4])).unwrap();
        let index: Vec<u8> = [256u32, 0, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        if asks {
            client.write_all(&say(command::DEVICE_GET_REGION_IO_FDS, &index)).unwrap();
        } else {
            client.write_all(&say(command::DMA_MAP, &[0; 32])[..30]).unwrap();
        }
        while server.ready(Instant::now()).work > 0 {}
        let state = server.save(Instant::now()).unwrap();
        server.give_up();
        let journal = state.descriptors.last().unwrap();
        let content = [0, MESSAGE, REPLY].map(|at| {
            let mut bytes = vec![0; HEAD_LEN];
            pread(journal, &mut bytes, at as u64).unwrap();
            bytes
        });
        Genuine { _folder: folder, client, state, content }
    }

    /// A server goes on with a journal of this content.
    fn go_on(&self, content: &[Vec<u8>; 3], number: u64, held: usize) -> Result<(), BadState> {
        let journal = crate::journal::create().unwrap();
        for (at, bytes) in [0, MESSAGE, REPLY].into_iter().zip(content) {
            pwrite(&journal, bytes, at as u64).unwrap();
        }
        self.go_on_with(journal, number, held)
    }

    /// Receives what the client has got: bytes, and descriptors.
    fn drain(&self) -> (usize, usize) {
        let (mut bytes, mut fds) = (0, 0);
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut data = [0; 4096];
            let mut parts = [IoSliceMut::new(&mut data)];
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let Ok(got) = recvmsg(&self.client, &mut parts, &mut ancillary, flags) else {
                return (bytes, fds);
            };
            assert!(got.bytes > 0, "the connection has ended");
            bytes += got.bytes;
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds += rights.count();
                }
            }
        }
    }

    /// The server that goes on from this journal.
    fn server(
        &self,
        journal: OwnedFd,
        number: u64,
        held: usize,
    ) -> Result<Server<Quiet>, BadState> {
        let mut descriptors: Vec<OwnedFd> =
            self.state.descriptors.iter().map(|fd| fd.try_clone().unwrap()).collect();
        *descriptors.last_mut().unwrap() = journal;
        let fds = (0..held).map(|_| self.client.as_fd().try_clone_to_owned().unwrap()).collect();
        let data: ServerData = self.state.data.clone();
        let state = ServerState { data, descriptors, held: Held { number, fds } };
        Server::restore(state, "x", "test", Quiet, Instant::now())
    }

    fn go_on_with(&self, journal: OwnedFd, number: u64, held: usize) -> Result<(), BadState> {
        let mut server = self.server(journal, number, held)?;
        // A whole message, or a reply, is there at once. Nothing else comes: this ends.
        let mut calls = 0;
        while server.ready(Instant::now()).work > 0 {
            calls += 1;
            assert!(calls < 10, "work without end");
        }
        let saved = server.save(Instant::now());
        server.give_up();
        saved.map(drop).map_err(|error| BadState::Os(Errno::from_io_error(&error).unwrap()))
    }
}

#[test]
fn what_is_no_journal_is_refused() {
    let genuine = Genuine::new(false);
    genuine.go_on(&genuine.content, 3, 0).unwrap();
    let small = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let grows = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&grows, super::super::layout::LEN as u64).unwrap();
    let socket = genuine.client.as_fd().try_clone_to_owned().unwrap();
    for file in [small, grows, socket] {
        assert!(genuine.go_on_with(file, 3, 0).is_err());
    }
    let change = |at: usize, bytes: &[u8]| {
        let mut content = genuine.content.clone();
        content[0][at..at + bytes.len()].copy_from_slice(bytes);
        genuine.go_on(&content, 3, 0)
    };
    let [answered, received] = [Line::Answered, Line::Received].map(|line| {
        let count = &genuine.content[0][line.count()..][..8];
        line.slot(u64::from_ne_bytes(count.try_into().unwrap()))
    });
    for (what, at, bytes) in [
        ("no mark", 0, &b"x"[..]),
        ("another version", 8, &2u32.to_ne_bytes()),
        ("a state from the future", answered + slot::MESSAGE, &0u64.to_ne_bytes()),
        ("another client", answered + slot::CLIENT, &9u64.to_ne_bytes()),
        ("a reply that is half sent", answered + slot::BYTES, &100u32.to_ne_bytes()),
        ("more was sent than there is", answered + slot::DONE, &u32::MAX.to_ne_bytes()),
        ("a long reply", answered + slot::BYTES, &(u32::MAX - 1).to_ne_bytes()),
        ("a long message", received + slot::DONE, &(2u32 << 20).to_ne_bytes()),
        ("a long receipt", received + slot::TOOK, &(u32::MAX - 1).to_ne_bytes()),
        ("many descriptors", received + slot::FDS, &17u32.to_ne_bytes()),
    ] {
        assert!(matches!(change(at, bytes), Err(BadState::Journal(_))), "{what}");
    }
}

/// Whoever had the former process may write to its journal at any time. So the next server neither
/// reads nor writes there once it is made, not even before anybody keeps it.
#[test]
fn the_next_server_has_a_journal_of_its_own_from_the_first_moment() {
    let mut genuine = Genuine::new(true);
    genuine.drain();
    let journal = genuine.state.descriptors.last().unwrap().try_clone().unwrap();
    // The former process was killed before it sent the reply that has descriptors.
    let slot = {
        let count = &genuine.content[0][Line::Answered.count()..][..8];
        Line::Answered.slot(u64::from_ne_bytes(count.try_into().unwrap()))
    };
    pwrite(&journal, &u32::MAX.to_ne_bytes(), (slot + slot::TOOK) as u64).unwrap();
    let mut server = genuine.server(journal.try_clone().unwrap(), 0, 0).unwrap();
    let inode = |file: &OwnedFd| rustix::fs::fstat(file).unwrap().st_ino;
    // From here on it is an attacker's.
    let garbage = vec![0xff; HEAD_LEN];
    let parts = [0, MESSAGE, REPLY];
    for at in parts {
        assert_eq!(pwrite(&journal, &garbage, at as u64), Ok(HEAD_LEN));
    }
    let state = server.save(Instant::now()).unwrap();
    assert_ne!(inode(state.descriptors.last().unwrap()), inode(&journal));
    assert_eq!(state.data.journal, genuine.state.data.journal, "the numbers go on");
    assert_eq!(genuine.drain(), (0, 0), "nobody has the new journal yet");
    while server.ready(Instant::now()).work > 0 {}
    let (bytes, fds) = genuine.drain();
    assert!(bytes > 0 && fds == 1, "{bytes} bytes, {fds} descriptors");
    let say = message(8, command::DEVICE_RESET, Kind::Command { no_reply: false }, &[]);
    genuine.client.write_all(&say).unwrap();
    while server.ready(Instant::now()).work > 0 {}
    assert_eq!(genuine.drain(), (16, 0));
    for at in parts {
        let mut now = vec![0; HEAD_LEN];
        pread(&journal, &mut now, at as u64).unwrap();
        assert!(now == garbage, "the server has written to the former journal at {at}");
    }
    server.give_up();
}

/// A process that serves a client without having given that away says so where others look.
#[test]
fn a_journal_that_is_forsaken_ends_its_clients_connection() {
    let genuine = Genuine::new(false);
    let journal = genuine.state.descriptors.last().unwrap().try_clone().unwrap();
    let number = genuine.state.data.journal.unwrap();
    let mut server = genuine.server(journal.try_clone().unwrap(), 0, 0).unwrap();
    assert!(!read(&journal, number, 1).unwrap().stale, "nothing has happened yet");
    server.forsake_former();
    assert!(read(&journal, number, 1).unwrap().stale);
    while server.ready(Instant::now()).work > 0 {}
    assert!(server.is_connected(), "its own journal is another one");
    server.give_up();
    let mut late = genuine.server(journal, 0, 0).unwrap();
    while late.ready(Instant::now()).work > 0 {}
    assert!(!late.is_connected());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever is in the journal, a server refuses it or goes on, with as many bytes and
    /// descriptors as a message has.
    #[test]
    fn no_journal_harms_a_server(
        asks: bool,
        words in prop::collection::vec((0..32usize, prop_oneof![
            0..3u32, 15..66u32, Just(u32::MAX), Just(1 << 20), any::<u32>(),
        ]), 1..4),
        anywhere in prop::collection::vec((0..3usize, 0..HEAD_LEN, any::<u8>()), 0..4),
        number in 0..5u64,
        held in 0..20usize,
    ) {
        let genuine = Genuine::new(asks);
        let mut content = genuine.content.clone();
        for (word, value) in words {
            // A field of a slot that counts, or one of its neighbours.
            let line = if word & 1 == 0 { Line::Answered } else { Line::Received };
            let count = u64::from_ne_bytes(content[0][line.count()..][..8].try_into().unwrap());
            let fields = [
                slot::MESSAGE, slot::CLIENT, slot::BYTES, slot::DONE, slot::FDS, slot::WITH,
                slot::FLAGS, slot::TOOK,
            ];
            let at = line.slot(count) + fields[word / 2 % 8];
            content[0][at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        for (part, at, byte) in anywhere {
            content[part][at] = byte;
        }
        let _ = genuine.go_on(&content, number, held);
    }
}
