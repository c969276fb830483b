// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares a ring with a plain queue, and tests it with a peer that writes anything anywhere.

use std::collections::VecDeque;

use proptest::prelude::*;
use vbus_shm::ring::{
    BadRing, DeviceEnd, DriverEnd, Entry, Full, Layout, NEXT, Return, Returns, SIGNAL_OFFSET,
};
use vbus_shm::signal::{Armed, DEVICE_SEQ};
use vbus_shm::sync::{Ordering, Word};

#[derive(Clone, Copy, Debug)]
enum Op {
    /// Submits this many entries like this one.
    Submit(u8, Entry),
    /// The same by one call.
    SubmitAll(u8, Entry),
    DriverPost,
    DriverArm(u32),
    DriverDisarm,
    Reap,
    /// Up to so many.
    ReapAll(u8),
    Take,
    /// Up to so many.
    TakeAll(u8),
    /// So many.
    GiveBack(u8),
    /// So many by one call.
    GiveBackAll(u8),
    /// Takes up to so many and returns each at once. Refuses the one after.
    ServeAll(u8),
    DevicePost,
    DeviceArm(u32),
    DeviceDisarm,
}

fn entry() -> impl Strategy<Value = Entry> {
    // Any flags except the ring's own.
    (any::<u64>(), any::<u32>(), any::<u16>(), 0..0x4000_u16)
        .prop_map(|(addr, len, id, flags)| Entry { addr, len, id, flags })
}

fn op() -> impl Strategy<Value = Op> {
    let batch = || prop_oneof![4 => Just(1), 2 => 0..20_u8, 1 => 30..70_u8];
    prop_oneof![
        5 => (batch(), entry()).prop_map(|(n, entry)| Op::Submit(n, entry)),
        3 => (batch(), entry()).prop_map(|(n, entry)| Op::SubmitAll(n, entry)),
        4 => Just(Op::DriverPost),
        1 => (0..3_u32).prop_map(Op::DriverArm),
        1 => Just(Op::DriverDisarm),
        8 => Just(Op::Reap),
        3 => batch().prop_map(Op::ReapAll),
        8 => Just(Op::Take),
        3 => batch().prop_map(Op::TakeAll),
        6 => batch().prop_map(Op::GiveBack),
        3 => batch().prop_map(Op::GiveBackAll),
        4 => batch().prop_map(Op::ServeAll),
        4 => Just(Op::DevicePost),
        1 => (0..3_u32).prop_map(Op::DeviceArm),
        1 => Just(Op::DeviceDisarm),
    ]
}

fn layout() -> impl Strategy<Value = Layout> {
    let returns = prop_oneof![Just(Returns::Counted), Just(Returns::Entries), Just(Returns::Runs)];
    (1..=6_u32, returns).prop_map(|(log, returns)| Layout::new(1 << log, returns).unwrap())
}

/// Starts near the points where a number could wrap around.
pub fn start() -> impl Strategy<Value = u64> {
    let edges = prop_oneof![
        Just(0),
        Just(1 << 31),
        Just(1 << 32),
        Just(1 << 48),
        Just(1 << 63),
        any::<u64>()
    ];
    (edges, 0..40_u64).prop_map(|(edge, before): (u64, u64)| edge.wrapping_sub(before))
}

/// The rule for a kick, in numbers that never wrap around.
#[derive(Default)]
struct Kicks {
    posted: u64,
    armed: Option<u64>,
}

impl Kicks {
    fn post(&mut self, total: u64) -> bool {
        let before = std::mem::replace(&mut self.posted, total);
        self.armed.is_some_and(|at| before <= at && at < total)
    }
}

/// A batch of `n` entries like `entry`.
fn batch(n: u8, entry: Entry) -> impl ExactSizeIterator<Item = Entry> {
    (0..n).map(move |i| Entry { id: entry.id ^ u16::from(i), ..entry })
}

/// The returns that have a tag, in numbers that never wrap around: what a driver that polls sees.
struct Published {
    returns: Returns,
    count: u64,
}

impl Published {
    /// The device has given back `given` entries, one more than before.
    fn give(&mut self, given: u64) {
        // A long run is published before the post.
        if self.returns == Returns::Entries
            || self.returns == Returns::Runs && given - self.count == 32
        {
            self.count = given;
        }
    }

    /// What the driver sees of a return.
    fn content(&self, back: Return) -> Return {
        match self.returns {
            Returns::Runs => Return { len: back.len << 1 >> 1, id: 0, flags: back.flags & NEXT },
            _ => back,
        }
    }
}

fn behaves_like_a_queue(layout: Layout, start: u64, ops: Vec<Op>) -> Result<(), TestCaseError> {
    let memory: Vec<Word> = (0..layout.words()).map(|_| Word::new(0)).collect();
    let mut driver = DriverEnd::create(&memory[..], layout, start).unwrap();
    let mut device = DeviceEnd::attach(&memory[..]).unwrap();
    let returns = layout.returns();
    // The device's `seq` in memory. It may be ahead of the last post.
    let seq = &memory[(SIGNAL_OFFSET + DEVICE_SEQ) / 8];
    let stored = || seq.load(Ordering::Relaxed).wrapping_sub(start);
    let (mut way, mut held, mut back) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
    let (mut submitted, mut taken, mut given, mut reaped) = (0_u64, 0_u64, 0_u64, 0_u64);
    let (mut doorbell, mut interrupt) = (Kicks::default(), Kicks::default());
    let mut published = Published { returns, count: 0 };
    for op in ops {
        match op {
            Op::Submit(n, entry) => {
                for entry in batch(n, entry) {
                    let room = submitted - reaped < u64::from(layout.entries());
                    prop_assert_eq!(driver.submit(entry), if room { Ok(()) } else { Err(Full) });
                    if room {
                        way.push_back(entry);
                        submitted += 1;
                    }
                }
            }
            Op::SubmitAll(n, entry) => {
                let room = submitted - reaped + u64::from(n) <= u64::from(layout.entries());
                let outcome = driver.submit_all(batch(n, entry));
                prop_assert_eq!(outcome, if room { Ok(()) } else { Err(Full) });
                if room {
                    way.extend(batch(n, entry));
                    submitted += u64::from(n);
                }
            }
            Op::DriverPost => {
                prop_assert_eq!(driver.post().is_wanted(), doorbell.post(submitted));
            }
            Op::Take => {
                let expected = (taken < submitted).then(|| way.pop_front().unwrap());
                prop_assert_eq!(device.take(), Ok(expected));
                taken += u64::from(expected.is_some());
                held.extend(expected);
            }
            Op::TakeAll(max) => {
                let mut all = Vec::new();
                let n = device.take_all(u32::from(max), |entry| all.push(entry)).unwrap();
                prop_assert_eq!(n as usize, way.len().min(usize::from(max)));
                prop_assert!(way.drain(..n as usize).eq(all.iter().copied()));
                taken += u64::from(n);
                held.extend(all);
            }
            Op::GiveBack(n) | Op::GiveBackAll(n) => {
                let mut all = Vec::new();
                for _ in 0..n {
                    // Out of order, if this form of returns allows it.
                    let one = match returns {
                        Returns::Entries => held.pop_back(),
                        _ => held.pop_front(),
                    };
                    let one = one.map(|entry: Entry| Return { len: !entry.len, ..entry.into() });
                    if one.is_some() {
                        given += 1;
                        published.give(given);
                    }
                    back.extend(one.map(|one| published.content(one)));
                    all.push(one.unwrap_or_default());
                }
                if matches!(op, Op::GiveBackAll(_)) {
                    device.give_back_all(all);
                } else {
                    all.into_iter().for_each(|one| device.give_back(one));
                }
                // Another end would know what was returned.
                let there: Vec<Word> =
                    memory.iter().map(|word| Word::new(word.load(Ordering::Relaxed))).collect();
                let (mut other, _) = DeviceEnd::resume(&there[..]).unwrap();
                let not_given = submitted - published.count;
                prop_assert_eq!(other.take_all(100, |_| ()), Ok(u32::try_from(not_given).unwrap()));
            }
            Op::ServeAll(max) => {
                let mut all = Vec::new();
                let n = device
                    .serve_all(u32::from(max) + 1, |entry| {
                        let back = Return { len: !entry.len, ..entry.into() };
                        (all.len() < usize::from(max)).then(|| {
                            all.push((entry, back));
                            back
                        })
                    })
                    .unwrap();
                prop_assert_eq!(n as usize, all.len());
                prop_assert_eq!(n as usize, way.len().min(usize::from(max)));
                for (entry, one) in all {
                    prop_assert_eq!(way.pop_front(), Some(entry));
                    if returns == Returns::Counted {
                        // The oldest entry held comes back.
                        held.push_back(entry);
                        let oldest: Entry = held.pop_front().unwrap();
                        back.push_back(oldest.into());
                    } else {
                        back.push_back(published.content(one));
                    }
                }
                taken += u64::from(n);
                let holds = !held.is_empty();
                for _ in 0..n {
                    given += 1;
                    published.give(given);
                }
                if returns == Returns::Runs && !holds {
                    published.count = given;
                }
            }
            Op::DevicePost => {
                prop_assert_eq!(device.post().is_wanted(), interrupt.post(given));
                published.count = given;
            }
            Op::Reap | Op::ReapAll(_) if returns == Returns::Counted => {
                let enough = if let Op::ReapAll(max) = op { u32::from(max) } else { u32::MAX };
                let there = u32::try_from(interrupt.posted - reaped).unwrap();
                let n = driver.reap_count(enough).unwrap();
                prop_assert!(n <= there && n >= there.min(enough), "{n} of {there}");
                back.drain(..n as usize);
                reaped += u64::from(n);
            }
            Op::Reap => {
                let expected = (reaped < published.count).then(|| back.pop_front().unwrap());
                prop_assert_eq!(driver.reap(), Ok(expected));
                reaped += u64::from(expected.is_some());
            }
            Op::ReapAll(max) => {
                let mut all = Vec::new();
                let n = driver.reap_all(u32::from(max), |one| all.push(one)).unwrap();
                prop_assert_eq!(u64::from(n), (published.count - reaped).min(max.into()));
                prop_assert!(back.drain(..n as usize).eq(all));
                reaped += u64::from(n);
            }
            Op::DriverArm(after) => {
                let at = reaped + u64::from(after);
                let missed = driver.arm(after) == Armed::Missed;
                prop_assert_eq!(missed, stored() > at);
                interrupt.armed = Some(at);
            }
            Op::DeviceArm(after) => {
                let at = taken + u64::from(after);
                let missed = device.arm(after) == Armed::Missed;
                prop_assert_eq!(missed, doorbell.posted > at);
                doorbell.armed = Some(at);
            }
            Op::DriverDisarm => {
                driver.disarm();
                interrupt.armed = None;
            }
            Op::DeviceDisarm => {
                device.disarm();
                doorbell.armed = None;
            }
        }
        prop_assert_eq!(u64::from(driver.in_flight()), submitted - reaped);
        prop_assert_eq!(
            u64::from(driver.space()),
            u64::from(layout.entries()) - (submitted - reaped)
        );
        prop_assert_eq!(u64::from(device.held()), taken - given);
        prop_assert!((interrupt.posted..=given).contains(&stored()));
        if returns != Returns::Counted {
            prop_assert!(published.count.saturating_sub(stored()) <= u64::from(layout.entries()));
        }
        prop_assert_eq!(u64::from(device.pending()), doorbell.posted.saturating_sub(taken));
    }
    Ok(())
}

/// A write by the peer. It is any value, and often one that is almost right.
fn hostile() -> impl Strategy<Value = (usize, u64)> {
    let value = prop_oneof![
        any::<u64>(),
        (0..40_u64),
        any::<u32>().prop_map(|n| u64::from(n) << 32),
        any::<u16>().prop_map(|flags| u64::from(flags) << 48),
        (0..40_u64, 0..4_u64).prop_map(|(id, marks)| id << 32 | marks << 62),
        Just(u64::MAX),
    ];
    (any::<prop::sample::Index>().prop_map(|i| i.index(4096)), value)
}

proptest! {
    #[test]
    fn a_ring_behaves_like_a_queue(
        layout in layout(),
        start in start(),
        ops in prop::collection::vec(op(), 0..200),
    ) {
        behaves_like_a_queue(layout, start, ops)?;
    }

    #[test]
    fn a_ring_survives_a_hostile_peer(
        layout in layout(),
        start in start(),
        steps in prop::collection::vec((hostile(), op()), 1..200),
    ) {
        const GUARD: u64 = 0x5afe_5afe_5afe_5afe;
        let memory: Vec<Word> = (0..layout.words() + 16).map(|_| Word::new(GUARD)).collect();
        let region = &memory[8..8 + layout.words()];
        let mut driver = DriverEnd::create(region, layout, start).unwrap();
        let mut device = DeviceEnd::attach(region).unwrap();
        for ((word, value), op) in steps {
            region[word % region.len()].store(value, Ordering::Relaxed);
            match op {
                Op::Submit(n, entry) => (0..n).for_each(|_| _ = driver.submit(entry)),
                Op::SubmitAll(n, entry) => _ = driver.submit_all(batch(n, entry)),
                Op::DriverPost => drop(driver.post()),
                Op::DriverArm(after) => drop(driver.arm(after)),
                Op::DriverDisarm => driver.disarm(),
                Op::Reap => {
                    // The driver never reaps more returns than it submitted entries.
                    let before = driver.in_flight();
                    let count =
                        std::iter::from_fn(|| driver.reap().ok().flatten()).take(100).count();
                    prop_assert!(count <= before as usize);
                    if layout.returns() == Returns::Counted {
                        prop_assert!(driver.reap_count(u32::MAX).unwrap_or(0) <= before);
                    }
                }
                Op::ReapAll(max) => {
                    let (before, mut n) = (driver.in_flight(), 0);
                    let _ = driver.reap_all(u32::from(max), |_| n += 1);
                    prop_assert!(n <= before);
                }
                Op::TakeAll(max) => {
                    let (before, mut n) = (device.held(), 0);
                    let _ = device.take_all(u32::from(max), |_| n += 1);
                    prop_assert!(before + n <= layout.entries());
                }
                Op::Take => {
                    let before = device.held();
                    let count =
                        std::iter::from_fn(|| device.take().ok().flatten()).take(100).count();
                    prop_assert!(before as usize + count <= layout.entries() as usize);
                }
                Op::GiveBack(n) => {
                    (0..n).for_each(|_| device.give_back(Return { len: 2, id: 3, flags: NEXT }));
                }
                Op::GiveBackAll(n) => {
                    device.give_back_all((0..n).map(|_| Return { len: 2, id: 3, flags: NEXT }));
                }
                Op::ServeAll(max) => {
                    let before = device.held();
                    let n = device.serve_all(u32::from(max), |entry| Some(entry.into())).unwrap();
                    prop_assert!(n <= u32::from(max) && device.held() == before);
                }
                Op::DevicePost => drop(device.post()),
                Op::DeviceArm(after) => drop(device.arm(after)),
                Op::DeviceDisarm => device.disarm(),
            }
            prop_assert!(driver.in_flight() <= layout.entries());
            prop_assert!(device.held() <= layout.entries());
            if let Ok(other) = DeviceEnd::attach(region) {
                prop_assert!(other.layout().words() <= region.len());
            }
            if let Ok((mut other, _)) = DeviceEnd::resume(region) {
                prop_assert!(other.layout().words() <= region.len() && other.held() == 0);
                let count = std::iter::from_fn(|| other.take().ok().flatten()).take(100).count();
                prop_assert!(count <= other.layout().entries() as usize);
            }
        }
        for guard in memory[..8].iter().chain(&memory[8 + layout.words()..]) {
            prop_assert_eq!(guard.load(Ordering::Relaxed), GUARD);
        }
    }

    #[test]
    fn any_header_is_refused_or_fits(
        header in prop::array::uniform4(prop_oneof![any::<u64>(), 0..64_u64]),
        words in 0..200_usize,
    ) {
        let memory: Vec<Word> = (0..words).map(|_| Word::new(0)).collect();
        for (word, value) in memory.iter().zip([vbus_shm::ring::MAGIC].into_iter().chain(header)) {
            word.store(value, Ordering::Relaxed);
        }
        match DeviceEnd::attach(&memory[..]) {
            Ok(device) => prop_assert!(device.layout().words() <= words),
            Err(error) => prop_assert!(error != BadRing::Magic),
        }
    }
}
