// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two or three drivers on a switch.

use crate::driver::{Net, Shape, bus, frame};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use vbus_core::shm::ring::Entry;
use vbus_core::{ConnectionState, ErrorCode};

const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const B: [u8; 6] = [2, 0, 0, 0, 0, 2];
const C: [u8; 6] = [2, 0, 0, 0, 0, 3];
const BROADCAST: [u8; 6] = [0xff; 6];

fn config(last: u8) -> serde_json::Value {
    json!({ "mac": format!("02:00:00:00:00:{last:02x}"), "switch": "s", "backpressure-ms": 60_000 })
}

#[test]
fn frames_go_where_they_are_sent() {
    let bus = bus(2);
    let [mut a, mut b, mut c] =
        [1, 2, 3].map(|n| Net::new(&bus, &format!("n{n}"), config(n), Shape::default()));
    a.send(0, &frame(B, A, 1, 60));
    assert_eq!(b.recv(0), frame(B, A, 1, 60));
    b.send(0, &frame(BROADCAST, B, 2, 1514));
    assert_eq!(a.recv(0), frame(BROADCAST, B, 2, 1514));
    assert_eq!(c.recv(0), frame(BROADCAST, B, 2, 1514));
    c.send_with(0, &[0; 12], &frame(A, C, 3, 999), 7);
    assert_eq!(a.recv(0), frame(A, C, 3, 999));
    assert_eq!((a.try_recv(0), b.try_recv(0), c.try_recv(0)), (None, None, None));
}

#[test]
fn a_frame_larger_than_a_buffer_comes_in_a_chain() {
    let bus = bus(1);
    let shape = Shape { buffer_bytes: 512, ..Shape::default() };
    let mtu = |n| {
        let mut config = config(n);
        config["mtu"] = json!(9000);
        config
    };
    let mut a = Net::new(&bus, "a", mtu(1), shape);
    let mut b = Net::new(&bus, "b", mtu(2), shape);
    for len in [14, 499, 500, 501, 1012, 9014] {
        a.send(0, &frame(B, A, 5, len));
        let (header, got) = b.recv_with(0);
        assert_eq!(got, frame(B, A, 5, len));
        assert_eq!(u16::from_le_bytes([header[10], header[11]]) as usize, (len + 12).div_ceil(512));
    }
}

#[test]
fn a_slow_receiver_holds_the_sender_and_loses_nothing() {
    let bus = bus(2);
    let shape = Shape { entries: 8, ..Shape::default() };
    let mut a = Net::new(&bus, "a", config(1), shape);
    let mut b = Net::new(&bus, "b", config(2), shape);
    let sender = std::thread::spawn(move || {
        for n in 0..5000 {
            a.send(0, &frame(B, A, n, 64 + (n as usize * 37) % 1400));
        }
        a
    });
    for n in 0..5000 {
        assert_eq!(b.recv(0), frame(B, A, n, 64 + (n as usize * 37) % 1400));
    }
    let a = sender.join().unwrap();
    a.interrupts.wait("the counters", || (a.counter("/pairs/0/tx/frames") == 5000).then_some(()));
    assert_eq!(b.counter("/pairs/0/rx/drops/no_buffers"), 0);
    assert!(a.counter("/pairs/0/tx/waits") > 0, "the receiver was meant to be too slow");
}

#[test]
fn buffers_of_any_size_will_do() {
    let bus = bus(2);
    let mut a = Net::new(&bus, "a", config(1), Shape::default());
    let endpoint = bus.create("b", "venet", &config(2)).unwrap();
    let mut b = Net::open(&endpoint, Shape::default());
    // By the first buffer's size, one more such buffer is enough. But many small ones follow, each
    // with a doorbell of its own.
    let sizes = [500, 64, 64, 64, 64, 64, 64, 64, 64];
    for n in 0..200 {
        a.send(0, &frame(B, A, n, 1000));
        for (id, len) in sizes.into_iter().enumerate() {
            let addr = b.pairs[0].rx_buffers + id as u64 * 2048;
            b.pairs[0].rx.submit(Entry { addr, len, id: id as u16, flags: 0 }).unwrap();
            b.kick_rx(0);
        }
        let (mut got, mut next) = (Vec::new(), 0);
        let interrupts = b.interrupts.clone();
        interrupts.wait("the frame", || {
            let _ = b.pairs[0].rx.arm(0);
            while let Some(entry) = b.pairs[0].rx.reap().unwrap() {
                let addr = b.pairs[0].rx_buffers + next * 2048;
                next += 1;
                got.extend(b.memory.read(addr, entry.len as usize));
            }
            (got.len() >= 1012).then_some(())
        });
        assert_eq!(got[12..], frame(B, A, n, 1000));
        // Unused buffers serve the next frame. Here all nine are used.
        assert_eq!(b.pairs[0].rx.in_flight(), 0);
    }
}

#[test]
fn a_driver_that_loses_its_memory_harms_no_other() {
    let bus = bus(2);
    let mut a = Net::new(&bus, "a", config(1), Shape::default());
    let mut c = Net::new(&bus, "c", config(3), Shape::default());
    let endpoint = bus
        .create(
            "b",
            "venet",
            &json!({ "mac": "02:00:00:00:00:02", "switch": "s", "backpressure-ms": 1 }),
        )
        .unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let (stop, coming) = (done.clone(), endpoint.clone());
    let coming_and_going = std::thread::spawn(move || {
        let mut lives = 0;
        while !stop.load(Ordering::Relaxed) || lives < 100 {
            let mut b = Net::open(&coming, Shape::default());
            b.post_all();
            b.send(0, &frame(C, B, lives, 60));
            match lives % 3 {
                // The driver does not close, as when a VM dies.
                0 => coming.unmap_all(),
                1 => coming.close(),
                _ => {
                    coming.unmap(0, u64::MAX);
                }
            }
            let state = if lives % 3 == 1 {
                ConnectionState::Closed
            } else {
                ConnectionState::Broken(ErrorCode::REVOKED)
            };
            assert_eq!(coming.state(), state);
            lives += 1;
        }
        lives
    });
    let count = 10_000;
    let sender = std::thread::spawn(move || {
        for n in 0..count {
            a.send(0, &frame(C, A, n, 64 + n as usize % 1400));
            a.send(0, &frame(B, A, n, 500));
            if n % 64 == 0 {
                a.send(0, &frame(BROADCAST, A, n, 60));
            }
        }
    });
    for n in 0..count {
        while c.recv(0) != frame(C, A, n, 64 + n as usize % 1400) {}
    }
    sender.join().unwrap();
    done.store(true, Ordering::Relaxed);
    assert!(coming_and_going.join().unwrap() >= 100);
    assert_eq!(endpoint.inspect()["device"]["link"], false);
}

#[test]
fn a_dead_receiver_delays_nobody_for_long() {
    let bus = bus(2);
    let mut a = Net::new(&bus, "a", config(1), Shape::default());
    let mut c = Net::new(&bus, "c", config(3), Shape::default());
    let endpoint =
        bus.create("b", "venet", &json!({ "mac": "02:00:00:00:00:02", "switch": "s" })).unwrap();
    let mut b = Net::open(&endpoint, Shape::default());
    let begin = Instant::now();
    for n in 0..2000 {
        a.send(0, &frame(B, A, n, 100));
        a.send(0, &frame(C, A, n, 100));
        assert_eq!(c.recv(0), frame(C, A, n, 100));
    }
    // Waiting 50 ms for each would have taken 100 s.
    assert!(begin.elapsed() < Duration::from_secs(50), "{:?}", begin.elapsed());
    assert_eq!(b.counter("/pairs/0/rx/drops/no_buffers"), 2000);
    // The receiver works again.
    b.post_all();
    a.send(0, &frame(B, A, 1, 100));
    assert_eq!(b.recv(0), frame(B, A, 1, 100));
}
