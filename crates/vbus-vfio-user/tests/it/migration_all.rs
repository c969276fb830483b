// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client moves a machine's state page, the interrupt controller that carries its interrupts, and
//! its `sched` device from one bus to another. Each of the three has a memory of its own here.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use vbus_core::{Bus, Executor, Tuning, lock};
use vbus_driver::pic::{Controller, Line, Nesting, Pic, Source};
use vbus_driver::sched::{self, Class, Outcome};
use vbus_driver::state::Pages;
use vbus_driver::{Function, Hal};
use vbus_sched::SchedClass;
use vbus_vfio_user::DeviceServer;
use vfio_user_protocol::message::MigrationState;

use crate::migration::read_all;
use crate::migration_net::{BYTES, Guest, Machine, PAGE, until};

/// The devices. The second one carries the interrupts of the first one.
const NAMES: [&str; 3] = ["page", "pic", "cpus"];

/// A bus with these devices.
struct Host {
    bus: Bus,
    _servers: Vec<DeviceServer>,
    paths: [PathBuf; 3],
}

impl Host {
    fn new(folder: &Path, host: &str) -> Host {
        let mut classes = vbus_devices::classes();
        classes.push(Box::new(SchedClass::new()));
        let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
        let bus = Bus::new(executor, classes);
        let mut servers = Vec::new();
        let paths = NAMES.map(|name| {
            let (class, settings) = match name {
                "page" => {
                    let page = json!({ "name": "a", "bytes": 8, "owner": "device" });
                    ("state", json!({ "pages": [page] }))
                }
                "pic" => ("pic", json!({ "cpus": 2 })),
                // No VMM answers there, so that no thread is changed.
                _ => ("sched", json!({ "cpus": 1, "qmp": folder.join("nobody") })),
            };
            let endpoint = bus.create(name, class, &settings).unwrap();
            if name == "page" {
                endpoint.set_router("pic");
            }
            let path = folder.join(format!("{host}.{name}"));
            servers.push(DeviceServer::start(endpoint, &path, Default::default()).unwrap());
            path
        });
        Host { bus, _servers: servers, paths }
    }

    fn set(&self, text: &str) {
        let request = json!({ "op": "set", "page": "a", "text": text });
        self.bus.get("page").unwrap().device().control(&request, &mut |_| true).unwrap();
    }
}

/// Takes all lines.
pub fn lines<H: Hal>(cpu: &mut Controller<H>) -> Vec<u16> {
    std::iter::from_fn(|| cpu.take().inspect(|line| cpu.end(*line))).collect()
}

#[test]
fn an_interrupt_controller_and_a_sched_device_are_moved() {
    let folder = tempfile::tempdir().unwrap();
    let hosts = ["a", "b"].map(|name| Host::new(folder.path(), name));
    let guests = [0, 1, 2].map(|device| {
        let guest = Guest(Arc::default());
        guest.moves_to(0, Machine::new(&hosts[0].paths[device]));
        guest.set_bus_master();
        guest
    });
    let function = |device: usize| Function::probe(guests[device].clone()).unwrap();
    let mut state = Pages::open(function(0)).unwrap();
    let page = state.find("a").unwrap().unwrap();
    let mut reader = state.reader(&page, 0).unwrap();
    let mut pic = Pic::open(function(1)).unwrap();
    let mut cpu = pic.cpu(1, 32, Nesting::Flat, 1).unwrap();
    pic.route(Source { device: "page", vector: 0 }, Line { cpu: 1, number: 9 }).unwrap();
    assert_eq!(lines(&mut cpu), [9], "a route begins with an interrupt");
    let mut cpus = sched::Cpus::open(function(2)).unwrap();
    let mut virtual_cpu = cpus.cpu(0).unwrap();
    for turn in 1..=4 {
        let [now, next] = [&hosts[(turn + 1) % 2], &hosts[turn % 2]];
        let mut value = [0; 8];
        let _ = reader.arm_newer(reader.version());
        now.set("before");
        assert_eq!(lines(&mut cpu), [9]);
        reader.read(&mut value).unwrap();
        assert_eq!(&value, b"before\0\0");
        virtual_cpu.post(Class::Fifo(5));
        let looked = |cpu: &sched::Cpu<Guest>| cpu.report().unwrap().0.version == cpu.version();
        until("the report", || looked(&virtual_cpu));
        // An interrupt is pending when the machine moves.
        let _ = reader.arm_newer(reader.version());
        now.set("moving");

        let mut moving = Vec::new();
        for (guest, path) in guests.iter().zip(&next.paths) {
            let (from, to) = (guest.machine(), Machine::new(path));
            from.ask(|client| client.dma_logging_start(PAGE, &[]));
            from.ask(|client| client.set_migration_state(MigrationState::PreCopy));
            (0..BYTES / PAGE).for_each(|page| from.copy_page(&to, page));
            from.ask(|client| client.set_migration_state(MigrationState::StopCopy));
            let stream = read_all(lock(&from.client).as_mut().unwrap());
            from.copy_dirty(&to);
            assert!(from.bytes() == to.bytes(), "turn {turn}: the log has missed a page");
            moving.push((guest, to, stream));
        }
        // The controller comes before the device whose interrupts it carries, or after it; both
        // stand still until both are there.
        if turn % 2 == 0 {
            moving.swap(0, 1);
        }
        for (_, to, stream) in &moving {
            to.ask(|client| client.set_migration_state(MigrationState::Resuming));
            to.ask(|client| client.migration_write(stream));
            to.ask(|client| client.set_migration_state(MigrationState::Stop));
        }
        for (guest, to, _) in moving {
            to.ask(|client| client.set_migration_state(MigrationState::Running));
            let from = guest.machine();
            guest.moves_to(turn, to);
            *lock(&from.client) = None;
        }
        assert_eq!(lines(&mut cpu), [9], "turn {turn}: the interrupt that was pending");
        reader.read(&mut value).unwrap();
        assert_eq!(&value, b"moving\0\0");
        assert_eq!(reader.version(), 2 * turn as u64);
        virtual_cpu.post(Class::Own);
        until("the report, at another host", || looked(&virtual_cpu));
        let report = virtual_cpu.report().unwrap().0;
        assert_eq!((report.updates, report.outcome), (2 * turn as u64, Outcome::Granted));
    }
}
