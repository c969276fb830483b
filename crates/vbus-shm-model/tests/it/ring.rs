// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver and a device over a ring. Each sleeps when it has nothing to do.

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::thread;
use vbus_shm_model::ledger::{self, Ledger};
use vbus_shm_model::memory::WORD;
use vbus_shm_model::ring::{DeviceEnd, DriverEnd, Entry, Layout, Return, Returns};
use vbus_shm_model::signal::Armed;
use vbus_shm_model::sync::{Edge, Fence, Place, live};

use crate::harness::{Kick, Shared, check, needs};

/// The last positions before those in `arm` wrap around. A ring of 8 begins with its slot 6 then.
const NEAR_WRAP: u64 = (1 << 63) - 2;

pub fn entry(n: u64) -> Entry {
    Entry { addr: 100 + n, len: 1, id: 7, flags: 0 }
}

/// The length that the device returns with the `n`th entry.
fn answer(n: u64) -> u32 {
    2 + u32::try_from(n).unwrap()
}

/// The `n`th return, as the device makes it.
pub fn back(n: u64) -> Return {
    Return { len: answer(n), id: 7, flags: 0 }
}

/// The `n`th return, as the driver sees it.
fn seen(returns: Returns, n: u64) -> Return {
    Return { id: if returns == Returns::Runs { 0 } else { 7 }, ..back(n) }
}

/// A model: `total` entries go through a ring of `entries`. Each end posts up to `batch` entries at
/// a time, by the calls for batches if there is more than one entry in a batch. All entries stand
/// for one buffer. The device writes the buffer with each entry.
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
            let mut answer = |taken| {
                assert_eq!(taken, entry(done), "an entry came torn or out of order");
                buffer.store(done + 1, Ordering::Relaxed);
                done += 1;
                Return { id: 7, ..back(done - 1) }
            };
            if self.returns == Returns::Runs {
                // The entries of a batch come back as one run, by the post.
                for _ in 0..self.batch {
                    let Some(taken) = device.take().unwrap() else { break };
                    device.give_back(answer(taken));
                }
            } else if self.batch > 1 {
                let batch = u32::try_from(self.batch).unwrap();
                device.serve_all(batch, |taken| Some(answer(taken))).unwrap();
            } else if let Some(taken) = device.take().unwrap() {
                device.give_back(answer(taken));
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

        let (mut submitted, mut reaped, mut missed) = (0, 0, false);
        while reaped < self.total {
            let n = self.batch.min(self.total - submitted).min(driver.space().into());
            if self.batch > 1 {
                let batch: Vec<_> = (submitted..submitted + n).map(entry).collect();
                driver.submit_all(batch).unwrap();
            } else if n == 1 {
                driver.submit(entry(submitted)).unwrap();
            }
            submitted += n;
            if driver.post().is_wanted() {
                doorbell.kick();
            }
            let before = reaped;
            if self.returns == Returns::Counted {
                reaped += u64::from(driver.reap_count(u32::MAX).unwrap());
            } else {
                while let Some(one) = driver.reap().unwrap() {
                    let expected = seen(self.returns, reaped);
                    assert_eq!(one, expected, "a return came torn or out of order");
                    reaped += 1;
                }
            }
            assert!(
                buffer.load(Ordering::Relaxed) >= reaped,
                "a return was seen before what the device wrote"
            );
            assert!(!missed || reaped > before, "a return was missed, and is not there");
            missed = false;
            if reaped == before {
                match driver.arm(0) {
                    Armed::Waiting => interrupt.wait(),
                    Armed::Missed => missed = true,
                }
            }
        }
        there.join().unwrap();
    }
}

const FORMS: [Returns; 3] = [Returns::Counted, Returns::Entries, Returns::Runs];

#[test]
fn entries_one_by_one() {
    for returns in FORMS {
        check(3, move || Model::new(returns, 2, 2, 1).run());
    }
}

#[test]
fn batches() {
    for returns in FORMS {
        check(2, move || Model::new(returns, 2, 3, 2).run());
    }
}

/// The first two slots are in one cache line and the third is in another.
#[test]
fn batches_that_span_two_lines() {
    for returns in FORMS {
        check(2, move || Model::new(returns, 8, 3, 3).run());
    }
}

/// A device end of either kind.
enum Device {
    Plain(DeviceEnd<Shared>),
    WithLedger(Ledger<Shared>),
}

/// The memory and the kicks of a device of a ring of 8. The next device end gets the same.
#[derive(Clone)]
struct Mortal {
    ring: Shared,
    /// `None`: the device returns the entries in the order of submission.
    ledger: Option<Shared>,
    stop: Arc<AtomicBool>,
    doorbell: Kick,
    interrupt: Kick,
}

impl Mortal {
    fn attach(&self) -> Device {
        match &self.ledger {
            None => Device::Plain(DeviceEnd::attach(self.ring.clone()).unwrap()),
            Some(ledger) => {
                Device::WithLedger(Ledger::attach(self.ring.clone(), ledger.clone()).unwrap())
            }
        }
    }

    fn resume(&self) -> Device {
        let (device, kick) = match &self.ledger {
            None => {
                let (device, kick) = DeviceEnd::resume(self.ring.clone()).unwrap();
                (Device::Plain(device), kick)
            }
            Some(ledger) => {
                let (device, kick) = Ledger::resume(self.ring.clone(), ledger.clone()).unwrap();
                (Device::WithLedger(device), kick)
            }
        };
        if kick.is_wanted() {
            self.interrupt.kick();
        }
        device
    }

    fn serve(&self, mut device: Device) {
        let answer = |entry: Entry| {
            assert_eq!(entry.len, 1, "an entry came torn or out of order");
            Return { len: answer(entry.addr - 100), ..entry.into() }
        };
        // A device with a ledger returns the newest entry first, those of its predecessor included.
        let mut in_work: Vec<_> = match &device {
            Device::Plain(_) => Vec::new(),
            Device::WithLedger(device) => device.held().map(|held| held.entry).collect(),
        };
        while !self.stop.load(Ordering::Acquire) {
            let ring = match &mut device {
                Device::Plain(device) => {
                    while let Some(entry) = device.take().unwrap() {
                        device.give_back(answer(entry));
                    }
                    device
                }
                Device::WithLedger(device) => {
                    in_work.extend(std::iter::from_fn(|| device.take().unwrap()));
                    while let Some(entry) = in_work.pop() {
                        device.give_back(answer(entry));
                    }
                    device.ring()
                }
            };
            if ring.post().is_wanted() {
                self.interrupt.kick();
            }
            if ring.arm(0) == Armed::Waiting {
                self.doorbell.wait();
            }
        }
    }

    /// `total` entries go through the ring as one batch. The first device end ends before its
    /// access or fence number `accesses`, and another end takes up the ring.
    fn run(form: Form, total: u16, accesses: u32) {
        let layout = Layout::new(8, form.returns).unwrap();
        let ring = Shared::new(layout.words());
        let mut driver = DriverEnd::create(ring.clone(), layout, NEAR_WRAP).unwrap();
        let ledger = form.has_ledger.then(|| Shared::new(ledger::bytes(8) / WORD));
        if let Some(ledger) = &ledger {
            ledger::format(ledger, 8).unwrap();
        }
        let stop = Arc::new(AtomicBool::new(false));
        let there = Mortal { ring, ledger, stop, doorbell: Kick::new(), interrupt: Kick::new() };
        let thread = thread::spawn({
            let there = there.clone();
            move || {
                let first = there.attach();
                if live(accesses, || there.serve(first)).is_none() {
                    there.serve(there.resume());
                }
            }
        });
        for id in 0..total {
            driver.submit(Entry { id, ..entry(id.into()) }).unwrap();
        }
        if driver.post().is_wanted() {
            there.doorbell.kick();
        }
        let mut reaped = Vec::new();
        while reaped.len() < usize::from(total) {
            let before = reaped.len();
            if form.returns == Returns::Counted {
                let n = driver.reap_count(u32::MAX).unwrap();
                reaped.extend((0..n).map(|_| 0));
            } else {
                while let Some(one) = driver.reap().unwrap() {
                    let oldest = u16::try_from(reaped.len()).unwrap();
                    let id = if form.has_ledger { one.id } else { oldest };
                    assert_eq!(one.len, answer(id.into()), "a return came torn or out of order");
                    assert!(!reaped.contains(&id), "an entry came back twice");
                    reaped.push(id);
                }
            }
            if reaped.len() == before && driver.arm(0) == Armed::Waiting {
                there.interrupt.wait();
            }
        }
        there.stop.store(true, Ordering::Release);
        there.doorbell.kick();
        thread.join().unwrap();
    }
}

/// A form of returns, without a ledger or with one.
#[derive(Clone, Copy)]
struct Form {
    returns: Returns,
    has_ledger: bool,
}

impl Form {
    const fn plain(returns: Returns) -> Form {
        Form { returns, has_ledger: false }
    }

    const LEDGER: Form = Form { returns: Returns::Entries, has_ledger: true };
}

#[test]
fn another_device_resumes_one_that_ended_before_any_access() {
    for returns in FORMS {
        for total in [2, 3] {
            for accesses in 0..40 {
                check(1, move || Mortal::run(Form::plain(returns), total, accesses));
            }
        }
    }
}

#[test]
fn another_device_resumes_one_with_a_ledger() {
    for accesses in 0..50 {
        check(1, move || Mortal::run(Form::LEDGER, 3, accesses));
    }
}

/// The first device ends after it stored the tag of its return (3), and after it stored `seq` but
/// before the fence of `post` (4). So only the fence of `resume` stands between `seq` and `arm`.
#[test]
fn resuming_needs_its_fence() {
    let fences = [Place::Fence(Fence::Resume), Place::Fence(Fence::Arm)];
    needs(&fences, 2, || Mortal::run(Form::plain(Returns::Entries), 1, 4));
    needs(&fences, 2, || Mortal::run(Form::plain(Returns::Entries), 1, 3));
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
    for places in [SLEEP, TAGS, SEQS] {
        needs(&places, 2, || Model::new(Returns::Entries, 2, 2, 1).run());
        needs(&places, 2, || Model::new(Returns::Entries, 2, 2, 2).run());
    }
}

/// The tag of a run covers the run's lengths. The lengths of the last two entries share a word.
#[test]
fn runs_need_each_place() {
    for places in [SLEEP, TAGS, SEQS] {
        needs(&places, 2, || Model::new(Returns::Runs, 2, 2, 1).run());
        needs(&places, 2, || Model::new(Returns::Runs, 2, 2, 2).run());
    }
    needs(&TAGS, 2, || Model::new(Returns::Runs, 8, 3, 3).run());
}

/// The same for batches that span two cache lines.
#[test]
fn a_batch_needs_the_release_of_its_tags() {
    needs(&TAGS, 2, || Model::new(Returns::Counted, 8, 3, 3).run());
    needs(&TAGS, 2, || Model::new(Returns::Entries, 8, 3, 3).run());
}
