// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two or three drivers on a switch.

use crate::driver::{Net, Shape, bus, frame};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use vbus_core::shm::abi::venet::{F_RX, F_TX};
use vbus_core::shm::ring::Entry;
use vbus_core::{ConnectionState, ErrorCode};

use crate::offloads::{large, payload};

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
    // The senders keep step with the receiver. Otherwise its buffers run out while its thread is
    // not scheduled, and a sender with frames for several receivers does not wait for long.
    let received = Arc::new(AtomicU64::new(0));
    let (seen_by_a, seen_by_b) = (received.clone(), received.clone());
    let coming_and_going = std::thread::spawn(move || {
        let (mut lives, mut seen) = (0, u64::MAX);
        while !stop.load(Ordering::Relaxed) || lives < 100 {
            let now = seen_by_b.load(Ordering::Relaxed);
            if now == seen && !stop.load(Ordering::Relaxed) {
                std::thread::yield_now();
                continue;
            }
            seen = now;
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
            while seen_by_a.load(Ordering::Relaxed) + 16 < n {
                std::thread::yield_now();
            }
            a.send(0, &frame(C, A, n, 64 + n as usize % 1400));
            a.send(0, &frame(B, A, n, 500));
            if n % 64 == 0 {
                a.send(0, &frame(BROADCAST, A, n, 60));
            }
        }
    });
    for n in 0..count {
        while c.recv(0) != frame(C, A, n, 64 + n as usize % 1400) {}
        received.store(n, Ordering::Relaxed);
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
    assert_eq!(b.drops(), 2000);
    // The receiver works again.
    b.post_all();
    a.send(0, &frame(B, A, 1, 100));
    assert_eq!(b.recv(0), frame(B, A, 1, 100));
}

/// The hostile receiver posts one buffer for every ten frames to its neighbour, so its budget is
/// never used up. The test counts frames, and no time.
#[test]
fn a_receiver_that_dribbles_holds_up_no_neighbour() {
    let bus = bus(2);
    let config = |n: u8| json!({ "mac": format!("02:00:00:00:00:{n:02x}"), "switch": "s" });
    let mut a = Net::new(&bus, "a", config(1), Shape::default());
    let mut c = Net::new(&bus, "c", config(3), Shape::default());
    let endpoint = bus.create("b", "venet", &config(2)).unwrap();
    let mut b = Net::open(&endpoint, Shape::default());
    let (rounds, mut got) = (2000, 0);
    for n in 0..rounds {
        if n % 10 == 0 {
            got += u64::from(b.try_recv(0).is_some());
            if b.pairs[0].rx.space() > 0 {
                b.post_buffer(0, (n / 10 % 64) as u16);
                b.kick_rx(0);
            }
        }
        a.send(0, &frame(B, A, n, 100));
        a.send(0, &frame(C, A, n, 100));
        assert_eq!(c.recv(0), frame(C, A, n, 100));
    }
    // Every frame to it was delivered or counted as dropped, once.
    a.interrupts
        .wait("the counters", || (a.counter("/pairs/0/tx/frames") == 2 * rounds).then_some(()));
    while b.try_recv(0).is_some() {
        got += 1;
    }
    assert_eq!(b.drops() + b.counter("/pairs/0/rx/frames"), rounds);
    assert!(got > 0 && b.counter("/pairs/0/rx/drops/too_slow") > 0, "{got}");
}

#[test]
fn a_driver_sends_from_its_own_address_only() {
    let bus = bus(1);
    let mut a = Net::new(&bus, "a", config(1), Shape::default());
    let mut b = Net::new(&bus, "b", config(2), Shape::default());
    let mut bridge = config(3);
    bridge["learn"] = json!(true);
    let mut c = Net::new(&bus, "c", bridge, Shape::default());
    let far = [2, 0, 0, 0, 0, 9];
    // Without `learn`: an address of nobody, of another device, and a group address.
    for source in [far, B, BROADCAST] {
        a.send(0, &frame(B, source, 1, 60));
    }
    // With `learn` only the addresses of nobody else.
    for source in [A, B] {
        c.send(0, &frame(B, source, 1, 60));
    }
    c.send(0, &frame(B, far, 2, 60));
    assert_eq!(b.recv(0), frame(B, far, 2, 60));
    a.send(0, &frame(B, A, 3, 60));
    assert_eq!(b.recv(0), frame(B, A, 3, 60));
    a.interrupts.wait("the counters", || (a.counter("/pairs/0/tx/frames") == 1).then_some(()));
    assert_eq!(a.counter("/pairs/0/tx/drops/spoofed"), 3);
    assert_eq!(c.counter("/pairs/0/tx/drops/spoofed"), 2);
}

#[test]
fn tags_change_between_access_ports_and_trunks() {
    let bus = bus(2);
    let with = |n: u8, more: serde_json::Value| {
        let mut config = config(n);
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let mut a = Net::new(&bus, "a", with(1, json!({ "vlan": 10 })), Shape::default());
    let mut b = Net::new(&bus, "b", with(2, json!({ "vlan": 20 })), Shape::default());
    let trunk = with(3, json!({ "trunk": [10, 20] }));
    let mut c = Net::new(&bus, "c", trunk, Shape::default());
    let tagged = |id: u8, frame: &[u8]| [&frame[..12], &[0x81, 0, 0, id], &frame[12..]].concat();
    a.send(0, &frame(BROADCAST, A, 1, 200));
    assert_eq!(c.recv(0), tagged(10, &frame(BROADCAST, A, 1, 200)));
    // The frame lies in many pieces, and the tag is split between two of them.
    for parts in 1..18 {
        let sent = tagged(20, &frame(B, C, parts as u64, 200));
        c.send_with(0, &[0; 12], &sent, parts);
        assert_eq!(b.recv(0), frame(B, C, parts as u64, 200));
    }
    // The longest frames pass both ways.
    b.send(0, &frame(C, B, 2, 1514));
    assert_eq!(c.recv(0), tagged(20, &frame(C, B, 2, 1514)));
    c.send(0, &tagged(10, &frame(A, C, 3, 1514)));
    assert_eq!(a.recv(0), frame(A, C, 3, 1514));
    // Frames that may not pass are counted.
    c.send(0, &frame(A, C, 4, 60));
    a.send(0, &tagged(10, &frame(C, A, 4, 60)));
    a.send(0, &frame(C, A, 5, 60));
    assert_eq!(c.recv(0), tagged(10, &frame(C, A, 5, 60)));
    a.interrupts.wait("the counters", || {
        (a.counter("/pairs/0/tx/drops/denied") == 1 && c.counter("/pairs/0/tx/drops/denied") == 1)
            .then_some(())
    });
    assert_eq!((a.try_recv(0), b.try_recv(0)), (None, None));
}

#[test]
fn the_longest_segment_is_cut_for_its_tag() {
    let bus = bus(2);
    let all = Shape { features: F_TX | F_RX, buffer_bytes: 4096, ..Shape::default() };
    let port = |n: u8, vlan: &str, value: serde_json::Value| {
        let mut config = config(n);
        config[vlan] = value;
        Net::new(&bus, vlan, config, all)
    };
    let mut a = port(1, "vlan", json!(10));
    let mut b = port(2, "trunk", json!([10]));
    // With the tag, the last of these is longer than a driver may get.
    for len in [65_558 - 4, 65_558] {
        let (header, segment) = large(6, 1448, len - 54);
        assert_eq!(segment.len(), len);
        a.send_with(0, &header, &segment, 5);
        let mut got = Vec::new();
        while got.len() < len - 54 {
            let (header, frame) = b.recv_with(0);
            assert_eq!((header[1] == 0, frame.len() > 1518), (len == 65_558, len != 65_558));
            assert_eq!(frame[12..18], [0x81, 0, 0, 10, 8, 0]);
            got.extend_from_slice(&frame[58..]);
        }
        assert!(got == segment[54..]);
    }
}

#[test]
fn a_broadcast_with_many_segments_reaches_every_port_once() {
    let bus = bus(2);
    let tso = Shape { features: F_TX, ..Shape::default() };
    let mut a = Net::new(&bus, "a", config(1), tso);
    let mut others: Vec<Net> = (2..12)
        .map(|n| Net::new(&bus, &format!("n{n}"), config(n), Shape { entries: 512, ..tso }))
        .collect();
    // 417 segments for each of ten receivers, in one frame. A later frame comes after all of them.
    let (header, mut segment) = large(6, 48, 20_000);
    segment[..6].copy_from_slice(&BROADCAST);
    a.send_with(0, &header, &segment, 3);
    a.send(0, &frame(BROADCAST, A, 1, 60));
    for other in &mut others {
        let mut got = Vec::new();
        while got.len() < 20_000 {
            got.extend_from_slice(payload(&other.recv(0), 6));
        }
        assert!(got == segment[54..]);
        assert_eq!(other.recv(0), frame(BROADCAST, A, 1, 60));
        assert_eq!(other.drops(), 0);
    }
}

#[test]
fn a_storm_of_broadcasts_is_limited_and_counted() {
    let bus = bus(1);
    let mut limited = config(1);
    limited["broadcast-rate"] = json!(10);
    let mut a = Net::new(&bus, "a", limited, Shape::default());
    let mut b = Net::new(&bus, "b", config(2), Shape::default());
    // A frame that only one port gets is no broadcast.
    let _c = Net::new(&bus, "c", config(3), Shape::default());
    for n in 0..10_000 {
        a.send(0, &frame(BROADCAST, A, n, 60));
    }
    a.send(0, &frame(B, A, 1, 60));
    while b.recv(0) != frame(B, A, 1, 60) {}
    a.interrupts.wait("the counters", || {
        let sent = a.counter("/pairs/0/tx/frames") + a.counter("/pairs/0/tx/drops/storm");
        (sent == 10_001).then_some(())
    });
    let received = b.counter("/pairs/0/rx/frames") + b.drops();
    assert_eq!(received, a.counter("/pairs/0/tx/frames"));
    assert!(a.counter("/pairs/0/tx/drops/storm") > 0);
}

#[test]
fn dhcp_has_its_checksum_whatever_the_receiver_accepts() {
    let bus = bus(1);
    let all = Shape { features: F_TX | F_RX, buffer_bytes: 4096, ..Shape::default() };
    let [mut a, mut b] = [1, 2].map(|n| Net::new(&bus, &format!("n{n}"), config(n), all));
    let (header, mut frame) = large(17, 0, 300);
    a.send_with(0, &header, &frame, 1);
    assert_eq!(b.recv_with(0).0[0], 1, "to another port: the checksum is left to the receiver");
    frame[36..38].copy_from_slice(&68_u16.to_be_bytes());
    a.send_with(0, &header, &frame, 1);
    let (header, got) = b.recv_with(0);
    assert_eq!((header[0], payload(&got, 17)), (0, payload(&got, 17)));
}

/// 16 kb/s are two frames of 1000 bytes a second. The clock gives only a lower bound here.
#[test]
fn rates_are_limited_in_both_directions() {
    let bus = bus(2);
    let with = |n: u8, key: &str| {
        let mut config = config(n);
        config[key] = json!("16k");
        config["burst"] = json!(1);
        config
    };
    let mut a = Net::new(&bus, "a", with(1, "tx-rate"), Shape::default());
    let mut b = Net::new(&bus, "b", config(2), Shape::default());
    let mut c = Net::new(&bus, "c", with(3, "rx-rate"), Shape::default());
    let null = json!({ "backend": "null", "source-bytes": 1000, "rx-rate": "16k", "burst": 1 });
    let begin = Instant::now();
    let mut source = Net::new(&bus, "source", null, Shape::default());
    // From a driver: the frames wait, and none is lost.
    for n in 0..3 {
        a.send(0, &frame(B, A, n, 1000));
    }
    for n in 0..3 {
        assert_eq!(b.recv(0), frame(B, A, n, 1000));
    }
    assert!(begin.elapsed() >= Duration::from_millis(990), "{:?}", begin.elapsed());
    // To a driver, from a source that nobody else waits for.
    (0..3).for_each(|_| drop(source.recv(0)));
    assert!(begin.elapsed() >= Duration::from_millis(990), "{:?}", begin.elapsed());
    assert_eq!(source.drops(), 0);
    // To a driver on a switch: they are dropped and counted.
    for n in 0..200 {
        b.send(0, &frame(C, B, n, 1000));
    }
    b.interrupts.wait("the counters", || (b.counter("/pairs/0/tx/frames") == 200).then_some(()));
    assert_eq!(c.recv(0), frame(C, B, 0, 1000));
    let dropped = c.counter("/pairs/0/rx/drops/rate");
    assert_eq!((dropped, dropped + c.counter("/pairs/0/rx/frames")), (c.drops(), 200));
    assert!(dropped > 0);
}
