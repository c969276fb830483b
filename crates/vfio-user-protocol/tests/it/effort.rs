// SPDX-License-Identifier: Apache-2.0 OR MIT
//! However much a client asks for, one call of the server does a bounded amount of it. All of this
//! is counted, not timed.

use std::time::Instant;

use crate::support::{Bench, NO_REPLY, Raw, framed};
use vfio_user_protocol::message::{Info, MultiWrite, SetIrqs, command};
use vfio_user_protocol::message::{IrqData, IrqVerb};

/// The most work of one call, apart from its last message.
const CALL: u32 = 64;

/// A `REGION_WRITE_MULTI` of 256 writes, every `nth` of them long.
fn multi(nth: usize) -> Vec<u8> {
    let offset = |i: usize| if i % nth == nth - 1 { 0 } else { 8 };
    let writes: Vec<_> =
        (0..256).map(|i| MultiWrite { region: 1, offset: offset(i), data: &[1; 4] }).collect();
    MultiWrite::body(&writes)
}

#[test]
fn quick_calls_do_nothing_long_and_long_calls_do_one_thing() {
    let mut bench = Bench::new();
    let mut raw = Raw::negotiated(&mut bench);
    // Posted messages, without a look at the replies: 1 message of 128 long writes.
    raw.send(&framed(2, command::REGION_WRITE_MULTI, NO_REPLY, &multi(2)));
    let now = Instant::now();
    for done in 0..128 {
        for _ in 0..3 {
            let outcome = bench.server.ready_quick(now);
            assert!(outcome.long, "after {done} long writes");
            assert!(outcome.work <= CALL, "{} units", outcome.work);
            assert_eq!(bench.server.target().long_writes, done);
        }
        bench.server.ready_long(now);
        assert_eq!(bench.server.target().long_writes, done + 1, "one at a time");
    }
    assert!(!bench.server.ready_quick(now).long);
    assert_eq!(bench.server.target().writes, 256);

    // All kinds of long operations wait for their turn, and what comes after them waits too.
    raw.send(&framed(3, command::DEVICE_RESET, 0, &[]));
    raw.send(&framed(4, command::REGION_WRITE_MULTI, 0, &multi(300)));
    assert!(bench.server.ready_quick(now).long);
    assert_eq!(bench.server.target().resets, 0);
    assert!(!bench.server.ready_long(now).long);
    assert_eq!((bench.server.target().resets, bench.server.target().writes), (1, 512));
    drop(raw);
    // So does the end of the session.
    assert!(bench.server.ready_quick(now).long);
    assert!(!bench.server.has_client() && bench.server.target().connected);
    assert!(bench.server.ready_quick(now).long);
    bench.server.ready_long(now);
    assert!(!bench.server.target().connected);
    assert!(!bench.server.ready_quick(now).long);
}

#[test]
fn what_costs_more_is_charged_more() {
    let mut bench = Bench::new();
    let mut raw = Raw::negotiated(&mut bench);
    let mut cost = |message: &[u8]| {
        raw.send(message);
        let mut work = 0;
        // The message may come in several pieces.
        bench.until(None, |server| {
            work += server.ready_quick(Instant::now()).work;
            work > 0
        });
        work
    };
    let read = |bytes: u32| {
        let mut body = 0u64.to_le_bytes().to_vec();
        body.extend(7u32.to_le_bytes());
        body.extend(bytes.to_le_bytes());
        framed(2, command::REGION_READ, 0, &body)
    };
    assert_eq!(cost(&read(4)), 1);
    let writes = cost(&framed(3, command::REGION_WRITE_MULTI, NO_REPLY, &multi(300)));
    assert!(writes > 256 / 4, "{writes} units for 256 writes");
    let verb = IrqVerb::Trigger;
    let set = SetIrqs { index: 2, start: 0, count: 32, verb, data: IrqData::None };
    assert_eq!(cost(&framed(4, command::DEVICE_SET_IRQS, 0, &set.body())), 1 + 32 / 4);
    // The size of the reply, which depends on all 3 eventfds of the region.
    let ask = Info { argsz: 16, flags: 0, index: 0, count: 0 };
    assert_eq!(cost(&framed(5, command::DEVICE_GET_REGION_IO_FDS, 0, &ask.body())), 1 + 3);
}

#[test]
fn a_flood_of_messages_takes_many_calls() {
    let mut bench = Bench::new();
    let mut raw = Raw::negotiated(&mut bench);
    let body = MultiWrite::body(&[MultiWrite { region: 1, offset: 8, data: &[1; 4] }]);
    let flood: Vec<u8> =
        (0..1000).flat_map(|_| framed(2, command::REGION_WRITE_MULTI, NO_REPLY, &body)).collect();
    raw.send(&flood);
    let mut calls = 0;
    while bench.server.target().writes < 1000 {
        let before = bench.server.target().writes;
        let outcome = bench.server.ready_quick(Instant::now());
        assert!(outcome.work <= CALL && bench.server.target().writes - before <= CALL);
        calls += 1;
    }
    assert!(calls >= 1000 / CALL);
}
