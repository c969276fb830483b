// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The scheduling class of virtual CPUs. A thread of this process takes the place of one.

use serde_json::json;
use vbus_driver::sched::{Class, Cpus, Outcome, Report};
use vbus_driver::{Error, state};
use vbus_shm::signal::Armed;

use crate::local::{Local, bus};

#[test]
fn requests_are_granted_in_part_and_reported() {
    let (tell, told) = std::sync::mpsc::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        tell.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
        let _ = ended.recv();
    });
    let bus = bus();
    // The requests below keep the thread's own nice value, because another one could not be
    // restored without a privilege.
    let config = json!({ "threads": [told.recv().unwrap()], "allow": ["normal", "fifo"],
        "priority-max": 3, "boost-ms": 700 });
    let local = Local::new(&bus, "s", "sched", &config);
    let mut cpus = Cpus::open(local.probe()).unwrap();
    let limits = *cpus.limits();
    assert_eq!((limits.cpus, limits.priority_max, limits.nice_min), (1, 3, None));
    assert_eq!((limits.changes, limits.boost_ms), (1000, 700));
    assert!(
        limits.allows(Class::Fifo(1)) && limits.allows(Class::Own) && !limits.allows(Class::Idle)
    );
    let mut cpu = cpus.cpu(0).unwrap();
    assert!(matches!(cpus.cpu(1), Err(Error::Unsupported(_))));
    assert!(matches!(cpus.cpu(0), Err(Error::Refused { .. })));

    let mut ask = |class: Class| -> Report {
        cpu.post(class);
        loop {
            let (report, number) = cpu.report().unwrap();
            if report.version == cpu.version() {
                cpu.disarm_report();
                return report;
            }
            if cpu.arm_report(number) == Armed::Waiting {
                local.wait_interrupt();
            }
        }
    };
    // Tests may run under `nice`, and their threads inherit its value.
    let nice = rustix::process::getpriority_process(None).unwrap();
    let own = Class::Normal(nice);
    let report = ask(own);
    assert_eq!((report.outcome, report.class, report.changes), (Outcome::Granted, own, 1));
    let report = ask(Class::Batch(1));
    assert_eq!(
        (report.outcome, report.class, report.refused),
        (Outcome::NotAllowed, Class::Own, 1)
    );
    let report = ask(Class::Normal(-20));
    assert_eq!((report.outcome, report.class, report.clamped), (Outcome::Clamped, own, 1));
    let report = ask(Class::RoundRobin(0));
    assert_eq!(
        (report.outcome, report.class, report.updates),
        (Outcome::BadRequest, Class::Own, 4)
    );
    cpus.close();
    drop(cpus);
    assert!(matches!(state::Pages::open(local.probe()), Err(Error::WrongClass(3))));
    drop(end);
    thread.join().unwrap();
}
