// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the target is given for somebody else: descriptors, and states.

use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::journal::read;
use crate::message::{Kind, command, message};
use crate::state::ServerState;
use crate::{IrqAction, IrqInfo, RegionInfo, Server, Target};

/// What the target was asked for, in order.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    /// The number of the message, and of its descriptors.
    Hold(u64, usize),
    /// The number of the message in the state, and of the state's descriptors.
    Commit(u64, usize),
}

#[derive(Default)]
struct Notes {
    events: Vec<Event>,
    changed: bool,
    /// Nobody takes states.
    lost: bool,
    /// The last state was taken by nobody.
    lags: bool,
}

impl Target for Notes {
    fn region_info(&self, _: u32) -> RegionInfo {
        RegionInfo::read_write(64)
    }
    fn irq_info(&self, _: u32) -> IrqInfo {
        IrqInfo::messages(4)
    }
    fn read(&mut self, _: u32, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Ok(())
    }
    fn write(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }
    fn set_irqs(&mut self, _: u32, _: IrqAction) -> Result<(), Errno> {
        self.changed = true;
        Ok(())
    }
    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }
    fn disconnected(&mut self) {}
    fn wants_commit(&self) -> bool {
        self.changed
    }
    fn commit(&mut self, server: io::Result<ServerState>) {
        (self.changed, self.lags) = (false, self.lost);
        if self.lost {
            return;
        }
        let ServerState { data, descriptors, .. } = server.unwrap();
        self.events.push(Event::Commit(data.journal.unwrap(), descriptors.len()));
    }
    fn is_committed(&self) -> bool {
        !self.changed && !self.lags
    }
    fn hold(&mut self, number: u64, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        self.events.push(Event::Hold(number, fds.len()));
        Ok(())
    }
}

#[test]
fn descriptors_of_a_message_are_in_no_state_and_are_held_until_the_state_has_their_message() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::bind(folder.path().join("s"), "test", Notes::default()).unwrap();
    server.set_journal(crate::journal::create().unwrap(), Instant::now()).unwrap();
    let mut client = UnixStream::connect(server.path()).unwrap();
    let say = |number, body: &[u8]| message(7, number, Kind::Command { no_reply: false }, body);
    client.write_all(&say(command::VERSION, &[0; 4])).unwrap();
    let run = |server: &mut Server<Notes>| {
        while server.ready(Instant::now()).work > 0 {}
        std::mem::take(&mut server.target_mut().events)
    };
    run(&mut server);
    // VFIO_IRQ_SET_DATA_EVENTFD and VFIO_IRQ_SET_ACTION_TRIGGER of one interrupt.
    let body: Vec<u8> =
        [20u32, 4 | 32, 2, 0, 1].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let bytes = say(command::DEVICE_SET_IRQS, &body);
    let (begin, rest) = bytes.split_at(20);
    let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(&client, &[IoSlice::new(begin)], &mut control, SendFlags::empty()).unwrap();
    let events = run(&mut server);
    let Some(Event::Hold(number, 1)) = events.first() else { panic!("{events:?}") };
    let (number, last) = (*number, *number - 1);
    // Another client comes in the middle of the message: the state has its socket.
    let _other = UnixStream::connect(server.path()).unwrap();
    assert_eq!(run(&mut server), [Event::Commit(last, 4)], "held, and in no state");
    // Somebody new has the state, and gets the descriptors too.
    server.commit();
    assert_eq!(
        std::mem::take(&mut server.target_mut().events),
        [Event::Commit(last, 4), Event::Hold(number, 1)]
    );
    client.write_all(rest).unwrap();
    assert_eq!(run(&mut server), [Event::Commit(number, 4), Event::Hold(number + 1, 0)]);
}

/// Also by a message that changes nothing.
#[test]
fn a_client_that_was_told_what_no_state_has_is_known_until_a_state_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::bind(folder.path().join("s"), "test", Notes::default()).unwrap();
    let file = crate::journal::create().unwrap();
    let copy = file.try_clone().unwrap();
    server.set_journal(file, Instant::now()).unwrap();
    let mut client = UnixStream::connect(server.path()).unwrap();
    let mut say = |server: &mut Server<Notes>, number, words: &[u32]| {
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let kind = Kind::Command { no_reply: false };
        client.write_all(&message(7, number, kind, &body)).unwrap();
        while server.ready(Instant::now()).work > 0 {}
        // What a successor finds that has the state of this moment.
        let number = server.save(Instant::now()).unwrap().data.journal.unwrap();
        read(&copy, number, 1).unwrap().stale
    };
    // VFIO_IRQ_SET_DATA_NONE and VFIO_IRQ_SET_ACTION_TRIGGER of one interrupt.
    let (change, reset) = ([20, 1 | 32, 2, 0, 1], command::DEVICE_RESET);
    assert!(!say(&mut server, command::VERSION, &[0]));
    assert!(!say(&mut server, command::DEVICE_SET_IRQS, &change));
    server.target_mut().lost = true;
    assert!(!say(&mut server, reset, &[]), "it changes nothing here");
    assert!(say(&mut server, command::DEVICE_SET_IRQS, &change));
    assert!(say(&mut server, reset, &[]));
    server.target_mut().lost = false;
    server.commit();
    let number = server.save(Instant::now()).unwrap().data.journal.unwrap();
    let found = read(&copy, number, 1).unwrap();
    assert!(!found.stale && found.unsent.is_empty());
    assert!(!say(&mut server, reset, &[]));
}
