// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The calls of a driver that has started, each with good arguments and bad ones.

use serde_json::{Value, json};
use vbus_core::shm::abi::venet::{self as abi, counters_page as at, status_page as word};
use vbus_core::shm::signal::Armed;
use vbus_core::shm::signal::end::Driver;
use vbus_core::shm::state::Reader;
use vbus_core::{Bus, ConnectionState, ErrorCode, Window};

use crate::driver::{Net, Shape, bus, frame, open};
use crate::offloads::large;

const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const B: [u8; 6] = [2, 0, 0, 0, 0, 2];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];
const TCP: u8 = 6;

fn config(n: u8, more: &Value) -> Value {
    let mut config = json!({ "mac": format!("02:00:00:00:00:{n:02x}"), "backpressure-ms": 60_000 });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

/// Makes devices 1 and 2 on one switch, with drivers of these shapes.
fn two(bus: &Bus, more: &Value, shapes: [Shape; 2]) -> [Net; 2] {
    [Net::new(bus, "a", config(1, more), shapes[0]), Net::new(bus, "b", config(2, more), shapes[1])]
}

fn features(features: u64) -> Shape {
    Shape { features, buffer_bytes: 4096, ..Shape::default() }
}

#[test]
fn receive_offloads_are_switched_off_and_on_while_running() {
    let bus = bus(2);
    let all = abi::F_TX | abi::F_RX;
    let [mut a, mut b] = two(&bus, &json!({}), [features(all), features(all)]);
    let (header, frame) = large(TCP, 1448, 20_000);
    let whole = |a: &mut Net, b: &mut Net| {
        a.send_with(0, &header, &frame, 2);
        let (got_header, got) = b.recv_with(0);
        assert_eq!((got_header[..10].to_vec(), got.len()), (header[..10].to_vec(), frame.len()));
    };
    let set = |b: &mut Net, features: u64| b.call(abi::CALL_SET_OFFLOADS, &features.to_le_bytes());
    whole(&mut a, &mut b);
    for _ in 0..10 {
        set(&mut b, 0).unwrap();
        a.send_with(0, &header, &frame, 2);
        let mut payload = 0;
        while payload < 20_000 {
            let (header, frame) = b.recv_with(0);
            assert_eq!((header[0], header[1]), (0, 0), "nothing is left to the receiver");
            payload += frame.len() - 54;
        }
        set(&mut b, abi::F_RX_CSUM | abi::F_RX_TSO4).unwrap();
        whole(&mut a, &mut b);
    }
    for bad in [abi::F_RX_TSO4, abi::F_TX_CSUM, abi::F_HASH, 1 << 63] {
        assert_eq!(set(&mut b, bad), Err(ErrorCode::BAD_ARGUMENT), "{bad:#x}");
    }
    assert_eq!(b.call(abi::CALL_SET_OFFLOADS, &[0; 7]), Err(ErrorCode::BAD_LENGTH));
    whole(&mut a, &mut b);
}

#[test]
fn queues_are_added_and_taken_away_while_running() {
    let bus = bus(2);
    let shapes = [Shape { pairs: 2, ..Shape::default() }, Shape::default()];
    let [mut a, mut b] = two(&bus, &json!({ "queue-pairs": 2 }), shapes);
    let set = |b: &mut Net, queues: u32| b.call(abi::CALL_SET_QUEUES, &queues.to_le_bytes());
    // Sends a frame of each of 32 flows. Returns how many come to the queues 0 and 1.
    let spread = |a: &mut Net, b: &mut Net, queues| {
        let mut counts = [0; 2];
        for port in 0..32 {
            let (_, mut flow) = large(TCP, 0, 100);
            flow[34..36].copy_from_slice(&(30_000_u16 + port).to_be_bytes());
            a.send(1, &flow);
            let (queue, got) = b.recv_any(queues);
            assert_eq!(got, flow);
            counts[queue] += 1;
        }
        counts
    };
    assert_eq!(spread(&mut a, &mut b, 1), [32, 0]);
    assert_eq!(set(&mut b, 2), Err(ErrorCode::BAD_ARGUMENT), "pair 1 is not there");
    b.add_pair();
    assert_eq!(spread(&mut a, &mut b, 2), [32, 0]);
    set(&mut b, 2).unwrap();
    let counts = spread(&mut a, &mut b, 2);
    assert!(counts[0] > 4 && counts[1] > 4, "one busy queue reaches all: {counts:?}");
    b.send(1, &frame(A, B, 77, 60));
    assert_eq!(a.recv_any(2).1, frame(A, B, 77, 60));
    set(&mut b, 1).unwrap();
    assert_eq!(spread(&mut a, &mut b, 2), [32, 0]);
    for bad in [0, 3, u32::MAX] {
        assert_eq!(set(&mut b, bad), Err(ErrorCode::BAD_ARGUMENT));
    }
    assert_eq!(b.call(abi::CALL_SET_QUEUES, &[1]), Err(ErrorCode::BAD_LENGTH));
    b.drop_ring(1, true);
    b.drop_ring(1, false);
    assert_eq!(spread(&mut a, &mut b, 1), [32, 0]);
}

#[test]
fn a_ring_is_taken_out_and_put_back_while_running() {
    let bus = bus(2);
    let [mut a, mut b] = two(&bus, &json!({}), [Shape::default(); 2]);
    for round in 0..20 {
        let entries = [8, 64, 256][round % 3];
        a.send(0, &frame(B, A, 1, 100));
        assert_eq!(b.recv(0), frame(B, A, 1, 100));
        b.drop_ring(0, true);
        // No sender waits for a ring that does not exist.
        a.send(0, &frame(B, A, 2, 100));
        b.add_ring(0, true, entries.min(64));
        // The other rings of the pair did not change.
        b.send(0, &frame(A, B, 3, 100));
        assert_eq!(a.recv(0), frame(A, B, 3, 100));
        b.post_all();
        a.send(0, &frame(B, A, 4, 100));
        let got = b.recv(0);
        assert!(got == frame(B, A, 4, 100) || got == frame(B, A, 2, 100));
        if got == frame(B, A, 2, 100) {
            assert_eq!(b.recv(0), frame(B, A, 4, 100));
        }
        b.drop_ring(0, false);
        b.add_ring(0, false, entries);
        b.send(0, &frame(A, B, 5, 100));
        assert_eq!(a.recv(0), frame(A, B, 5, 100));
    }
    assert_eq!(b.endpoint.state(), ConnectionState::Open);
    assert_eq!(b.endpoint.counters().opens.get(), 1);
}

#[test]
fn a_transmit_ring_takes_its_last_frame_with_it() {
    let bus = bus(2);
    let small = Shape { entries: 8, ..Shape::default() };
    let [mut a, mut b] = two(&bus, &json!({}), [features(abi::F_TX), small]);
    // The receiver takes no segments, and has buffers for some of the frames that this makes.
    let (header, segment) = large(TCP, 1448, 60_000);
    a.send_with(0, &header, &segment, 1);
    let waits = |a: &Net| (a.counter("/pairs/0/tx/waits") > 0).then_some(());
    a.interrupts.clone().wait("the wait for buffers", || waits(&a));
    a.drop_ring(0, false);
    a.add_ring(0, false, 8);
    a.send(0, &frame(B, A, 7, 100));
    let mut before = 0;
    while b.recv(0) != frame(B, A, 7, 100) {
        before += 1;
        assert!(before <= 8, "the frames that were delivered before the ring went");
    }
    assert_eq!(b.try_recv(0), None);
}

#[test]
fn the_address_of_a_device_without_a_driver_is_nobody_else_s() {
    let bus = bus(1);
    let mut a = Net::new(&bus, "a", config(1, &json!({})), features(abi::F_MAC));
    drop(bus.create("b", "venet", &config(2, &json!({}))).unwrap());
    let mut set = |mac: [u8; 6]| a.call(abi::CALL_SET_MAC, &mac);
    assert_eq!(set(B), Err(ErrorCode::EXISTS));
    for mac in [OTHER, A, A, OTHER] {
        set(mac).unwrap();
    }
    bus.remove("b").unwrap();
    set(B).unwrap();
}

#[test]
fn the_address_changes_where_the_settings_allow_it() {
    let bus = bus(1);
    let [mut a, mut b] = two(&bus, &json!({}), [features(abi::F_MAC); 2]);
    b.add_status_page();
    let burst = |a: &mut Net, b: &mut Net, own: [u8; 6]| {
        for (n, to) in [B, OTHER].into_iter().enumerate() {
            a.send(0, &frame(to, A, n as u64, 60));
        }
        assert_eq!(b.recv(0)[..6], own);
    };
    burst(&mut a, &mut b, B);
    b.call(abi::CALL_SET_MAC, &OTHER).unwrap();
    burst(&mut a, &mut b, OTHER);
    b.status("the address", |w| w[word::MAC] == 0x0900_0000_0002);
    assert_eq!(b.call(abi::CALL_SET_MAC, &A), Err(ErrorCode::EXISTS), "that is the other's");
    assert_eq!(b.call(abi::CALL_SET_MAC, &[3, 0, 0, 0, 0, 1]), Err(ErrorCode::BAD_ARGUMENT));
    assert_eq!(b.call(abi::CALL_SET_MAC, &[0; 6]), Err(ErrorCode::BAD_ARGUMENT));
    assert_eq!(b.call(abi::CALL_SET_MAC, &[2; 7]), Err(ErrorCode::BAD_LENGTH));
    burst(&mut a, &mut b, OTHER);
    // The next driver has the device's own address.
    let endpoint = b.endpoint.clone();
    let mut b = Net::open(&endpoint, Shape::default());
    b.post_all();
    burst(&mut a, &mut b, B);
    assert_eq!(b.call(abi::CALL_SET_MAC, &OTHER), Err(ErrorCode::DENIED), "not accepted");
    let fixed = bus.create("c", "venet", &config(3, &json!({ "mac-changes": false }))).unwrap();
    assert_eq!(fixed.identity().features & abi::F_MAC, 0);
    assert_eq!(open(&fixed, &b.memory, abi::F_MAC), Err(ErrorCode::BAD_FEATURES));
}

/// The key of Microsoft's RSS verification suite; see the unit tests of the hash.
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

fn rss(kinds: u32, table: &[u16]) -> Vec<u8> {
    let entries = (table.len() as u16).to_le_bytes();
    let table: Vec<u8> = table.iter().flat_map(|queue| queue.to_le_bytes()).collect();
    [&kinds.to_le_bytes()[..], &entries, &[0; 2], &KEY, &table].concat()
}

/// A TCP segment over IPv4 to device 2 whose hash is 0x51cc_c178.
fn hashed(to: [u8; 6]) -> Vec<u8> {
    let ports = [2794_u16.to_be_bytes(), 1766_u16.to_be_bytes()].concat();
    let ip = [0x45, 0, 0, 60, 0, 0, 0, 0, 64, TCP, 0, 0, 66, 9, 149, 187, 161, 142, 100, 80];
    [&to[..], &A, &[8, 0], &ip, &ports, &[0; 36]].concat()
}

#[test]
fn the_hash_chooses_the_queue_and_stands_in_the_header() {
    let bus = bus(2);
    let shape = Shape { pairs: 4, features: abi::F_RSS | abi::F_HASH, ..Shape::default() };
    let [mut a, mut b] =
        two(&bus, &json!({ "queue-pairs": 4 }), [Shape { pairs: 4, ..Shape::default() }, shape]);
    a.send(2, &hashed(B));
    let (chosen, got) = b.recv_any(4);
    assert_eq!(got, hashed(B));
    a.send(1, &hashed(B));
    let (header, got) = b.recv_header(chosen);
    assert_eq!((got, &header[12..]), (hashed(B), &[0; 8][..]), "no key: the header has no hash");
    // 0x78 % 8 is entry 0.
    for queue in [3, 1, 0] {
        b.call(abi::CALL_SET_RSS, &rss(abi::hash_kind::TCPV4, &[queue, 2, 2, 2, 2, 2, 2, 2]))
            .unwrap();
        for q in 0..4 {
            a.send(q, &hashed(B));
            let (header, got) = b.recv_header(usize::from(queue));
            assert_eq!(got, hashed(B));
            assert_eq!(header[12..], [0x78, 0xc1, 0xcc, 0x51, 2, 0, 0, 0]);
        }
    }
    // A frame that is not hashed goes by entry 0.
    a.send(3, &frame(B, A, 1, 100));
    let (header, got) = b.recv_header(0);
    assert_eq!((got, &header[12..]), (frame(B, A, 1, 100), &[0; 8][..]));
    let mut call = |buffer: &[u8]| b.call(abi::CALL_SET_RSS, buffer);
    assert_eq!(call(&rss(1, &[4])), Err(ErrorCode::BAD_ARGUMENT), "there is no such queue");
    assert_eq!(call(&rss(1, &[0; 3])), Err(ErrorCode::BAD_ARGUMENT));
    assert_eq!(call(&rss(0x40, &[])), Err(ErrorCode::BAD_ARGUMENT));
    assert_eq!(call(&rss(1, &[0; 256])), Err(ErrorCode::LIMIT));
    assert_eq!(call(&rss(1, &[0; 4])[..50]), Err(ErrorCode::BAD_LENGTH));
    call(&rss(1, &[3])).unwrap();
    let queues = |b: &mut Net, n: u32| b.call(abi::CALL_SET_QUEUES, &n.to_le_bytes());
    assert_eq!(queues(&mut b, 3), Err(ErrorCode::BAD_ARGUMENT), "the table names queue 3");
    b.call(abi::CALL_SET_RSS, &rss(0, &[])).unwrap();
    queues(&mut b, 3).unwrap();
    a.send(2, &hashed(B));
    assert_eq!(b.recv_any(3).1, hashed(B));
    // A driver that accepted neither feature has no key.
    assert_eq!(a.call(abi::CALL_SET_RSS, &rss(1, &[])), Err(ErrorCode::DENIED));
}

#[test]
fn interrupts_are_held_back_by_time_and_by_frames() {
    const HOUR: u32 = 3_600_000_000;
    let bus = bus(1);
    let [mut a, mut b] = two(&bus, &json!({}), [features(0), features(abi::F_COALESCE)]);
    let set = |net: &mut Net, pair: u32, [rx, tx]: [(u32, u32); 2]| {
        let words = [pair, 0, rx.0, rx.1, tx.0, tx.1];
        net.call(abi::CALL_SET_COALESCE, &words.map(u32::to_le_bytes).concat())
    };
    let interrupts = |net: &Net| net.endpoint.counters().interrupts.get();
    let arrive = |a: &mut Net, b: &mut Net, frames: u64| {
        let before = b.counter("/pairs/0/rx/frames");
        for n in 0..frames {
            a.send(0, &frame(B, A, n, 60));
        }
        let arrived = || b.counter("/pairs/0/rx/frames") == before + frames;
        b.interrupts.wait("the frames", || arrived().then_some(()));
    };
    // By frames: the third one interrupts.
    set(&mut b, 0, [(HOUR, 3), (0, 0)]).unwrap();
    assert_eq!(b.pairs[0].rx.arm(0), Armed::Waiting);
    let before = interrupts(&b);
    arrive(&mut a, &mut b, 2);
    assert_eq!(interrupts(&b), before, "held back");
    arrive(&mut a, &mut b, 1);
    b.interrupts.wait("the interrupt", || (interrupts(&b) == before + 1).then_some(()));
    (0..3).for_each(|_| drop(b.recv(0)));
    // By time alone.
    set(&mut b, abi::ALL_PAIRS, [(1000, 0), (0, 0)]).unwrap();
    assert_eq!(b.pairs[0].rx.arm(0), Armed::Waiting);
    let before = interrupts(&b);
    arrive(&mut a, &mut b, 1);
    b.interrupts.wait("the interrupt", || (interrupts(&b) == before + 1).then_some(()));
    b.recv(0);
    // An interrupt that is held back goes when coalescing is switched off.
    set(&mut b, 0, [(HOUR, 0), (0, 0)]).unwrap();
    assert_eq!(b.pairs[0].rx.arm(0), Armed::Waiting);
    let before = interrupts(&b);
    arrive(&mut a, &mut b, 5);
    assert_eq!(interrupts(&b), before);
    set(&mut b, 0, [(0, 0), (HOUR, 0)]).unwrap();
    b.interrupts.wait("the interrupt", || (interrupts(&b) == before + 1).then_some(()));
    // The transmit ring holds its own back.
    assert_eq!(b.pairs[0].tx.arm(0), Armed::Waiting);
    let before = interrupts(&b);
    b.send(0, &frame(A, B, 1, 60));
    assert_eq!(a.recv(0), frame(A, B, 1, 60));
    assert_eq!(interrupts(&b), before);
    set(&mut b, 0, [(0, 0), (0, 0)]).unwrap();
    b.interrupts.wait("the interrupt", || (interrupts(&b) == before + 1).then_some(()));

    assert_eq!(set(&mut b, 1, [(0, 0); 2]), Err(ErrorCode::BAD_ARGUMENT), "one pair only");
    assert_eq!(b.call(abi::CALL_SET_COALESCE, &[0; 8]), Err(ErrorCode::BAD_LENGTH));
    assert_eq!(set(&mut a, 0, [(0, 0); 2]), Err(ErrorCode::DENIED), "not accepted");
}

/// The driver must hear of its frames when it has no buffers left, or it would lose frames.
#[test]
fn a_starved_ring_holds_no_interrupt_back() {
    let bus = bus(1);
    let shape = Shape { entries: 8, ..features(abi::F_COALESCE) };
    let [mut a, mut b] = two(&bus, &json!({}), [features(0), shape]);
    let words = [abi::ALL_PAIRS, 0, 3_600_000_000, 0, 0, 0];
    b.call(abi::CALL_SET_COALESCE, &words.map(u32::to_le_bytes).concat()).unwrap();
    assert_eq!(b.pairs[0].rx.arm(0), Armed::Waiting);
    let before = b.endpoint.counters().interrupts.get();
    for n in 0..9 {
        a.send(0, &frame(B, A, n, 60));
    }
    let interrupted = || b.endpoint.counters().interrupts.get() > before;
    b.interrupts.wait("the interrupt", || interrupted().then_some(()));
    for n in 0..9 {
        assert_eq!(b.recv(0), frame(B, A, n, 60));
    }
}

#[test]
fn a_sender_leaves_a_queue_that_is_no_longer_in_use() {
    let bus = bus(2);
    let shape = Shape { pairs: 2, entries: 8, ..Shape::default() };
    let more = json!({ "queue-pairs": 2, "backpressure-ms": 3_600_000 });
    let [mut a, mut b] = two(&bus, &more, [Shape { pairs: 2, ..Shape::default() }, shape]);
    // A flow that goes to queue 1.
    let flow = |port: u16, n: u8| {
        let (_, mut flow) = large(TCP, 0, 100);
        flow[34..36].copy_from_slice(&port.to_be_bytes());
        flow[90] = n;
        flow
    };
    let port = (1..).find(|port| {
        a.send(0, &flow(*port, 0));
        b.recv_any(2).0 == 1
    });
    let port = port.unwrap();
    // Queue 1 has buffers for 8 frames. The ninth waits, for an hour at most.
    for n in 0..9 {
        a.send(0, &flow(port, n));
    }
    let waits = || (a.counter("/pairs/0/tx/waits") > 0).then_some(());
    a.interrupts.wait("the wait for buffers", waits);
    b.call(abi::CALL_SET_QUEUES, &1_u32.to_le_bytes()).unwrap();
    assert_eq!(b.recv(0), flow(port, 8));
    for n in 0..8 {
        assert_eq!(b.recv(1), flow(port, n));
    }
}

#[test]
fn vlans_are_filtered() {
    let bus = bus(1);
    let [mut a, mut b] = two(&bus, &json!({}), [features(0), features(abi::F_VLAN)]);
    let tagged = |id: u16, seed: u64| {
        let mut tagged = frame(B, A, seed, 100);
        let tag = [0x81, 0, (id >> 8) as u8, id as u8];
        tagged.splice(12..12, tag);
        tagged
    };
    let mut map = vec![0; 8 + abi::VLAN_MAP_BYTES];
    map[0] = 1;
    map[8] = 1 << 5;
    map[8 + 511] = 1 << 7;
    b.call(abi::CALL_SET_VLANS, &map).unwrap();
    let ids = [6, 5, 4094, 0, 4095];
    for (n, id) in ids.into_iter().enumerate() {
        a.send(0, &tagged(id, n as u64));
    }
    a.send(0, &frame(B, A, 9, 100));
    let expected = [tagged(5, 1), tagged(0, 3), tagged(4095, 4), frame(B, A, 9, 100)];
    for expected in expected {
        assert_eq!(b.recv(0), expected);
    }
    b.call(abi::CALL_SET_VLANS, &[0; 8]).unwrap();
    a.send(0, &tagged(6, 1));
    assert_eq!(b.recv(0), tagged(6, 1));
    assert_eq!(b.call(abi::CALL_SET_VLANS, &map[..100]), Err(ErrorCode::BAD_LENGTH));
    assert_eq!(b.call(abi::CALL_SET_VLANS, &[3; 8]), Err(ErrorCode::BAD_ARGUMENT));
    assert_eq!(a.call(abi::CALL_SET_VLANS, &map), Err(ErrorCode::DENIED));
}

#[test]
fn frames_are_as_long_as_the_mtu_and_two_tags() {
    let bus = bus(1);
    let [mut a, mut b] = two(&bus, &json!({ "mtu": 1500 }), [features(0); 2]);
    let tagged = |tags: usize, len: usize| {
        let mut tagged = frame(B, A, len as u64, len - 4 * tags);
        tagged.splice(12..12, [0x88, 0xa8, 0, 5, 0x81, 0, 0, 6][8 - 4 * tags..].to_vec());
        tagged
    };
    for tags in 0..=2 {
        let longest = 1514 + 4 * tags;
        a.send(0, &tagged(tags, longest + 1));
        a.send(0, &tagged(tags, longest));
        assert_eq!(b.recv(0), tagged(tags, longest), "{tags} tags");
    }
    assert_eq!(a.counter("/pairs/0/tx/drops/too_long"), 3);
    // A neighbour with a larger MTU.
    let large_mtu = json!({ "mtu": 9000, "learn": true });
    let mut c = Net::new(&bus, "c", config(3, &large_mtu), features(abi::F_TX));
    c.send(0, &frame(B, OTHER, 1, 1515));
    c.send(0, &frame(B, OTHER, 2, 1514));
    assert_eq!(b.recv(0), frame(B, OTHER, 2, 1514));
    assert_eq!(b.counter("/pairs/0/rx/drops/too_long"), 1);
    // Segments that are too long too, the second by the options of TCP alone.
    for (size, words) in [(8000, 5), (1456, 8)] {
        let (header, mut segment) = large(TCP, size, 20_000);
        segment[6..12].copy_from_slice(&OTHER);
        segment[34 + 12] = words << 4;
        c.send_with(0, &header, &segment, 2);
    }
    c.send(0, &frame(B, OTHER, 3, 60));
    assert_eq!(b.recv(0), frame(B, OTHER, 3, 60));
    assert_eq!(b.counter("/pairs/0/rx/drops/too_long"), 3);
    // With segments that just fit, it gets all of them.
    let (header, mut segment) = large(TCP, 1448, 2 * 1448 - 12);
    segment[6..12].copy_from_slice(&OTHER);
    segment[34 + 12] = 8 << 4;
    c.send_with(0, &header, &segment, 2);
    assert_eq!((b.recv(0).len(), b.recv(0).len()), (1514, 66 + 1448 - 24));
}

#[test]
fn the_status_page_tells_of_the_link() {
    let bus = bus(1);
    let more = json!({ "speed": 25_000, "duplex": "half" });
    let [mut a, mut b] = two(&bus, &json!({}), [features(0); 2]);
    let mut c = Net::new(&bus, "c", config(3, &more), features(0));
    c.add_status_page();
    c.status("speed", |w| (w[word::SPEED], w[word::DUPLEX]) == (25_000, 0));
    b.add_status_page();
    b.status("nothing known", |w| (w[word::SPEED], w[word::DUPLEX], w[word::LINK]) == (0, 2, 1));
    let control = |b: &Net, request: Value| {
        let mut answer = Value::Null;
        b.endpoint.device().control(&request, &mut |value| {
            answer = value;
            true
        })?;
        Ok::<_, String>(answer)
    };
    assert_eq!(control(&b, json!({ "op": "announce" })).unwrap()["announces"], 1);
    b.status("the request to announce", |w| w[word::ANNOUNCE] == 1 && w[word::LINK] == 1);
    assert_eq!(control(&b, json!({ "op": "link", "up": false })).unwrap()["link"], false);
    b.status("no link", |w| w[word::LINK] == 0);
    control(&b, json!({ "op": "link", "up": true })).unwrap();
    b.status("a link again", |w| w[word::LINK] == 1);
    assert!(control(&b, json!({ "op": "sing" })).unwrap_err().contains("announce"));
    assert!(control(&b, json!({ "op": "link" })).unwrap_err().contains("\"up\""));
    a.send(0, &frame(B, A, 1, 60));
    assert_eq!(b.recv(0), frame(B, A, 1, 60));
}

#[test]
fn the_counters_page_has_each_queue_and_each_reason() {
    let bus = bus(1);
    let shape = Shape { pairs: 2, features: abi::F_TX | abi::F_RX, ..Shape::default() };
    let [mut a, mut b] = two(&bus, &json!({ "queue-pairs": 2 }), [shape; 2]);
    let (ours, theirs) = (a.add_counters_page(2), b.add_counters_page(2));
    let (header, segment) = large(TCP, 1448, 9_000);
    a.send_with(1, &header, &segment, 2);
    let (by_flow, _) = b.recv_any(2);
    a.send(0, &frame(B, A, 1, 60));
    let (other, _) = b.recv_any(2);
    a.send(0, &[0; 5]);
    a.send_with(0, &[0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &frame(B, A, 2, 60), 1);
    a.send(0, &vec![2; 1519]);
    a.send(0, &frame(B, [6; 6], 4, 60));
    a.send(0, &frame(B, A, 3, 60));
    b.recv(other);
    let interrupts = b.interrupts.clone();
    interrupts.wait("the counters", || {
        let read = |page: &Reader<Window, Driver>| {
            let mut bytes = vec![0; 2 * at::BYTES as usize];
            page.read(&mut bytes).unwrap();
            let words: Vec<u64> =
                bytes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect();
            words
        };
        let (a, b) = (read(&ours), read(&theirs));
        let drops =
            [at::TX_DROPS_SHORT, at::TX_DROPS_HEADER, at::TX_DROPS_LONG, at::TX_DROPS_SPOOFED];
        let first = a[at::TX_FRAMES] == 2 && drops.map(|at| a[at]) == [1; 4];
        let a = &a[at::WORDS..];
        let second = (a[at::TX_FRAMES], a[at::TX_CSUM], a[at::TX_SEGMENTS]) == (1, 1, 1)
            && a[at::TX_BYTES] == segment.len() as u64;
        let of = |q: usize| b[q * at::WORDS..].to_vec();
        let (all, flow) = (u64::from(by_flow == other), of(by_flow));
        let third = of(other)[at::RX_FRAMES] == 2 + all;
        let fourth = (flow[at::RX_CSUM], flow[at::RX_SEGMENTS]) == (1, 1);
        (first && second && third && fourth).then_some(())
    });
}

/// No call of a driver ends its connection or another driver's.
#[test]
fn any_buffer_is_refused_or_obeyed() {
    let bus = bus(2);
    let all = abi::F_TX | abi::F_RX | abi::F_HASH | abi::F_RSS | abi::F_VLAN | abi::F_MAC;
    let shape = Shape { pairs: 2, features: all, ..Shape::default() };
    let [mut a, mut b] = two(&bus, &json!({ "queue-pairs": 2 }), [Shape::default(); 2]);
    let mut hostile = Net::new(&bus, "h", config(3, &json!({ "queue-pairs": 2 })), shape);
    let mut x = 1_u64;
    let mut random = || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        x >> 33
    };
    let mut obeyed = 0;
    for n in 0..3_000 {
        let function = (random() % 11) as u32;
        let right = [0, 0, 8, 8, 4, 6, 48, [8, 520][random() as usize % 2], 24, 0, 0];
        let any = random() as usize % 600;
        let len = [right[function as usize], any][usize::from(random() % 4 == 0)];
        let small = random() % 4 != 0;
        let mut buffer: Vec<u8> =
            (0..len).map(|_| if small { random() % 8 / 6 } else { random() } as u8).collect();
        if random() % 4 != 0 {
            buffer.iter_mut().skip(1).take(3).for_each(|byte| *byte = 0);
            buffer.iter_mut().skip(4).take(4).for_each(|byte| *byte = 0);
        }
        obeyed += u32::from(hostile.call(function, &buffer).is_ok());
        let flags = random() as u32 | 1;
        let refused = hostile.endpoint.call(function, flags, 2048, 0);
        assert!(matches!(refused, Err(ErrorCode::BAD_ARGUMENT)));
        if n % 50 == 0 {
            a.send(0, &frame([0xff; 6], A, n, 60));
            assert_eq!(b.recv(0), frame([0xff; 6], A, n, 60));
        }
    }
    assert!(obeyed > 100, "{obeyed}");
    assert_eq!(hostile.endpoint.state(), ConnectionState::Open);
}
