//! A driver and a device over a ring, each asleep whenever it has nothing to do.

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::thread;
use vbus_shm_model::ring::{DeviceEnd, DriverEnd, Entry, Layout, Return, Returns};
use vbus_shm_model::signal::Armed;
use vbus_shm_model::sync::{Edge, Fence, Place, live};

use crate::harness::{Kick, Shared, check, needs};

/// The first line of a lap holds the last positions that `arm` has room for.
const NEAR_WRAP: u64 = (1 << 63) - 2;

pub fn entry(n: u64) -> Entry {
    Entry { addr: 100 + n, len: 1, id: 7, flags: 0 }
}

/// What the driver gets of the `n`th return.
pub fn back(returns: Returns, n: u64) -> Return {
    let id = if returns == Returns::InOrder { 0 } else { 7 };
    Return { len: 2 + u32::try_from(n).unwrap(), id, flags: 0 }
}

/// A model: `total` entries go through a ring of `entries`, of which the driver posts up to `batch`
/// at a time, and the device likewise. With each the device fills the one buffer that all of them
/// stand for.
#[derive(Clone, Copy)]
struct Model {
    returns: Returns,
    entries: u32,
    total: u64,
    batch: u64,
}

impl Model {
    const fn new(returns: Returns, entries: u32, total: u64, batch: u64) -> Model {
        Model { returns, entries, total, batch }
    }

    fn device(
        self,
        mut device: DeviceEnd<Shared>,
        buffer: &AtomicU64,
        doorbell: &Kick,
        interrupt: &Kick,
    ) {
        let mut done = 0;
        while done < self.total {
            for _ in 0..self.batch {
                let Some(taken) = device.take().unwrap() else { break };
                assert_eq!(taken, entry(done), "an entry came torn or out of order");
                buffer.store(done + 1, Ordering::Relaxed);
                device.give_back(Return { id: 7, ..back(self.returns, done) });
                done += 1;
            }
            if device.post().is_wanted() {
                interrupt.kick();
            }
            if done < self.total && device.arm(0) == Armed::Waiting {
                doorbell.wait();
            }
        }
    }

    fn run(self) {
        let layout = Layout::new(self.entries, self.returns).unwrap();
        let memory = Shared::new(layout.words());
        let mut driver = DriverEnd::create(memory.clone(), layout, NEAR_WRAP).unwrap();
        let device = DeviceEnd::attach(memory).unwrap();
        let buffer = Arc::new(AtomicU64::new(0));
        let (doorbell, interrupt) = (Kick::new(), Kick::new());
        let there = thread::spawn({
            let (buffer, doorbell, interrupt) =
                (buffer.clone(), doorbell.clone(), interrupt.clone());
            move || self.device(device, &buffer, &doorbell, &interrupt)
        });

        let (mut submitted, mut reaped) = (0, 0);
        while reaped < self.total {
            for _ in 0..self.batch.min(self.total - submitted) {
                submitted += u64::from(driver.submit(entry(submitted)).is_ok());
            }
            if driver.post().is_wanted() {
                doorbell.kick();
            }
            let before = reaped;
            if self.returns == Returns::Counted {
                reaped += u64::from(driver.reap_count().unwrap());
            } else {
                while let Some(one) = driver.reap().unwrap() {
                    let expected = back(self.returns, reaped);
                    assert_eq!(one, expected, "a return came torn or out of order");
                    reaped += 1;
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
}

const FORMS: [Returns; 3] = [Returns::Counted, Returns::Entries, Returns::InOrder];

#[test]
fn entries_one_by_one() {
    for returns in FORMS {
        check(3, move || Model::new(returns, 2, 2, 1).run());
        check(2, move || Model::new(returns, 2, 3, 1).run());
    }
}

#[test]
fn batches() {
    for returns in FORMS {
        check(2, move || Model::new(returns, 2, 3, 2).run());
    }
}

/// Five entries, so that they fill more than a line.
#[test]
fn batches_of_more_than_a_line() {
    for returns in FORMS {
        check(2, move || Model::new(returns, 8, 5, 5).run());
    }
}

/// The device of a ring of 8, through which `total` entries go as one batch.
#[derive(Clone)]
struct Mortal {
    memory: Shared,
    stop: Arc<AtomicBool>,
    doorbell: Kick,
    interrupt: Kick,
}

impl Mortal {
    fn serve(&self, mut device: DeviceEnd<Shared>) {
        while !self.stop.load(Ordering::Acquire) {
            while let Some(entry) = device.take().unwrap() {
                assert_eq!(entry.len, 1, "an entry came torn or out of order");
                let back = Return { id: 7, ..back(device.layout().returns(), entry.addr - 100) };
                device.give_back(back);
            }
            if device.post().is_wanted() {
                self.interrupt.kick();
            }
            if device.arm(0) == Armed::Waiting {
                self.doorbell.wait();
            }
        }
    }

    /// The first device end ends before its access number `accesses`, and another takes the ring
    /// up.
    fn run(returns: Returns, total: u64, accesses: u32) {
        let layout = Layout::new(8, returns).unwrap();
        let memory = Shared::new(layout.words());
        let mut driver = DriverEnd::create(memory.clone(), layout, NEAR_WRAP).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let there = Mortal { memory, stop, doorbell: Kick::new(), interrupt: Kick::new() };
        let thread = thread::spawn({
            let there = there.clone();
            move || {
                let first = DeviceEnd::attach(there.memory.clone()).unwrap();
                if live(accesses, || there.serve(first)).is_none() {
                    let (second, kick) = DeviceEnd::resume(there.memory.clone()).unwrap();
                    if kick.is_wanted() {
                        there.interrupt.kick();
                    }
                    there.serve(second);
                }
            }
        });
        (0..total).for_each(|n| driver.submit(entry(n)).unwrap());
        if driver.post().is_wanted() {
            there.doorbell.kick();
        }
        let mut reaped = 0;
        while reaped < total {
            let before = reaped;
            if returns == Returns::Counted {
                reaped += u64::from(driver.reap_count().unwrap());
            } else {
                while let Some(one) = driver.reap().unwrap() {
                    assert_eq!(one, back(returns, reaped), "a return came torn or out of order");
                    reaped += 1;
                }
            }
            if reaped == before && driver.arm(0) == Armed::Waiting {
                there.interrupt.wait();
            }
        }
        there.stop.store(true, Ordering::Release);
        there.doorbell.kick();
        thread.join().unwrap();
    }
}

#[test]
fn a_device_that_ends_before_any_access_is_resumed() {
    for returns in FORMS {
        for total in [2, 5] {
            for accesses in 0..40 {
                check(1, move || Mortal::run(returns, total, accesses));
            }
        }
    }
}

#[test]
fn resuming_needs_its_fences() {
    needs(&SLEEP, 2, || Mortal::run(Returns::InOrder, 1, 5));
}

const SLEEP: [Place; 2] = [Place::Fence(Fence::Post), Place::Fence(Fence::Arm)];
const TAGS: [Place; 2] = [Place::Publish(Edge::Tag), Place::Observe(Edge::Tag)];
const SEQS: [Place; 2] = [Place::Publish(Edge::Seq), Place::Observe(Edge::Seq)];

#[test]
fn counted_returns_need_each_place() {
    for places in [SLEEP, TAGS, SEQS] {
        needs(&places, 2, || Model::new(Returns::Counted, 2, 2, 1).run());
        needs(&places, 2, || Model::new(Returns::Counted, 2, 2, 2).run());
    }
}

#[test]
fn returned_entries_need_each_place() {
    for places in [SLEEP, TAGS] {
        needs(&places, 2, || Model::new(Returns::Entries, 2, 2, 1).run());
        needs(&places, 2, || Model::new(Returns::Entries, 2, 2, 2).run());
    }
}

#[test]
fn returns_in_order_need_each_place() {
    for places in [SLEEP, TAGS] {
        needs(&places, 2, || Model::new(Returns::InOrder, 2, 2, 1).run());
        needs(&places, 2, || Model::new(Returns::InOrder, 2, 2, 2).run());
    }
}

/// Likewise in batches of more than a line.
#[test]
fn a_batch_needs_the_release_of_its_tags() {
    for returns in [Returns::Counted, Returns::InOrder] {
        needs(
            &TAGS,
            2,
            match returns {
                Returns::Counted => || Model::new(Returns::Counted, 8, 5, 5).run(),
                _ => || Model::new(Returns::InOrder, 8, 5, 5).run(),
            },
        );
    }
}
