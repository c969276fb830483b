// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Migration: the document's bytes, both ends together, and what a hostile client may ask for.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Instant;

use crate::support::{Bench, Movable, Raw, Seen, framed};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_user_protocol::message::{
    DmaRange, FEATURE_LEN, Feature, LoggingControl, LoggingReport, MigData, MigrationFlags,
    MigrationState, command, feature,
};
use vfio_user_protocol::migration::{ArcFailure, MAX_LOGGING_RANGES, MigrationArc};
use vfio_user_protocol::{Client, ClientError, Errno};

/// Get, set and probe, as the document numbers them.
const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

fn movable() -> Bench {
    let mut bench = Bench::new();
    bench.server.target_mut().movable = Some(Movable::default());
    bench
}

fn refused(result: Result<impl std::fmt::Debug, ClientError>) -> Errno {
    match result {
        Err(ClientError::Refused { errno, .. }) => errno,
        other => panic!("not refused: {other:?}"),
    }
}

/// The numbers of the document. libvfio-user's header `vfio-user.h` has the same ones: its packed
/// structures have 8 bytes (`vfio_user_device_feature`, `_migration`, `_mig_state`, `_mig_data`),
/// 16 (`_dma_logging_control`, `_dma_logging_range`) and 24 (`_dma_logging_report`).
#[test]
fn each_body_has_the_documents_layout() {
    assert_eq!((command::DEVICE_FEATURE, command::MIG_DATA_READ), (16, 17));
    assert_eq!(command::MIG_DATA_WRITE, 18);
    assert_eq!((feature::MIGRATION, feature::MIG_DEVICE_STATE), (1, 2));
    assert_eq!((feature::DMA_LOGGING_START, feature::DMA_LOGGING_STOP), (6, 7));
    assert_eq!(feature::DMA_LOGGING_REPORT, 8);

    // argsz at 0, flags at 4, data at 8.
    let asked = Feature { argsz: 0x30, feature: 8, get: true, set: false, probe: false };
    assert_eq!(asked.body(&[0xaa]), [bytes![0x30u32, GET | 8], vec![0xaa]].concat());
    let asked = Feature { argsz: 9, feature: 2, get: false, set: true, probe: true };
    assert_eq!(asked.body(&[]), bytes![9u32, SET | PROBE | 2]);
    assert_eq!(Feature::parse(&asked.body(&[7])).unwrap(), (asked, &[7][..]));

    // flags at 0: 8 bytes.
    let flags = |bits: u64| MigrationFlags::parse(&bits.to_ne_bytes()).unwrap();
    for (bits, stop_copy, p2p, pre_copy) in
        [(1, true, false, false), (2, false, true, false), (4, false, false, true)]
    {
        assert_eq!(flags(bits), MigrationFlags { stop_copy, p2p, pre_copy });
        assert_eq!(flags(bits).data(), bits.to_ne_bytes());
    }
    assert_eq!(flags(0xf8), MigrationFlags::default());

    // device_state at 0, data_fd at 4.
    let numbers = [
        (MigrationState::Error, 0u32),
        (MigrationState::Stop, 1),
        (MigrationState::Running, 2),
        (MigrationState::StopCopy, 3),
        (MigrationState::Resuming, 4),
        (MigrationState::RunningP2p, 5),
        (MigrationState::PreCopy, 6),
        (MigrationState::PreCopyP2p, 7),
    ];
    for (state, number) in numbers {
        assert_eq!(state.data(), bytes![number, 0u32]);
        assert_eq!(MigrationState::parse(&bytes![number, 0xffu32]).unwrap(), state);
    }
    assert!(MigrationState::parse(&bytes![8u32, 0u32]).is_err());
    assert!(MigrationState::parse(&bytes![1u32]).is_err());

    // page_size at 0, num_ranges at 8, reserved at 12, ranges at 16; iova at 0, length at 8.
    let range = |iova, length| DmaRange { iova, length };
    let control = LoggingControl { page_size: 4096, ranges: vec![range(1, 2), range(3, 4)] };
    assert_eq!(control.data(), bytes![4096u64, 2u32, 0u32, 1u64, 2u64, 3u64, 4u64]);
    assert_eq!(LoggingControl::parse(&control.data()).unwrap(), control);
    assert!(LoggingControl::parse(&bytes![4096u64, 2u32, 0u32, 1u64, 2u64]).is_err());
    assert!(LoggingControl::parse(&bytes![4096u64, 0u32, 0u32, 1u64]).is_err());
    assert!(LoggingControl::parse(&bytes![4096u64, u32::MAX, 0u32]).is_err());

    // iova at 0, length at 8, page_size at 16, the bitmap at 24.
    let report = LoggingReport { iova: 1, length: 2, page_size: 4 };
    assert_eq!(report.data(&[5]), bytes![1u64, 2u64, 4u64, 5u64]);
    assert_eq!(LoggingReport::parse(&report.data(&[5])).unwrap(), (report, &bytes![5u64][..]));
    let words = |iova, length, page_size| LoggingReport { iova, length, page_size }.words();
    assert_eq!(words(0, 4096 * 64, 4096), Some(1));
    assert_eq!(words(0, 4096 * 64 + 1, 4096), Some(2));
    assert_eq!(words(4096, u64::MAX - 4096, 1), Some((1 << 58) - 64));
    assert_eq!(words(4096, u64::MAX, 4096), None);
    assert_eq!((words(0, 0, 4096), words(0, 4096, 0), words(0, 4096, 4097)), (None, None, None));

    // argsz at 0, size at 4, data at 8.
    let data = MigData { argsz: 9, size: 1 };
    assert_eq!(data.body(&[3]), [bytes![9u32, 1u32], vec![3]].concat());
    assert_eq!(MigData::parse_reply(&data.body(&[3])), Ok((data, &[3][..])));
    assert_eq!(MigData::parse_reply(&data.body(&[3, 0, 0])), Ok((data, &[3][..])));
    assert!(MigData::parse_with_data(&data.body(&[3, 0, 0])).is_err());
    for short in [&data.body(&[])[..], &data.body(&[])[..7], &[]] {
        assert!(MigData::parse_reply(short).is_err(), "{short:?}");
    }
}

/// What the server answers.
enum Answer {
    /// Success, with this body.
    Body(Vec<u8>),
    /// The same body as the request's.
    Echo,
    /// A header with this errno.
    Error(Errno),
}
use Answer::{Body, Echo, Error};

const INVAL: Answer = Error(Errno::INVAL);

/// Requests of one session, in this order.
fn rows() -> Vec<(&'static str, u16, Vec<u8>, Answer)> {
    let feature = |rule, body: Vec<u8>, answer| (rule, command::DEVICE_FEATURE, body, answer);
    let set = |rule, state: u32, answer| feature(rule, bytes![16u32, SET | 2, state, 0u32], answer);
    let now = |rule, state: u32| {
        feature(rule, bytes![16u32, GET | 2], Body(bytes![16u32, GET | 2, state, 0u32]))
    };
    let read = |rule, argsz: u32, size: u32, answer| {
        (rule, command::MIG_DATA_READ, bytes![argsz, size], answer)
    };
    let write = |rule, argsz: u32, size: u32, data: &[u8], answer| {
        let body = [bytes![argsz, size], data.to_vec()].concat();
        (rule, command::MIG_DATA_WRITE, body, answer)
    };
    let data = |data: &[u8]| {
        let size = u32::try_from(data.len()).unwrap();
        Body([bytes![8 + size, size], data.to_vec()].concat())
    };
    vec![
        // Probes.
        feature("probe", bytes![8u32, PROBE | 1], Echo),
        feature("probe of get", bytes![8u32, PROBE | GET | 1], Echo),
        feature("only get", bytes![8u32, PROBE | SET | 1], INVAL),
        feature("get and set together, in a probe", bytes![8u32, PROBE | GET | SET | 2], Echo),
        feature("only set", bytes![8u32, PROBE | GET | 6], INVAL),
        feature("only set", bytes![8u32, PROBE | GET | SET | 7], INVAL),
        feature("probe", bytes![8u32, PROBE | SET | 6], Echo),
        feature("probe", bytes![8u32, PROBE | GET | 8], Echo),
        feature("a probe has the data that it has", bytes![16u32, PROBE | 1, 7u64], Echo),
        feature("but room for them", bytes![15u32, PROBE | 1, 7u64], INVAL),
        // The kernel has these: tokens, power states, the size of the data (9), mastering the bus.
        feature("no feature of the document", bytes![8u32, PROBE], Error(Errno::NOTTY)),
        feature("no feature of the document", bytes![8u32, PROBE | 3], Error(Errno::NOTTY)),
        feature("no feature of the document", bytes![16u32, GET | 9], Error(Errno::NOTTY)),
        feature("no feature of the document", bytes![16u32, SET | 10], Error(Errno::NOTTY)),
        feature("no feature at all", bytes![8u32, PROBE | 0xffff], Error(Errno::NOTTY)),
        // MIGRATION
        feature(
            "STOP_COPY and PRE_COPY; P2P is not used",
            bytes![16u32, GET | 1],
            Body(bytes![16u32, GET | 1, 5u64]),
        ),
        feature("argsz", bytes![15u32, GET | 1], INVAL),
        feature("cannot be set", bytes![16u32, SET | 1, 1u64], INVAL),
        // MIG_DEVICE_STATE
        now("RUNNING at first", 2),
        feature("argsz", bytes![15u32, GET | 2], INVAL),
        feature("short", bytes![16u32, SET | 2, 1u32], INVAL),
        feature("argsz", bytes![8u32, SET | 2, 1u32, 0u32], INVAL),
        set("ERROR cannot be asked for", 0, INVAL),
        set("not used in vfio-user", 5, INVAL),
        set("not used in vfio-user", 7, INVAL),
        set("no state", 8, INVAL),
        now("as before", 2),
        set("a state to itself", 2, Echo),
        read("RUNNING is no state of saving", 16, 8, INVAL),
        write("RUNNING is no RESUMING", 9, 1, &[1], INVAL),
        set("RUNNING to PRE_COPY", 6, Echo),
        now("PRE_COPY", 6),
        read("the first bytes", 16, 8, data(b"the stre")),
        read("no room for the reply", 15, 8, INVAL),
        read("no bytes", 8, 0, data(b"")),
        read("more than max_data_xfer_size", u32::MAX, (1 << 20) + 1, INVAL),
        set("PRE_COPY to STOP_COPY", 3, Echo),
        set("STOP_COPY to PRE_COPY is not allowed", 6, INVAL),
        now("STOP_COPY", 3),
        read("fewer than asked for: the end", 108, 100, data(b"am")),
        read("the end", 108, 100, data(b"")),
        set("STOP_COPY to RESUMING, over STOP", 4, Echo),
        write("bytes", 12, 4, b"a ne", Body(vec![])),
        write("data as long as size", 12, 4, b"a n", INVAL),
        write("data as long as size", 12, 4, b"a new", INVAL),
        write("argsz is of a reply that has no body", 0, 2, b"w ", Body(vec![])),
        read("RESUMING is no state of saving", 16, 8, INVAL),
        set("RESUMING to RUNNING, over STOP", 2, Echo),
        now("RUNNING", 2),
        set("RUNNING to STOP_COPY, over STOP", 3, Echo),
        set("STOP_COPY to RUNNING, over STOP", 2, Echo),
        set("RUNNING to RESUMING, over STOP", 4, Echo),
        ("reset", command::DEVICE_RESET, vec![], Body(vec![])),
        now("a reset leads to RUNNING", 2),
    ]
}

#[test]
fn the_server_answers_each_command_by_the_document() {
    let mut bench = movable();
    bench.server.target_mut().movable.as_mut().unwrap().stream = b"the stream".to_vec();
    let mut raw = Raw::negotiated(&mut bench);
    for (id, (rule, number, body, answer)) in (1..).zip(rows()) {
        raw.send(&framed(id, number, 0, &body));
        let (error, expected) = match answer {
            Body(expected) => (None, expected),
            Echo => (None, body.clone()),
            Error(errno) => (Some(errno.raw_os_error().unsigned_abs()), vec![]),
        };
        let seen = raw.see(&mut bench);
        assert_eq!(seen, Seen::Reply(id, number, error, expected), "{rule}: {body:x?}");
    }
    use MigrationArc::*;
    let movable = bench.server.target().movable.as_ref().unwrap();
    let arcs = [
        // To PRE_COPY, to STOP_COPY, to RESUMING, to RUNNING.
        [BeginPreCopy, StopInPreCopy, EndSaving, BeginRestoring, EndRestoring, Start].to_vec(),
        // To STOP_COPY, to RUNNING, to RESUMING.
        [Stop, BeginSaving, EndSaving, Start, Stop, BeginRestoring].to_vec(),
    ];
    assert_eq!(movable.arcs, arcs.concat());
    assert_eq!(movable.written, b"a new ");
}

fn words(bits: &[usize], count: usize) -> Vec<u64> {
    let mut words = vec![0; count];
    for bit in bits {
        words[bit / 64] |= 1 << (bit % 64);
    }
    words
}

#[test]
fn the_log_is_started_reported_and_stopped() {
    let mut bench = movable();
    let start = |page: u64, ranges: &[(u64, u64)]| {
        let ranges: Vec<_> =
            ranges.iter().map(|&(iova, length)| DmaRange { iova, length }).collect();
        let data = LoggingControl { page_size: page, ranges }.data();
        let argsz = u32::try_from(FEATURE_LEN + data.len()).unwrap();
        [bytes![argsz, SET | 6], data].concat()
    };
    let report =
        |argsz: u32, iova: u64, length: u64, page: u64| bytes![argsz, GET | 8, iova, length, page];
    let many: Vec<_> = (0..=MAX_LOGGING_RANGES as u64).map(|i| (i * 8192, 4096)).collect();
    let stop = bytes![8u32, SET | 7];
    let chosen = |page: u64, body: Vec<u8>| {
        let mut body = body;
        body[8..16].copy_from_slice(&page.to_ne_bytes());
        Body(body)
    };
    // 70 pages need two words.
    let reply = |iova: u64, length: u64, page: u64, bits: &[usize]| {
        let report = LoggingReport { iova, length, page_size: page };
        let count = usize::try_from(report.words().unwrap()).unwrap();
        let argsz = u32::try_from(32 + count * 8).unwrap();
        Body([bytes![argsz, GET | 8], report.data(&words(bits, count))].concat())
    };
    let rows = [
        ("the log is off", report(40, 0, 4096, 4096), INVAL),
        ("nothing to stop", stop.clone(), Echo),
        ("no page", start(0, &[]), INVAL),
        ("no power of two", start(4097, &[]), INVAL),
        ("an empty range", start(4096, &[(0, 0)]), INVAL),
        ("a range that wraps around", start(4096, &[(1 << 63, 1 << 63), (0, 1)]), INVAL),
        ("ranges that overlap", start(4096, &[(8192, 4096), (0, 8193)]), INVAL),
        ("too many ranges", start(4096, &many), Error(Errno::TOOBIG)),
        ("fewer ranges than said", bytes![24u32, SET | 6, 4096u64, 1u32, 0u32], INVAL),
        ("the log is still off", report(40, 0, 4096, 4096), INVAL),
        ("the most ranges", start(4096, &many[1..]), Echo),
        ("stop", stop.clone(), Echo),
        ("a smaller page than the device has", start(512, &[]), chosen(4096, start(512, &[]))),
        ("the same again", start(512, &[]), chosen(4096, start(512, &[]))),
        ("something else", start(4096, &[]), INVAL),
        ("a word of bits", report(40, 0, 4096 * 64, 4096), reply(0, 4096 * 64, 4096, &[0, 3, 63])),
        ("each bit once", report(40, 0, 4096 * 64, 4096), reply(0, 4096 * 64, 4096, &[])),
        ("no room: how much is needed", report(40, 4096 * 64, 4096 * 70, 4096), {
            Body([bytes![48u32, GET | 8], bytes![4096u64 * 64, 4096u64 * 70, 4096u64]].concat())
        }),
        (
            "and nothing is lost",
            report(999, 4096 * 64, 4096 * 70, 4096),
            reply(4096 * 64, 4096 * 70, 4096, &[0, 66]),
        ),
        (
            "larger pages",
            report(40, 1 << 30, 1 << 24, 1 << 21),
            reply(1 << 30, 1 << 24, 1 << 21, &[0, 1]),
        ),
        ("argsz below the fixed part", report(7, 0, 4096, 4096), INVAL),
        ("a range that wraps around", report(40, 1 << 63, 1 << 63, 1 << 57), INVAL),
        ("an empty range", report(40, 0, 0, 4096), INVAL),
        ("no page", report(40, 0, 4096, 0), INVAL),
        ("no power of two", report(40, 0, 4096, 3), INVAL),
        ("more bits than a message has", report(u32::MAX, 0, 1 << 60, 1), INVAL),
        ("short", bytes![40u32, GET | 8, 0u64, 4096u64], INVAL),
        ("the data of a stop mean nothing", bytes![24u32, SET | 7, 512u64, 9u32, 0u32], Echo),
        ("the log is off", report(40, 0, 4096, 4096), INVAL),
    ];
    let first = (1 << 30) / 4096;
    let dirty = [0, 3, 63, 64, 130, first, first + 1, first + 600];
    bench.server.target_mut().movable.as_mut().unwrap().dirty.extend(dirty);
    let mut raw = Raw::negotiated(&mut bench);
    for (id, (rule, body, answer)) in (1..).zip(rows) {
        raw.send(&framed(id, command::DEVICE_FEATURE, 0, &body));
        let (error, expected) = match answer {
            Body(expected) => (None, expected),
            Echo => (None, body.clone()),
            Error(errno) => (Some(errno.raw_os_error().unsigned_abs()), vec![]),
        };
        let seen = raw.see(&mut bench);
        let expected = Seen::Reply(id, command::DEVICE_FEATURE, error, expected);
        assert_eq!(seen, expected, "{rule}: {body:x?}");
    }
    assert!(bench.server.target().movable.as_ref().unwrap().log.is_none());
}

#[test]
fn a_device_is_moved_from_one_server_to_another() {
    let (mut from, mut to) = (movable(), movable());
    let state: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let source = from.server.target_mut().movable.as_mut().unwrap();
    source.stream.clone_from(&state);
    source.dirty.extend([1, 100, 8_000_000]);
    let moved = from.with(|path| {
        let mut client = Client::connect(path).unwrap();
        let flags = MigrationFlags { stop_copy: true, p2p: false, pre_copy: true };
        assert_eq!(client.migration_flags().unwrap(), Some(flags));
        assert!(client.logs_dma().unwrap());
        assert_eq!(client.migration_state().unwrap(), MigrationState::Running);
        client.set_migration_state(MigrationState::PreCopy).unwrap();
        let (mut moved, more) = client.migration_read().unwrap();
        assert_eq!((moved.len(), more), (1 << 20, true));
        let all = DmaRange { iova: 0, length: 1 << 40 };
        assert_eq!(client.dma_logging_start(4096, &[all]).unwrap(), 4096);
        // More bits than one message has.
        let bitmap = client.dma_logging_report(0, 10_000_001 * 4096, 4096).unwrap();
        assert_eq!(bitmap, words(&[1, 100, 8_000_000], 10_000_001usize.div_ceil(64)));
        assert_eq!(client.dma_logging_report(4096, 1, 4096).unwrap(), [0]);
        client.dma_logging_stop().unwrap();
        client.set_migration_state(MigrationState::StopCopy).unwrap();
        assert_eq!(refused(client.set_migration_state(MigrationState::PreCopy)), Errno::INVAL);
        loop {
            let (data, more) = client.migration_read().unwrap();
            moved.extend(data);
            if !more {
                break moved;
            }
        }
    });
    assert!(moved == state);
    to.with(|path| {
        let mut client = Client::connect(path).unwrap();
        client.set_migration_state(MigrationState::Resuming).unwrap();
        client.migration_write(&moved).unwrap();
        client.set_migration_state(MigrationState::Running).unwrap();
        assert_eq!(client.migration_state().unwrap(), MigrationState::Running);
    });
    assert!(to.server.target().movable.as_ref().unwrap().written == state);
}

#[test]
fn a_device_without_state_has_no_migration() {
    let mut bench = Bench::new();
    bench.with(|path| {
        let mut client = Client::connect(path).unwrap();
        assert_eq!(client.migration_flags().unwrap(), None);
        assert!(!client.logs_dma().unwrap());
        assert_eq!(refused(client.migration_state()), Errno::NOTTY);
        assert_eq!(refused(client.set_migration_state(MigrationState::Stop)), Errno::NOTTY);
        assert_eq!(refused(client.dma_logging_start(4096, &[])), Errno::NOTTY);
        assert_eq!(refused(client.dma_logging_report(0, 4096, 4096)), Errno::NOTTY);
        assert_eq!(refused(client.dma_logging_stop()), Errno::NOTTY);
        assert_eq!(refused(client.migration_read()), Errno::OPNOTSUPP);
        assert_eq!(refused(client.migration_write(&[1])), Errno::OPNOTSUPP);
    });
}

/// A client that goes towards RUNNING from RESUMING, over STOP, with a device that refuses an arc.
fn refusing(
    arc: MigrationArc,
    failure: ArcFailure,
    then: impl FnOnce(&mut Client) + Send,
) -> (Errno, MigrationState) {
    let mut bench = movable();
    bench.server.target_mut().movable.as_mut().unwrap().refused = Some((arc, failure));
    bench.with(|path: &Path| {
        let mut client = Client::connect(path).unwrap();
        client.set_migration_state(MigrationState::Resuming).unwrap();
        let errno = refused(client.set_migration_state(MigrationState::Running));
        let reached = client.migration_state().unwrap();
        then(&mut client);
        (errno, reached)
    })
}

#[test]
fn a_device_that_refuses_an_arc_is_where_it_got_to() {
    use MigrationArc::{EndRestoring, Start};
    let nothing = |_: &mut Client| {};
    let unchanged = ArcFailure::Unchanged(Errno::ILSEQ);
    assert_eq!(
        refusing(EndRestoring, unchanged, nothing),
        (Errno::ILSEQ, MigrationState::Resuming)
    );
    assert_eq!(refusing(Start, unchanged, nothing), (Errno::ILSEQ, MigrationState::Stop));
    let failed = ArcFailure::Failed(Errno::IO);
    let only_reset = |client: &mut Client| {
        for state in MigrationState::ALL.into_iter().filter(|s| *s != MigrationState::Error) {
            assert_eq!(refused(client.set_migration_state(state)), Errno::INVAL, "{state:?}");
        }
        assert_eq!(refused(client.migration_read()), Errno::INVAL);
        assert_eq!(refused(client.migration_write(&[1])), Errno::INVAL);
        client.reset().unwrap();
        assert_eq!(client.migration_state().unwrap(), MigrationState::Running);
        client.set_migration_state(MigrationState::Stop).unwrap();
    };
    assert_eq!(refusing(Start, failed, only_reset), (Errno::IO, MigrationState::Error));
}

#[test]
fn a_client_cannot_write_without_end() {
    let mut bench = movable();
    bench.with(|path| {
        let mut client = Client::connect(path).unwrap();
        client.set_migration_state(MigrationState::Resuming).unwrap();
        let mib = vec![1; 1 << 20];
        assert_eq!(refused((0..100).try_for_each(|_| client.migration_write(&mib))), Errno::FBIG);
    });
    assert_eq!(bench.server.target().movable.as_ref().unwrap().written.len(), 4 << 20);
}

#[test]
fn a_new_client_finds_a_running_device_without_log() {
    let mut bench = movable();
    bench.with(|path| {
        let mut client = Client::connect(path).unwrap();
        client.dma_logging_start(4096, &[]).unwrap();
        client.set_migration_state(MigrationState::StopCopy).unwrap();
    });
    bench.until_gone();
    bench.server.target_mut().movable = Some(Movable::default());
    bench.with(|path| {
        let mut client = Client::connect(path).unwrap();
        assert_eq!(client.migration_state().unwrap(), MigrationState::Running);
        assert_eq!(refused(client.dma_logging_report(0, 4096, 4096)), Errno::INVAL);
    });
}

#[test]
fn what_takes_long_is_left_to_the_thread_for_it() {
    let mut bench = movable();
    let memory = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 4096).unwrap();
    let mut raw = Raw::negotiated(&mut bench);
    let now = Instant::now();
    let start = bytes![24u32, SET | 6, 4096u64, 0u32, 0u32];
    let report = bytes![40u32, GET | 8, 0u64, 4096u64, 4096u64];
    for body in [bytes![16u32, SET | 2, 1u32, 0u32], start, report, bytes![8u32, SET | 7]] {
        raw.send(&framed(2, command::DEVICE_FEATURE, 0, &body));
        assert!(bench.server.ready_quick(now).long, "{body:x?}");
        assert!(!bench.server.ready_long(now).long);
    }
    for number in [command::MIG_DATA_READ, command::MIG_DATA_WRITE] {
        raw.send(&framed(2, number, 0, &bytes![8u32, 0u32]));
        assert!(bench.server.ready_quick(now).long);
        assert!(!bench.server.ready_long(now).long);
    }
    let with_descriptor = framed(3, command::DEVICE_FEATURE, 0, &bytes![16u32, GET | 1]);
    raw.send_with(&with_descriptor, &[memory.as_fd()]);
    for error in [false, false, false, false, true, true] {
        let seen = raw.see(&mut bench);
        assert!(matches!(&seen, Seen::Reply(2, _, e, _) if e.is_some() == error), "{seen:?}");
    }
    let inval = Some(Errno::INVAL.raw_os_error().unsigned_abs());
    assert_eq!(raw.see(&mut bench), Seen::Reply(3, command::DEVICE_FEATURE, inval, vec![]));
}

#[test]
fn a_server_whose_device_is_being_moved_stays_where_it_is() {
    let mut bench = movable();
    let mut raw = Raw::negotiated(&mut bench);
    let mut busy = |bench: &mut Bench, body: Vec<u8>| {
        raw.send(&framed(2, command::DEVICE_FEATURE, 0, &body));
        assert!(matches!(raw.see(bench), Seen::Reply(2, _, None, _)));
        match bench.server.save(Instant::now()) {
            Ok(_) => false,
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy);
                true
            }
        }
    };
    assert!(busy(&mut bench, bytes![16u32, SET | 2, 6u32, 0u32]));
    assert!(busy(&mut bench, bytes![24u32, SET | 6, 4096u64, 0u32, 0u32]));
    assert!(busy(&mut bench, bytes![16u32, SET | 2, 2u32, 0u32]));
    assert!(!busy(&mut bench, bytes![8u32, SET | 7]));
}
