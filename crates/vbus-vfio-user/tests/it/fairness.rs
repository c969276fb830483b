// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client that does expensive things keeps no device of another client waiting.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use vbus_core::{
    Bus, Connection, Device, ErrorCode, Executor, Identity, Open, Progress, Region, Tuning,
};
use vbus_driver::{Function, Hal};
use vbus_process::{MEMORY_BYTES, Process};
use vbus_vfio_user::DeviceServer;

use crate::attacks::ATTACKS;
use crate::stage::{Measured, Until, measure};

/// `cargo xtask bench fairness` prints some milliseconds on an idle machine. This bound only tells
/// that a neighbour is served at all: where a worker does the work of an attack itself, a round
/// trip takes up to 40 s.
const BOUND: Duration = Duration::from_secs(3);

#[test]
fn no_attack_keeps_a_neighbour_waiting() {
    // Its client waits for one reply as long as it can, and `posted` does the same without.
    for attack in ATTACKS.iter().filter(|attack| attack.name != "write-multi") {
        let time = Duration::from_millis(100);
        let until = Until { time, operations: attack.operations, round_trips: 50 };
        let Measured { operations, round_trips, median, p999, longest } = measure(attack, until);
        println!(
            "{} ({operations} times): {round_trips} round trips, {median:?}, {p999:?}, {longest:?}",
            attack.what
        );
        assert!(longest < BOUND, "{}: {longest:?}", attack.name);
    }
}

/// Notes which thread does what.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<(&'static str, String)>>>);

impl Notes {
    fn note(&self, what: &'static str) {
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        self.0.lock().unwrap().push((what, thread));
    }
}

impl Device for Notes {
    fn identity(&self) -> Identity {
        Identity::user("notes")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        self.note("open");
        Ok(Box::new(Noting(self.clone())))
    }
}

struct Noting(Notes);

impl Connection for Noting {
    fn region_added(&mut self, _: Region) -> Result<(), ErrorCode> {
        self.0.note("region");
        Ok(())
    }

    fn call(&mut self, _: u32, _: u32, _: &mut [u8]) -> Result<u64, ErrorCode> {
        self.0.note("call");
        Ok(0)
    }

    fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
        self.0.note("poll");
        Ok(Progress::Idle)
    }
}

impl Drop for Noting {
    fn drop(&mut self) {
        self.0.note("end");
    }
}

#[test]
fn what_takes_long_runs_beside_the_workers() {
    let folder = tempfile::tempdir().unwrap();
    let bus = Bus::new(Executor::start(Tuning::default()).unwrap(), Vec::new());
    let notes = Notes::default();
    let endpoint = bus.add("notes", Arc::new(notes.clone())).unwrap();
    let path = folder.path().join("s");
    let server = DeviceServer::start(endpoint, &path, Default::default()).unwrap();
    for _ in 0..2 {
        // The client before may not have gone yet.
        let process = loop {
            match Process::connect(server.path(), MEMORY_BYTES) {
                Ok(process) => break process,
                Err(_) => std::thread::yield_now(),
            }
        };
        let mut function = Function::probe(process.clone()).unwrap();
        function.open(0).unwrap();
        let memory = process.alloc(4096).unwrap();
        function.region_add(0, 0, &memory, (0, 64), None).unwrap();
        function.call(1, 0, &mut []).unwrap();
        // The first closes. The second goes without a word.
        if notes.0.lock().unwrap().iter().any(|(what, _)| *what == "end") {
            rustix::net::shutdown(process.socket(), rustix::net::Shutdown::Both).unwrap();
            std::mem::forget(function);
        }
    }
    while notes.0.lock().unwrap().iter().filter(|(what, _)| *what == "end").count() < 2 {
        std::thread::yield_now();
    }
    for (what, thread) in &*notes.0.lock().unwrap() {
        assert_eq!(thread.starts_with("vbus-aside"), *what != "poll", "{what} on {thread}");
    }
}
