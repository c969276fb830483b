// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log of written pages, which the front end reads while its machine is moved, and what else a
//! move needs.

use std::collections::BTreeSet;
use std::time::Instant;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};

use super::*;

const SET_LOG_BASE: u32 = 6;
const SET_LOG_FD: u32 = 7;
const SEND_RARP: u32 = 19;
const SET_BACKEND_REQ_FD: u32 = 21;
const LOG_ALL: u64 = 1 << 26;
const EVENT_IDX: u64 = 1 << 29;
/// The flag of SET_VRING_ADDR: writes to the used ring are logged.
const LOG_USED: u32 = 1;

const PAGE: usize = 4096;
/// Bytes of a bitmap of all memory, and where it is in its file.
const BITMAP: u64 = MEMORY / 4096 / 8;
const OFFSET: u64 = 16;

type Pages = BTreeSet<u64>;

/// The front end's bitmap.
struct Bitmap(OwnedFd);

impl Bitmap {
    fn new() -> Bitmap {
        let file = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
        // A front end's file ends where the bitmap does.
        ftruncate(&file, OFFSET + BITMAP).unwrap();
        Bitmap(file)
    }

    /// The pages that are marked, whose marks are taken.
    fn take(&self) -> Pages {
        let mut marks = vec![0; usize::try_from(BITMAP).unwrap()];
        assert_eq!(pread(&self.0, &mut marks, OFFSET).unwrap(), marks.len());
        assert_eq!(pwrite(&self.0, &vec![0; marks.len()], OFFSET).unwrap(), marks.len());
        let set = |page: &u64| marks[usize::try_from(page / 8).unwrap()] & 1 << (page % 8) != 0;
        (0..BITMAP * 8).filter(set).collect()
    }
}

fn page(addr: u64) -> u64 {
    addr / PAGE as u64
}

impl FrontEnd {
    /// Hands the bitmap over. Returns the reply, which this request always has.
    fn set_log(&mut self, bitmap: &Bitmap) -> Vec<u8> {
        let body = [BITMAP, OFFSET].map(u64::to_le_bytes).concat();
        self.send_raw(&FrontEnd::message(SET_LOG_BASE, 0, &body), &[bitmap.0.as_fd()]);
        self.answer(SET_LOG_BASE)
    }

    fn snapshot(&self) -> Vec<u8> {
        self.memory.read(0, usize::try_from(MEMORY).unwrap())
    }

    /// The pages that have changed since `before`.
    fn changed(&self, before: &[u8]) -> Pages {
        let now = self.snapshot();
        let pages = before.chunks(PAGE).zip(now.chunks(PAGE));
        (0..).zip(pages).filter(|(_, (before, now))| before != now).map(|(at, _)| at).collect()
    }
}

/// The bitmap has the pages that the device has changed, and no others: buffers, used ring, packed
/// descriptors, event suppression.
#[test]
fn the_log_has_each_page_that_the_device_writes() {
    for features in [0, EVENT_IDX, RING_PACKED, RING_PACKED | EVENT_IDX] {
        let packed = features & RING_PACKED != 0;
        let lab = Lab::new();
        let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
        let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
        let mut second = FrontEnd::connect(&two);
        second.agree(VERSION_1 | features);
        assert!(second.share());
        let mut rx = second.ring(0, 64);
        let mut base = if packed { 0x8000_8000 } else { 0 };
        let bitmap = Bitmap::new();
        assert_eq!(second.set_log(&bitmap), [0; 8]);
        // Without LOG_ALL nothing is marked.
        for round in 0..20_u16 {
            let logs = round >= 2;
            if round == 2 {
                let all = VERSION_1 | features | PROTOCOL_FEATURES | LOG_ALL;
                assert!(second.tell_number(request::SET_FEATURES, all));
            }
            let before = second.snapshot();
            let addr = second.memory.alloc(2 * PAGE);
            let buffer = addr + PAGE as u64 - 20; // The frame begins in the next page.
            if packed {
                let there = rx.queue.desc + 16 * u64::from(round);
                let descriptor = [&buffer.to_le_bytes()[..], &[0, 8, 0, 0, 7, 0]].concat();
                second.memory.write(there, &descriptor);
                second.memory.write(there + 14, &0x82_u16.to_le_bytes());
            } else {
                rx.queue.add(&second.memory, &[(buffer, 2048, true)]);
            }
            second.start(&rx, base);
            rx.call.take();
            let sent = frame(1, 0, &[u8::try_from(round).unwrap() + 1; 300]);
            first.send(&mut tx, &sent);
            rx.call.wait();
            base = second.stop(0);
            assert_eq!(second.memory.read(buffer + HEADER as u64, sent.len()), sent);
            if !packed {
                rx.queue.used(&second.memory).unwrap();
            }
            let (changed, marked) = (second.changed(&before), bitmap.take());
            let of_driver = [rx.queue.driver, rx.queue.desc].map(page);
            // The descriptors of a packed ring are both ends'.
            let of_driver = if packed { &of_driver[..1] } else { &of_driver[..] };
            let mut expected = changed;
            expected.retain(|page| !of_driver.contains(page));
            assert!(expected.len() >= 3, "{expected:?}");
            if !logs {
                assert_eq!(marked, Pages::new());
                continue;
            }
            // Event suppression may be written as it was.
            let same: Pages = marked.difference(&expected).copied().collect();
            assert!(expected.is_subset(&marked), "{features:#x}: {expected:?}, {marked:?}");
            assert!(same.iter().all(|at| *at == page(rx.queue.device)), "{features:#x}: {same:?}");
        }
    }
}

/// QEMU replaces the bitmap when memory comes, and takes the marks of the former one afterwards.
#[test]
fn a_log_is_replaced_begins_and_ends_while_frames_pass() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, 0);
    let bitmaps = [Bitmap::new(), Bitmap::new()];
    second.set_log(&bitmaps[0]);
    let all = VERSION_1 | PROTOCOL_FEATURES;
    assert!(second.tell_number(request::SET_FEATURES, all | LOG_ALL));
    let mut log_used = addresses(0, &rx.queue);
    log_used[4..8].copy_from_slice(&LOG_USED.to_le_bytes());
    log_used[32..40].copy_from_slice(&rx.queue.device.to_le_bytes());
    assert!(second.tell(request::SET_VRING_ADDR, &log_used, &[]));
    // Another place for it would need marks of its own.
    let mut elsewhere = log_used.clone();
    elsewhere[32..40].copy_from_slice(&0x10_0000_u64.to_le_bytes());
    assert!(!second.tell(request::SET_VRING_ADDR, &elsewhere, &[]));
    assert!(second.tell(request::SET_VRING_ADDR, &log_used, &[]));
    assert!(second.tell(SET_LOG_FD, &[], &[new_eventfd().as_fd()]));
    for round in 0..40_usize {
        let addr = second.post(&mut rx, 2048);
        first.send(&mut tx, &frame(1, 0, &[7; 40]));
        second.receive(&mut rx, addr);
        // Now nobody marks the former one any more, and whatever was written is marked in it.
        second.set_log(&bitmaps[(round + 1) % 2]);
        let marked = bitmaps[round % 2].take();
        assert!(marked.is_superset(&[addr, rx.queue.device].map(page).into()), "{marked:?}");
        assert!(marked.len() <= 3, "{marked:?}");
    }
    // A running ring may move, with its log.
    let moved = second.ring(0, 64);
    log_used[..40].copy_from_slice(&addresses(0, &moved.queue));
    log_used[4..8].copy_from_slice(&LOG_USED.to_le_bytes());
    log_used[32..40].copy_from_slice(&moved.queue.device.to_le_bytes());
    assert!(second.tell(request::SET_VRING_ADDR, &log_used, &[]));
    rx = moved;
    let memory = [(0, MEMORY, USER, 0)];
    let file = second.memory.file();
    assert!(second.tell(request::SET_MEM_TABLE, &table(&memory), &[file.as_fd()]));
    let addr = second.post(&mut rx, 2048);
    first.send(&mut tx, &frame(1, 0, &[8; 40]));
    second.receive(&mut rx, addr);
    assert!(bitmaps[0].take().contains(&page(addr)), "the log outlives a change of the memory");
    // Memory that the bitmap does not cover.
    let far = one_region((1 << 30, PAGE as u64, 1 << 30, 0));
    assert!(!second.tell(request::ADD_MEM_REG, &far, &[file.as_fd()]));
    assert!(second.tell_number(request::SET_FEATURES, all));
    // A task that began to write before may mark its pages after the reply. A change of the memory
    // stops the rings for a moment: then it has.
    assert!(second.tell(request::SET_MEM_TABLE, &table(&memory), &[file.as_fd()]));
    bitmaps.iter().for_each(|bitmap| _ = bitmap.take());
    let addr = second.post(&mut rx, 2048);
    first.send(&mut tx, &frame(1, 0, &[9; 40]));
    second.receive(&mut rx, addr);
    assert_eq!(bitmaps.map(|bitmap| bitmap.take()), [Pages::new(), Pages::new()]);
}

#[test]
fn a_bitmap_that_cannot_be_one_ends_the_connection_and_a_lost_one_harms_nobody() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let file = Bitmap::new();
    let eventfd = new_eventfd();
    for (size, offset, fd) in [
        (BITMAP, OFFSET, eventfd.as_fd()),
        (BITMAP + 1, OFFSET, file.0.as_fd()),
        (BITMAP - 1, OFFSET, file.0.as_fd()),
        (BITMAP, OFFSET + 1, file.0.as_fd()),
        (0, OFFSET, file.0.as_fd()),
        (u64::MAX, OFFSET, file.0.as_fd()),
        (BITMAP, u64::MAX - 7, file.0.as_fd()),
    ] {
        let (mut second, _rx, _tx) = FrontEnd::card(&two, 0);
        let body = [size, offset].map(u64::to_le_bytes).concat();
        second.send_raw(&FrontEnd::message(SET_LOG_BASE, 0, &body), &[fd]);
        second.wait_for_end();
    }
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, LOG_ALL);
    second.set_log(&file);
    ftruncate(&file.0, 0).unwrap();
    let addr = second.post(&mut rx, 2048);
    first.send(&mut tx, &frame(1, 0, b"no log"));
    assert_eq!(second.receive(&mut rx, addr), frame(1, 0, b"no log"));
}

#[test]
fn the_network_learns_where_a_machine_is_now() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, 0);
    let addr = second.post(&mut rx, 2048);
    let mut first = FrontEnd::connect(&one);
    first.agree(VERSION_1);
    let mut word = [MACS[0].to_vec(), vec![9, 9]].concat();
    let told = |first: &mut FrontEnd, word: &[u8]| first.tell(SEND_RARP, word, &[]);
    assert!(told(&mut first, &word), "without a driver nothing happens");
    assert!(first.share());
    let mut tx = first.ring(1, 64);
    first.start(&tx, 0);
    assert!(told(&mut first, &word));
    let mut expected = [&[0xff; 6][..], &MACS[0], &[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]].concat();
    for _ in 0..2 {
        expected.extend(MACS[0].iter().chain(&[0; 4]));
    }
    expected.resize(60, 0);
    assert_eq!(second.receive(&mut rx, addr), expected);
    // An address that is another device's is not announced as this one's.
    word[..6].copy_from_slice(&MACS[1]);
    assert!(told(&mut first, &word));
    let addr = second.post(&mut rx, 2048);
    first.send(&mut tx, &frame(1, 0, b"next"));
    assert_eq!(second.receive(&mut rx, addr), frame(1, 0, b"next"));
}

#[test]
fn a_change_of_the_link_is_told_on_the_socket_for_it() {
    let lab = Lab::new();
    let served = lab.serve(0, json!({}));
    let (mut front_end, _rx, _tx) = FrontEnd::card(&served, 0);
    let mut read = [6, 2, 0].map(u32::to_le_bytes).concat();
    read.extend([0; 2]);
    // The device's task has seen the carrier. Otherwise a link that goes down changes nothing.
    let began = Instant::now();
    while front_end.ask(request::GET_CONFIG, &read)[12..] != [1, 0] {
        assert!(began.elapsed() < TIMEOUT);
        std::thread::yield_now();
    }
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    assert!(!front_end.tell(SET_BACKEND_REQ_FD, &[], &[new_eventfd().as_fd()]));
    assert!(front_end.tell(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
    drop(theirs);
    ours.set_read_timeout(Some(TIMEOUT)).unwrap();
    for (up, status) in [(false, [0, 0]), (true, [1, 0])] {
        let set = json!({ "op": "link", "up": up });
        served.endpoint.device().control(&set, &mut |_| true).unwrap();
        let mut message = [0; 12];
        ours.read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(front_end.ask(request::GET_CONFIG, &read)[12..], status);
    }
    // One that does not read its messages is not waited for.
    for up in [false, true].into_iter().cycle().take(2000) {
        let set = json!({ "op": "link", "up": up });
        served.endpoint.device().control(&set, &mut |_| true).unwrap();
    }
    drop(front_end);
    served.counts("the end", |stats| stats.clients == 1);
    let mut rest = Vec::new();
    ours.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len() % 12, 0);
}

/// A socket for the device's messages may have descriptors in it whose close waits. The next
/// messages do not wait for it.
#[test]
fn a_socket_for_messages_that_cannot_be_closed_at_once_keeps_nobody_waiting() {
    let lab = Lab::new();
    let served = lab.serve(0, json!({}));
    let (mut front_end, _rx, _tx) = FrontEnd::card(&served, 0);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (lingers, peer) = vbus_test_driver::lingering();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [lingers.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&ours, &[IoSlice::new(b"x")], &mut ancillary, SendFlags::empty()).unwrap();
    assert!(front_end.tell(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
    drop((theirs, lingers));
    let (_other, next) = UnixStream::pair().unwrap();
    assert!(front_end.tell(SET_BACKEND_REQ_FD, &[], &[next.as_fd()]));
    drop(peer);
}

/// The frames of a ring that was disabled are taken and dropped.
#[test]
fn what_a_disabled_ring_sends_goes_nowhere() {
    let lab = Lab::new();
    let (one, two) = (lab.serve(0, json!({})), lab.serve(1, json!({})));
    let (mut first, _rx, mut tx) = FrontEnd::card(&one, 0);
    let (mut second, mut rx, _tx) = FrontEnd::card(&two, 0);
    let addr = second.post(&mut rx, 2048);
    assert!(first.tell_words(request::SET_VRING_ENABLE, &[1, 0]));
    for _ in 0..100 {
        first.send(&mut tx, &frame(1, 0, b"disabled"));
    }
    let drops = || one.endpoint.device().inspect()["pairs"][0]["tx"]["drops"]["no_link"].as_u64();
    eventually("the drops", || (drops() == Some(100)).then_some(()));
    assert!(first.tell_words(request::SET_VRING_ENABLE, &[1, 1]));
    first.send(&mut tx, &frame(1, 0, b"enabled"));
    assert_eq!(second.receive(&mut rx, addr), frame(1, 0, b"enabled"));
    assert_eq!(first.stop(1), 101);
}
