// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Buffers in flight outlive the connection, and the process that had it.

use rustix::fs::ftruncate;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::*;

const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;

/// The body of both messages, with what QEMU fills it up with.
fn body(size: u64, offset: u64, rings: u16, ring_size: u16) -> Vec<u8> {
    let mut body = [size, offset].map(u64::to_le_bytes).concat();
    body.extend([rings, ring_size].map(u16::to_le_bytes).concat());
    body.resize(24, 0);
    body
}

impl FrontEnd {
    /// Memory for the buffers in flight: what the reply says, and its file.
    fn get_in_flight(&mut self, rings: u16, ring_size: u16) -> (Vec<u8>, OwnedFd) {
        let ask = body(0, 0, rings, ring_size);
        self.send_raw(&FrontEnd::message(GET_INFLIGHT_FD, 0, &ask), &[]);
        let mut bytes = [0; 36];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [rustix::io::IoSliceMut::new(&mut bytes)];
        let got = recvmsg(&self.socket, &mut parts, &mut ancillary, RecvFlags::WAITALL).unwrap();
        assert_eq!(got.bytes, 36);
        let file = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        assert_eq!(bytes[..4], GET_INFLIGHT_FD.to_le_bytes());
        (bytes[HEADER..].to_vec(), file.unwrap())
    }

    /// A packed receive buffer in `slot` of the first lap, with its slot as its id. Returns where
    /// it is.
    fn post_packed(&mut self, rx: &Ring, slot: u16) -> u64 {
        let addr = self.memory.alloc(2048);
        let there = rx.queue.desc + 16 * u64::from(slot);
        let rest = [2048_u32.to_le_bytes(), u32::from(slot).to_le_bytes()].concat();
        self.memory.write(there, &[&addr.to_le_bytes()[..], &rest].concat());
        self.memory.write(there + 14, &0x82_u16.to_le_bytes());
        rx.kick();
        addr
    }

    fn wait_packed(&self, rx: &Ring, slot: u16) {
        let there = rx.queue.desc + 16 * u64::from(slot);
        eventually("a used descriptor", || {
            let flags = self.memory.read(there + 14, 2);
            (flags[0] & 0x80 != 0 && flags[1] & 0x80 != 0).then_some(())
        });
    }
}

/// The process of the bus is gone without a word, and another one comes. The front end tells it the
/// base with which the first one began.
#[test]
fn another_process_goes_on_where_the_first_one_died() {
    for packed in [false, true] {
        let features = VERSION_1 | if packed { RING_PACKED } else { 0 };
        let (base, size) = if packed { (0x8000_8000, 64) } else { (0, 64) };
        let mut kept: Option<(Vec<u8>, OwnedFd)> = None;
        let mut driver: Option<(Memory, Ring)> = None;
        let mut next = 0_u16;
        let mut places = Vec::new();
        for life in 0..4_u8 {
            let lab = Lab::new();
            let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
            let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
            let (memory, ring) = driver.take().unzip();
            let mut second =
                FrontEnd::connect_with(&two, memory.unwrap_or_else(|| Memory::alone(MEMORY)));
            second.agree(features);
            assert!(second.share());
            let (told, file) = kept.get_or_insert_with(|| second.get_in_flight(2, size));
            assert!(second.tell(SET_INFLIGHT_FD, told, &[file.as_fd()]));
            let mut rx = ring.unwrap_or_else(|| second.ring(0, size));
            second.start(&rx, base);
            // Some buffers are in flight whenever a process dies.
            for _ in 0..8 {
                let slot = u16::try_from(places.len()).unwrap();
                places.push(if packed {
                    second.post_packed(&rx, slot)
                } else {
                    second.post(&mut rx, 2048)
                });
            }
            for number in 0..5 {
                let sent = frame(1, 0, &[life, number, 1]);
                first.send(&mut tx, &sent);
                let addr = places[usize::from(next)];
                if packed {
                    second.wait_packed(&rx, next);
                } else {
                    assert_eq!(rx.queue.wait(&second.memory).1, 72);
                }
                let got = second.memory.read(addr + HEADER as u64, sent.len());
                assert_eq!(got, sent, "packed {packed}, life {life}");
                next += 1;
            }
            assert_eq!(rx.queue.used(&second.memory).filter(|_| !packed), None);
            let FrontEnd { memory, socket, .. } = second;
            drop(socket);
            drop((one, two));
            driver = Some((memory, rx));
        }
    }
}

/// A ring that was stopped in order goes on at the base that the front end says, whatever a region
/// had: its driver may have begun anew.
#[test]
fn a_base_counts_after_a_stop_and_the_region_after_a_death() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let mut second = FrontEnd::connect(&two);
    second.agree(VERSION_1);
    assert!(second.share());
    let (told, file) = second.get_in_flight(1, 64);
    assert!(second.tell(SET_INFLIGHT_FD, &told, &[file.as_fd()]));
    let mut rx = second.ring(0, 64);
    second.start(&rx, 0);
    assert!(!second.tell(SET_INFLIGHT_FD, &told, &[file.as_fd()]), "a ring is running");
    for _ in 0..3 {
        second.post(&mut rx, 2048);
    }
    first.send(&mut tx, &frame(1, 0, b"one"));
    rx.queue.wait(&second.memory);
    assert_eq!(second.stop(0), 1);
    // The driver begins anew.
    let mut rx = second.ring(0, 64);
    second.start(&rx, 0);
    let addr = second.post(&mut rx, 2048);
    first.send(&mut tx, &frame(1, 0, b"two"));
    assert_eq!(second.receive(&mut rx, addr), frame(1, 0, b"two"));
    // Memory that changes stops the ring for a moment.
    let addr = second.post(&mut rx, 2048);
    assert!(second.share());
    first.send(&mut tx, &frame(1, 0, b"three"));
    assert_eq!(second.receive(&mut rx, addr), frame(1, 0, b"three"));
    assert_eq!(second.stop(0), 2);
}

/// A front end resets the device before it has said anything of a ring. What a process that died
/// had in flight is another driver's.
#[test]
fn a_reset_forgets_what_a_process_that_died_had_in_flight() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let mut second = FrontEnd::connect(&two);
    second.agree(VERSION_1);
    assert!(second.share());
    let (told, file) = second.get_in_flight(2, 64);
    assert!(second.tell(SET_INFLIGHT_FD, &told, &[file.as_fd()]));
    let mut old = second.ring(0, 64);
    second.start(&old, 0);
    let addr = second.post(&mut old, 2048);
    first.send(&mut tx, &frame(1, 0, b"old"));
    second.receive(&mut old, addr);
    let FrontEnd { memory, socket, .. } = second;
    drop(socket);
    let mut second = FrontEnd::connect_with(&two, memory);
    second.agree(VERSION_1);
    assert!(second.share());
    let mut version = [0; 2];
    rustix::io::pread(&file, &mut version, 8).unwrap();
    assert_eq!(version, [1, 0], "it was left in use");
    assert!(second.tell(SET_INFLIGHT_FD, &told, &[file.as_fd()]));
    assert!(second.tell(request::RESET_DEVICE, &[], &[]));
    rustix::io::pread(&file, &mut version, 8).unwrap();
    assert_eq!(version, [0, 0]);
    // Its driver begins anew.
    assert!(second.tell_number(request::SET_FEATURES, VERSION_1 | PROTOCOL_FEATURES));
    let mut rx = second.ring(0, 64);
    second.start(&rx, 0);
    let addr = second.post(&mut rx, 2048);
    first.send(&mut tx, &frame(1, 0, b"new"));
    assert_eq!(second.receive(&mut rx, addr), frame(1, 0, b"new"));
    assert_eq!(second.stop(0), 1);
}

/// A front end asks for the base of a ring that has not begun since a process died. What that had
/// in flight stays so.
#[test]
fn a_ring_that_has_not_begun_keeps_what_a_process_that_died_had_in_flight() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let mut second = FrontEnd::connect(&two);
    second.agree(VERSION_1);
    assert!(second.share());
    let (told, file) = second.get_in_flight(2, 64);
    assert!(second.tell(SET_INFLIGHT_FD, &told, &[file.as_fd()]));
    let mut rx = second.ring(0, 64);
    second.start(&rx, 0);
    let places = [(); 3].map(|()| second.post(&mut rx, 2048));
    first.send(&mut tx, &frame(1, 0, b"one"));
    assert_eq!(second.receive(&mut rx, places[0]), frame(1, 0, b"one"));
    let FrontEnd { memory, socket, .. } = second;
    drop(socket);
    let mut second = FrontEnd::connect_with(&two, memory);
    second.agree(VERSION_1);
    assert!(second.share());
    assert!(second.tell(SET_INFLIGHT_FD, &told, &[file.as_fd()]));
    assert!(second.tell_words(request::SET_VRING_NUM, &[0, 64]));
    assert_eq!(second.stop(0), 0);
    let mut version = [0; 2];
    rustix::io::pread(&file, &mut version, 8).unwrap();
    assert_eq!(version, [1, 0], "it is still in use");
    second.start(&rx, 0);
    for (addr, word) in places[1..].iter().zip([b"two", b"new"]) {
        first.send(&mut tx, &frame(1, 0, word));
        assert_eq!(second.receive(&mut rx, *addr), frame(1, 0, word));
    }
    // When it has begun, its base counts.
    assert_eq!(second.stop(0), 3);
    rustix::io::pread(&file, &mut version, 8).unwrap();
    assert_eq!(version, [0, 0]);
}

#[test]
fn regions_that_cannot_be_are_refused_and_lost_ones_harm_nobody() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let mut second = FrontEnd::connect(&two);
    second.agree(VERSION_1);
    assert!(second.share());
    for (rings, size) in [(0, 64), (3, 64), (u16::MAX, 64), (1, 0), (1, 32_769)] {
        assert!(!second.tell(GET_INFLIGHT_FD, &body(0, 0, rings, size), &[]));
    }
    let (told, file) = second.get_in_flight(2, 64);
    let size = u64::from_le_bytes(told[..8].try_into().unwrap());
    for (size, offset, rings, ring_size) in [
        (size - 1, 0, 2, 64),
        (size, 4096, 2, 64),
        (size, 1, 2, 64),
        (u64::MAX, u64::MAX - 4095, 2, 64),
        (size, 0, 2, 1024),
        (size, 0, 3, 64),
    ] {
        let wrong = body(size, offset, rings, ring_size);
        assert!(!second.tell(SET_INFLIGHT_FD, &wrong, &[file.as_fd()]), "{wrong:x?}");
    }
    assert!(!second.tell(SET_INFLIGHT_FD, &told, &[new_eventfd().as_fd()]));
    // A region in which nonsense is: the ring does not start, and the front end learns it.
    assert!(second.tell(SET_INFLIGHT_FD, &told, &[file.as_fd()]));
    for nonsense in [[2, 0, 64, 0], [1, 0, 63, 0]] {
        rustix::io::pwrite(&file, &nonsense, 8).unwrap();
        let rx = second.ring(0, 64);
        assert!(second.tell_words(request::SET_VRING_NUM, &[0, 64]));
        assert!(second.tell(request::SET_VRING_ADDR, &addresses(0, &rx.queue), &[]));
        let number = 0_u64.to_le_bytes();
        let kicked = second.tell(request::SET_VRING_KICK, &number, &[rx.kick.as_fd()]);
        assert!(!(kicked && second.tell_words(request::SET_VRING_ENABLE, &[0, 1])));
        second.stop(0);
    }
    // One that is taken away while the ring runs.
    let mut rx = second.ring(0, 64);
    second.start(&rx, 0);
    ftruncate(&file, 0).unwrap();
    let addr = second.post(&mut rx, 2048);
    first.send(&mut tx, &frame(1, 0, b"no region"));
    assert_eq!(second.receive(&mut rx, addr), frame(1, 0, b"no region"));
}
