// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Each fault of a client has its expected result: an error reply, or the end of the connection. In
//! every case the server then serves the next client, and has no more open descriptors than before.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::support::{
    Bench, NO_REPLY, REPLY, Raw, Seen, alone, framed, open_fds, raw, until_open_fds, version,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_user_protocol::{Client, Errno};

/// The expected result.
#[derive(Clone, Copy)]
enum Fate {
    /// Message 1 gets this errno, and the connection goes on.
    Refused(Errno),
    /// Message 1 succeeds, and the connection goes on.
    Done,
    /// The client gets no answer, and the connection goes on.
    Ignored,
    /// Message 1 gets this errno, and the connection ends.
    RefusedAndEnded(Errno),
    /// The connection ends without an answer.
    Ended,
    /// The client has gone, which is no violation.
    Left,
}
use Fate::{Done, Ended, Ignored, Left, Refused, RefusedAndEnded};

const INVAL: Fate = Refused(Errno::INVAL);
const NOT_SUPPORTED: Fate = Refused(Errno::OPNOTSUPP);
const BAD_START: Fate = RefusedAndEnded(Errno::INVAL);

type Act = Box<dyn Fn(&mut Raw, &Fds)>;

struct Case {
    name: &'static str,
    /// Negotiate the version first.
    negotiated: bool,
    fate: Fate,
    act: Act,
}

struct Fds {
    memory: OwnedFd,
    empty: OwnedFd,
    events: Vec<OwnedFd>,
}

impl Fds {
    fn events(&self, count: usize) -> Vec<BorrowedFd<'_>> {
        self.events.iter().cycle().take(count).map(AsFd::as_fd).collect()
    }
}

#[derive(Default)]
struct Table(Vec<Case>);

impl Table {
    /// Adds a case: these bytes before the negotiation.
    fn start(&mut self, name: &'static str, fate: Fate, bytes: Vec<u8>) {
        self.0.push(Case {
            name,
            negotiated: false,
            fate,
            act: Box::new(move |raw, _| raw.send(&bytes)),
        });
    }

    /// Adds a case: these bytes after the negotiation.
    fn bytes(&mut self, name: &'static str, fate: Fate, bytes: Vec<u8>) {
        self.0.push(Case {
            name,
            negotiated: true,
            fate,
            act: Box::new(move |raw, _| raw.send(&bytes)),
        });
    }

    /// Adds a case: a command with id 1.
    fn command(&mut self, name: &'static str, fate: Fate, command: u16, body: Vec<u8>) {
        self.bytes(name, fate, framed(1, command, 0, &body));
    }

    /// Adds a case: a command with id 1 and descriptors.
    fn with_fds(
        &mut self,
        name: &'static str,
        fate: Fate,
        (command, body): (u16, Vec<u8>),
        fds: impl Fn(&Fds) -> Vec<BorrowedFd<'_>> + 'static,
    ) {
        let bytes = framed(1, command, 0, &body);
        let act = Box::new(move |raw: &mut Raw, all: &Fds| raw.send_with(&bytes, &fds(all)));
        self.0.push(Case { name, negotiated: true, fate, act });
    }
}

fn start_of_session(t: &mut Table) {
    t.start("command before VERSION", BAD_START, framed(1, 4, 0, &bytes![16u32, 0u32, 0u32, 0u32]));
    t.start(
        "posted command before VERSION",
        Ended,
        framed(1, 10, NO_REPLY, &bytes![0u64, 0u32, 0u32]),
    );
    t.start("unknown command before VERSION", BAD_START, framed(1, 999, 0, &[]));
    t.start("reply before VERSION", Ended, framed(1, 1, REPLY, &version()));
    t.start("VERSION without a body", BAD_START, framed(1, 1, 0, &[]));
    t.start("VERSION shorter than its numbers", BAD_START, framed(1, 1, 0, &[0, 0, 0]));
    t.start("VERSION without data, which is legal", Done, framed(1, 1, 0, &[0; 4]));
    t.start("VERSION with JSON without NUL", BAD_START, framed(1, 1, 0, b"\0\0\0\0{}"));
    t.start("VERSION with a NUL within", BAD_START, framed(1, 1, 0, b"\0\0\0\0{\0}\0"));
    t.start("VERSION with an empty text", BAD_START, framed(1, 1, 0, b"\0\0\0\0\0"));
    t.start(
        "VERSION with half a JSON",
        BAD_START,
        framed(1, 1, 0, b"\0\0\0\0{\"capabilities\":{\0"),
    );
    t.start("VERSION with an array", BAD_START, framed(1, 1, 0, b"\0\0\0\0[]\0"));
    t.start("VERSION with a text as a number", BAD_START, {
        framed(1, 1, 0, b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":\"many\"}}\0")
    });
    t.start("VERSION with a negative number", BAD_START, {
        framed(1, 1, 0, b"\0\0\0\0{\"capabilities\":{\"max_data_xfer_size\":-1}}\0")
    });
    t.start(
        "VERSION nested too deep",
        BAD_START,
        framed(1, 1, 0, &[&[0; 4], &[b'['; 3000][..], &[0]].concat()),
    );
    t.start("VERSION that is not UTF-8", BAD_START, framed(1, 1, 0, b"\0\0\0\0\"\xff\xfe\"\0"));
    t.start(
        "VERSION of another major",
        RefusedAndEnded(Errno::OPNOTSUPP),
        framed(1, 1, 0, &bytes![7u16, 0u16]),
    );
    t.start("VERSION posted", Ended, framed(1, 1, NO_REPLY, &version()));
    t.start("VERSION of a megabyte", Ended, raw(1, 1, (1 << 20) + 16, 0, &[b' '; 5000]));
    t.bytes("second VERSION", BAD_START, framed(1, 1, 0, &version()));
}

fn framing(t: &mut Table) {
    t.start("size 0", Ended, raw(1, 1, 0, 0, &[]));
    t.bytes("size below the header", Ended, raw(1, 4, 15, 0, &[]));
    t.bytes("size of 4 GiB", Ended, raw(1, 4, u32::MAX, 0, &[]));
    t.bytes("size one above the limit", Ended, raw(1, 10, 16 + 16 + (1 << 20) + 1, 0, &[]));
    t.bytes("type 2", Ended, framed(1, 4, 2, &[0; 16]));
    t.bytes("type 15", Ended, framed(1, 4, 15, &[0; 16]));
    t.bytes("reply that nobody asked for", Ended, framed(1, 11, REPLY, &[0; 16]));
    t.bytes("reply to a command of the client", Ended, framed(1, 4, REPLY, &[0; 16]));
    t.bytes("error reply that nobody asked for", Ended, framed(1, 12, REPLY | 0x20, &[]));
    t.bytes(
        "reserved flags in a command",
        Done,
        framed(1, 4, 0xffff_ff00, &bytes![16u32, 0u32, 0u32, 0u32]),
    );
    t.command("unknown command", Refused(Errno::NOSYS), 99, vec![]);
    t.command("unknown command with a long body", Refused(Errno::NOSYS), 0, vec![7; 100_000]);
    t.bytes("unknown command, posted", Ignored, framed(1, 65535, NO_REPLY, &[1; 9]));
    t.command("DMA_READ from the client", INVAL, 11, bytes![0u64, 16u64]);
    t.command("DMA_WRITE from the client", INVAL, 12, bytes![0u64, 4u64, 0u32]);
    t.bytes(
        "failed command, posted",
        Ignored,
        framed(1, 10, NO_REPLY, &bytes![0u64, 77u32, 4u32, 1u32]),
    );
    t.0.push(Case {
        name: "header a byte at a time",
        negotiated: true,
        fate: Done,
        act: Box::new(|raw, _| {
            raw.stream.set_nonblocking(false).unwrap();
            for byte in framed(1, 4, 0, &bytes![16u32, 0u32, 0u32, 0u32]) {
                raw.send(&[byte]);
            }
        }),
    });
    t.bytes("two commands at once", Done, {
        [framed(1, 4, 0, &bytes![16u32, 0u32, 0u32, 0u32]), framed(7, 99, NO_REPLY, &[])].concat()
    });
    t.0.push(Case {
        name: "end within a header",
        negotiated: true,
        fate: Left,
        act: Box::new(|raw, _| {
            raw.send(&[1, 0, 4]);
            raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
        }),
    });
    t.0.push(Case {
        name: "end within a body",
        negotiated: true,
        fate: Left,
        act: Box::new(|raw, _| {
            raw.send(&framed(1, 4, 0, &bytes![16u32, 0u32, 0u32, 0u32])[..20]);
            raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
        }),
    });
}

fn information(t: &mut Table) {
    t.command("GET_INFO without a body", INVAL, 4, vec![]);
    t.command("GET_INFO, short", INVAL, 4, vec![0; 15]);
    t.command("GET_INFO without room for the reply", INVAL, 4, bytes![15u32, 0u32, 0u32, 0u32]);
    t.command("GET_REGION_INFO, short", INVAL, 5, vec![0; 31]);
    t.command(
        "GET_REGION_INFO without room",
        INVAL,
        5,
        bytes![31u32, 0u32, 0u32, 0u32, 0u64, 0u64],
    );
    t.command(
        "GET_REGION_INFO of region 9 of 9",
        INVAL,
        5,
        bytes![32u32, 0u32, 9u32, 0u32, 0u64, 0u64],
    );
    t.command(
        "GET_REGION_INFO of region -1",
        INVAL,
        5,
        bytes![32u32, 0u32, u32::MAX, 0u32, 0u64, 0u64],
    );
    t.command("GET_IRQ_INFO, short", INVAL, 7, vec![0; 12]);
    t.command("GET_IRQ_INFO of index 5 of 5", INVAL, 7, bytes![16u32, 0u32, 5u32, 0u32]);
    t.command("GET_REGION_IO_FDS, short", INVAL, 6, vec![0; 8]);
    t.command("GET_REGION_IO_FDS of region 9 of 9", INVAL, 6, bytes![4096u32, 0u32, 9u32, 0u32]);
    t.command("GET_REGION_IO_FDS with flags", INVAL, 6, bytes![4096u32, 1u32, 0u32, 0u32]);
    t.command("GET_REGION_IO_FDS with a count", INVAL, 6, bytes![4096u32, 0u32, 0u32, 3u32]);
    t.command(
        "GET_REGION_IO_FDS of a region without any",
        Done,
        6,
        bytes![16u32, 0u32, 1u32, 0u32],
    );
    t.command("GET_REGION_IO_FDS without room", INVAL, 6, bytes![0u32, 0u32, 0u32, 0u32]);
    t.command("DEVICE_FEATURE, short", INVAL, 16, vec![0; 7]);
    t.command("DEVICE_FEATURE that does nothing", INVAL, 16, bytes![8u32, 1u32]);
    t.command("DEVICE_FEATURE, get and set", INVAL, 16, bytes![8u32, 0x3_0001u32]);
    t.command("DEVICE_FEATURE, unknown flag", INVAL, 16, bytes![8u32, 0x9_0001u32]);
    t.command("DEVICE_FEATURE, migration", Refused(Errno::NOTTY), 16, bytes![16u32, 0x5_0001u32]);
    t.command("DEVICE_FEATURE, any", Refused(Errno::NOTTY), 16, bytes![8u32, 0x4_ffffu32]);
    t.command("DIRTY_PAGES", NOT_SUPPORTED, 14, vec![0; 64]);
    t.command("MIG_DATA_READ", NOT_SUPPORTED, 17, bytes![8u32, 8u32]);
    t.command("MIG_DATA_WRITE", NOT_SUPPORTED, 18, bytes![8u32, 0u32]);
}

fn accesses(t: &mut Table) {
    let access = |offset: u64, region: u32, count: u32| bytes![offset, region, count];
    let write = move |offset, region, count, data: &[u8]| {
        [access(offset, region, count), data.to_vec()].concat()
    };
    t.command("READ, short", INVAL, 9, vec![0; 15]);
    t.command("READ with data", INVAL, 9, write(0, 0, 4, &[0; 4]));
    t.command("READ of 4 GiB", INVAL, 9, access(0, 0, u32::MAX));
    t.command("READ above the transfer size", INVAL, 9, access(0, 0, (1 << 20) + 1));
    t.command("READ behind the region's end", INVAL, 9, access(4093, 0, 4));
    t.command("READ whose end overflows", INVAL, 9, access(u64::MAX - 1, 0, 4));
    t.command("READ of region 9 of 9", INVAL, 9, access(0, 9, 4));
    t.command("READ of region -1", INVAL, 9, access(0, u32::MAX, 4));
    t.command("READ of a region that is not there", INVAL, 9, access(0, 3, 4));
    t.command("READ of a write-only region", Refused(Errno::PERM), 9, access(0, 1, 4));
    t.command("READ that the device refuses", Refused(Errno::IO), 9, access(4092, 0, 4));
    t.command("READ of nothing", Done, 9, access(0, 0, 0));
    t.command("WRITE, short", INVAL, 10, vec![0; 3]);
    t.command("WRITE with less data than it says", INVAL, 10, write(0, 0, 8, &[0; 4]));
    t.command("WRITE with more data than it says", INVAL, 10, write(0, 0, 4, &[0; 8]));
    t.command("WRITE of 4 GiB with 4 bytes", INVAL, 10, write(0, 0, u32::MAX, &[0; 4]));
    t.command("WRITE behind the region's end", INVAL, 10, write(4096, 0, 1, &[0]));
    t.command("WRITE whose end overflows", INVAL, 10, write(u64::MAX, 0, 2, &[0; 2]));
    t.command("WRITE to region 9 of 9", INVAL, 10, write(0, 9, 1, &[0]));
    t.command("WRITE to a read-only region", Refused(Errno::PERM), 10, write(0, 6, 1, &[0]));
    t.command("WRITE that the device refuses", Refused(Errno::IO), 10, write(4000, 0, 4, &[0; 4]));
    t.command("WRITE of nothing", Done, 10, access(0, 0, 0));
    let one = |offset: u64, region: u32, count: u32| bytes![offset, region, count, 0u64];
    t.command("WRITE_MULTI, short", INVAL, 15, vec![0; 7]);
    t.command("WRITE_MULTI without writes", Done, 15, bytes![0u64]);
    t.command("WRITE_MULTI, more than it brings", INVAL, 15, [bytes![2u64], one(0, 0, 4)].concat());
    t.command(
        "WRITE_MULTI, fewer than it brings",
        INVAL,
        15,
        [bytes![0u64], one(0, 0, 4)].concat(),
    );
    t.command("WRITE_MULTI, 2^64 - 1 writes", INVAL, 15, [bytes![u64::MAX], one(0, 0, 4)].concat());
    t.command(
        "WRITE_MULTI, a count that wraps",
        INVAL,
        15,
        [bytes![1u64 << 61], one(0, 0, 4)].concat(),
    );
    t.command("WRITE_MULTI with 9 bytes in one", INVAL, 15, [bytes![1u64], one(0, 0, 9)].concat());
    t.command(
        "WRITE_MULTI of 256 writes",
        Done,
        15,
        [bytes![256u64], one(0, 0, 4).repeat(256)].concat(),
    );
    t.command(
        "WRITE_MULTI of 257 writes",
        INVAL,
        15,
        [bytes![257u64], one(0, 0, 4).repeat(257)].concat(),
    );
    t.command(
        "WRITE_MULTI, one outside",
        INVAL,
        15,
        [bytes![2u64], one(4095, 0, 4), one(0, 0, 4)].concat(),
    );
}

fn memory(t: &mut Table) {
    let map = |argsz: u32, flags: u32, offset: u64, address: u64, size: u64| {
        bytes![argsz, flags, offset, address, size]
    };
    t.command("DMA_MAP, short", INVAL, 2, vec![0; 31]);
    t.command("DMA_MAP with a small argsz", INVAL, 2, map(31, 3, 0, 0, 4096));
    t.command("DMA_MAP with unknown flags", INVAL, 2, map(32, 7, 0, 0, 4096));
    t.command("DMA_MAP of nothing", INVAL, 2, map(32, 3, 0, 0, 0));
    t.command("DMA_MAP of half a page", INVAL, 2, map(32, 3, 0, 0, 2048));
    t.command("DMA_MAP at half a page", INVAL, 2, map(32, 3, 0, 2048, 4096));
    t.command("DMA_MAP whose end overflows", INVAL, 2, map(32, 3, 0, u64::MAX - 4095, 8192));
    t.command("DMA_MAP of all there is", INVAL, 2, map(32, 3, 0, 4096, u64::MAX - 4095));
    t.command("DMA_MAP without memory", Done, 2, map(32, 3, 0, 0, 4096));
    fn file(f: &Fds) -> Vec<BorrowedFd<'_>> {
        vec![f.memory.as_fd()]
    }
    t.with_fds("DMA_MAP with memory", Done, (2, map(32, 3, 0, 0, 4096)), file);
    t.with_fds("DMA_MAP from an offset within a page", INVAL, (2, map(32, 3, 100, 0, 4096)), file);
    t.with_fds(
        "DMA_MAP from an overflowing offset",
        INVAL,
        (2, map(32, 3, u64::MAX - 4095, 0, 4096)),
        file,
    );
    t.with_fds("DMA_MAP from a negative offset", INVAL, (2, map(32, 3, 1 << 63, 0, 4096)), file);
    t.with_fds("DMA_MAP with two descriptors", INVAL, (2, map(32, 3, 0, 0, 4096)), |f| f.events(2));
    t.with_fds("DMA_MAP with 16 descriptors", INVAL, (2, map(32, 3, 0, 0, 4096)), |f| f.events(16));
    t.with_fds(
        "DMA_MAP that the device refuses",
        Refused(Errno::NODEV),
        (2, map(32, 3, 0, 0, 4096)),
        |f| vec![f.empty.as_fd()],
    );
    t.with_fds("posted DMA_MAP that fails", INVAL, (2, map(32, 3, 0, 1, 4096)), file);
    let twice = |second: Vec<u8>| {
        [framed(5, 2, NO_REPLY, &map(32, 3, 0, 8192, 8192)), framed(1, 2, 0, &second)].concat()
    };
    let exists = Refused(Errno::EXIST);
    t.bytes("DMA_MAP, the same twice", exists, twice(map(32, 3, 0, 8192, 8192)));
    t.bytes("DMA_MAP over the first page", exists, twice(map(32, 3, 0, 4096, 8192)));
    t.bytes("DMA_MAP over the last page", exists, twice(map(32, 3, 0, 12288, 8192)));
    t.bytes("DMA_MAP within", exists, twice(map(32, 3, 0, 12288, 4096)));
    t.bytes("DMA_MAP around", exists, twice(map(32, 3, 0, 0, 1 << 20)));
    t.bytes("DMA_MAP just below", Done, twice(map(32, 3, 0, 4096, 4096)));
    t.bytes("DMA_MAP just above", Done, twice(map(32, 3, 0, 16384, 4096)));
    t.bytes("too many DMA_MAPs", Refused(Errno::NOSPC), {
        let posted = (0..512).map(|i| framed(5, 2, NO_REPLY, &map(32, 3, 0, i * 8192, 4096)));
        posted.chain([framed(1, 2, 0, &map(32, 3, 0, 1 << 40, 4096))]).collect::<Vec<_>>().concat()
    });
    let unmap =
        |argsz: u32, flags: u32, address: u64, size: u64| bytes![argsz, flags, address, size];
    let then = |second: Vec<u8>| {
        [framed(5, 2, NO_REPLY, &map(32, 3, 0, 8192, 8192)), framed(1, 3, 0, &second)].concat()
    };
    t.command("DMA_UNMAP, short", INVAL, 3, vec![0; 23]);
    t.command("DMA_UNMAP with a small argsz", INVAL, 3, unmap(8, 0, 0, 4096));
    t.command("DMA_UNMAP of what is not mapped", Done, 3, unmap(24, 0, 0, 4096));
    t.command("DMA_UNMAP of nothing", INVAL, 3, unmap(24, 0, 4096, 0));
    t.bytes("DMA_UNMAP of a part", INVAL, then(unmap(24, 0, 8192, 4096)));
    t.bytes("DMA_UNMAP from the middle", INVAL, then(unmap(24, 0, 12288, 4096)));
    t.bytes("DMA_UNMAP of more", Done, then(unmap(24, 0, 8192, 16384)));
    t.bytes("DMA_UNMAP whose end overflows", INVAL, then(unmap(24, 0, 8192, u64::MAX)));
    t.bytes("DMA_UNMAP with the dirty bitmap", NOT_SUPPORTED, then(unmap(1000, 1, 8192, 8192)));
    t.bytes("DMA_UNMAP of all with a range", INVAL, then(unmap(24, 2, 8192, 8192)));
    t.bytes("DMA_UNMAP with unknown flags", INVAL, then(unmap(24, 8, 8192, 8192)));
    t.bytes("DMA_UNMAP, exactly", Done, then(unmap(24, 0, 8192, 8192)));
    t.bytes("DMA_UNMAP of all", Done, then(unmap(24, 2, 0, 0)));
    t.command("DMA_UNMAP of all when nothing is mapped", Done, 3, unmap(24, 2, 0, 0));
}

fn interrupts(t: &mut Table) {
    let set =
        |flags: u32, index: u32, start: u32, count: u32| bytes![20u32, flags, index, start, count];
    t.command("SET_IRQS, short", INVAL, 8, vec![0; 19]);
    t.command("SET_IRQS with a small argsz", INVAL, 8, bytes![19u32, 0x21u32, 0u32, 0u32, 0u32]);
    t.command("SET_IRQS without a verb", INVAL, 8, set(0x01, 0, 0, 1));
    t.command("SET_IRQS with two verbs", INVAL, 8, set(0x31, 0, 0, 1));
    t.command("SET_IRQS without data", INVAL, 8, set(0x20, 0, 0, 1));
    t.command("SET_IRQS with two kinds of data", INVAL, 8, set(0x23, 0, 0, 1));
    t.command("SET_IRQS with unknown flags", INVAL, 8, set(0x61, 0, 0, 1));
    t.command("SET_IRQS of index 5 of 5", INVAL, 8, set(0x21, 5, 0, 1));
    t.command("SET_IRQS of index -1", INVAL, 8, set(0x21, u32::MAX, 0, 1));
    t.command("SET_IRQS of an index without interrupts", INVAL, 8, set(0x21, 3, 0, 1));
    t.command("SET_IRQS behind the end", INVAL, 8, set(0x21, 1, 3, 2));
    t.command("SET_IRQS whose end overflows", INVAL, 8, set(0x21, 1, u32::MAX, 2));
    t.command("SET_IRQS of 4 billion", INVAL, 8, set(0x24, 1, 0, u32::MAX));
    t.command("SET_IRQS, mask of none", INVAL, 8, set(0x09, 0, 0, 0));
    t.command("SET_IRQS, disable from 1 on", INVAL, 8, set(0x21, 1, 1, 0));
    t.command("SET_IRQS, disable", Done, 8, set(0x21, 1, 0, 0));
    t.command("SET_IRQS, disable the error index", Done, 8, set(0x21, 3, 0, 0));
    t.command("SET_IRQS, disable the request index", Done, 8, set(0x21, 4, 0, 0));
    t.command("SET_IRQS, flags without bytes", INVAL, 8, bytes![24u32, 0x22u32, 1u32, 0u32, 4u32]);
    t.command("SET_IRQS, flags beyond argsz", INVAL, 8, [set(0x22, 1, 0, 4), vec![1; 4]].concat());
    t.command("SET_IRQS, 4 billion flags", INVAL, 8, {
        [bytes![u32::MAX, 0x22u32, 1u32, 0u32, u32::MAX], vec![1; 64]].concat()
    });
    t.with_fds("SET_IRQS with eventfds", Done, (8, set(0x24, 2, 4, 16)), |f| f.events(16));
    t.with_fds("SET_IRQS with too few eventfds", INVAL, (8, set(0x24, 2, 0, 8)), |f| f.events(7));
    t.with_fds("SET_IRQS with too many eventfds", INVAL, (8, set(0x24, 2, 0, 8)), |f| f.events(9));
    t.with_fds("SET_IRQS with eventfds behind the end", INVAL, (8, set(0x24, 2, 30, 3)), |f| {
        f.events(3)
    });
    t.with_fds("SET_IRQS with eventfds and no range", INVAL, (8, set(0x24, 2, 0, 0)), |f| {
        f.events(1)
    });
    t.with_fds("SET_IRQS with flags and eventfds", INVAL, (8, set(0x21, 2, 0, 1)), |f| f.events(1));
    t.with_fds("SET_IRQS with what is no eventfd", INVAL, (8, set(0x24, 2, 0, 2)), |f| {
        vec![f.events[0].as_fd(), f.memory.as_fd()]
    });
    t.with_fds("SET_IRQS that the device refuses", NOT_SUPPORTED, (8, set(0x0c, 0, 0, 1)), |f| {
        f.events(1)
    });
    t.command("SET_IRQS, disconnect", Done, 8, set(0x24, 2, 0, 32));
}

fn descriptors(t: &mut Table) {
    let info = || (4, bytes![16u32, 0u32, 0u32, 0u32]);
    t.with_fds("a descriptor where none belongs", INVAL, info(), |f| f.events(1));
    t.with_fds("16 descriptors where none belongs", INVAL, info(), |f| f.events(16));
    t.with_fds("17 descriptors", Ended, info(), |f| f.events(17));
    t.with_fds("18 descriptors", Ended, (8, bytes![20u32, 0x24u32, 2u32, 0u32, 18u32]), |f| {
        f.events(18)
    });
    t.with_fds("253 descriptors", Ended, info(), |f| f.events(253));
    t.with_fds("descriptors with an unknown command", INVAL, (77, vec![0; 40]), |f| f.events(16));
    t.with_fds("descriptors with RESET", INVAL, (13, vec![]), |f| f.events(3));
    t.0.push(Case {
        name: "a descriptor with VERSION",
        negotiated: false,
        fate: Done,
        act: Box::new(|raw, f| raw.send_with(&framed(1, 1, 0, &version()), &f.events(1))),
    });
    t.0.push(Case {
        name: "descriptors with every piece of a message",
        negotiated: true,
        fate: Ended,
        act: Box::new(|raw, f| {
            let bytes = framed(1, 8, 0, &bytes![20u32, 0x24u32, 2u32, 0u32, 20u32]);
            for piece in bytes.chunks(8) {
                raw.send_with(piece, &f.events(10));
            }
        }),
    });
    t.0.push(Case {
        name: "descriptors in two pieces of a message, as many as allowed",
        negotiated: true,
        fate: Done,
        act: Box::new(|raw, f| {
            let bytes = framed(1, 8, 0, &bytes![20u32, 0x24u32, 2u32, 0u32, 16u32]);
            raw.send_with(&bytes[..10], &f.events(8));
            raw.send_with(&bytes[10..], &f.events(8));
        }),
    });
    t.0.push(Case {
        name: "descriptors with a message that is never whole",
        negotiated: true,
        fate: Left,
        act: Box::new(|raw, f| {
            raw.send_with(&framed(1, 8, 0, &[0; 20])[..18], &f.events(16));
            raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
        }),
    });
    t.0.push(Case {
        name: "two commands in one piece, the descriptor with the first",
        negotiated: true,
        fate: Done,
        act: Box::new(|raw, f| {
            let map = |address: u64| bytes![32u32, 3u32, 0u64, address, 4096u64];
            let both = [framed(1, 2, 0, &map(0)), framed(2, 2, NO_REPLY, &map(4096))].concat();
            raw.send_with(&both, &[f.memory.as_fd()]);
        }),
    });
}

/// A correct client, which does one of each kind of request.
fn good_client(path: &std::path::Path) {
    let mut client = Client::connect(path).unwrap();
    assert_eq!(client.device_info().unwrap().regions, 9);
    client.region_write(0, 8, &[1, 2, 3, 4]).unwrap();
    let mut data = [0; 4];
    client.region_read(0, 8, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4]);
    let memory = memfd_create("good", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 65536).unwrap();
    client.dma_map(memory.as_fd(), 0, 0x10000, 65536).unwrap();
    client.dma_unmap(0x10000, 65536).unwrap();
    let interrupt = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    client.connect_irqs(1, 0, &[interrupt.as_fd()]).unwrap();
    client.reset().unwrap();
}

/// Nobody waits while a descriptor of the client is closed: not its server's thread, not the next
/// client, and not the end of the server.
#[test]
fn a_descriptor_whose_close_waits_keeps_nobody_waiting() {
    let mut bench = Bench::new();
    let mut peers = Vec::new();
    let info = framed(1, 4, 0, &bytes![16u32, 0u32, 0u32, 0u32]);
    // With a command, with memory that the device refuses, with memory that the device may not
    // access, with a message that is never whole, and from a client that is refused.
    for act in 0..5 {
        let mut raw = Raw::negotiated(&mut bench);
        let (socket, peer) = vbus_test_driver::lingering();
        peers.push(peer);
        match act {
            0 => {
                raw.send_with(&info, &[socket.as_fd()]);
                drop(socket);
                let inval = Some(Errno::INVAL.raw_os_error().unsigned_abs());
                assert_eq!(raw.see(&mut bench), Seen::Reply(1, 4, inval, vec![]));
                raw.send(&info);
                assert!(matches!(raw.see(&mut bench), Seen::Reply(1, 4, None, _)));
            }
            1 => {
                let map = framed(1, 2, 0, &bytes![32u32, 3u32, 0u64, 0u64, 4096u64]);
                raw.send_with(&map, &[socket.as_fd()]);
                drop(socket);
                assert!(matches!(raw.see(&mut bench), Seen::Reply(1, 2, Some(_), _)));
            }
            2 => {
                let map = framed(1, 2, 0, &bytes![32u32, 0u32, 0u64, 0u64, 4096u64]);
                raw.send_with(&map, &[socket.as_fd()]);
                drop(socket);
                assert_eq!(raw.see(&mut bench), Seen::Reply(1, 2, None, vec![]));
            }
            3 => {
                raw.send_with(&info[..20], &[socket.as_fd()]);
                drop(socket);
                raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
                assert_eq!(raw.see(&mut bench), Seen::Closed);
            }
            _ => {
                let mut other = Raw::connect(&bench);
                other.send_with(&framed(1, 1, 0, &version()), &[socket.as_fd()]);
                drop(socket);
                assert!(matches!(other.see(&mut bench), Seen::Reply(1, 1, Some(_), _)));
                assert_eq!(other.see(&mut bench), Seen::Closed);
            }
        }
        drop(raw);
        bench.until_gone();
    }
    bench.with(good_client);
    drop(bench);
    // Their peers go. Then the closes end.
    drop(peers);
}

/// A client sends as many such descriptors as the server takes, leaves, and comes again. The next
/// client does not wait for them.
#[test]
fn closes_that_wait_keep_the_next_client_out_no_more() {
    let mut bench = Bench::new();
    let info = framed(1, 4, 0, &bytes![16u32, 0u32, 0u32, 0u32]);
    // Copies of one socket: only the last close of them waits. So there is one for each client, and
    // those behind it wait too.
    let mut peers = Vec::new();
    for _ in 0..6 {
        let mut raw = Raw::negotiated(&mut bench);
        let (socket, peer) = vbus_test_driver::lingering();
        peers.push(peer);
        raw.send_with(&info, &[socket.as_fd()]);
        drop(socket);
        assert!(matches!(raw.see(&mut bench), Seen::Reply(1, 4, Some(_), _)));
        let (pipe, _end) = rustix::pipe::pipe().unwrap();
        // As many as one message may have, and more messages than the server reads now.
        for _ in 0..8 {
            raw.send_with(&info, &[pipe.as_fd(); 16]);
        }
        for _ in 0..4 {
            bench.server.ready(Instant::now());
        }
        drop(raw);
        bench.until_gone();
        bench.with(good_client);
        bench.until_gone();
    }
    drop((bench, peers));
}

/// More descriptors than a message may have end the connection. The server's thread closes none of
/// them: the kernel would, if the server had no room for them.
#[test]
fn too_many_descriptors_are_not_closed_while_they_are_received() {
    let mut bench = Bench::new();
    let mut raw = Raw::negotiated(&mut bench);
    let (socket, peer) = vbus_test_driver::lingering();
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    let mut many = vec![pipe.as_fd(); 40];
    many.push(socket.as_fd());
    let info = framed(1, 4, 0, &bytes![16u32, 0u32, 0u32, 0u32]);
    raw.send_with(&info, &many);
    drop(many);
    drop(socket);
    assert_eq!(raw.see(&mut bench), Seen::Closed);
    bench.with(good_client);
    drop((bench, peer));
}

/// The test counts the descriptors of the process, so it runs in a process of its own.
#[test]
fn every_misdeed_has_its_fate_and_the_server_goes_on() {
    alone("malformed::every_misdeed_has_its_fate_and_the_server_goes_on", every_misdeed);
}

fn every_misdeed() {
    let mut t = Table::default();
    start_of_session(&mut t);
    framing(&mut t);
    information(&mut t);
    accesses(&mut t);
    memory(&mut t);
    interrupts(&mut t);
    descriptors(&mut t);
    let memory = memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 1 << 20).unwrap();
    let fds = Fds {
        memory,
        empty: memfd_create("e", MemfdFlags::CLOEXEC).unwrap(),
        events: (0..4).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect(),
    };
    let mut bench = Bench::new();
    let before = open_fds();
    for case in &t.0 {
        let mut raw =
            if case.negotiated { Raw::negotiated(&mut bench) } else { Raw::connect(&bench) };
        let violations = bench.server.stats().violations;
        (case.act)(&mut raw, &fds);
        if let Refused(errno) | RefusedAndEnded(errno) = case.fate {
            match raw.see(&mut bench) {
                Seen::Reply(1, _, Some(got), body) => {
                    assert_eq!(got, errno.raw_os_error().unsigned_abs(), "{}", case.name);
                    assert!(body.is_empty(), "{}: an error reply is a header alone", case.name);
                }
                other => panic!("{}: {other:?} instead of {errno}", case.name),
            }
        }
        if matches!(case.fate, Done) {
            let seen = raw.see(&mut bench);
            assert!(matches!(seen, Seen::Reply(1, _, None, _)), "{}: {seen:?}", case.name);
        }
        if matches!(case.fate, Ended | RefusedAndEnded(_) | Left) {
            assert_eq!(raw.see(&mut bench), Seen::Closed, "{}", case.name);
            let more = u64::from(!matches!(case.fate, Left));
            assert_eq!(bench.server.stats().violations, violations + more, "{}", case.name);
        } else {
            raw.send(&framed(2, 4, 0, &bytes![16u32, 0u32, 0u32, 0u32]));
            let reply = Seen::Reply(2, 4, None, bytes![16u32, 3u32, 9u32, 5u32]);
            assert_eq!(raw.see(&mut bench), reply, "{}: the connection does not go on", case.name);
            assert_eq!(bench.server.stats().violations, violations, "{}", case.name);
        }
        drop(raw);
        bench.until_gone();
        assert!(
            bench.server.target().maps.is_empty() && bench.server.target().irqs.is_empty(),
            "{}",
            case.name
        );
        bench.with(good_client);
        bench.until_gone();
        until_open_fds(before, case.name);
    }
    println!("{} cases", t.0.len());

    // A client can also be too slow. The caller of `ready` gives the time.
    for (name, negotiated, bytes) in [
        ("no VERSION at all", false, &b""[..]),
        ("half a VERSION", false, &framed(1, 1, 0, &version())[..30]),
        ("half a header", true, &[1, 0, 4][..]),
        ("half a body", true, &framed(1, 10, 0, &[0; 64])[..40]),
    ] {
        let mut raw = if negotiated { Raw::negotiated(&mut bench) } else { Raw::connect(&bench) };
        raw.send(bytes);
        bench.until(None, |server| server.deadline().is_some());
        let violations = bench.server.stats().violations;
        let deadline = bench.server.deadline().unwrap();
        bench.server.ready(deadline - Duration::from_millis(1));
        assert!(bench.server.has_client(), "{name}: ended early");
        // The process stood still. The client may have done so too, and gets its time again.
        bench.server.ready(deadline + Duration::from_secs(60));
        assert!(bench.server.has_client(), "{name}: ended for the server's own standstill");
        let deadline = bench.server.deadline().unwrap();
        bench.server.ready(deadline);
        assert_eq!(raw.see(&mut bench), Seen::Closed, "{name}");
        // Whoever says nothing does nothing wrong.
        let accused = u64::from(!bytes.is_empty());
        assert_eq!(bench.server.stats().violations, violations + accused, "{name}");
        drop(raw);
        bench.with(good_client);
        bench.until_gone();
        until_open_fds(before, name);
    }

    // A client sends requests and does not read. The answers do not pile up, and the server ends
    // the connection after some time.
    let mut raw = Raw::negotiated(&mut bench);
    raw.stream.set_nonblocking(true).unwrap();
    let read = framed(1, 9, 0, &bytes![0u64, 0u32, 3840u32]);
    let mut asked = 0u64;
    loop {
        match std::io::Write::write(&mut raw.stream, &read) {
            Ok(n) => assert_eq!(n, read.len()),
            Err(_) if bench.server.stats().messages > asked => {
                asked = bench.server.stats().messages
            }
            Err(_) => break,
        }
        bench.server.ready(Instant::now());
    }
    let deadline = bench.server.deadline().expect("the server waits for the client to read");
    bench.server.ready(deadline);
    assert!(!bench.server.has_client());
    drop(raw);
    bench.with(good_client);
    bench.until_gone();
    until_open_fds(before, "a client that does not read");
}
