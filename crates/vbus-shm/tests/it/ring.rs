//! A ring against a plain queue, and against a peer that writes anything anywhere.

use std::collections::VecDeque;

use proptest::prelude::*;
use vbus_shm::ring::{BadRing, DeviceEnd, DriverEnd, Entry, Full, Layout, NEXT, Returns};
use vbus_shm::sync::{Ordering, Word};

#[derive(Clone, Copy, Debug)]
enum Op {
    Submit(Entry),
    DriverPost,
    DriverArm(u32),
    DriverDisarm,
    Reap,
    Take,
    GiveBack,
    DevicePost,
    DeviceArm(u32),
    DeviceDisarm,
    SubmitAll(u8, Entry),
    ReapAll(u32),
    Serve(u32),
}

fn entry() -> impl Strategy<Value = Entry> {
    // Every bit but the ring's own.
    (any::<u64>(), any::<u32>(), any::<u16>(), 0..0x4000_u16)
        .prop_map(|(addr, len, id, flags)| Entry { addr, len, id, flags })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => entry().prop_map(Op::Submit),
        2 => Just(Op::DriverPost),
        1 => (0..3_u32).prop_map(Op::DriverArm),
        1 => Just(Op::DriverDisarm),
        4 => Just(Op::Reap),
        4 => Just(Op::Take),
        4 => Just(Op::GiveBack),
        2 => Just(Op::DevicePost),
        1 => (0..3_u32).prop_map(Op::DeviceArm),
        1 => Just(Op::DeviceDisarm),
        1 => (0..20_u8, entry()).prop_map(|(n, entry)| Op::SubmitAll(n, entry)),
        1 => (0..20_u32).prop_map(Op::ReapAll),
        1 => (0..20_u32).prop_map(Op::Serve),
    ]
}

fn returns() -> impl Strategy<Value = Returns> {
    prop_oneof![Just(Returns::Counted), Just(Returns::Entries)]
}

fn layout() -> impl Strategy<Value = Layout> {
    (1..=4_u32, returns()).prop_map(|(log, returns)| Layout::new(1 << log, returns).unwrap())
}

/// Starts around the points where counts wrap around.
fn start() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), (0..8_u32).prop_map(|n| n.wrapping_neg()), any::<u32>()]
}

/// What decides on a kick, in numbers that never wrap around.
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

fn behaves_like_a_queue(layout: Layout, start: u32, ops: Vec<Op>) -> Result<(), TestCaseError> {
    let memory: Vec<Word> = (0..layout.words()).map(|_| Word::new(0)).collect();
    let mut driver = DriverEnd::create(&memory[..], layout, start).unwrap();
    let mut device = DeviceEnd::attach(&memory[..]).unwrap();
    let (mut way, mut held, mut back) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
    let (mut submitted, mut taken, mut given, mut reaped) = (0_u64, 0_u64, 0_u64, 0_u64);
    let (mut doorbell, mut interrupt) = (Kicks::default(), Kicks::default());
    for op in ops {
        match op {
            Op::Submit(entry) => {
                let room = submitted - reaped < u64::from(layout.entries());
                prop_assert_eq!(driver.submit(entry), if room { Ok(()) } else { Err(Full) });
                if room {
                    way.push_back(entry);
                    submitted += 1;
                }
            }
            Op::SubmitAll(n, entry) => {
                let room = u64::from(layout.entries()) - (submitted - reaped);
                let expected = u64::from(n).min(room);
                let all = (0..n).map(|i| Entry { id: entry.id ^ u16::from(i), ..entry });
                prop_assert_eq!(u64::from(driver.submit_all(all.clone())), expected);
                way.extend(all.take(usize::try_from(expected).unwrap()));
                submitted += expected;
            }
            Op::Serve(max) => {
                let mut seen = Vec::new();
                let served = device.serve(max, |entry| {
                    seen.push(entry);
                    Entry { len: !entry.len, ..entry }
                });
                let expected: Vec<_> = way.drain(..way.len().min(max as usize)).collect();
                prop_assert_eq!(served, Ok(u32::try_from(expected.len()).unwrap()));
                prop_assert_eq!(&seen, &expected);
                taken += expected.len() as u64;
                given += expected.len() as u64;
                back.extend(expected.into_iter().map(|entry| Entry { len: !entry.len, ..entry }));
            }
            Op::ReapAll(max) if layout.returns() == Returns::Entries => {
                let mut seen = Vec::new();
                let count = driver.reap_all(max, |entry| seen.push(entry));
                let expected: Vec<_> = back.drain(..back.len().min(max as usize)).collect();
                prop_assert_eq!(count, Ok(u32::try_from(expected.len()).unwrap()));
                prop_assert_eq!(&seen, &expected);
                reaped += expected.len() as u64;
            }
            Op::ReapAll(_) => {}
            Op::DriverPost => prop_assert_eq!(driver.post(), doorbell.post(submitted)),
            Op::Take => {
                let expected = way.pop_front();
                prop_assert_eq!(device.take(), Ok(expected));
                taken += u64::from(expected.is_some());
                held.extend(expected);
            }
            Op::GiveBack => {
                // Out of order where order need not be kept.
                let one = if layout.returns() == Returns::Entries {
                    held.pop_back()
                } else {
                    held.pop_front()
                };
                device.give_back(one.unwrap_or_default());
                given += u64::from(one.is_some());
                back.extend(one);
            }
            Op::DevicePost => prop_assert_eq!(device.post(), interrupt.post(given)),
            Op::Reap if layout.returns() == Returns::Entries => {
                let expected = back.pop_front();
                prop_assert_eq!(driver.reap(), Ok(expected));
                reaped += u64::from(expected.is_some());
            }
            Op::Reap => {
                prop_assert_eq!(
                    driver.reap_count(),
                    Ok(u32::try_from(interrupt.posted - reaped).unwrap())
                );
                reaped = interrupt.posted;
            }
            Op::DriverArm(after) => {
                let at = reaped + u64::from(after);
                let missed = driver.arm(after) == vbus_shm::signal::Armed::Missed;
                prop_assert_eq!(missed, interrupt.posted > at);
                interrupt.armed = Some(at);
            }
            Op::DeviceArm(after) => {
                let at = taken + u64::from(after);
                let missed = device.arm(after) == vbus_shm::signal::Armed::Missed;
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
    }
    Ok(())
}

/// A write of the peer's: anything, with a liking for what is almost right.
fn hostile() -> impl Strategy<Value = (usize, u64)> {
    let value = prop_oneof![
        any::<u64>(),
        (0..40_u64),
        any::<u32>().prop_map(|n| u64::from(n) << 32),
        any::<u16>().prop_map(|flags| u64::from(flags) << 48),
        Just(u64::MAX),
    ];
    (any::<prop::sample::Index>().prop_map(|i| i.index(4096)), value)
}

proptest! {
    #[test]
    fn is_a_queue(layout in layout(), start in start(), ops in prop::collection::vec(op(), 0..200)) {
        behaves_like_a_queue(layout, start, ops)?;
    }

    #[test]
    fn survives_a_hostile_peer(
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
                Op::Submit(entry) => drop(driver.submit(entry)),
                Op::DriverPost => drop(driver.post()),
                Op::DriverArm(after) => drop(driver.arm(after)),
                Op::DriverDisarm => driver.disarm(),
                Op::Reap => {
                    // However full of returns the ring looks, no more come out than went in.
                    let before = driver.in_flight();
                    let entries = std::iter::from_fn(|| driver.reap().ok().flatten()).take(100).count();
                    prop_assert!(entries <= before as usize);
                    prop_assert!(driver.reap_count().unwrap_or(0) <= before);
                }
                Op::Take => {
                    let before = device.held();
                    let entries = std::iter::from_fn(|| device.take().ok().flatten()).take(100).count();
                    prop_assert!(before as usize + entries <= layout.entries() as usize);
                }
                Op::GiveBack => device.give_back(Entry { addr: 1, len: 2, id: 3, flags: NEXT }),
                Op::DevicePost => drop(device.post()),
                Op::DeviceArm(after) => drop(device.arm(after)),
                Op::DeviceDisarm => device.disarm(),
                Op::SubmitAll(n, entry) => drop(driver.submit_all((0..n).map(|_| entry))),
                Op::ReapAll(max) => {
                    let (before, mut count) = (driver.in_flight(), 0);
                    let _ = driver.reap_all(max, |_| count += 1);
                    prop_assert!(count <= before.min(max));
                }
                Op::Serve(max) => {
                    let mut count = 0;
                    let _ = device.serve(max, |entry| {
                        count += 1;
                        entry
                    });
                    prop_assert!(count <= max);
                }
            }
            prop_assert!(driver.in_flight() <= layout.entries() && device.held() <= layout.entries());
            if let Ok(other) = DeviceEnd::attach(region) {
                prop_assert!(other.layout().words() <= region.len());
            }
        }
        for guard in memory[..8].iter().chain(&memory[8 + layout.words()..]) {
            prop_assert_eq!(guard.load(Ordering::Relaxed), GUARD);
        }
    }

    #[test]
    fn any_header_is_refused_or_fits(header in prop::array::uniform4(prop_oneof![any::<u64>(), 0..64_u64]), words in 0..200_usize) {
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
