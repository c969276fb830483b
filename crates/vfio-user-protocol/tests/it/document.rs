// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The protocol's document, command by command: a table of requests with the exact reply of the
//! server, and a table of replies with the result of the client.
//!
//! `malformed` has the faults of a client. Here are also the requests that the document allows, and
//! every field that it says must be zero.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::support::{Bench, NO_REPLY, Raw, Seen, framed, send_with, version};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_user_protocol::message::{self, Kind, MultiWrite, Version, command};
use vfio_user_protocol::{Client, ClientError, Errno};

/// What the server answers to a request.
enum Answer {
    /// Success, with this body.
    Body(Vec<u8>),
    /// A header with this errno, and no body.
    Error(Errno),
    /// Nothing.
    Silence,
}
use Answer::{Body, Error, Silence};

struct Row {
    /// What the document says.
    rule: &'static str,
    command: u16,
    flags: u32,
    body: Vec<u8>,
    /// How many descriptors of memory it carries.
    fds: usize,
    answer: Answer,
}

fn row(rule: &'static str, command: u16, body: Vec<u8>, answer: Answer) -> Row {
    Row { rule, command, flags: 0, body, fds: 0, answer }
}

const INVAL: Answer = Error(Errno::INVAL);

/// Requests of one session, in this order, on the device of `support`.
fn rows() -> Vec<Row> {
    let info = |argsz: u32, flags: u32, index: u32, count: u32| bytes![argsz, flags, index, count];
    let region = |argsz: u32, flags: u32, index: u32, cap: u32, size: u64, offset: u64| {
        bytes![argsz, flags, index, cap, size, offset]
    };
    let map = |argsz: u32, flags: u32, offset: u64, address: u64, size: u64| {
        bytes![argsz, flags, offset, address, size]
    };
    let unmap =
        |argsz: u32, flags: u32, address: u64, size: u64| bytes![argsz, flags, address, size];
    let irqs = |argsz: u32, flags: u32, index: u32, start: u32, count: u32| {
        bytes![argsz, flags, index, start, count]
    };
    let access = |offset: u64, region: u32, count: u32| bytes![offset, region, count];
    let with = |head: Vec<u8>, data: &[u8]| [head, data.to_vec()].concat();
    let longer = |body: Vec<u8>| with(body, &[0xee; 8]);
    let posted = |row: Row| Row { flags: NO_REPLY, answer: Silence, ..row };
    let with_memory = |row: Row| Row { fds: 1, ..row };
    use command as c;

    let mut rows = vec![
        // The header.
        row("the error field of a command is reserved", c::DEVICE_RESET, vec![], Body(vec![])),
        Row {
            flags: 0x20 | 0xffff_ff00,
            ..row("the error bit of a command means nothing", c::DEVICE_RESET, vec![], Body(vec![]))
        },
        posted(row("no reply to a command that failed", 77, vec![], Silence)),
        row("a command that the document does not have", 77, vec![], Error(Errno::NOSYS)),
        row("the server's command", c::DMA_READ, bytes![0u64, 8u64], INVAL),
        row("the server's command", c::DMA_WRITE, bytes![0u64, 8u64, 0u64], INVAL),
        // DEVICE_GET_INFO
        row("16 bytes today", c::DEVICE_GET_INFO, info(16, 0, 0, 0), Body(info(16, 3, 9, 5))),
        row("argsz is a maximum", c::DEVICE_GET_INFO, info(999, 0, 0, 0), Body(info(16, 3, 9, 5))),
        row("argsz below the fixed part", c::DEVICE_GET_INFO, info(15, 0, 0, 0), INVAL),
        row("flags must be zero", c::DEVICE_GET_INFO, info(16, 1, 0, 0), INVAL),
        row("num_regions must be zero", c::DEVICE_GET_INFO, info(16, 0, 1, 0), INVAL),
        row("num_irqs must be zero", c::DEVICE_GET_INFO, info(16, 0, 0, 1), INVAL),
        // DEVICE_GET_REGION_INFO
        row(
            "the structure alone, because there are no capabilities",
            c::DEVICE_GET_REGION_INFO,
            region(32, 0, 0, 0, 0, 0),
            Body(region(32, 3, 0, 0, 4096, 0)),
        ),
        row(
            "a region that can be read only",
            c::DEVICE_GET_REGION_INFO,
            region(4096, 0, 6, 0, 0, 0),
            Body(region(32, 1, 6, 0, 512, 0)),
        ),
        row(
            "a region without bytes",
            c::DEVICE_GET_REGION_INFO,
            region(32, 0, 4, 0, 0, 0),
            Body(region(32, 0, 4, 0, 0, 0)),
        ),
        row("argsz", c::DEVICE_GET_REGION_INFO, region(31, 0, 0, 0, 0, 0), INVAL),
        row("flags", c::DEVICE_GET_REGION_INFO, region(32, 4, 0, 0, 0, 0), INVAL),
        row("cap_offset", c::DEVICE_GET_REGION_INFO, region(32, 0, 0, 32, 0, 0), INVAL),
        row("size", c::DEVICE_GET_REGION_INFO, region(32, 0, 0, 0, 4096, 0), INVAL),
        row("offset", c::DEVICE_GET_REGION_INFO, region(32, 0, 0, 0, 0, 1 << 40), INVAL),
        row("index", c::DEVICE_GET_REGION_INFO, region(32, 0, 9, 0, 0, 0), INVAL),
        // DEVICE_GET_REGION_IO_FDS
        row(
            "argsz too small for the sub-regions: only how much is needed",
            c::DEVICE_GET_REGION_IO_FDS,
            info(16 + 3 * 40 - 1, 0, 0, 0),
            Body(info(16 + 3 * 40, 0, 0, 3)),
        ),
        row(
            "a region without sub-regions",
            c::DEVICE_GET_REGION_IO_FDS,
            info(4096, 0, 7, 0),
            Body(info(16, 0, 7, 0)),
        ),
        row("flags", c::DEVICE_GET_REGION_IO_FDS, info(4096, 1, 0, 0), INVAL),
        row("count", c::DEVICE_GET_REGION_IO_FDS, info(4096, 0, 0, 1), INVAL),
        row("argsz", c::DEVICE_GET_REGION_IO_FDS, info(15, 0, 0, 0), INVAL),
        row("index", c::DEVICE_GET_REGION_IO_FDS, info(4096, 0, 9, 0), INVAL),
        // DEVICE_GET_IRQ_INFO
        row("INTx", c::DEVICE_GET_IRQ_INFO, info(16, 0, 0, 0), Body(info(16, 7, 0, 1))),
        row("MSI", c::DEVICE_GET_IRQ_INFO, info(16, 0, 1, 0), Body(info(16, 9, 1, 4))),
        row("no interrupts", c::DEVICE_GET_IRQ_INFO, info(16, 0, 3, 0), Body(info(16, 0, 3, 0))),
        row("argsz", c::DEVICE_GET_IRQ_INFO, info(12, 0, 0, 0), INVAL),
        row("flags", c::DEVICE_GET_IRQ_INFO, info(16, 1, 0, 0), INVAL),
        row("count", c::DEVICE_GET_IRQ_INFO, info(16, 0, 0, 1), INVAL),
        row("index", c::DEVICE_GET_IRQ_INFO, info(16, 0, 5, 0), INVAL),
        // DEVICE_SET_IRQS
        row("trigger", c::DEVICE_SET_IRQS, irqs(20, 0x21, 1, 0, 4), Body(vec![])),
        row("mask", c::DEVICE_SET_IRQS, irqs(20, 0x09, 0, 0, 1), Body(vec![])),
        row("unmask", c::DEVICE_SET_IRQS, irqs(20, 0x11, 0, 0, 1), Body(vec![])),
        row(
            "an array of booleans",
            c::DEVICE_SET_IRQS,
            with(irqs(24, 0x22, 1, 0, 4), &[0, 1, 0, 1]),
            Body(vec![]),
        ),
        row(
            "argsz includes the booleans",
            c::DEVICE_SET_IRQS,
            with(irqs(23, 0x22, 1, 0, 4), &[0; 4]),
            INVAL,
        ),
        row(
            "as many booleans as interrupts",
            c::DEVICE_SET_IRQS,
            with(irqs(23, 0x22, 1, 0, 4), &[0; 3]),
            INVAL,
        ),
        row("argsz is the body's size", c::DEVICE_SET_IRQS, irqs(28, 0x21, 1, 0, 4), INVAL),
        row("argsz", c::DEVICE_SET_IRQS, irqs(19, 0x21, 1, 0, 4), INVAL),
        row("one kind of data", c::DEVICE_SET_IRQS, irqs(20, 0x25, 1, 0, 4), INVAL),
        row("one action", c::DEVICE_SET_IRQS, irqs(20, 0x29, 1, 0, 4), INVAL),
        row("other flags", c::DEVICE_SET_IRQS, irqs(20, 0x61, 1, 0, 4), INVAL),
        row("the range", c::DEVICE_SET_IRQS, irqs(20, 0x21, 1, 3, 2), INVAL),
        row(
            "no descriptors: disconnect",
            c::DEVICE_SET_IRQS,
            irqs(20, 0x24, 2, 0, 32),
            Body(vec![]),
        ),
        row("only eventfds", c::DEVICE_SET_IRQS, irqs(20, 0x24, 2, 0, 1), INVAL),
    ];
    if let Some(last) = rows.last_mut() {
        last.fds = 1;
    }
    for index in 0..5 {
        rows.push(row(
            "count and start 0 without data disable all of any index",
            c::DEVICE_SET_IRQS,
            irqs(20, 0x21, index, 0, 0),
            Body(vec![]),
        ));
    }
    rows.extend([
        row("an index that is not there", c::DEVICE_SET_IRQS, irqs(20, 0x21, 5, 0, 0), INVAL),
        row("only a trigger disables", c::DEVICE_SET_IRQS, irqs(20, 0x09, 3, 0, 0), INVAL),
        row("start 1 does not disable", c::DEVICE_SET_IRQS, irqs(20, 0x21, 3, 1, 0), INVAL),
        row("booleans do not disable", c::DEVICE_SET_IRQS, irqs(20, 0x22, 3, 0, 0), INVAL),
        // DMA_MAP
        with_memory(row("mapped", c::DMA_MAP, map(32, 3, 4096, 0, 8192), Body(vec![]))),
        with_memory(row("mapped over", c::DMA_MAP, map(32, 3, 0, 4096, 8192), Error(Errno::EXIST))),
        row("mapped over", c::DMA_MAP, map(32, 3, 0, 0, 4096), Error(Errno::EXIST)),
        row("without a file", c::DMA_MAP, map(32, 1, 0, 1 << 40, 4096), Body(vec![])),
        row("no offset without a file", c::DMA_MAP, map(32, 1, 4096, 1 << 41, 4096), INVAL),
        row("argsz is the structure's size", c::DMA_MAP, map(31, 3, 0, 1 << 41, 4096), INVAL),
        row("argsz is the body's size", c::DMA_MAP, map(64, 3, 0, 1 << 41, 4096), INVAL),
        row("flags", c::DMA_MAP, map(32, 8, 0, 1 << 41, 4096), INVAL),
        row("pages of 4 KiB", c::DMA_MAP, map(32, 3, 0, (1 << 41) + 512, 4096), INVAL),
        row("pages of 4 KiB", c::DMA_MAP, map(32, 3, 0, 1 << 41, 512), INVAL),
        // DMA_UNMAP
        row("a part of a mapping", c::DMA_UNMAP, unmap(24, 0, 0, 4096), INVAL),
        row("argsz", c::DMA_UNMAP, unmap(23, 0, 0, 8192), INVAL),
        row("flags", c::DMA_UNMAP, unmap(24, 4, 0, 8192), INVAL),
        row(
            "the entry of the request",
            c::DMA_UNMAP,
            unmap(24, 0, 0, 8192),
            Body(unmap(24, 0, 0, 8192)),
        ),
        row(
            "QEMU unmaps what is not mapped",
            c::DMA_UNMAP,
            unmap(24, 0, 0, 8192),
            Body(unmap(24, 0, 0, 0)),
        ),
        // REGION_READ and REGION_WRITE
        row("echo", c::REGION_WRITE, with(access(8, 0, 3), &[1, 2, 3]), Body(access(8, 0, 3))),
        row(
            "echo and data",
            c::REGION_READ,
            access(7, 0, 4),
            Body(with(access(7, 0, 4), &[0, 1, 2, 3])),
        ),
        row("more than max_data_xfer_size", c::REGION_READ, access(0, 0, (1 << 20) + 1), INVAL),
        row("outside", c::REGION_READ, access(4095, 0, 2), INVAL),
        row("no such region", c::REGION_READ, access(0, 9, 1), INVAL),
        row("data as long as count", c::REGION_WRITE, with(access(8, 0, 3), &[1]), INVAL),
        row("data as long as count", c::REGION_WRITE, with(access(8, 0, 1), &[1, 2]), INVAL),
        posted(row("posted", c::REGION_WRITE, with(access(16, 0, 1), &[9]), Silence)),
        row(
            "done before the next reply",
            c::REGION_READ,
            access(16, 0, 1),
            Body(with(access(16, 0, 1), &[9])),
        ),
        // REGION_WRITE_MULTI
        row(
            "two writes",
            c::REGION_WRITE_MULTI,
            [bytes![2u64], access(24, 0, 1), vec![5; 8], access(25, 0, 8), vec![6; 8]].concat(),
            Body(bytes![2u64]),
        ),
        row(
            "each writes its count, not its 8 bytes",
            c::REGION_READ,
            access(24, 0, 10),
            Body(with(access(24, 0, 10), &[5, 6, 6, 6, 6, 6, 6, 6, 6, 0])),
        ),
        row(
            "8 bytes or less",
            c::REGION_WRITE_MULTI,
            [bytes![1u64], access(24, 0, 9), vec![5; 8]].concat(),
            INVAL,
        ),
        // DEVICE_FEATURE
        row("probe", c::DEVICE_FEATURE, bytes![8u32, 0x5_0001u32], Error(Errno::NOTTY)),
        row("get", c::DEVICE_FEATURE, bytes![16u32, 0x1_0001u32], Error(Errno::NOTTY)),
        row("probe of both", c::DEVICE_FEATURE, bytes![8u32, 0x7_0002u32], Error(Errno::NOTTY)),
        row("get and set", c::DEVICE_FEATURE, bytes![16u32, 0x3_0002u32], INVAL),
        row("nothing", c::DEVICE_FEATURE, bytes![16u32, 2u32], INVAL),
        row("argsz", c::DEVICE_FEATURE, bytes![7u32, 0x4_0001u32], INVAL),
        // Migration
        row("no state", c::MIG_DATA_READ, bytes![4096u32, 8u32], Error(Errno::OPNOTSUPP)),
        row("no state", c::MIG_DATA_WRITE, bytes![8u32, 0u32], Error(Errno::OPNOTSUPP)),
        // Later versions append fields.
        row(
            "a longer request",
            c::DEVICE_GET_INFO,
            longer(info(16, 0, 0, 0)),
            Body(info(16, 3, 9, 5)),
        ),
        row("a longer request", c::DMA_MAP, longer(map(32, 3, 0, 1 << 42, 4096)), Body(vec![])),
        row("a longer request", c::DEVICE_SET_IRQS, longer(irqs(20, 0x21, 1, 0, 4)), Body(vec![])),
        row("second VERSION", c::VERSION, version(), INVAL),
    ]);
    rows
}

#[test]
fn the_server_answers_each_command_by_the_document() {
    let memory = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 1 << 20).unwrap();
    let mut bench = Bench::new();
    let mut raw = Raw::negotiated(&mut bench);
    for (id, row) in (1..).zip(rows()) {
        let Row { rule, command, flags, body, fds, answer } = row;
        let what = format!("{}: {rule}: {body:x?}", message::command_name(command));
        let mut bytes = framed(id, command, flags, &body);
        // The error field of a command is reserved.
        bytes[12..16].fill(0xee);
        if fds > 0 {
            raw.send_with(&bytes, &vec![memory.as_fd(); fds]);
        } else {
            raw.send(&bytes);
        }
        let expected = match answer {
            Body(body) => Seen::Reply(id, command, None, body),
            Error(errno) => {
                Seen::Reply(id, command, Some(errno.raw_os_error().unsigned_abs()), vec![])
            }
            // The server answers in order: the next reply shows that there was none.
            Silence => continue,
        };
        assert_eq!(raw.see(&mut bench), expected, "{what}");
    }
    assert_eq!(raw.see(&mut bench), Seen::Closed, "a second VERSION ends the session");
}

/// What the client proposes, and what the server replies: the two numbers and the JSON.
const NEGOTIATIONS: &[(&str, u16, &str, u16, &str)] = &[
    ("no data", 1, "", 1, ""),
    ("an older minor version", 0, "{}\0", 0, "{}\0"),
    ("a newer minor version", 9, "{}\0", 1, "{}\0"),
    ("no capabilities", 1, "{\"capabilities\":{}}\0", 1, "{\"capabilities\":{}}\0"),
    (
        "each capability only if it was proposed",
        1,
        "{\"capabilities\":{\"max_msg_fds\":1}}\0",
        1,
        "{\"capabilities\":{\"max_msg_fds\":16}}\0",
    ),
    (
        "the lower number of mappings",
        1,
        "{\"capabilities\":{\"max_dma_maps\":7}}\0",
        1,
        "{\"capabilities\":{\"max_dma_maps\":7}}\0",
    ),
    (
        "the device's number of mappings",
        1,
        "{\"capabilities\":{\"max_dma_maps\":65535}}\0",
        1,
        "{\"capabilities\":{\"max_dma_maps\":512}}\0",
    ),
    (
        "a part of the page sizes",
        1,
        "{\"capabilities\":{\"pgsizes\":70144}}\0",
        1,
        "{\"capabilities\":{\"pgsizes\":69632}}\0",
    ),
    (
        "what the server does not have is not in the reply",
        1,
        "{\"capabilities\":{\"migration\":{\"pgsize\":4096},\"twin_socket\":{\"supported\":true},\
         \"write_multiple\":false,\"max_data_xfer_size\":4096}}\0",
        1,
        "{\"capabilities\":{\"max_data_xfer_size\":1048576}}\0",
    ),
];

#[test]
fn the_server_negotiates_by_the_document() {
    for &(name, minor, asked, expected_minor, expected) in NEGOTIATIONS {
        let mut bench = Bench::new();
        let mut raw = Raw::connect(&bench);
        let body = |minor: u16, data: &str| [bytes![0u16, minor], data.into()].concat();
        raw.send(&framed(1, command::VERSION, 0, &body(minor, asked)));
        let reply = Seen::Reply(1, command::VERSION, None, body(expected_minor, expected));
        assert_eq!(raw.see(&mut bench), reply, "{name}");
    }
}

#[test]
fn mappings_have_the_pages_that_were_negotiated() {
    let mut bench = Bench::new();
    let mut raw = Raw::connect(&bench);
    let asked = [bytes![0u16, 1u16], b"{\"capabilities\":{\"pgsizes\":65536}}\0".to_vec()].concat();
    raw.send(&framed(1, command::VERSION, 0, &asked));
    assert!(matches!(raw.see(&mut bench), Seen::Reply(1, _, None, _)));
    let inval = Some(Errno::INVAL.raw_os_error().unsigned_abs());
    for (address, size, error) in
        [(0u64, 0x1000u64, inval), (0x1000, 0x1_0000, inval), (0x1_0000, 0x1_0000, None)]
    {
        raw.send(&framed(2, command::DMA_MAP, 0, &bytes![32u32, 3u32, 0u64, address, size]));
        assert_eq!(raw.see(&mut bench), Seen::Reply(2, command::DMA_MAP, error, vec![]));
    }
}

/// The result of a client's call.
#[derive(Debug, PartialEq)]
enum Outcome {
    Done,
    Refused(Errno),
    /// The client gives the connection up.
    Final,
    /// The client refuses the call itself.
    NotSent,
}

type Call = fn(&mut Client) -> Result<(), ClientError>;

/// Runs `call` against a server that negotiates with `capabilities` and then sends `replies`.
fn client(
    capabilities: &str,
    call: impl FnOnce(&mut Client) -> Result<(), ClientError>,
    replies: Vec<(Kind, Vec<u8>, usize)>,
) -> Outcome {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let data = format!("{{\"capabilities\":{{{capabilities}}}}}\0");
    let server = std::thread::spawn(move || {
        let read = |stream: &mut UnixStream| {
            let mut head = [0; 16];
            stream.read_exact(&mut head).ok()?;
            let header = message::Header::parse(&head).unwrap();
            stream.read_exact(&mut vec![0; header.body_len()]).ok()?;
            Some(header)
        };
        let header = read(&mut theirs).unwrap();
        let version = Version { major: 0, minor: 1, data: data.as_bytes() }.body();
        let reply = |id, command, kind, body: &[u8]| message::message(id, command, kind, body);
        let done = Kind::Reply { error: None };
        theirs.write_all(&reply(header.id, header.command, done, &version)).unwrap();
        for (kind, body, fds) in replies {
            let Some(header) = read(&mut theirs) else { return };
            let fds: Vec<OwnedFd> =
                (0..fds).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let bytes = reply(header.id, header.command, kind, &body);
            match fds.is_empty() {
                true => theirs.write_all(&bytes).unwrap(),
                false => send_with(&theirs, &bytes, &fds),
            }
        }
        // Until the client has gone.
        let _ = theirs.read(&mut [0]);
    });
    let mut client = match Client::negotiate(ours.into()) {
        Ok(client) => client,
        Err(error) => {
            server.join().unwrap();
            assert!(error.is_final());
            return Outcome::Final;
        }
    };
    let result = call(&mut client);
    let outcome = match &result {
        Ok(()) => Outcome::Done,
        Err(ClientError::Refused { errno, .. }) => Outcome::Refused(*errno),
        Err(error) if error.is_final() => Outcome::Final,
        Err(_) => Outcome::NotSent,
    };
    if outcome == Outcome::Final {
        let again = client.reset();
        assert!(matches!(again, Err(ClientError::Closed)), "{result:?}, then {again:?}");
    }
    drop(client);
    server.join().unwrap();
    outcome
}

#[test]
fn the_client_checks_each_reply_by_the_document() {
    use Outcome::{Done, Final, NotSent, Refused};
    let done = Kind::Reply { error: None };
    let ok = |body: Vec<u8>| vec![(done, body, 0)];
    let error = |errno: u32| vec![(Kind::Reply { error: Some(errno) }, vec![], 0)];
    let info = |argsz: u32, flags: u32, index: u32, count: u32| bytes![argsz, flags, index, count];
    let region = |argsz: u32, index: u32| bytes![argsz, 3u32, index, 0u32, 4096u64, 0u64];
    let entry = |fd: u32, kind: u32, flags: u32| bytes![0u64, 4u64, fd, kind, flags, 0u32, 1u64];
    let sub = |argsz: u32, index: u32, entries: Vec<u8>, fds: usize| {
        let count = u32::try_from(entries.len() / 40).unwrap();
        let head = info(argsz, 0, index, count);
        let body = [head.clone(), entries].concat();
        vec![(done, head, 0), (done, body, fds)]
    };
    let device: Call = |c| c.device_info().map(drop);
    let region_1: Call = |c| c.region_info(1).map(drop);
    let irq_1: Call = |c| c.irq_info(1).map(drop);
    let none: Call = |c| c.io_eventfds(0).map(|found| assert!(found.is_empty()));
    let one: Call = |c| c.io_eventfds(0).map(|found| assert_eq!(found.len(), 1));
    let read: Call = |c| c.region_read(0, 8, &mut [0; 4]);
    let write: Call = |c| c.region_write(0, 8, &[1, 2]);
    let multi: Call = |c| c.region_write_multi(&[MultiWrite { offset: 0, region: 0, data: &[1] }]);
    let irqs: Call = |c| {
        let fds: Vec<_> = (0..3).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        c.connect_irqs(2, 0, &fds)
    };
    let map: Call = |c| {
        let memory = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        c.dma_map(memory.as_fd(), 0, 0, 4096)
    };
    let echo = |offset: u64, region: u32, count: u32| bytes![offset, region, count];
    let multiple = "\"write_multiple\":true";
    let table: Vec<(&str, &str, Call, Vec<_>, Outcome)> = vec![
        ("an errno", "", device, error(22), Refused(Errno::INVAL)),
        ("an error without an errno", "", device, error(0), Refused(Errno::IO)),
        ("no errno of this system", "", device, error(u32::MAX), Refused(Errno::IO)),
        ("GET_INFO", "", device, ok(info(16, 3, 9, 5)), Done),
        (
            "GET_INFO of a later version",
            "",
            device,
            ok([info(20, 3, 9, 5), vec![0; 4]].concat()),
            Done,
        ),
        ("GET_INFO, short", "", device, ok(vec![0; 12]), Final),
        ("GET_INFO, argsz", "", device, ok(info(8, 3, 9, 5)), Final),
        ("GET_REGION_INFO", "", region_1, ok(region(32, 1)), Done),
        (
            "GET_REGION_INFO with capabilities that do not fit",
            "",
            region_1,
            ok(region(64, 1)),
            Done,
        ),
        ("GET_REGION_INFO of another region", "", region_1, ok(region(32, 0)), Final),
        ("GET_REGION_INFO, short", "", region_1, ok(vec![0; 31]), Final),
        ("GET_IRQ_INFO", "", irq_1, ok(info(16, 9, 1, 4)), Done),
        ("GET_IRQ_INFO of another index", "", irq_1, ok(info(16, 9, 2, 4)), Final),
        ("IO_FDS, none", "", none, ok(info(16, 0, 0, 0)), Done),
        ("IO_FDS, not there", "", none, error(38), Refused(Errno::NOSYS)),
        ("IO_FDS", "", one, sub(56, 0, entry(0, 0, 0), 1), Done),
        ("IO_FDS of another region", "", one, sub(56, 1, entry(0, 0, 0), 1), Final),
        (
            "IO_FDS, one descriptor for two",
            "",
            |c| c.io_eventfds(0).map(|found| assert_eq!(found.len(), 2)),
            sub(96, 0, [entry(0, 0, 0), entry(0, 0, 1)].concat(), 1),
            Done,
        ),
        ("IO_FDS, an ioregionfd", "", none, sub(56, 0, entry(0, 1, 0), 1), Done),
        ("IO_FDS, a port", "", none, sub(56, 0, entry(0, 0, 2), 1), Done),
        ("IO_FDS, a descriptor that is not there", "", one, sub(56, 0, entry(1, 0, 0), 1), Final),
        ("IO_FDS, no descriptors", "", one, sub(56, 0, entry(0, 0, 0), 0), Final),
        ("IO_FDS, argsz below its entries", "", one, sub(55, 0, entry(0, 0, 0), 1), Final),
        ("IO_FDS, argsz above its body", "", one, sub(57, 0, entry(0, 0, 0), 1), Final),
        ("READ", "", read, ok([echo(8, 0, 4), vec![1; 4]].concat()), Done),
        ("READ of another place", "", read, ok([echo(9, 0, 4), vec![1; 4]].concat()), Final),
        ("READ of fewer bytes", "", read, ok([echo(8, 0, 3), vec![1; 3]].concat()), Final),
        ("READ without its bytes", "", read, ok(echo(8, 0, 4)), Final),
        ("READ beyond max_data_xfer_size", "\"max_data_xfer_size\":3", read, vec![], NotSent),
        ("WRITE", "", write, ok(echo(8, 0, 2)), Done),
        ("WRITE of another place", "", write, ok(echo(8, 1, 2)), Final),
        ("WRITE of fewer bytes", "", write, ok(echo(8, 0, 1)), Final),
        ("WRITE beyond max_data_xfer_size", "\"max_data_xfer_size\":1", write, vec![], NotSent),
        ("WRITE_MULTI", multiple, multi, ok(bytes![1u64]), Done),
        ("WRITE_MULTI of fewer", multiple, multi, ok(bytes![0u64]), Final),
        ("WRITE_MULTI, not negotiated", "", multi, vec![], NotSent),
        ("WRITE_MULTI, refused", "\"write_multiple\":false", multi, vec![], NotSent),
        ("one descriptor a message, unstated", "", irqs, vec![(done, vec![], 0); 3], Done),
        ("two descriptors a message", "\"max_msg_fds\":2", irqs, vec![(done, vec![], 0); 2], Done),
        ("no descriptor a message", "\"max_msg_fds\":0", map, vec![], NotSent),
        ("no mappings left", "", map, error(28), Refused(Errno::NOSPC)),
        (
            "a second socket",
            "\"twin_socket\":{\"supported\":true,\"fd_index\":0}",
            device,
            vec![],
            Final,
        ),
        (
            "no second socket",
            "\"twin_socket\":{\"supported\":false}",
            device,
            ok(info(16, 3, 9, 5)),
            Done,
        ),
        ("a number as text", "\"max_dma_maps\":\"1\"", device, vec![], Final),
    ];
    for (name, capabilities, call, replies, expected) in table {
        assert_eq!(client(capabilities, call, replies), expected, "{name}");
    }
}
