// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hostile devices return invalid values. The driver gets an error each time, and no index is out
//! of bounds.

use vbus_driver::requests::Requests;
use vbus_driver::venet::{BUFFER_MIN, CHAIN_MAX, FRAME_MAX, HEADER_BYTES, Nic, Piece, Rx, Tx};
use vbus_driver::{ConnectionState, Dma, Error, ErrorCode, Function};
use vbus_shm::Memory;
use vbus_shm::abi::{reg, venet as abi};
use vbus_shm::ring::{
    DeviceEnd, ENTRIES_OFFSET, ENTRY_BYTES, LAP, NEXT, RETURNED, Return, SIGNAL_OFFSET,
};
use vbus_shm::signal::DEVICE_SEQ;
use vbus_shm::sync::Ordering;

use crate::fake::{Fake, Plain};

const ENTRIES: u32 = 256;

/// A NIC whose device accepts every command, its queues, and the device's ends of them.
struct Rig {
    fake: Fake,
    nic: Nic<Fake>,
    tx: Tx<Fake>,
    rx: Rx<Fake>,
    device_tx: DeviceEnd<Plain>,
    device_rx: DeviceEnd<Plain>,
    tx_memory: Plain,
}

impl Rig {
    fn new() -> Rig {
        let fake = Fake::default();
        let mut nic = Nic::open(Function::probe(fake.clone()).unwrap(), 0, 0).unwrap();
        let (tx, mut rx) = nic.queue_pair(0, ENTRIES, BUFFER_MIN, 0).unwrap();
        nic.start().unwrap();
        for id in 0..ENTRIES as u16 {
            rx.give(id).unwrap();
        }
        rx.post();
        // Scratch memory and status page came first. The receive buffers are the fourth.
        let (tx_memory, rx_memory) = (fake.memory(2), fake.memory(4));
        let device_tx = DeviceEnd::attach(tx_memory.clone()).unwrap();
        let device_rx = DeviceEnd::attach(rx_memory).unwrap();
        Rig { fake, nic, tx, rx, device_tx, device_rx, tx_memory }
    }

    /// The device returns the first entry that it took, with this change.
    fn give_back(&mut self, change: impl FnOnce(Return) -> Return) {
        let entry = self.device_rx.take().unwrap().unwrap();
        self.device_rx.give_back(change(entry.into()));
        let _ = self.device_rx.post();
    }

    fn receive(&mut self) -> Result<Option<usize>, Error> {
        self.rx.receive().map(|frame| frame.map(<[_]>::len))
    }
}

fn corrupt<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert!(matches!(result, Err(Error::Corrupt(_))), "{result:?}");
}

#[test]
fn an_honest_frame_is_received() {
    let mut rig = Rig::new();
    assert_eq!(rig.receive(), Ok(None));
    rig.give_back(|entry| Return { len: BUFFER_MIN, flags: NEXT, ..entry });
    assert_eq!(rig.receive(), Ok(None), "it is not whole");
    assert_eq!(rig.rx.space(), 0, "a buffer of a frame that has come in part is not free");
    assert!(rig.rx.give(0).is_err());
    rig.give_back(|entry| Return { len: 60, ..entry });
    let frame = rig.rx.receive().unwrap().unwrap().to_vec();
    assert_eq!(
        frame.iter().map(|piece| (piece.id, piece.len)).collect::<Vec<_>>(),
        [(0, BUFFER_MIN), (1, 60)]
    );
    assert_eq!(rig.rx.space(), 2);
    for piece in frame {
        rig.rx.give(piece.id).unwrap();
    }
    assert_eq!(rig.receive(), Ok(None));
}

#[test]
fn buffers_come_back_in_the_order_in_which_they_were_given() {
    let mut rig = Rig::new();
    for (n, id) in [7, ENTRIES as u16, 0, 1024, u16::MAX].into_iter().enumerate() {
        // Whatever length and flags the device returns.
        rig.give_back(|entry| Return { id, len: 60, ..entry });
        let piece = rig.rx.receive().unwrap().unwrap()[0];
        assert_eq!((usize::from(piece.id), piece.len), (n, 60));
    }
    rig.rx.give(3).unwrap();
    rig.rx.give(0).unwrap();
    assert!(rig.rx.give(5).is_err(), "the device has it");
}

#[test]
fn lengths_are_checked() {
    for len in [0, HEADER_BYTES as u32, BUFFER_MIN + 1, u32::MAX] {
        let mut rig = Rig::new();
        rig.give_back(|entry| Return { len, ..entry });
        corrupt(rig.receive());
    }
}

#[test]
fn a_frame_ends_somewhere() {
    let mut rig = Rig::new();
    for n in 0..=CHAIN_MAX {
        // The buffers are small enough for the size limit, but too many for a frame.
        rig.give_back(|entry| Return { len: 64, flags: NEXT, ..entry });
        match rig.receive() {
            Ok(None) if n < CHAIN_MAX => {}
            result => corrupt(result),
        }
    }
    let mut rig = Rig::new();
    for n in 1..=CHAIN_MAX {
        let flags = if n == CHAIN_MAX { 0 } else { NEXT };
        rig.give_back(|entry| Return { len: BUFFER_MIN, flags, ..entry });
    }
    assert!(CHAIN_MAX * BUFFER_MIN as usize > FRAME_MAX);
    corrupt(rig.receive());
}

#[test]
fn the_driver_cannot_give_a_buffer_twice() {
    let mut rig = Rig::new();
    rig.give_back(|entry| Return { len: 60, ..entry });
    assert_eq!(rig.receive(), Ok(Some(1)));
    for id in [1, ENTRIES as u16, u16::MAX] {
        assert!(matches!(rig.rx.give(id), Err(Error::Unsupported(_))), "{id}");
    }
    rig.rx.give(0).unwrap();
}

#[test]
fn more_returns_than_submissions_are_refused() {
    let mut rig = Rig::new();
    let frame = [Piece { addr: 0x1000, len: 100 }, Piece { addr: 0x2000, len: 1 }];
    assert!(rig.tx.submit(&frame).unwrap());
    rig.tx.post();
    assert_eq!(rig.tx.reclaim(), Ok(0));
    for _ in 0..2 {
        let entry = rig.device_tx.take().unwrap().unwrap();
        rig.device_tx.give_back(entry.into());
    }
    let _ = rig.device_tx.post();
    assert_eq!(rig.tx.reclaim(), Ok(2));
    // The tag of the next slot says that more came back.
    let memory = rig.tx_memory.clone();
    let tag = &memory.words()[(ENTRIES_OFFSET + 2 * ENTRY_BYTES) / 8 + 1];
    for count in [0, 1, 3, u32::MAX] {
        tag.store(u64::from(LAP | RETURNED) << 48 | u64::from(count), Ordering::Relaxed);
        corrupt(rig.tx.reclaim());
    }
}

#[test]
fn frames_that_nobody_should_send_are_refused_and_full_rings_say_so() {
    let mut rig = Rig::new();
    let piece = |len| Piece { addr: 0, len };
    for frame in [
        vec![],
        vec![piece(HEADER_BYTES as u32)],
        vec![piece(100), piece(0)],
        vec![piece(FRAME_MAX as u32 + 1)],
        vec![piece(u32::MAX); 3],
        vec![piece(100); CHAIN_MAX + 1],
    ] {
        assert!(matches!(rig.tx.submit(&frame), Err(Error::Unsupported(_))), "{frame:?}");
    }
    let frame = [piece(100); CHAIN_MAX];
    let mut sent = 0;
    while rig.tx.submit(&frame).unwrap() {
        sent += 1;
    }
    assert_eq!((sent, rig.tx.in_flight()), (ENTRIES / CHAIN_MAX as u32, sent * CHAIN_MAX as u32));
    assert_eq!(rig.fake.rung(), 0, "nobody asked for a kick");
    let _ = rig.device_tx.arm(0);
    assert!(rig.tx.post());
    assert_eq!(rig.fake.rung(), 1);
}

#[test]
fn registers_that_make_no_sense_are_errors() {
    let mut rig = Rig::new();
    rig.fake.set_register(reg::CONNECTION, 9);
    corrupt(rig.nic.function().state());
    rig.fake.set_register(reg::CONNECTION, reg::CONNECTION_BROKEN | ErrorCode::CORRUPT.0 << 16);
    assert_eq!(rig.nic.function().state(), Ok(ConnectionState::Broken(ErrorCode::CORRUPT)));
    rig.fake.set_register(reg::CONNECTION, u32::MAX);
    assert_eq!(rig.nic.function().check(), Err(Error::Gone));
    rig.fake.set_register(reg::RESULT, u32::MAX);
    assert_eq!(rig.nic.start(), Err(Error::Gone));
    rig.fake.set_register(reg::RESULT, 0x1234);
    assert_eq!(rig.nic.start(), Err(Error::Refused { command: "CALL", code: ErrorCode(0x1234) }));
}

#[test]
fn handles_out_of_range_are_errors() {
    let fake = Fake::default();
    let mut function = Function::probe(fake.clone()).unwrap();
    function.open(0).unwrap();
    let memory = fake.memory(0);
    for value in [64, u32::MAX] {
        fake.set_register(reg::VALUE, value);
        corrupt(function.region_add(0, 0, &memory, (0, 4096), None));
    }
    fake.set_register(reg::VALUE, 0);
    fake.set_register(reg::VALUE + 4, 1);
    corrupt(function.region_add(0, 0, &memory, (0, 4096), None));
    assert!(memory.is_run(0, memory.bytes()));
}

#[test]
fn a_response_that_is_only_announced_is_an_error() {
    let fake = Fake::default();
    fake.set_register(reg::CLASS_NAME, u32::from_le_bytes(*b"four"));
    fake.set_register(reg::CONFIG, 64);
    fake.set_register(reg::CONFIG + 4, 64);
    let function = Function::probe(fake.clone()).unwrap();
    let mut requests = Requests::open(function, "four", 1, 0).unwrap();
    // The scratch memory came first.
    let ring = fake.memory(1);
    ring.words()[(SIGNAL_OFFSET + DEVICE_SEQ) / 8].store(5, Ordering::Relaxed);
    corrupt(requests.call(b"hello", &mut [], || panic!("the device says that it has answered")));
}

#[test]
fn a_config_area_that_never_rests_is_an_error() {
    let fake = Fake::default();
    let function = Function::probe(fake.clone()).unwrap();
    fake.script(reg::CONFIG_GENERATION, &[1, 2, 3, 3]);
    assert_eq!(vbus_driver::venet::config(&function).unwrap().mtu, 1500);
    fake.script(reg::CONFIG_GENERATION, &(0..100).collect::<Vec<_>>());
    corrupt(vbus_driver::venet::config(&function));
    fake.script(reg::CONFIG_GENERATION, &[]);
    for (offset, value) in [(8, 0), (8, 1), (8, 16 << 16 | 1)] {
        fake.set_register(reg::CONFIG + offset, value);
        corrupt(vbus_driver::venet::config(&function));
    }
    fake.set_register(reg::CONFIG + 8, u32::MAX);
    let config = vbus_driver::venet::config(&function).unwrap();
    assert_eq!((config.queue_pairs, config.ring_entries), (abi::QUEUE_PAIRS_MAX, 1024));
    fake.set_register(reg::CLASS, 2);
    let function = Function::probe(fake).unwrap();
    assert_eq!(vbus_driver::venet::config(&function), Err(Error::WrongClass(2)));
}
