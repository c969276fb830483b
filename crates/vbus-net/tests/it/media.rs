// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frames through each medium that needs no privileges.

use std::sync::Arc;

use vbus_core::{Executor, Tuning};
use vbus_net::{Captured, Direct, Link, Mac, Medium, Opener, Switches};

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
    let captured = Captured::new(&Direct, null, &path, 1000).unwrap();
    let front = Front::plug(&executor, &captured, A, 3);
    for _ in 0..3 {
        let frame = front.receive();
        assert_eq!((frame.len(), &frame[..6]), (60, &A[..]));
    }
    drop(front);
    drop(captured);
    assert_eq!(std::fs::read(path).unwrap().len(), 24 + 3 * (16 + 60));
}
