// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Device ends and owners of state pages that end before any access to shared memory. Another end
//! resumes what they left. The driver sees no return lost or doubled, and misses no kick.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;
use vbus_shm_model::steps::ledger::{self, Ledger};
use vbus_shm_model::steps::ring::{DeviceEnd, DriverEnd, Entry, Layout, Return, Returns};
use vbus_shm_model::steps::signal::{Armed, end};
use vbus_shm_model::steps::state::{self, Reader, Writer};
use vbus_shm_model::steps::sync::{Word, live};

type Memory<'a> = &'a [Word];

fn memory(words: usize) -> Vec<Word> {
    (0..words).map(|_| Word::new(0)).collect()
}

/// The length that the device returns with entry number `n`.
fn answer(n: u64) -> u32 {
    u32::try_from(n).unwrap() * 3 + 1
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Counted,
    Runs,
    Entries,
    /// Entries in any order.
    Ledger,
}

impl Form {
    fn returns(self) -> Returns {
        match self {
            Form::Counted => Returns::Counted,
            Form::Runs => Returns::Runs,
            Form::Entries | Form::Ledger => Returns::Entries,
        }
    }
}

const FORMS: [Form; 4] = [Form::Counted, Form::Runs, Form::Entries, Form::Ledger];

#[derive(Clone, Copy, Debug)]
enum Op {
    /// The driver submits this many entries and posts.
    Submit(u8),
    /// The driver reaps up to this many returns.
    Reap(u8),
    /// The driver arms. It does nothing else until a kick comes.
    Sleep,
    /// The device takes entries up to the first number, gives back up to the second, and posts.
    Serve(u8, u8),
    /// The same without a post.
    Work(u8, u8),
}

/// A device end while it lives.
enum Device<'a> {
    Plain(DeviceEnd<Memory<'a>>, VecDeque<Entry>),
    WithLedger(Ledger<Memory<'a>>, VecDeque<Entry>),
}

impl<'a> Device<'a> {
    /// Resumes the ring. Returns the end, and whether a kick of the driver is wanted.
    fn resume(form: Form, ring: Memory<'a>, ledger: Memory<'a>) -> (Device<'a>, bool) {
        if form == Form::Ledger {
            let (device, kick) = Ledger::resume(ring, ledger).unwrap();
            let held = device.held().map(|held| (held.position, held.entry));
            let held = held.collect::<BTreeMap<_, _>>().into_values().collect();
            return (Device::WithLedger(device, held), kick.is_wanted());
        }
        let (device, kick) = DeviceEnd::resume(ring).unwrap();
        (Device::Plain(device, VecDeque::new()), kick.is_wanted())
    }

    /// Takes and gives back, by calls for batches where there are such. If both numbers are the
    /// same, and nothing is held, each entry is served in place.
    fn work(&mut self, take: u8, give: u8) {
        let whole = |entry: &Entry| {
            assert_eq!(u64::from(entry.len), entry.addr ^ 0xff, "the submission is damaged");
        };
        let back = |entry: Entry| Return { len: answer(entry.addr), ..entry.into() };
        let (device, held) = match self {
            Device::Plain(device, held) if held.is_empty() && take == give => {
                let serve = |entry| {
                    whole(&entry);
                    Some(back(entry))
                };
                device.serve_all(u32::from(take), serve).unwrap();
                return;
            }
            Device::Plain(device, held) => {
                device.take_all(u32::from(take), |entry| held.push_back(entry)).unwrap();
                held.iter().for_each(whole);
                device.give_back_all(held.drain(..usize::from(give).min(held.len())).map(back));
                return;
            }
            Device::WithLedger(device, held) => (device, held),
        };
        for _ in 0..take {
            let Some(entry) = device.take().unwrap() else { break };
            whole(&entry);
            held.push_back(entry);
        }
        for _ in 0..give {
            // In some other order.
            let next = if give % 2 == 0 { held.pop_back() } else { held.pop_front() };
            let Some(entry) = next else { break };
            device.give_back(back(entry));
        }
    }

    /// Posts; says whether the driver is to be kicked.
    fn post(&mut self) -> bool {
        match self {
            Device::Plain(device, _) => device.post().is_wanted(),
            Device::WithLedger(device, _) => device.ring().post().is_wanted(),
        }
    }
}

/// The driver and its own memory.
struct Driver<'a> {
    form: Form,
    end: DriverEnd<Memory<'a>>,
    submitted: u64,
    reaped: u64,
    /// By id, the number of the entry in flight.
    in_flight: BTreeMap<u16, u64>,
    asleep: bool,
}

impl Driver<'_> {
    fn submit(&mut self, count: u8) {
        for _ in 0..count {
            if self.end.space() == 0 {
                break;
            }
            let id = (0..).find(|id| !self.in_flight.contains_key(id)).unwrap();
            let addr = self.submitted;
            let len = u32::try_from(addr ^ 0xff).unwrap();
            self.end.submit(Entry { addr, len, id, flags: 0 }).unwrap();
            self.in_flight.insert(id, addr);
            self.submitted += 1;
        }
        let _ = self.end.post(); // The device polls.
    }

    fn reap(&mut self, count: u8) -> bool {
        let before = self.reaped;
        if self.form == Form::Counted {
            self.reaped += u64::from(self.end.reap_count(u32::MAX).unwrap());
            let reaped = self.reaped;
            self.in_flight.retain(|_, n| *n >= reaped);
            return self.reaped != before;
        }
        for _ in 0..count {
            let Some(back) = self.end.reap().unwrap() else { break };
            // A run has no ids. It is in order.
            let oldest = || self.in_flight.iter().min_by_key(|(_, n)| **n).map(|(id, _)| *id);
            let id = if self.form == Form::Runs { oldest().unwrap() } else { back.id };
            let n = self.in_flight.remove(&id).expect("an entry came back twice");
            assert_eq!(back.len, answer(n), "another entry's return");
            if self.form != Form::Ledger {
                assert_eq!(n, self.reaped, "out of order");
            }
            self.reaped += 1;
        }
        self.reaped != before
    }
}

/// Runs `ops`. Device end number `i` ends before its access number `lives[i]`, counted from 0. The
/// one after the last of `lives` does not end. Returns how many ends have ended.
fn run(form: Form, entries: u32, start: u64, ops: &[Op], lives: &[u32]) -> usize {
    let layout = Layout::new(entries, form.returns()).unwrap();
    let (ring, ledger) = (memory(layout.words()), memory(ledger::bytes(entries) / 8));
    let end = DriverEnd::create(&ring[..], layout, start).unwrap();
    ledger::format(&&ledger[..], entries).unwrap();
    let mut driver =
        Driver { form, end, submitted: 0, reaped: 0, in_flight: BTreeMap::new(), asleep: false };
    let (mut device, mut ended) = (None, 0);
    let mut left = lives.first().copied().unwrap_or(u32::MAX);

    let mut serve = |driver: &mut Driver<'_>, take, give, post| {
        let before = device.take();
        let outcome = live(&mut left, || {
            let (mut end, kick) =
                before.map_or_else(|| Device::resume(form, &ring, &ledger), |end| (end, false));
            end.work(take, give);
            let kick = kick | (post && end.post());
            (end, kick)
        });
        if let Some((end, kick)) = outcome {
            device = Some(end);
            driver.asleep &= !kick;
        } else {
            // The end's own memory is lost, and so is a kick that it was about to send.
            ended += 1;
            left = lives.get(ended).copied().unwrap_or(u32::MAX);
        }
    };
    for op in ops {
        match *op {
            Op::Serve(take, give) => serve(&mut driver, take, give, true),
            Op::Work(take, give) => serve(&mut driver, take, give, false),
            _ if driver.asleep => {}
            Op::Submit(count) => driver.submit(count),
            Op::Reap(count) => drop(driver.reap(count)),
            Op::Sleep => driver.asleep = driver.end.arm(0) == Armed::Waiting,
        }
    }
    // Everything comes back, even if more device ends are to be killed.
    for _ in 0..1000 {
        if driver.reaped == driver.submitted {
            break;
        }
        serve(&mut driver, 255, 255, true);
        if !driver.asleep {
            driver.reap(255);
            if driver.reaped != driver.submitted && driver.end.arm(0) == Armed::Waiting {
                driver.asleep = true;
            }
        }
    }
    assert_eq!(driver.reaped, driver.submitted, "{form:?}: returns or a kick are lost");
    assert_eq!(driver.in_flight.len(), 0);
    ended
}

/// Kills the first device end before each of its accesses, and the second before each of its own.
#[test]
fn a_device_killed_at_any_access_loses_and_doubles_nothing() {
    let ops = [
        Op::Submit(7),
        Op::Serve(7, 6),
        Op::Sleep,
        Op::Serve(3, 7),
        Op::Reap(3),
        Op::Submit(3),
        Op::Serve(9, 1),
        Op::Reap(20),
        Op::Submit(8),
        Op::Serve(8, 8),
        Op::Reap(2),
        Op::Submit(1),
        Op::Serve(3, 2),
        // More than a ring of returns without a post.
        Op::Reap(20),
        Op::Submit(6),
        Op::Work(9, 5),
        Op::Reap(4),
        Op::Submit(5),
        Op::Work(9, 6),
        Op::Reap(20),
        Op::Submit(4),
        Op::Work(9, 5),
    ];
    for form in FORMS {
        for start in [0, (1 << 47) - 3, (1 << 48) - 3, u64::MAX - 3] {
            // Until the first device end does all the work.
            let mut first = 0;
            while (0..30).map(|second| run(form, 8, start, &ops, &[first, second])).max() > Some(0)
            {
                first += 1;
            }
            assert!(first > 40, "{first} accesses");
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..10_u8).prop_map(Op::Submit),
        3 => (0..10_u8).prop_map(Op::Reap),
        1 => Just(Op::Sleep),
        5 => (0..10_u8, 0..10_u8).prop_map(|(take, give)| Op::Serve(take, give)),
        3 => (0..10_u8, 0..10_u8).prop_map(|(take, give)| Op::Work(take, give)),
    ]
}

proptest! {
    #[test]
    fn whatever_is_killed_nothing_is_lost_or_doubled(
        log in 1..=4_u32,
        start in prop_oneof![Just(0), any::<u64>(), (0..20_u64).prop_map(u64::wrapping_neg)],
        ops in prop::collection::vec(op(), 0..60),
        lives in prop::collection::vec(0..60_u32, 0..20),
    ) {
        for form in FORMS {
            run(form, 1 << log, start, &ops, &lives);
        }
    }

    #[test]
    fn an_owner_killed_at_any_access_keeps_the_newest_value(
        lives in prop::collection::vec(0..20_u32, 0..20),
    ) {
        let layout = state::Layout::new(40, 4).unwrap();
        let page = memory(layout.words());
        layout.format(&&page[..], 0).unwrap();
        let mut reader = Reader::attach(&page[..], end::Driver).unwrap();
        let (mut known, mut next) = (0, 1_u8);
        let mut armed = false;
        for mut left in lives.into_iter().chain([u32::MAX]) {
            let written = live(&mut left, || {
                let (mut writer, kick) = Writer::resume(&page[..], end::Device).unwrap();
                kick.is_wanted() | writer.write(&[next; 40]).is_wanted()
            });
            armed &= written != Some(true);
            let mut value = [0; 40];
            let version = reader.read(&mut value).unwrap();
            prop_assert!(version == known || version == known + 1);
            if version > known {
                prop_assert_eq!(value, [next; 40], "a torn value");
                next = next.wrapping_add(1);
            } else {
                prop_assert_eq!(value, [next.wrapping_sub(1); 40], "a value was lost");
            }
            if armed {
                // No kick came. So the owner wrote nothing, or it ended after its post.
                prop_assert!(written.is_none() || version == known);
            }
            known = version;
            armed = reader.arm_newer(known) == Armed::Waiting;
        }
    }
}
