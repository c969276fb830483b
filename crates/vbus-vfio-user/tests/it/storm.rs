// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver that rings without end harms only itself. The cost of a ring is bounded, and other
//! devices of the same thread go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use vbus_core::shm::abi::bar0;
use vbus_core::shm::abi::capability::KIND_MMIO;
use vbus_core::{Bus, Endpoint, Executor, Tuning};
use vbus_driver::{Doorbell, Hal};
use vbus_process::Process;
use vbus_vfio_user::DeviceServer;

use crate::echo::{Driver, Echo, Over};

/// The least number of round trips.
const ROUND_TRIPS: u64 = 500;
/// The least number of rings of a storm.
const STORM: u64 = 2 * ROUND_TRIPS;

/// Runs a bus with two echoes, `loud` and `quiet`, on one thread without polling windows. The
/// driver of `loud` runs `storm`.
fn weather(storm: impl Fn(&Process, u32) + Sync) {
    let folder = tempfile::tempdir().unwrap();
    let tuning = Tuning { workers: 1, poll_max: Duration::ZERO, ..Tuning::default() };
    let bus = Bus::new(Executor::start(tuning).unwrap(), Vec::new());
    let serve = |name: &str| {
        let endpoint = bus.add(name, Arc::new(Echo)).unwrap();
        (
            endpoint.clone(),
            DeviceServer::start(endpoint, &folder.path().join(name), Default::default()).unwrap(),
        )
    };
    let (loud, loud_server) = serve("loud");
    let (_, quiet_server) = serve("quiet");
    let (storming, quiet) = (Driver::open(&loud_server), Driver::open(&quiet_server));
    storming.round_trip(1);
    quiet.round_trip(1);

    let polls = |endpoint: &Endpoint| {
        endpoint.counters().polls.get() + endpoint.counters().polls_empty.get()
    };
    let (before, rings, over) = (polls(&loud), AtomicU64::new(0), AtomicBool::new(false));
    let others = storming.function.hal().clone();
    let last = std::thread::scope(|scope| {
        let _over = Over(&over);
        for first in 0..2 {
            let (storm, others, rings, over) = (&storm, &others, &rings, &over);
            scope.spawn(move || {
                // Ring all doorbells in turn, also those without a region.
                for number in (first..).step_by(2) {
                    storm(others, number % 8);
                    rings.fetch_add(1, Ordering::Relaxed);
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
        }
        // The bus also serves the driver that rings without end, and loses none of its rings.
        let mut number = 1;
        while number < ROUND_TRIPS || rings.load(Ordering::Relaxed) <= STORM {
            number += 1;
            quiet.round_trip(number);
            storming.round_trip(number);
        }
        number
    });
    let rung = rings.load(Ordering::Relaxed);
    // By then the bus has handled the last rings.
    (last + 1..last + 21).for_each(|number| quiet.round_trip(number));
    let polled = polls(&loud) - before;
    println!("{rung} rings by storm, {polled} polls");
    // A ring wakes the device at most once. A wake-up causes one poll without work, or one with
    // work and one without.
    assert!(polled <= rung + 3 * last, "{polled} polls for {rung} rings");

    // After the storm the device does not poll.
    (last + 21..last + 61).for_each(|number| quiet.round_trip(number));
    assert_eq!(polls(&loud) - before, polled);
    assert_eq!(loud.counters().broken.get(), 0);
    storming.round_trip(u64::MAX);
}

#[test]
fn a_storm_by_eventfds_costs_the_others_no_answer() {
    // Each ring is one write of an eventfd, which the bus watches.
    let mmio = Doorbell { kind: KIND_MMIO, stride: 4, base: 0x1000 };
    weather(|process, number| process.ring(mmio, number));
}

#[test]
fn a_storm_by_messages_costs_the_others_no_answer() {
    weather(|process, number| {
        process.write32(bar0::DOORBELLS + u64::from(number) * bar0::DOORBELL_STRIDE, 1)
    });
}
