// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile driver that writes random values, beside two honest drivers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::json;
use vbus_core::shm::Memory as _;
use vbus_core::shm::abi::venet::{CALL_FILTER, F_RX, F_TX, FILTER_PROMISCUOUS, tx};
use vbus_core::shm::ring::{DriverEnd, Entry, Layout, NEXT, SIGNAL_OFFSET};
use vbus_core::{ConnectionState, Endpoint, ErrorCode};
use vbus_test_driver::Random;

use crate::driver::{Net, RX_RETURNS, Shape, TIMEOUT, TX_RETURNS, add, bus, frame};

const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const B: [u8; 6] = [2, 0, 0, 0, 0, 2];
const H: [u8; 6] = [2, 0, 0, 0, 0, 3];
const C: [u8; 6] = [2, 0, 0, 0, 0, 4];
const ALL: u64 = F_TX | F_RX;

#[test]
fn a_ring_that_is_refused_is_not_kept() {
    let bus = bus(1);
    let endpoint = bus.create("h", "venet", &json!({ "mac": "02:00:00:00:00:03" })).unwrap();
    let mut net = Net::open(&endpoint, Shape::default());
    net.drop_ring(0, false);
    let layout = Layout::new(64, TX_RETURNS).unwrap();
    let addr = net.memory.alloc(layout.bytes());
    let window = net.memory.window(addr, layout.bytes());
    DriverEnd::create(window.clone(), layout, 0).unwrap();
    // Another processor changes the header all the time.
    let magic = window.words()[0].load(Ordering::Relaxed);
    let done = Arc::new(AtomicBool::new(false));
    let stop = done.clone();
    let other = std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            window.words()[0].fetch_xor(magic, Ordering::Relaxed);
        }
    });
    let (mut taken, mut refused) = (0, 0);
    let end = Instant::now() + TIMEOUT;
    // Hardly ever does nothing change between two looks.
    while taken < 500 || refused < 500 {
        assert!(Instant::now() < end, "taken {taken} times, refused {refused} times");
        match add(&endpoint, tx(0), addr, layout.bytes(), SIGNAL_OFFSET) {
            Ok(handle) => {
                endpoint.region_drop(u64::from(handle)).unwrap();
                taken += 1;
            }
            Err(error) => {
                assert_eq!(error, ErrorCode::BAD_LAYOUT);
                refused += 1;
            }
        }
    }
    done.store(true, Ordering::Relaxed);
    other.join().unwrap();
}

/// Rings the doorbell, and waits until the device has polled since.
fn be_looked_at(net: &Net) {
    let polls = || net.endpoint.counters().polls.get() + net.endpoint.counters().polls_empty.get();
    let before = polls();
    net.interrupts.wait("the device to look", || {
        (0..4).for_each(|handle| net.endpoint.ring(handle));
        std::thread::yield_now();
        (net.endpoint.state() != ConnectionState::Open || polls() > before + 4).then_some(())
    });
}

/// One connection of the hostile driver: opens, then writes at random until the device ends the
/// connection. Returns the error code.
fn live(endpoint: &Arc<Endpoint>, random: &mut Random) -> Option<ErrorCode> {
    let shape = Shape { features: ALL, ..Shape::default() };
    let mut net = Net::open(endpoint, shape);
    let _ = net.call(CALL_FILTER, &[FILTER_PROMISCUOUS as u8, 0, 0, 0, 0, 0, 0, 0]);
    if random.index(2) == 0 {
        net.post_all();
    }
    let rings = [(net.pairs[0].tx_addr, TX_RETURNS), (net.pairs[0].rx_addr, RX_RETURNS)].map(
        |(addr, returns)| {
            net.memory.window(addr, Layout::new(shape.entries, returns).unwrap().bytes())
        },
    );
    for _ in 0..300 {
        match random.index(6) {
            // Write anything anywhere in a ring: entries, counts, arms, the header.
            0 => {
                let words = rings[random.index(2)].words();
                let value = match random.index(4) {
                    0 => random.next(),
                    1 => random.next() & 0xffff,
                    2 => random.next() | 1 << 32,
                    _ => 0,
                };
                words[random.index(words.len())].store(value, Ordering::Relaxed);
            }
            // Submit entries in good order with bad content.
            1 => {
                let [addr, len] = match random.index(5) {
                    0 => [random.next(), 100],
                    1 => [u64::MAX - 5, 100],
                    2 => [net.pairs[0].rx_buffers, random.next()],
                    3 => [net.pairs[0].rx_buffers, 0],
                    _ => [net.pairs[0].rx_buffers, 1 + random.next() % 4096],
                };
                let flags = if random.index(3) == 0 { NEXT } else { 0 };
                let entry = Entry { addr, len: len as u32, id: 1, flags };
                let pair = &mut net.pairs[0];
                let _ = if random.index(4) == 0 {
                    pair.rx.submit(entry)
                } else {
                    pair.tx.submit(entry)
                };
            }
            // Send frames with bad headers to every address.
            _ => {
                let mut header = [0; 12];
                for byte in &mut header[..random.index(13)] {
                    *byte = random.next() as u8;
                }
                header[0] &= 3;
                header[1] = [0, 1, 4, 5, 0x81, 77][random.index(6)];
                let to = [A, B, [0xff; 6]][random.index(3)];
                let mut bytes =
                    frame(to, [H, A, B][random.index(3)], random.next(), 14 + random.index(3000));
                bytes[12..14].copy_from_slice(&[8, 0]);
                if random.index(2) == 0 {
                    bytes[14..].iter_mut().take(60).for_each(|b| *b = random.next() as u8);
                }
                if net.pairs[0].tx.space() > 4 {
                    // A bad count is an error of the driver's own end, which this test ignores.
                    let addr = net.pairs[0].rx_buffers;
                    net.memory.write(addr, &[&header[..], &bytes].concat());
                    let _ = net.pairs[0].tx.submit(Entry {
                        addr,
                        len: 12 + bytes.len() as u32,
                        id: 0,
                        flags: 0,
                    });
                }
            }
        }
        if random.index(3) == 0 {
            net.kick_tx(0);
            net.kick_rx(0);
            (0..4).for_each(|handle| endpoint.ring(handle));
        }
        let _ = net.pairs[0].tx.reap_count(u32::MAX);
        if random.index(30) == 0 {
            be_looked_at(&net);
        }
        if let ConnectionState::Broken(code) = endpoint.state() {
            return Some(code);
        }
    }
    None
}

#[test]
fn it_breaks_nothing_but_its_own_connection() {
    let bus = bus(2);
    let config = |n: u8, backpressure_ms: u32| {
        let mac = format!("02:00:00:00:00:{n:02x}");
        json!({ "mac": mac, "backpressure-ms": backpressure_ms })
    };
    let mut a = Net::new(&bus, "a", config(1, 60_000), Shape { features: ALL, ..Shape::default() });
    let mut b = Net::new(&bus, "b", config(2, 60_000), Shape::default());
    let h = bus.create("h", "venet", &config(3, 5)).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let (stop, endpoint) = (done.clone(), h.clone());
    let hostile = std::thread::spawn(move || {
        let mut random = Random(7);
        let mut broken = 0;
        let mut lives = 0;
        while !stop.load(Ordering::Relaxed) || lives < 100 {
            broken += u32::from(live(&endpoint, &mut random).is_some());
            lives += 1;
        }
        (lives, broken)
    });
    let count = 20_000;
    let mut c = Net::new(&bus, "c", config(4, 60_000), Shape::default());
    let sender = std::thread::spawn(move || {
        for n in 0..count {
            // A sender with one receiver loses nothing.
            a.send(0, &frame(B, A, n, 64 + n as usize % 1400));
            // The hostile driver may or may not have buffers. A sender must not wait for it for
            // ever.
            if n % 16 == 0 {
                c.send(0, &frame(H, C, n, 500));
            }
        }
        a
    });
    for n in 0..count {
        let wanted = frame(B, A, n, 64 + n as usize % 1400);
        // Frames of the hostile driver come in between. (Its broadcast frames wait for no buffers:
        // only the frames of `a` must all arrive.)
        while b.recv(0) != wanted {}
    }
    let mut a = sender.join().unwrap();
    done.store(true, Ordering::Relaxed);
    let (lives, broken) = hostile.join().unwrap();
    assert!(
        broken > lives / 4,
        "the device should catch the hostile driver more often: {broken} of {lives} times"
    );
    assert_eq!([a.endpoint.state(), b.endpoint.state()], [ConnectionState::Open; 2]);
    // And the device serves an honest driver again.
    let mut h = Net::open(&h, Shape::default());
    h.post_all();
    a.send(0, &frame(H, A, 1, 60));
    while h.recv(0) != frame(H, A, 1, 60) {}
}

#[test]
fn each_fault_has_its_error_code() {
    let bus = bus(1);
    let endpoint =
        bus.create("a", "venet", &json!({ "backend": "null", "source-bytes": 60 })).unwrap();
    let broken = |net: &mut Net, tx: &[(u64, u32, u16)], rx: &[(u64, u32)]| {
        for &(addr, len, flags) in tx {
            net.pairs[0].tx.submit(Entry { addr, len, id: 0, flags }).unwrap();
        }
        for &(addr, len) in rx {
            net.pairs[0].rx.submit(Entry { addr, len, id: 0, flags: 0 }).unwrap();
        }
        net.kick_tx(0);
        net.kick_rx(0);
        let interrupts = net.interrupts.clone();
        let code = interrupts.wait("the end of the connection", || match net.endpoint.state() {
            ConnectionState::Broken(code) => Some(code),
            _ => None,
        });
        assert_eq!(net.call(CALL_FILTER, &[0; 8]), Err(ErrorCode::NOT_OPEN));
        code
    };
    let check = |tx: &[(u64, u32, u16)], rx: &[(u64, u32)], code| {
        let mut net = Net::open(&endpoint, Shape::default());
        assert_eq!(broken(&mut net, tx, rx), code, "{tx:x?} {rx:x?}");
    };
    check(&[(1 << 40, 100, 0)], &[], ErrorCode::BAD_ADDRESS);
    check(&[(u64::MAX - 10, 100, 0)], &[], ErrorCode::BAD_ADDRESS);
    check(&[(0, 0, 0)], &[], ErrorCode::BAD_LENGTH);
    check(&[(0, 70_000, 0)], &[], ErrorCode::BAD_LENGTH);
    check(&[(0, u32::MAX, NEXT), (0, u32::MAX, 0)], &[], ErrorCode::BAD_LENGTH);
    check(&[(0, 100, NEXT); 21], &[], ErrorCode::BAD_LENGTH);
    check(&[], &[(1 << 40, 2048)], ErrorCode::BAD_ADDRESS);
    check(&[], &[(0, 63)], ErrorCode::BAD_LENGTH);
}

#[test]
fn what_it_sent_before_its_fault_arrives() {
    let bus = bus(1);
    let config = |n: u8| json!({ "mac": format!("02:00:00:00:00:{n:02x}") });
    let mut b = Net::new(&bus, "b", config(2), Shape::default());
    b.post_all();
    let h = bus.create("h", "venet", &config(3)).unwrap();
    for life in 1..=10 {
        let mut net = Net::open(&h, Shape::default());
        assert!(net.submit(0, &[0; 12], &frame(B, H, life, 60), 1));
        net.pairs[0].tx.submit(Entry { addr: 0, len: 0, id: 0, flags: 0 }).unwrap();
        net.kick_tx(0);
        let interrupts = net.interrupts.clone();
        interrupts.wait("the end of the connection", || {
            matches!(h.state(), ConnectionState::Broken(_)).then_some(())
        });
        // The device counts the frame when it posts it, and the post wakes the receiver.
        assert_eq!(b.counter("/pairs/0/rx/frames"), life);
    }
}
