// SPDX-License-Identifier: Apache-2.0 OR MIT
//! NICs on a switch: frames between two drivers.

use serde_json::json;
use vbus_core::Bus;
use vbus_driver::venet::{
    CHAIN_MAX, Coalesce, Duplex, F_COALESCE, F_HASH, F_MAC, F_RSS, F_RX, F_RX_CSUM, F_RX_TSO4,
    F_TX, F_TX_CSUM, F_VLAN, FRAME_MAX, HEADER_BYTES, Nic, Piece, Rss, Rx, Tx, VLAN_MAP_BYTES,
    counters_page, hash_kind,
};
use vbus_driver::{Dma, Error, Hal};
use vbus_shm::ErrorCode;
use vbus_shm::signal::Armed;

use crate::local::{Local, LocalMemory, bus, until};

const ENTRIES: u32 = 64;
const BUFFER: usize = 4096;
const SLOT: usize = FRAME_MAX.next_multiple_of(64);

/// Gives all buffers to the device.
fn fill(rx: &mut Rx<Local>) {
    for id in 0..rx.space() as u16 {
        rx.give(id).unwrap();
    }
    rx.post();
}

/// A NIC with one queue pair and its buffers.
struct Station {
    local: Local,
    nic: Nic<Local>,
    tx: Tx<Local>,
    rx: Rx<Local>,
    sending: LocalMemory,
    sent: usize,
}

impl Station {
    fn new(bus: &Bus, last: u8, mtu: u16) -> Station {
        Station::with(bus, last, mtu, 0)
    }

    /// Opens a NIC with these features, if the device offers them.
    fn with(bus: &Bus, last: u8, mtu: u16, features: u64) -> Station {
        let config = json!({ "mac": format!("02:00:00:00:00:{last:02x}"), "mtu": mtu,
            "backend": "switch", "backpressure-ms": 60_000, "queue-pairs": 2, "speed": 1000 });
        let local = Local::new(bus, &format!("n{last}"), "venet", &config);
        let mut nic = Nic::open(local.probe(), features, 0).unwrap();
        let (tx, mut rx) = nic.queue_pair(0, ENTRIES, BUFFER as u32, 0).unwrap();
        fill(&mut rx);
        nic.start().unwrap();
        let sending = local.alloc(SLOT * ENTRIES as usize).unwrap();
        Station { local, nic, tx, rx, sending, sent: 0 }
    }

    /// Sends a frame in pieces of at most `piece` bytes (a multiple of 8).
    fn send(&mut self, frame: &[u8], piece: usize) {
        // This also frees the memory for the frame's bytes: a slot is free when its entries have
        // come back.
        until("room in the transmit ring", || {
            self.tx.reclaim().unwrap();
            (self.tx.space() as usize >= CHAIN_MAX).then_some(())
        });
        let slot = self.sent % ENTRIES as usize * SLOT;
        self.sent += 1;
        let mut bytes = vec![0; HEADER_BYTES];
        bytes.extend_from_slice(frame);
        self.sending.copy_in(slot, &bytes);
        let pieces: Vec<Piece> = (0..bytes.len())
            .step_by(piece)
            .map(|at| Piece {
                addr: self.sending.address(slot + at),
                len: piece.min(bytes.len() - at) as u32,
            })
            .collect();
        assert!(pieces.len() <= CHAIN_MAX);
        assert!(self.tx.submit(&pieces).unwrap());
        self.tx.post();
    }

    /// Takes the next frame, if there is one. Its buffers go back at once.
    fn try_receive(&mut self) -> Option<Vec<u8>> {
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

    /// Takes the next frame. It sleeps until an interrupt comes.
    fn receive(&mut self) -> Vec<u8> {
        loop {
            if let Some(frame) = self.try_receive() {
                self.rx.disarm();
                return frame;
            }
            if self.rx.arm(0) == Armed::Waiting {
                self.local.wait_interrupt();
                self.nic.function().acknowledge();
            }
        }
    }
}

fn mac(last: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, last]
}

fn frame(to: [u8; 6], from: u8, n: usize, len: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(len);
    frame.extend(to);
    frame.extend(mac(from));
    frame.extend([0x88, 0xb5]);
    frame.extend((frame.len()..len).map(|i| (i * 31 + n) as u8));
    frame
}

#[test]
fn frames_of_all_sizes_pass_in_one_piece_or_many() {
    let bus = bus();
    let (mut a, mut b) = (Station::new(&bus, 1, 9000), Station::new(&bus, 2, 9000));
    for (n, len) in [15, 60, 1514, 4084, 4085, 8180, 9014].into_iter().enumerate() {
        for piece in [SLOT, 512] {
            a.send(&frame(mac(2), 1, n, len), piece);
            assert_eq!(b.receive(), frame(mac(2), 1, n, len), "{len} bytes in pieces of {piece}");
        }
        b.send(&frame(mac(1), 2, n, len), SLOT);
        assert_eq!(a.receive(), frame(mac(1), 2, n, len));
    }
}

#[test]
fn a_stream_keeps_its_order_through_many_laps() {
    const COUNT: usize = 20_000;
    let bus = bus();
    let (mut a, mut b) = (Station::new(&bus, 1, 1500), Station::new(&bus, 2, 1500));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..COUNT {
                a.send(&frame(mac(2), 1, n, 60 + n % 1400), SLOT);
            }
        });
        scope.spawn(|| {
            for n in 0..COUNT {
                assert_eq!(b.receive(), frame(mac(2), 1, n, 60 + n % 1400), "frame {n}");
            }
        });
    });
    until("the last returns", || {
        a.tx.reclaim().unwrap();
        (a.tx.in_flight() == 0).then_some(())
    });
}

#[test]
fn the_status_page_tells_of_link_and_traffic() {
    let bus = bus();
    let (mut a, mut b) = (Station::new(&bus, 1, 1500), Station::new(&bus, 2, 1500));
    until("the link", || a.nic.status().unwrap().link.then_some(()));
    for n in 0..10 {
        a.send(&frame(mac(2), 1, n, 100), SLOT);
        b.receive();
    }
    until("the statistics", || {
        let (a, b) = (a.nic.status().unwrap(), b.nic.status().unwrap());
        (a.tx.frames == 10 && a.tx.bytes == 1000 && b.rx.frames == 10 && b.rx.bytes == 1000)
            .then_some(())
    });
    // The last update has arrived. The next one has newer counts, which cause no interrupt.
    assert_eq!(a.nic.arm_status(), Armed::Waiting);
    while a.local.interrupted() {}
    a.send(&frame(mac(2), 1, 11, 100), SLOT);
    until("the news", || a.nic.status_is_newer().then_some(()));
    assert!(!a.local.interrupted());
}

#[test]
fn the_filter_lets_through_what_it_names() {
    let bus = bus();
    let (mut a, mut b) = (Station::new(&bus, 1, 1500), Station::new(&bus, 2, 1500));
    let (group, other) = ([0x33, 0x33, 0, 0, 0, 7], [0x33, 0x33, 0, 0, 0, 8]);
    b.nic.filter(0, &[group]).unwrap();
    a.send(&frame(other, 1, 0, 60), SLOT);
    a.send(&frame(group, 1, 1, 60), SLOT);
    assert_eq!(b.receive(), frame(group, 1, 1, 60));
    // These are more than the device accepts, so all multicast frames pass.
    b.nic.filter(0, &[group; 65]).unwrap();
    a.send(&frame(other, 1, 2, 60), SLOT);
    assert_eq!(b.receive(), frame(other, 1, 2, 60));
    b.nic.filter(vbus_driver::venet::FILTER_PROMISCUOUS, &[]).unwrap();
    a.send(&frame(mac(9), 1, 3, 60), SLOT);
    assert_eq!(b.receive(), frame(mac(9), 1, 3, 60));
}

#[test]
fn a_nic_is_opened_again_and_again() {
    let bus = bus();
    let mut b = Station::new(&bus, 2, 1500);
    let a = Station::new(&bus, 1, 1500);
    let Station { local, nic, .. } = a;
    let mut function = nic.close();
    for n in 0..100 {
        let mut nic = Nic::open(function, u64::MAX, 0).unwrap();
        assert_ne!(nic.function().features(), 0);
        let (mut tx, _rx) = nic.queue_pair(0, 32, 4096, 0).unwrap();
        nic.start().unwrap();
        let memory = local.alloc(4096).unwrap();
        let bytes = [&[0; HEADER_BYTES][..], &frame(mac(2), 1, n, 60)].concat();
        memory.copy_in(0, &bytes);
        assert!(tx.submit(&[Piece { addr: memory.address(0), len: bytes.len() as u32 }]).unwrap());
        tx.post();
        assert_eq!(b.receive(), frame(mac(2), 1, n, 60));
        function = nic.close();
    }
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorCode {
    match result.unwrap_err() {
        Error::Refused { code, .. } => code,
        other => panic!("{other}"),
    }
}

#[test]
fn features_come_with_those_that_they_need() {
    let bus = bus();
    let a = Station::with(&bus, 1, 1500, F_TX | F_RX_TSO4);
    assert_eq!(a.nic.function().features(), F_TX);
    let b = Station::with(&bus, 2, 1500, F_TX & !F_TX_CSUM | F_RX | F_HASH);
    assert_eq!(b.nic.function().features(), F_RX | F_HASH);
    assert_eq!((a.rx.header_bytes(), b.rx.header_bytes()), (HEADER_BYTES, HEADER_BYTES + 8));
}

#[test]
fn settings_change_while_it_runs() {
    let bus = bus();
    let all = F_TX | F_RX | F_HASH | F_RSS | F_VLAN | F_MAC | F_COALESCE;
    let mut a = Station::new(&bus, 1, 1500);
    let mut b = Station::with(&bus, 2, 1500, all);
    assert_eq!(b.nic.function().features(), all);
    b.nic.set_offloads(0).unwrap();
    b.nic.set_offloads(F_RX_CSUM | F_RX_TSO4).unwrap();
    assert_eq!(refused(b.nic.set_offloads(F_RX_TSO4)), ErrorCode::BAD_ARGUMENT);

    b.nic.set_mac(mac(9)).unwrap();
    a.send(&frame(mac(2), 1, 1, 60), SLOT);
    a.send(&frame(mac(9), 1, 2, 60), SLOT);
    assert_eq!(b.receive(), frame(mac(9), 1, 2, 60));
    until("the address", || (b.nic.status().unwrap().mac == mac(9)).then_some(()));
    assert_eq!(refused(b.nic.set_mac(mac(1))), ErrorCode::EXISTS);
    b.nic.set_mac(mac(2)).unwrap();

    let mut ids = [0; VLAN_MAP_BYTES];
    ids[0] = 1 << 7;
    b.nic.set_vlans(Some(&ids)).unwrap();
    let tagged = |id: u8, n: usize| {
        let mut frame = frame(mac(2), 1, n, 60);
        frame.splice(12..12, [0x81, 0, 0, id]);
        frame
    };
    a.send(&tagged(6, 3), SLOT);
    a.send(&tagged(7, 4), SLOT);
    assert_eq!(b.receive(), tagged(7, 4));
    b.nic.set_vlans(None).unwrap();
    a.send(&tagged(6, 5), SLOT);
    assert_eq!(b.receive(), tagged(6, 5));

    // The device may hold back an interrupt for an hour. The second frame sends it.
    let hour = Coalesce { usecs: 3_600_000_000, frames: 2 };
    b.nic.set_coalesce(Some(0), hour, Coalesce::default()).unwrap();
    assert_eq!(b.rx.arm(0), Armed::Waiting);
    while b.local.interrupted() {}
    a.send(&frame(mac(2), 1, 6, 60), SLOT);
    a.send(&frame(mac(2), 1, 7, 60), SLOT);
    b.local.wait_interrupt();
    for n in [6, 7] {
        assert_eq!(b.try_receive(), Some(frame(mac(2), 1, n, 60)));
    }
    b.nic.set_coalesce(None, Coalesce::default(), Coalesce::default()).unwrap();
    let wrong = b.nic.set_coalesce(Some(2), Coalesce::default(), Coalesce::default());
    assert_eq!(refused(wrong), ErrorCode::BAD_ARGUMENT);

    let status = b.nic.status().unwrap();
    assert_eq!((status.speed, status.duplex), (Some(1000), Duplex::Full));
}

#[test]
fn queues_come_and_go_while_it_runs() {
    let bus = bus();
    let mut a = Station::new(&bus, 1, 1500);
    let mut b = Station::with(&bus, 2, 1500, F_RSS);
    assert_eq!(refused(b.nic.set_queues(2)), ErrorCode::BAD_ARGUMENT);
    let (tx, mut rx) = b.nic.queue_pair(1, ENTRIES, BUFFER as u32, 0).unwrap();
    fill(&mut rx);
    b.nic.set_queues(2).unwrap();
    let rss = Rss { kinds: hash_kind::IPV4, key: [3; 40], table: &[1] };
    b.nic.set_rss(Some(&rss)).unwrap();
    a.send(&frame(mac(2), 1, 1, 60), SLOT);
    let pieces = until("a frame of the second pair", || rx.receive().unwrap().map(<[_]>::to_vec));
    assert_eq!(pieces[0].len, 60 + HEADER_BYTES as u32);
    assert_eq!(refused(b.nic.set_queues(1)), ErrorCode::BAD_ARGUMENT, "the table names it");
    b.nic.set_rss(None).unwrap();
    b.nic.set_queues(1).unwrap();
    b.nic.remove_pair(tx, rx).unwrap();
    a.send(&frame(mac(2), 1, 2, 60), SLOT);
    assert_eq!(b.receive(), frame(mac(2), 1, 2, 60));
}

#[test]
fn a_queue_is_reset_while_the_others_run() {
    let bus = bus();
    let mut a = Station::new(&bus, 1, 1500);
    let Station { local, mut nic, tx, rx, sending, .. } = Station::new(&bus, 2, 1500);
    nic.add_counters(0).unwrap();
    let tx = nic.reset_tx(tx, 32, 0).unwrap();
    let mut rx = nic.reset_rx(rx, 32, BUFFER as u32, 0).unwrap();
    assert_eq!((tx.space(), rx.space()), (32, 32));
    fill(&mut rx);
    let mut b = Station { local, nic, tx, rx, sending, sent: 0 };
    for n in 0..100 {
        a.send(&frame(mac(2), 1, n, 60), SLOT);
        assert_eq!(b.receive(), frame(mac(2), 1, n, 60));
        b.send(&frame(mac(1), 2, n, 61), SLOT);
        assert_eq!(a.receive(), frame(mac(1), 2, n, 61));
    }
    until("the counters", || {
        let counters = b.nic.counters(0).unwrap().0;
        let frames = (counters[counters_page::TX_FRAMES], counters[counters_page::RX_FRAMES]);
        (frames == (100, 100) && counters[counters_page::RX_BYTES] == 6000).then_some(())
    });
    assert_eq!(b.nic.counters(1).unwrap().0[counters_page::RX_FRAMES], 0);
}
