// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients that are silent, a bus that is, and a bus without descriptors.
use std::time::Instant;

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit};

use crate::support::{Served, TWO, wait_until};

#[test]
fn silent_control_clients_keep_nobody_out() {
    let bus = Served::start(TWO);
    let silent: Vec<_> = (0..100).map(|_| bus.control()).collect();
    // At the first try, and not only when they have been silent for too long.
    bus.good(&["device", "list"]);
    bus.good(&["stats"]);
    drop(silent);
}

#[test]
fn a_bus_that_does_not_answer_is_not_waited_for_without_end() {
    let bus = Served::start(TWO);
    bus.signal(Signal::STOP);
    let begin = Instant::now();
    let error = bus.bad(&["device", "list"]);
    assert!(error.contains("the bus does not answer within 10s"), "{error}");
    assert!(error.contains("is its process stopped"), "{error}");
    assert!(begin.elapsed().as_secs() >= 9, "it has its time");
    bus.signal(Signal::CONT);
    bus.good(&["device", "list"]);
}

#[test]
fn a_bus_without_descriptors_says_so_once_and_recovers() {
    let bus = Served::start(TWO);
    let pid = Pid::from_child(&bus.child);
    bus.good(&["device", "list"]);
    let threads = format!("/proc/{}/task", bus.child.id());
    let is_client = |thread: std::io::Result<std::fs::DirEntry>| {
        let name = std::fs::read_to_string(thread.unwrap().path().join("comm"));
        name.is_ok_and(|name| name.starts_with("control-client"))
    };
    wait_until("the client to go", || !std::fs::read_dir(&threads).unwrap().any(is_client));
    // The bus may have no descriptor from its first free number on.
    let taken = |number: &u64| {
        let path = format!("/proc/{}/fd/{number}", bus.child.id());
        std::fs::symlink_metadata(path).is_ok()
    };
    let free = (0..).find(|number| !taken(number));
    let full = Rlimit { current: free, maximum: getrlimit(Resource::Nofile).maximum };
    let before = prlimit(Some(pid), Resource::Nofile, full).unwrap();
    let error = bus.bad(&["device", "list"]);
    assert!(error.contains("does not answer within 10s"), "{error}");
    let log = || std::fs::read_to_string(&bus.log).unwrap();
    assert_eq!(log().matches("control clients have to wait").count(), 1, "{}", log());
    prlimit(Some(pid), Resource::Nofile, before).unwrap();
    wait_until("the bus", || bus.run(&["device", "list"]).code == Some(0));
}
