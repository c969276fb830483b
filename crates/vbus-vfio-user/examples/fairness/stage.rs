// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bus with one worker and three devices. One client does an expensive thing as hard as it can.
//! Meanwhile the driver of another device counts how long each of its round trips takes.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vbus_core::{Bus, Connection, Device, ErrorCode, Executor, Identity, Open, Region, Tuning};
use vbus_devices::state::StateClass;
use vbus_vfio_user::DeviceServer;

use crate::attacks::Attack;
use crate::echo::{Driver, Echo, Over};

/// When a measurement ends.
#[derive(Clone, Copy)]
pub struct Until {
    /// After this time,
    pub time: Duration,
    /// and not before the hostile client has done its thing so many times, where it can be counted,
    pub operations: u64,
    /// and the neighbour has made so many round trips.
    pub round_trips: u64,
}

/// What a measurement found.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// What the hostile client did: messages, commands, connections.
    pub operations: u64,
    /// Round trips of the neighbour.
    pub round_trips: u64,
    /// The shortest time of one half of the round trips, and of 999 of 1000.
    pub median: Duration,
    pub p999: Duration,
    /// The longest round trip.
    pub longest: Duration,
}

/// The sockets of the devices that a hostile client can use.
pub struct Targets {
    /// A device that takes 1024 regions and drops them.
    pub takes: PathBuf,
    /// A device with 16 state pages of 1 MiB, which the driver writes.
    pub pages: PathBuf,
}

/// Takes any region whose id is below 1024, and does nothing with it.
struct Takes;

impl Device for Takes {
    fn identity(&self) -> Identity {
        Identity::user("takes").with_regions(1024)
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Taking(Vec::new())))
    }
}

struct Taking(Vec<Region>);

impl Connection for Taking {
    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        if region.id >= 1024 {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        self.0.push(region);
        Ok(())
    }

    fn region_dropped(&mut self, handle: u32) -> Result<(), ErrorCode> {
        self.0.retain(|region| region.handle != handle);
        Ok(())
    }
}

/// Measures one attack, on a bus of its own.
pub fn measure(attack: &Attack, until: Until) -> Measured {
    let folder = tempfile::tempdir().expect("a temporary folder");
    // Without polling windows: the worker sleeps whenever it may.
    let tuning = Tuning { workers: 1, poll_max: Duration::ZERO, ..Tuning::default() };
    let executor = Executor::start(tuning).expect("an event loop");
    let bus = Bus::new(executor, vec![Box::new(StateClass)]);
    let page = |number| serde_json::json!({ "name": format!("p{number}"), "bytes": 1 << 20, "owner": "driver" });
    let pages: Vec<_> = (0..16).map(page).collect();
    let endpoints = [
        bus.add("echo", Arc::new(Echo)).expect("a device"),
        bus.add("takes", Arc::new(Takes)).expect("a device"),
        bus.create("pages", "state", &serde_json::json!({ "pages": pages })).expect("a device"),
    ];
    let [echo, takes, pages] = endpoints.map(|endpoint| {
        let path = folder.path().join(endpoint.name());
        DeviceServer::start(endpoint, &path, Default::default()).expect("a socket")
    });
    let targets = Targets { takes: takes.path().into(), pages: pages.path().into() };
    let neighbour = Driver::open(&echo);
    let (over, operations) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut waits = Vec::new();
    std::thread::scope(|scope| {
        let hostile = scope.spawn(|| {
            let _over = Over(&over);
            while !over.load(Ordering::Relaxed) {
                (attack.run)(&targets, &over, &operations);
            }
        });
        let _over = Over(&over);
        let begin = Instant::now();
        let done = || operations.load(Ordering::Relaxed) >= until.operations;
        while begin.elapsed() < until.time
            || (waits.len() as u64) < until.round_trips
            || !(attack.operations == 0 || done())
        {
            assert!(!hostile.is_finished(), "the attack has failed");
            let begin = Instant::now();
            neighbour.round_trip(waits.len() as u64 + 1);
            waits.push(begin.elapsed());
        }
    });
    waits.sort_unstable();
    let at = |part: usize| waits[(waits.len() * part / 1000).min(waits.len() - 1)];
    Measured {
        operations: operations.load(Ordering::Relaxed),
        round_trips: waits.len() as u64,
        median: at(500),
        p999: at(999),
        longest: at(1000),
    }
}
