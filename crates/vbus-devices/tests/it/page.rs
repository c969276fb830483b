// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Everything beside the rings: the status page, the capture, the filter, and the errors of START.

use serde_json::json;
use vbus_core::ErrorCode;
use vbus_core::shm::abi::venet::{self as abi, status_page as word};
use vbus_core::shm::ring::{self, DriverEnd, Layout, Returns};

use crate::driver::{Memory, Net, Shape, add, bus, call, frame, open};

const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const B: [u8; 6] = [2, 0, 0, 0, 0, 2];
const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

fn config(n: u8) -> serde_json::Value {
    json!({ "mac": format!("02:00:00:00:00:{n:02x}") })
}

#[test]
fn the_status_page_follows() {
    let bus = bus(1);
    let mut a = Net::new(&bus, "a", config(1), Shape::default());
    let mut b = Net::new(&bus, "b", config(2), Shape::default());
    let handle = b.add_status_page();
    b.status("the link", |w| w[word::LINK] == 1 && w[word::MAC] == 0x0200_0000_0002);
    for n in 0..10 {
        a.send(0, &frame(B, A, n, 100));
        b.recv(0);
    }
    b.status("the last frame", |w| w[word::RX_FRAMES] == 10 && w[word::RX_BYTES] == 1000);
    let interrupts = b.endpoint.counters().interrupts.get();
    b.send(0, &frame(A, B, 1, 60));
    b.send(0, &[0; 5]);
    b.status("the frame sent, and the one dropped", |w| {
        w[word::TX_FRAMES] == 1 && w[word::TX_DROPS] == 1
    });
    assert_eq!(b.endpoint.counters().interrupts.get(), interrupts, "counts alone do not interrupt");
    b.endpoint.region_drop(u64::from(handle)).unwrap();
    b.add_status_page();
    b.status("the link, again", |w| w[word::LINK] == 1 && w[word::TX_BYTES] == 60);
}

#[test]
fn a_capture_holds_both_directions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.pcap");
    let bus = bus(1);
    let mut captured = config(1);
    captured["pcap"] = json!(path);
    captured["snap-length"] = json!(70);
    let mut a = Net::new(&bus, "a", captured, Shape::default());
    let mut b = Net::new(&bus, "b", config(2), Shape::default());
    let (there, back) = (frame(B, A, 1, 60), frame(A, B, 2, 1514));
    a.send_with(0, &[0; 12], &there, 3);
    b.recv(0);
    b.send(0, &back);
    a.recv(0);
    assert_eq!(a.endpoint.inspect()["device"]["pcap"]["records"], 2);
    drop((a, b));
    bus.remove("a").unwrap(); // The file is complete once its device is gone.
    let file = std::fs::read(&path).unwrap();
    let number = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    assert_eq!((number(0), number(16), number(20)), (0xa1b2_c3d4, 70, 1));
    assert_eq!((number(32), number(36)), (60, 60));
    assert_eq!(file[40..100], there);
    assert_eq!((number(108), number(112)), (70, 1514));
    assert_eq!(file[116..], back[..70]);
}

#[test]
fn the_filter_decides_which_frames_come() {
    let bus = bus(1);
    let mut a = Net::new(&bus, "a", config(1), Shape::default());
    let mut b = Net::new(&bus, "b", config(2), Shape::default());
    let other = [2, 0, 0, 0, 0, 9];
    let burst = |a: &mut Net| {
        for (n, to) in [GROUP, other, B].into_iter().enumerate() {
            a.send(0, &frame(to, A, n as u64, 60));
        }
    };
    let first = |b: &mut Net| <[u8; 6]>::try_from(&b.recv(0)[..6]).unwrap();
    burst(&mut a);
    assert_eq!(first(&mut b), B);
    let filter = |flags: u32, addresses: &[[u8; 6]]| {
        [
            &flags.to_le_bytes()[..],
            &(addresses.len() as u32).to_le_bytes(),
            addresses.as_flattened(),
        ]
        .concat()
    };
    b.call(abi::CALL_FILTER, &filter(0, &[GROUP])).unwrap();
    burst(&mut a);
    assert_eq!([first(&mut b), first(&mut b)], [GROUP, B]);
    b.call(abi::CALL_FILTER, &filter(abi::FILTER_PROMISCUOUS, &[])).unwrap();
    burst(&mut a);
    assert_eq!([first(&mut b), first(&mut b), first(&mut b)], [GROUP, other, B]);
    b.call(abi::CALL_FILTER, &filter(0, &[])).unwrap();
    burst(&mut a);
    assert_eq!(first(&mut b), B);
    assert_eq!(b.call(abi::CALL_FILTER, &filter(8, &[])), Err(ErrorCode::BAD_ARGUMENT));
}

#[test]
fn several_pairs_share_a_device() {
    let bus = bus(2);
    let mut four = config(1);
    four["queue-pairs"] = json!(4);
    let mut a = Net::new(&bus, "a", four, Shape { pairs: 4, ..Shape::default() });
    let mut two = config(2);
    two["queue-pairs"] = json!(4);
    let mut b = Net::new(&bus, "b", two, Shape { pairs: 2, ..Shape::default() });
    for q in 0..4 {
        a.send(q, &frame(B, A, q as u64, 200));
        assert_eq!(b.recv_any(2).1, frame(B, A, q as u64, 200));
        b.send(q % 2, &frame(A, B, q as u64, 300));
        assert_eq!(a.recv_any(4).1, frame(A, B, q as u64, 300));
    }
}

#[test]
fn a_bad_start_fails_with_its_error_code() {
    let bus = bus(1);
    let mut settings = config(1);
    settings["queue-pairs"] = json!(2);
    let endpoint = bus.create("a", "venet", &settings).unwrap();
    let mut memory = Memory::new(&endpoint, 1 << 20);
    assert_eq!(open(&endpoint, &memory, abi::F_TX_TSO4), Err(ErrorCode::BAD_FEATURES));
    open(&endpoint, &memory, 0).unwrap();
    let mut ring = |id, returns, entries, signal| {
        let layout = Layout::new(entries, returns).unwrap();
        let addr = memory.alloc(layout.bytes());
        DriverEnd::create(memory.window(addr, layout.bytes()), layout, 0).unwrap();
        add(&endpoint, id, addr, layout.bytes(), signal)
    };
    assert_eq!(
        ring(abi::tx(2), Returns::Counted, 8, ring::SIGNAL_OFFSET),
        Err(ErrorCode::BAD_ARGUMENT)
    );
    assert_eq!(
        ring(abi::tx(0), Returns::Entries, 8, ring::SIGNAL_OFFSET),
        Err(ErrorCode::BAD_LAYOUT)
    );
    assert_eq!(
        ring(abi::tx(0), Returns::Counted, 8192, ring::SIGNAL_OFFSET),
        Err(ErrorCode::BAD_LAYOUT)
    );
    assert_eq!(ring(abi::tx(0), Returns::Counted, 8, 0), Err(ErrorCode::BAD_SIGNAL));
    ring(abi::tx(0), Returns::Counted, 8, ring::SIGNAL_OFFSET).unwrap();
    assert_eq!(ring(abi::tx(0), Returns::Counted, 8, ring::SIGNAL_OFFSET), Err(ErrorCode::EXISTS));
    ring(abi::tx(1), Returns::Counted, 8, ring::SIGNAL_OFFSET).unwrap();
    let rx1 = ring(abi::rx(1), Returns::Runs, 8, ring::SIGNAL_OFFSET).unwrap();
    assert_eq!(
        call(&endpoint, &memory, abi::CALL_START, &[]),
        Err(ErrorCode::BAD_ARGUMENT),
        "pair 0 is not whole"
    );
    let mut ring = |id, returns| {
        let layout = Layout::new(8, returns).unwrap();
        let addr = memory.alloc(layout.bytes());
        DriverEnd::create(memory.window(addr, layout.bytes()), layout, 0).unwrap();
        add(&endpoint, id, addr, layout.bytes(), ring::SIGNAL_OFFSET)
    };
    let rx0 = ring(abi::rx(0), Returns::Runs).unwrap();
    endpoint.region_drop(u64::from(rx1)).unwrap();
    assert_eq!(
        call(&endpoint, &memory, abi::CALL_START, &[]),
        Err(ErrorCode::BAD_ARGUMENT),
        "pair 1 is not whole"
    );
    let mut ring = |id, returns| {
        let layout = Layout::new(8, returns).unwrap();
        let addr = memory.alloc(layout.bytes());
        DriverEnd::create(memory.window(addr, layout.bytes()), layout, 0).unwrap();
        add(&endpoint, id, addr, layout.bytes(), ring::SIGNAL_OFFSET)
    };
    ring(abi::rx(1), Returns::Runs).unwrap();
    assert_eq!(call(&endpoint, &memory, abi::CALL_START, &[0]), Err(ErrorCode::BAD_LENGTH));
    call(&endpoint, &memory, abi::CALL_START, &[]).unwrap();
    assert_eq!(call(&endpoint, &memory, abi::CALL_START, &[]), Err(ErrorCode::DENIED));
    endpoint.region_drop(u64::from(rx0)).unwrap();
    assert_eq!(call(&endpoint, &memory, 77, &[]), Err(ErrorCode::BAD_FUNCTION));
}
