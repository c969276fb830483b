//! A driver and a device over a ring, each asleep whenever it has nothing to do.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use vbus_shm_model::ring::{DeviceEnd, DriverEnd, Entry, Layout, Returns};
use vbus_shm_model::signal::Armed;
use vbus_shm_model::sync::{Edge, Fence, Place};

use crate::harness::{Kick, Shared, check, needs};

const NEAR_WRAP: u32 = u32::MAX - 1;

fn entry(n: u64) -> Entry {
    Entry { addr: 100 + n, len: 1, id: 7, flags: 0 }
}

/// By which calls the ends work.
#[derive(Clone, Copy, PartialEq)]
enum Calls {
    Single,
    Batch,
}

/// `total` entries go through a ring of two. With each the device fills the one buffer that all of
/// them stand for.
fn model(returns: Returns, calls: Calls, total: u64) {
    let start = NEAR_WRAP;
    let layout = Layout::new(2, returns).unwrap();
    let memory = Shared::new(layout.words());
    let mut driver = DriverEnd::create(memory.clone(), layout, start).unwrap();
    let mut device = DeviceEnd::attach(memory).unwrap();
    let buffer = Arc::new(AtomicU64::new(0));
    let (doorbell, interrupt) = (Kick::new(), Kick::new());

    let there = thread::spawn({
        let (buffer, doorbell, interrupt) = (buffer.clone(), doorbell.clone(), interrupt.clone());
        move || {
            let mut done = 0;
            while done < total {
                let mut answer = |taken: Entry| {
                    assert_eq!(taken, entry(done), "an entry came torn or out of order");
                    done += 1;
                    buffer.store(done, Ordering::Relaxed);
                    Entry { len: 2, ..taken }
                };
                if calls == Calls::Batch {
                    let _ = device.serve(2, &mut answer).unwrap();
                } else {
                    while let Some(taken) = device.take().unwrap() {
                        device.give_back(answer(taken));
                    }
                }
                if device.post() {
                    interrupt.kick();
                }
                if done < total && device.arm(0) == Armed::Waiting {
                    doorbell.wait();
                }
            }
        }
    });

    let (mut submitted, mut reaped) = (0, 0);
    while reaped < total {
        if calls == Calls::Batch {
            submitted += u64::from(driver.submit_all((submitted..total).map(entry)));
        } else {
            while submitted < total && driver.submit(entry(submitted)).is_ok() {
                submitted += 1;
            }
        }
        if driver.post() {
            doorbell.kick();
        }
        let before = reaped;
        match returns {
            Returns::Counted => reaped += u64::from(driver.reap_count().unwrap()),
            Returns::Entries => {
                let mut each = |back| {
                    assert_eq!(
                        back,
                        Entry { len: 2, ..entry(reaped) },
                        "a return came torn or out of order"
                    );
                    reaped += 1;
                };
                if calls == Calls::Batch {
                    let _ = driver.reap_all(2, &mut each).unwrap();
                } else {
                    while let Some(back) = driver.reap().unwrap() {
                        each(back);
                    }
                }
            }
        }
        assert!(
            buffer.load(Ordering::Relaxed) >= reaped,
            "a return was seen before what the device wrote"
        );
        if reaped == before && driver.arm(0) == Armed::Waiting {
            interrupt.wait();
        }
    }
    there.join().unwrap();
}

#[test]
fn counted_returns() {
    check(3, || model(Returns::Counted, Calls::Single, 3));
}

#[test]
fn returned_entries() {
    check(3, || model(Returns::Entries, Calls::Single, 3));
}

#[test]
fn batches() {
    check(2, || model(Returns::Counted, Calls::Batch, 3));
    check(2, || model(Returns::Entries, Calls::Batch, 3));
}

#[test]
fn counted_returns_need_each_place() {
    let places = [
        Place::Fence(Fence::Post),
        Place::Fence(Fence::Arm),
        Place::Publish(Edge::Seq),
        Place::Observe(Edge::Seq),
        Place::Publish(Edge::Tag),
        Place::Observe(Edge::Tag),
    ];
    needs(&places, 2, || model(Returns::Counted, Calls::Single, 2));
    needs(&places, 2, || model(Returns::Counted, Calls::Batch, 2));
}

#[test]
fn returned_entries_need_each_place() {
    let places = [
        Place::Fence(Fence::Post),
        Place::Fence(Fence::Arm),
        Place::Publish(Edge::Tag),
        Place::Observe(Edge::Tag),
    ];
    needs(&places, 2, || model(Returns::Entries, Calls::Single, 2));
    needs(&places, 2, || model(Returns::Entries, Calls::Batch, 2));
}
