// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames through each medium that needs no privileges.

use std::sync::Arc;

use serde_json::json;
use vbus_core::settings::Settings;
use vbus_core::{Executor, Tuning};
use vbus_net::{
    Backend, Captured, Direct, Limited, Limits, Link, Mac, Medium, Opener, Switches, Uplink,
    UplinkConfig,
};

use crate::front::Front;

const A: Mac = [2, 0, 0, 0, 0, 1];
const B: Mac = [2, 0, 0, 0, 0, 2];

fn executor() -> Arc<Executor> {
    Executor::start(Tuning { workers: 2, ..Tuning::default() }).unwrap()
}

fn frame(to: Mac, from: Mac, n: u32) -> Vec<u8> {
    [&to[..], &from, &[0x88, 0xb5], &n.to_le_bytes(), &[7; 50]].concat()
}

fn opener() -> Arc<dyn Opener> {
    Arc::new(Direct)
}

#[test]
fn a_switch_keeps_frames_until_the_receiver_has_room() {
    let (executor, switches) = (executor(), Switches::default());
    let links = [Arc::new(Link::default()), Arc::new(Link::default())];
    let [a, b] = [0, 1].map(|n| {
        Medium::Switch("s".into()).open(&switches, &opener(), 1, 1500, links[n].clone()).unwrap()
    });
    let (a, b) = (Front::plug(&executor, &*a, A, 10), Front::plug(&executor, &*b, B, 0));
    assert!(links.iter().all(|link| link.is_up()));
    for n in 0..100 {
        a.send(&frame(B, A, n));
    }
    for n in 0..100 {
        b.add_room(1);
        assert_eq!(b.receive(), frame(B, A, n), "in order, none lost");
    }
    assert!(b.has_none());
    assert!(!b.plug.set_mac(A), "the other device has that address");
    drop(b);
    assert!(links[0].is_up());
}

#[test]
fn another_rate_wakes_a_queue_that_waits() {
    let (executor, switches) = (executor(), Switches::default());
    let open =
        || Medium::Switch("s".into()).open(&switches, &opener(), 1, 1500, Arc::default()).unwrap();
    let (mut limits, b) = (Limits::default(), open());
    (limits.tx_rate, limits.burst) = (Some(8000), Some(1));
    let a = Limited::new(open(), limits.clone());
    let b = Front::plug(&executor, &*b, B, usize::MAX);
    for rate in [Some(1_000_000_000), None] {
        assert!(a.set_limits(&limits));
        let front = Front::plug(&executor, &a, A, 0);
        // The debt of this frame delays the next one for longer than the test waits.
        let long = [frame(B, A, 1), vec![7; 1_000_000]].concat();
        front.send(&long);
        assert_eq!(b.receive(), long);
        front.send(&frame(B, A, 2));
        while front.waits() == 0 {
            std::thread::yield_now();
        }
        assert!(b.has_none());
        let mut raised = limits.clone();
        raised.tx_rate = rate;
        assert!(a.set_limits(&raised));
        assert_eq!(b.receive(), frame(B, A, 2));
    }
}

#[test]
fn two_streams_are_two_ends_of_a_cable() {
    let (executor, switches, dir) = (executor(), Switches::default(), tempfile::tempdir().unwrap());
    let path = dir.path().join("socket");
    let open = |medium: Medium| medium.open(&switches, &opener(), 1, 1500, Arc::default()).unwrap();
    let (a, b) = (open(Medium::Listen(path.clone())), open(Medium::Connect(path)));
    let a = Front::plug(&executor, &*a, A, usize::MAX);
    let b = Front::plug(&executor, &*b, B, usize::MAX);
    // The stream drops frames while there is no peer. The first frame that arrives shows that there
    // is one.
    let mut n = 0;
    while a.has_none() {
        n += 1;
        b.send(&frame(A, B, n));
        std::thread::yield_now();
    }
    a.send(&frame(B, A, 7));
    a.send(&frame(A, A, 8));
    a.send(&frame(B, A, 9));
    assert_eq!(b.receive(), frame(B, A, 7));
    assert_eq!(b.receive(), frame(B, A, 9), "the receiver's filter decides");
}

#[test]
fn the_capture_records_a_source_behind_any_front() {
    let (executor, switches, dir) = (executor(), Switches::default(), tempfile::tempdir().unwrap());
    let path = dir.path().join("null.pcap");
    let null = Medium::Null(60).open(&switches, &opener(), 1, 1500, Arc::default()).unwrap();
    let captured = Captured::new(&opener(), null, &path, 1000).unwrap();
    let front = Front::plug(&executor, &captured, A, 3);
    for _ in 0..3 {
        let frame = front.receive();
        assert_eq!((frame.len(), &frame[..6]), (60, &A[..]));
    }
    drop(front);
    drop(captured);
    assert_eq!(std::fs::read(path).unwrap().len(), 24 + 3 * (16 + 60));
}

#[test]
fn each_reader_of_a_fifo_gets_a_capture_and_none_stops_the_device() {
    let (executor, switches, dir) = (executor(), Switches::default(), tempfile::tempdir().unwrap());
    let path = dir.path().join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let null = Medium::Null(60).open(&switches, &opener(), 1, 1500, Arc::default()).unwrap();
    let captured = Captured::new(&opener(), null, &path, 1000).unwrap();
    let front = Front::plug(&executor, &captured, A, usize::MAX);
    front.receive(); // Nobody reads the capture.
    for _ in 0..2 {
        // This waits for the capture to open the other end.
        let mut reader = std::fs::File::open(&path).unwrap();
        let mut bytes = [0; 24 + 2 * (16 + 60)];
        std::io::Read::read_exact(&mut reader, &mut bytes).unwrap();
        assert_eq!(bytes[..4], 0xa1b2_c3d4_u32.to_le_bytes(), "it begins with the head");
        assert_eq!([bytes[24 + 8], bytes[24 + 76 + 8]], [60, 60], "the lengths of two records");
        drop(reader);
        // A reader that came before the capture has noticed would get the rest of this one's.
        while Backend::inspect(&captured)["pcap"]["open"] == true {
            front.receive();
        }
    }
    // The reader of this one reads nothing at all.
    let reader = std::fs::File::open(&path).unwrap();
    for _ in 0..10_000 {
        front.receive();
    }
    drop(front);
    drop(captured);
    drop(reader);
}

#[test]
fn an_uplink_joins_a_switch_to_the_outside() {
    const OUTSIDE: Mac = [2, 0, 0, 0, 0, 8];
    const FAR: Mac = [2, 0, 0, 0, 0, 9];
    let (executor, switches, dir) = (executor(), Switches::default(), tempfile::tempdir().unwrap());
    let path = dir.path().join("socket");
    let value = json!({ "switch": "s", "backend": "stream", "listen": path, "mtu": 1400 });
    let mut settings = Settings::new(&value).unwrap();
    let config = UplinkConfig::parse(&mut settings, 68..=9000).unwrap();
    settings.finish().unwrap();
    let opener = opener();
    let uplink = Uplink::open("up", config, &switches, &opener).unwrap();
    uplink.start(&executor, 0, Arc::default()).unwrap();
    let port = || Medium::Switch("s".into()).open(&switches, &opener, 1, 1500, Arc::default());
    let (a, b) = (port().unwrap(), port().unwrap());
    let a = Front::plug(&executor, &*a, A, usize::MAX);
    let b = Front::plug(&executor, &*b, B, 0);
    let outside = Medium::Connect(path).open(&switches, &opener, 1, 1500, Arc::default()).unwrap();
    let outside = Front::plug(&executor, &*outside, OUTSIDE, usize::MAX);
    // Frames are dropped while the stream has no peer.
    let mut n = 0;
    while outside.has_none() {
        n += 1;
        a.send(&frame(OUTSIDE, A, n));
        std::thread::yield_now();
    }
    // From outside, with many addresses there, to a driver that posts few buffers: all come, in
    // order.
    for n in 0..100 {
        outside.send(&frame(B, FAR, n));
    }
    for n in 0..100 {
        b.add_room(1);
        assert_eq!(b.receive(), frame(B, FAR, n));
    }
    // The other way. The uplink has room for so many, however late its task runs.
    for n in 0..400 {
        b.send(&frame(OUTSIDE, B, n));
    }
    let mut next = 0;
    while next < 400 {
        let got = outside.receive();
        if got[6..12] == B {
            assert_eq!(got, frame(OUTSIDE, B, next), "in order, none lost");
            next += 1;
        }
    }
    // Nobody outside has the address of a device, and no frame is longer than the uplink's MTU.
    outside.send(&frame(A, B, 1));
    outside.send(&[&frame(A, FAR, 2)[..], &[0; 1400]].concat());
    outside.send(&frame(A, FAR, 3));
    assert_eq!(a.receive(), frame(A, FAR, 3));
    // A frame is counted after it is sent.
    let sent = || uplink.inspect()["to-outside"]["frames"].as_u64().unwrap();
    while uplink.inspect()["from-outside"]["frames"] != 101 || sent() <= 400 {
        std::thread::yield_now();
    }
    let seen = uplink.inspect();
    assert_eq!(seen["learned"], json!([{ "mac": "02:00:00:00:00:09", "port": "up" }]));
    assert_eq!(seen["from-outside"]["drops"]["spoofed"], 1);
    assert_eq!(seen["from-outside"]["drops"]["too_long"], 1);
    uplink.stop();
    assert_eq!(uplink.inspect()["uplinks"], json!([]));
}

#[test]
fn an_uplink_sends_what_waits_for_its_rate() {
    const OUTSIDE: Mac = [2, 0, 0, 0, 0, 8];
    let (executor, switches, dir) = (executor(), Switches::default(), tempfile::tempdir().unwrap());
    let path = dir.path().join("socket");
    // 1 MB a second, and four frames at once.
    let value = json!({
        "switch": "s", "backend": "stream", "connect": path, "rate": 8_000_000, "burst": 256,
    });
    let config = UplinkConfig::parse(&mut Settings::new(&value).unwrap(), 68..=9000).unwrap();
    let opener = opener();
    let outside = Medium::Listen(path).open(&switches, &opener, 1, 1500, Arc::default()).unwrap();
    let outside = Front::plug(&executor, &*outside, OUTSIDE, usize::MAX);
    let uplink = Uplink::open("up", config, &switches, &opener).unwrap();
    uplink.start(&executor, 0, Arc::default()).unwrap();
    let a = Medium::Switch("s".into()).open(&switches, &opener, 1, 1500, Arc::default()).unwrap();
    let a = Front::plug(&executor, &*a, A, usize::MAX);
    // Frames are dropped while the stream has no peer.
    while outside.has_none() {
        a.send(&frame(OUTSIDE, A, u32::MAX));
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    // Nothing else passes, so nothing but the time wakes the uplink.
    for n in 0..40 {
        a.send(&frame(OUTSIDE, A, n));
    }
    let mut next = 0;
    while next < 40 {
        let got = outside.receive();
        if got != frame(OUTSIDE, A, u32::MAX) {
            assert_eq!(got, frame(OUTSIDE, A, next), "in order, none lost");
            next += 1;
        }
    }
}

#[test]
fn an_uplink_leads_somewhere() {
    let parse = |value| UplinkConfig::parse(&mut Settings::new(&value).unwrap(), 68..=9000);
    for (value, text) in [
        (json!({}), "\"backend\" is missing; write \"tap\" or \"stream\""),
        (json!({ "backend": "switch" }), "\"backend\" leads nowhere"),
        (json!({ "backend": "null" }), "\"backend\" leads nowhere"),
        (json!({ "backend": "tap", "mtu": 1 }), "\"mtu\" is 1; use a number from 68 to 9000"),
        (json!({ "backend": "tap", "vlan": 0 }), "\"vlan\" is 0; use a number from 1 to 4094"),
    ] {
        let error = parse(value).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error}");
    }
    let trunk = json!({ "switch": "lab", "backend": "tap", "tap": "up", "trunk": [10] });
    let config = parse(trunk).unwrap();
    assert_eq!(
        (config.port.switch, config.backend.medium),
        ("lab".into(), Medium::Tap("up".into()))
    );
    assert!(config.port.rules.uplink && config.port.rules.learn);
}
