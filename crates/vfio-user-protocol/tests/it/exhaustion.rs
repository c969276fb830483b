// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The process has no free descriptor. The server pauses, and goes on afterwards.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::support::{Bench, Raw, Seen, alone, framed, version};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit belongs to the process, so this test runs in a process of its own.
#[test]
fn without_descriptors_the_server_pauses_and_goes_on() {
    alone("exhaustion::without_descriptors_the_server_pauses_and_goes_on", pauses_and_goes_on);
}

fn pauses_and_goes_on() {
    let mut bench = Bench::new();
    let waiting = UnixStream::connect(bench.path()).unwrap();
    let before = getrlimit(Resource::Nofile);
    // The limit is on descriptor numbers. No number below the lowest free one is free.
    let lowest = std::fs::File::open("/dev/null").unwrap().as_raw_fd();
    let full = Rlimit { current: Some(lowest.unsigned_abs().into()), ..before };
    setrlimit(Resource::Nofile, full).unwrap();
    let now = Instant::now();
    let outcome = bench.server.ready(now);
    assert!(!outcome.more && !bench.server.has_client());
    let again = bench.server.deadline().expect("a time for the next try");
    assert!(again > now, "no try after another without a pause");
    // The server's descriptor is not readable either.
    let mut fds = [rustix::event::PollFd::new(&bench.server, rustix::event::PollFlags::IN)];
    let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&zero)), Ok(0));

    setrlimit(Resource::Nofile, before).unwrap();
    bench.server.ready(again);
    bench.server.ready(again);
    assert!(bench.server.has_client());
    drop(waiting);
    bench.until_gone();
    let mut raw = Raw::connect(&bench);
    raw.send(&framed(1, 1, 0, &version()));
    assert!(matches!(raw.see(&mut bench), Seen::Reply(1, 1, None, _)));
}

#[test]
fn a_command_whose_descriptors_find_no_room_fails_with_emfile() {
    alone("exhaustion::a_command_whose_descriptors_find_no_room_fails_with_emfile", fails);
}

fn fails() {
    let mut bench = Bench::new();
    let mut raw = Raw::connect(&bench);
    raw.send(&framed(1, 1, 0, &version()));
    assert!(matches!(raw.see(&mut bench), Seen::Reply(1, 1, None, _)));
    let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, 1 << 20).unwrap();
    // argsz, flags; offset, address, size.
    let map = [[32, 3].map(u32::to_ne_bytes).concat(), [0, 0, 4096].map(u64::to_ne_bytes).concat()];
    let map = framed(2, 2, 0, &map.concat());
    let before = getrlimit(Resource::Nofile);
    let lowest = std::fs::File::open("/dev/null").unwrap().as_raw_fd();
    let full = Rlimit { current: Some(lowest.unsigned_abs().into()), ..before };
    setrlimit(Resource::Nofile, full).unwrap();
    raw.send_with(&map, &[memory.as_fd()]);
    bench.server.ready(Instant::now());
    setrlimit(Resource::Nofile, before).unwrap();
    let errno = Errno::MFILE.raw_os_error().unsigned_abs();
    assert!(matches!(raw.see(&mut bench), Seen::Reply(2, 2, Some(e), _) if e == errno));
    // The client did nothing wrong. It goes on, and succeeds when there is room.
    raw.send_with(&map, &[memory.as_fd()]);
    assert!(matches!(raw.see(&mut bench), Seen::Reply(2, 2, None, _)));
    assert_eq!(bench.server.stats().violations, 0);
}
