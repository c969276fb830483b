// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Network cards under load while the bus is taken over again and again: no frame is lost, doubled
//! or changed.
//!
//! `VBUS_UPGRADES=50 cargo test -p vbus --test it take_over` takes over fifty times.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vbus_driver::venet::{CHAIN_MAX, FRAME_MAX, HEADER_BYTES, Nic, Piece, Rx, Tx};
use vbus_driver::{Dma as _, Function, Hal as _};
use vbus_process::{MEMORY_BYTES, Process, ProcessMemory};
use vbus_shm::signal::Armed;
use vfio_user_protocol::Client;

use crate::support::{Served, TIMEOUT, wait_until};
use crate::take_over::{pauses, take_over, upgrades};

pub const ENTRIES: u32 = 64;
const BUFFER: usize = 4096;
const SLOT: usize = FRAME_MAX.next_multiple_of(64);
/// A wait for an interrupt ends after this time, so that the test sees what is late.
const NAP: Duration = Duration::from_millis(20);

fn mac(last: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, last]
}

/// Frame `number` of a stream: every byte depends on the number.
pub fn frame(to: u8, from: u8, number: u64) -> Vec<u8> {
    let len = 60 + usize::try_from(number * 37 % 1400).unwrap();
    let mut frame = [&mac(to)[..], &mac(from), &[0x88, 0xb5]].concat();
    frame.extend(number.to_le_bytes());
    let mut word = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    while frame.len() < len {
        word = word.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        frame.push((word >> 56) as u8);
    }
    frame
}

/// A network card in a process, with one queue pair.
pub struct Card {
    process: Process,
    nic: Nic<Process>,
    pub tx: Tx<Process>,
    rx: Rx<Process>,
    sending: ProcessMemory,
    sent: usize,
}

impl Card {
    pub fn open(socket: PathBuf) -> Card {
        let process = Process::connect(socket, MEMORY_BYTES).unwrap();
        let function = Function::probe(process.clone()).unwrap();
        let mut nic = Nic::open(function, 0, 0).unwrap();
        let (tx, mut rx) = nic.queue_pair(0, ENTRIES, BUFFER as u32, 0).unwrap();
        for id in 0..rx.space() as u16 {
            rx.give(id).unwrap();
        }
        rx.post();
        nic.start().unwrap();
        let sending = process.alloc(SLOT * ENTRIES as usize).unwrap();
        Card { process, nic, tx, rx, sending, sent: 0 }
    }

    /// Sends a frame, if there is room.
    pub fn send(&mut self, frame: &[u8]) -> bool {
        self.tx.reclaim().unwrap();
        if (self.tx.space() as usize) < CHAIN_MAX {
            return false;
        }
        let slot = self.sent % ENTRIES as usize * SLOT;
        self.sent += 1;
        let bytes = [&[0; HEADER_BYTES][..], frame].concat();
        self.sending.copy_in(slot, &bytes);
        let piece = Piece { addr: self.sending.address(slot), len: bytes.len() as u32 };
        assert!(self.tx.submit(&[piece]).unwrap());
        self.tx.post();
        true
    }

    /// Takes the next frame, if there is one.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        let pieces = self.rx.receive().unwrap()?.to_vec();
        let mut frame = Vec::new();
        for piece in pieces {
            let mut bytes = vec![0; piece.len as usize];
            self.rx.buffers().copy_out(usize::from(piece.id) * BUFFER, &mut bytes);
            frame.extend(bytes);
            self.rx.give(piece.id).unwrap();
        }
        self.rx.post();
        Some(frame.split_off(self.rx.header_bytes()))
    }

    /// Sleeps until an interrupt comes, for a moment at most.
    pub fn sleep(&mut self) {
        if self.rx.arm(0) == Armed::Waiting {
            self.process.wait(NAP);
            self.nic.function().acknowledge();
        }
        self.rx.disarm();
    }
}

/// Sends a stream and receives that of the other card, until `stop` and until all `total` frames of
/// the other one have come. `sent` and `received` count.
fn run(
    mut card: Card,
    (own, other): (u8, u8),
    stop: &AtomicBool,
    [sent, received]: [&AtomicU64; 2],
    other_sent: &AtomicU64,
    other_ended: &AtomicBool,
    ended: &AtomicBool,
) {
    let begun = Instant::now();
    loop {
        let mut idle = true;
        let number = sent.load(Ordering::Relaxed);
        if !stop.load(Ordering::Relaxed) {
            if card.send(&frame(other, own, number)) {
                // Release: pairs with the load below. Who sees the end sees the last number.
                sent.store(number + 1, Ordering::Release);
                idle = false;
            }
        } else {
            ended.store(true, Ordering::Release);
        }
        while let Some(found) = card.receive() {
            idle = false;
            let number = received.load(Ordering::Relaxed);
            assert!(found == frame(own, other, number), "card {own}: not frame {number}");
            received.store(number + 1, Ordering::Release);
        }
        let all = other_ended.load(Ordering::Acquire)
            && received.load(Ordering::Relaxed) == other_sent.load(Ordering::Acquire);
        card.tx.reclaim().unwrap();
        if ended.load(Ordering::Relaxed) && all && card.tx.in_flight() == 0 {
            return;
        }
        assert!(begun.elapsed() < 20 * TIMEOUT, "card {own}: frames are missing");
        if idle {
            card.sleep();
        }
    }
}

#[test]
fn no_frame_is_lost_or_doubled_by_many_upgrades() {
    let nic = |last: u8| {
        format!(
            "[[device]]\nname = \"net{last}\"\nclass = \"venet\"\nbackend = \"switch\"\n\
             mac = \"02:00:00:00:00:0{last}\"\nbackpressure-ms = 60000\n"
        )
    };
    // Beside them stand a card for drivers of virtio, with a client, and an uplink that listens.
    let others = "[[device]]\nname = \"card\"\nclass = \"virtio-net\"\nbackend = \"switch\"\n\
                  [[device]]\nname = \"up\"\nclass = \"uplink\"\nbackend = \"stream\"\n\
                  listen = \"LISTEN\"\n";
    let folder = tempfile::tempdir().unwrap();
    let listens = folder.path().join("wire.sock");
    let others = others.replace("LISTEN", listens.to_str().unwrap());
    let mut bus = Served::start(&[nic(1), nic(2), others].concat());
    let mut client = Client::connect(bus.dir.join("card.sock")).unwrap();
    let mut before = [0; 64];
    client.region_read(7, 0, &mut before).unwrap();
    let cards = [1, 2].map(|last| Card::open(bus.dir.join(format!("net{last}.sock"))));
    let stop = AtomicBool::new(false);
    let [sent1, sent2, got1, got2] = [const { AtomicU64::new(0) }; 4];
    let [ended1, ended2] = [const { AtomicBool::new(false) }; 2];
    let count = upgrades(3);
    std::thread::scope(|scope| {
        let [one, two] = cards;
        let first =
            scope.spawn(|| run(one, (1, 2), &stop, [&sent1, &got1], &sent2, &ended2, &ended1));
        let second =
            scope.spawn(|| run(two, (2, 1), &stop, [&sent2, &got2], &sent1, &ended1, &ended2));
        for _ in 0..count {
            let before = [&got1, &got2].map(|count| count.load(Ordering::Relaxed));
            wait_until("frames pass in both directions", || {
                assert!(!first.is_finished() && !second.is_finished(), "a card has failed");
                let now = [&got1, &got2].map(|count| count.load(Ordering::Relaxed));
                now[0] > before[0] + 200 && now[1] > before[1] + 200
            });
            take_over(&mut bus);
        }
        stop.store(true, Ordering::Relaxed);
        first.join().unwrap();
        second.join().unwrap();
    });
    let all = [&sent1, &got2, &sent2, &got1].map(|count| count.load(Ordering::Relaxed));
    assert_eq!((all[0], all[2]), (all[1], all[3]));
    println!("{count} upgrades, {all:?} frames, pauses {:?}", pauses(&bus));
    let mut now = [0; 64];
    client.region_read(7, 0, &mut now).unwrap();
    assert_eq!(now, before);
    UnixStream::connect(&listens).unwrap();
    for name in ["net1", "net2"] {
        let shown = bus.json(&["device", "show", name]);
        assert_eq!(shown["counters"]["opens"], 1);
        assert_eq!(shown["counters"]["broken"], 0);
    }
}
