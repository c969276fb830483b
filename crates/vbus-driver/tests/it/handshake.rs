// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The negotiation of device and driver, and what the device tells its driver outside of queues:
//! versions, events, changes of the config area, incarnations.

use std::sync::{Arc, Mutex};

use vbus_core::{
    Bus, Connection, ConnectionState, CreateError, Device, ErrorCode, Executor, Fail, Identity,
    Joined, Notifier, Open, Region, Tuning, Versions,
};
use vbus_driver::{Error, Function};

use crate::local::Local;

/// A device that records its arguments.
#[derive(Default)]
struct Witness {
    notifier: Mutex<Option<Notifier>>,
    /// Version and incarnation of the last connection.
    opened: Mutex<Option<(u16, u64)>>,
    fail: Mutex<Option<Fail>>,
}

struct Opened;

impl Device for Witness {
    fn identity(&self) -> Identity {
        Identity::user("witness")
    }

    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4]
    }

    fn joined(&self, joined: Joined<'_>) -> Result<(), CreateError> {
        *self.notifier.lock().unwrap() = Some(joined.notifier);
        Ok(())
    }

    fn open(&self, open: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        *self.opened.lock().unwrap() = Some((open.version, open.incarnation));
        *self.fail.lock().unwrap() = Some(open.fail);
        Ok(Box::new(Opened))
    }
}

impl Connection for Opened {
    fn region_added(&mut self, _: Region) -> Result<(), ErrorCode> {
        Ok(())
    }
}

struct Rig {
    bus: Bus,
    witness: Arc<Witness>,
    local: Local,
    notifier: Notifier,
}

fn rig(versions: Versions) -> Rig {
    let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
    let mut bus = Bus::new(executor, Vec::new());
    bus.set_versions(versions);
    let witness = Arc::new(Witness::default());
    bus.add("w", witness.clone()).unwrap();
    let local = Local::attach(&bus, "w", 0);
    let notifier = witness.notifier.lock().unwrap().clone().expect("the device has joined");
    Rig { bus, witness, local, notifier }
}

fn range(lowest: u16, highest: u16) -> Versions {
    Versions { lowest, highest }
}

#[test]
fn the_highest_version_that_both_speak_is_taken() {
    let rig = rig(range(1, 2));
    for (driver, common) in
        [(range(1, 1), 1), (range(2, 2), 2), (range(1, 2), 2), (range(2, 9), 2), (range(0, 1), 1)]
    {
        let mut function = Function::probe_for(rig.local.clone(), driver).unwrap();
        assert_eq!(function.version(), common, "{driver}");
        function.open(0).unwrap();
        assert_eq!(rig.witness.opened.lock().unwrap().map(|(version, _)| version), Some(common));
    }
    let error = Function::probe_for(rig.local.clone(), range(3, 3)).unwrap_err();
    assert_eq!(error, Error::Version { device: range(1, 2), driver: range(3, 3) });
    assert_eq!(
        error.to_string(),
        "the device speaks versions 1 to 2 of the ABI, the driver speaks version 3"
    );
}

#[test]
fn the_generation_counts_changes_not_looks() {
    let rig = rig(Versions::SUPPORTED);
    let endpoint = rig.bus.get("w").unwrap();
    let function = rig.local.probe();
    let mut area = [0; 4];
    let (_, first) = endpoint.config();
    for _ in 0..3 {
        function.config(&mut area).unwrap();
        assert_eq!((area, endpoint.config().1), ([1, 2, 3, 4], first));
    }
    // Two changes between two reads. The second one restores the first value.
    rig.notifier.config_changed(vec![9; 4]);
    rig.notifier.config_changed(vec![1, 2, 3, 4]);
    function.config(&mut area).unwrap();
    assert_eq!((area, endpoint.config().1), ([1, 2, 3, 4], first + 2));
    rig.notifier.config_changed(vec![7; 5000]);
    assert_eq!(endpoint.config().0.len(), 1024);
}

#[test]
fn events_interrupt_once_each_and_are_there_until_they_are_taken() {
    let rig = rig(Versions::SUPPORTED);
    let mut function = rig.local.probe();
    // Without a driver, there is no interrupt, and no event stays pending.
    rig.notifier.announce();
    assert!(!rig.local.interrupted());
    function.open(0).unwrap();
    assert!(function.events().unwrap().is_empty());

    rig.notifier.announce();
    rig.local.wait_interrupt();
    rig.notifier.announce();
    assert!(!rig.local.interrupted(), "pending already");
    rig.notifier.config_changed(vec![5]);
    rig.local.wait_interrupt();
    let events = function.events().unwrap();
    assert!(events.announce() && events.config_changed() && !events.broken(), "{events:?}");
    assert!(function.events().unwrap().is_empty(), "taken");
    rig.notifier.announce();
    rig.local.wait_interrupt();

    // A fault is also an event. A pending event stays until the driver takes it or closes.
    rig.witness.fail.lock().unwrap().take().unwrap().fail(ErrorCode::CORRUPT);
    rig.local.wait_interrupt();
    assert_eq!(function.check(), Err(Error::Broken(ErrorCode::CORRUPT)));
    let events = function.events().unwrap();
    assert!(events.announce() && events.broken() && !events.removed(), "{events:?}");
    function.close();
    rig.notifier.announce();
    assert!(!rig.local.interrupted() && function.events().unwrap().is_empty());

    function.open(0).unwrap();
    rig.bus.remove("w").unwrap();
    rig.local.wait_interrupt();
    assert!(function.events().unwrap().removed());
}

#[test]
fn a_driver_learns_that_its_device_has_begun_anew() {
    let rig = rig(Versions::SUPPORTED);
    let endpoint = rig.bus.get("w").unwrap();
    let mut function = rig.local.probe();
    let first = function.incarnation().unwrap();
    assert_ne!(first, 0);
    function.open(0).unwrap();
    assert_eq!(rig.witness.opened.lock().unwrap().map(|(_, number)| number), Some(first));
    function.check().unwrap();
    endpoint.reincarnate();
    rig.local.wait_interrupt();
    assert!(function.events().unwrap().reincarnated());
    assert_eq!(function.check(), Err(Error::Reincarnated));
    assert_eq!(endpoint.state(), ConnectionState::Closed);
    let second = function.incarnation().unwrap();
    assert!(second != first && second != 0);
    // The driver opens the device again, and it works.
    function.open(0).unwrap();
    function.check().unwrap();

    // If another process serves the same device, that is another incarnation, even if the driver
    // finds an open connection.
    let other = self::rig(Versions::SUPPORTED);
    let mut function = other.local.probe();
    assert!(![first, second].contains(&function.incarnation().unwrap()));
    function.open(0).unwrap();
}
