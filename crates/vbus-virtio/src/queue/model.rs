// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Both ends of a queue under a model checker, loom. Each test checks a model whole, and then
//! without each of its places: the model must fail without it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use loom::sync::Notify;
use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use loom::thread;
use vbus_core::shm::signal::Armed;

use super::chain::Chain;
use super::driver::{Driver, DriverArea, Raw, WRITE};
use super::layout::{Format, RingFeatures};
use super::memory::{Area, Areas, Descriptor, Edge, Fence, Table, Tables};
use super::packed::Packed;
use super::split::Split;
use super::state::Position;

/// A place of the protocol that needs an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A full fence.
    Fence(Fence),
    /// The release of a publishing store.
    Publish(Edge),
    /// The acquire of an observing load.
    Observe(Edge),
}

const PLACES: [Place; 6] = [
    Place::Fence(Fence::Notify),
    Place::Fence(Fence::Arm),
    Place::Publish(Edge::Available),
    Place::Observe(Edge::Available),
    Place::Publish(Edge::Used),
    Place::Observe(Edge::Used),
];

thread_local! {
    // Loom runs the threads of a model as coroutines of the test's own thread.
    static REMOVED: Cell<Option<Place>> = const { Cell::new(None) };
}

fn present(place: Place) -> bool {
    REMOVED.get() != Some(place)
}

/// An integer of shared memory. Each has one size of access.
enum Integer {
    Half(AtomicU16),
    Word(AtomicU32),
    Long(AtomicU64),
}

/// An area, by the offsets of its integers.
#[derive(Clone)]
struct Model(Arc<BTreeMap<usize, Integer>>);

impl Model {
    fn half(&self, at: usize) -> &AtomicU16 {
        match &self.0[&at] {
            Integer::Half(half) => half,
            _ => panic!("another size at {at}"),
        }
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        match &self.0[&at] {
            Integer::Word(word) => word,
            _ => panic!("another size at {at}"),
        }
    }

    fn long(&self, at: usize) -> &AtomicU64 {
        match &self.0[&at] {
            Integer::Long(long) => long,
            _ => panic!("another size at {at}"),
        }
    }
}

impl Area for Model {
    fn load16(&self, at: usize) -> u16 {
        self.half(at).load(Ordering::Relaxed)
    }

    fn load32(&self, at: usize) -> u32 {
        self.word(at).load(Ordering::Relaxed)
    }

    fn load64(&self, at: usize) -> u64 {
        self.long(at).load(Ordering::Relaxed)
    }

    fn store16(&self, at: usize, value: u16) {
        self.half(at).store(value, Ordering::Relaxed);
    }

    fn store32(&self, at: usize, value: u32) {
        self.word(at).store(value, Ordering::Relaxed);
    }

    fn observe16(&self, at: usize, edge: Edge) -> u16 {
        let whole = present(Place::Observe(edge));
        self.half(at).load(if whole { Ordering::Acquire } else { Ordering::Relaxed })
    }

    fn publish16(&self, at: usize, value: u16, edge: Edge) {
        let whole = present(Place::Publish(edge));
        self.half(at).store(value, if whole { Ordering::Release } else { Ordering::Relaxed });
    }

    fn prefetch(&self, _: usize) {}

    fn fence(at: Fence) {
        if present(Place::Fence(at)) {
            fence(Ordering::SeqCst);
        }
    }
}

impl DriverArea for Model {
    fn store64(&self, at: usize, value: u64) {
        self.long(at).store(value, Ordering::Relaxed);
    }

    fn full_fence() {
        fence(Ordering::SeqCst);
    }
}

/// The memory of a queue.
fn areas(format: Format, size: usize) -> Areas<Model> {
    let area = |places: Vec<(usize, Integer)>| Model(Arc::new(places.into_iter().collect()));
    let half = |at: usize| (at, Integer::Half(AtomicU16::new(0)));
    let word = |at: usize| (at, Integer::Word(AtomicU32::new(0)));
    let long = |at: usize| (at, Integer::Long(AtomicU64::new(0)));
    match format {
        Format::Split => Areas {
            descriptors: area((0..2 * size).map(|i| long(8 * i)).collect()),
            driver: area((0..3 + size).map(|i| half(2 * i)).collect()),
            device: area(
                [half(0), half(2), half(4 + 8 * size)]
                    .into_iter()
                    .chain((0..2 * size).map(|i| word(4 + 4 * i)))
                    .collect(),
            ),
        },
        Format::Packed => Areas {
            descriptors: area(
                (0..size)
                    .map(|i| 16 * i)
                    .flat_map(|at| [long(at), word(at + 8), half(at + 12), half(at + 14)])
                    .collect(),
            ),
            driver: area(vec![word(0)]),
            device: area(vec![word(0)]),
        },
    }
}

/// There are no indirect tables.
struct NoTables;

impl Tables for NoTables {
    type Table<'t> = NoTables;

    fn table(&self, _: u64, _: u32) -> Option<NoTables> {
        None
    }
}

impl Table for NoTables {
    fn descriptor(&self, _: usize) -> Descriptor {
        unreachable!("there are no tables")
    }
}

/// A kick or an interrupt, as an eventfd carries it: it lasts until somebody waits for it.
#[derive(Clone)]
struct Event(Arc<Notify>);

impl Event {
    fn new() -> Event {
        Event(Arc::new(Notify::new()))
    }
}

enum Device {
    Split(Split),
    Packed(Packed),
}

macro_rules! either {
    ($ring:expr, $format:ident => $call:expr) => {
        match $ring {
            Device::Split($format) => $call,
            Device::Packed($format) => $call,
        }
    };
}

/// A model: its queue, and what its ends do.
#[derive(Clone, Copy)]
struct Case {
    format: Format,
    size: u16,
    event_idx: bool,
    /// Buffers in all, and how many the driver adds before it publishes.
    total: u16,
    batch: u16,
    /// Descriptors of each buffer.
    descriptors: u16,
    /// Both ends ask for no notifications while they work.
    disarm: bool,
}

/// The address of a buffer, by which both ends know its number.
fn address(number: u16) -> u64 {
    0x1000 + u64::from(number)
}

impl Case {
    const fn new(format: Format, size: u16, event_idx: bool) -> Case {
        Case { format, size, event_idx, total: 2, batch: 1, descriptors: 1, disarm: false }
    }

    /// The position from which the queue begins, so that it wraps around early.
    fn start(self) -> Position {
        match self.format {
            Format::Split => {
                Position { available: u16::MAX, used: u16::MAX, ..Position::default() }
            }
            Format::Packed => {
                let at = self.size - 1;
                Position { available: at, used: at, available_wrap: true, used_wrap: true }
            }
        }
    }

    fn features(self) -> RingFeatures {
        RingFeatures { event_idx: self.event_idx, ..RingFeatures::default() }
    }

    fn run(self) {
        let memory = areas(self.format, self.size.into());
        let share = || Areas {
            descriptors: memory.descriptors.clone(),
            driver: memory.driver.clone(),
            device: memory.device.clone(),
        };
        let driver =
            Driver::new(self.format, self.size, self.features(), self.start(), 0..self.size);
        driver.format(&memory);
        if self.format == Format::Split {
            memory.device.store16(2, self.start().used);
        }
        // The contents of the buffers: the driver's question, and the device's answer.
        let contents: Arc<Vec<[AtomicU64; 2]>> =
            Arc::new((0..self.total).map(|_| [AtomicU64::new(0), AtomicU64::new(0)]).collect());
        let (kick, interrupt) = (Event::new(), Event::new());
        let device = thread::spawn({
            let (memory, contents) = (share(), contents.clone());
            let (kick, interrupt) = (kick.clone(), interrupt.clone());
            move || self.device(&memory, &contents, &kick, &interrupt)
        });
        self.driver(driver, &memory, &contents, &kick, &interrupt);
        device.join().unwrap();
    }

    fn device(
        self,
        memory: &Areas<Model>,
        contents: &[[AtomicU64; 2]],
        kick: &Event,
        interrupt: &Event,
    ) {
        let features = self.features();
        let mut ring = match self.format {
            Format::Split => Device::Split(Split::new(self.size, features, self.start(), true)),
            Format::Packed => Device::Packed(Packed::new(self.size, features, self.start(), true)),
        };
        let mut done = 0;
        loop {
            let mut chain = Chain::new();
            while let Some((id, slots)) =
                either!(&mut ring, ring => ring.take(memory, &NoTables, &mut chain))
                    .expect("the descriptors are torn")
            {
                assert_eq!(slots, if self.format == Format::Split { 1 } else { self.descriptors });
                let parts = chain.writable();
                assert_eq!(parts.len(), usize::from(self.descriptors), "torn");
                assert!(parts.iter().all(|part| part.addr == address(done)), "out of order");
                let [question, answer] = &contents[usize::from(done)];
                assert_eq!(question.load(Ordering::Relaxed), 1, "taken before its content");
                answer.store(2, Ordering::Relaxed);
                match &mut ring {
                    Device::Split(ring) => {
                        ring.mark(id, false);
                        ring.put_used(memory, id, 1, 7);
                    }
                    Device::Packed(ring) => ring.put_used(memory, id, slots, 7),
                }
                chain.clear();
                done += 1;
            }
            either!(&mut ring, ring => ring.publish(memory));
            if either!(&mut ring, ring => ring.notification(memory)) {
                interrupt.0.notify();
            }
            if done == self.total {
                return;
            }
            if either!(&mut ring, ring => ring.arm(memory)) == Armed::Waiting {
                kick.0.wait();
            }
            if self.disarm {
                either!(&mut ring, ring => ring.disarm(memory));
            }
        }
    }

    fn driver(
        self,
        mut driver: Driver,
        memory: &Areas<Model>,
        contents: &[[AtomicU64; 2]],
        kick: &Event,
        interrupt: &Event,
    ) {
        let (mut added, mut reaped) = (0, 0);
        while reaped < self.total {
            while added < self.total && driver.room() >= usize::from(self.descriptors) {
                contents[usize::from(added)][0].store(1, Ordering::Relaxed);
                let raw = Raw { addr: address(added), len: 64, flags: WRITE };
                driver.add(memory, &vec![raw; self.descriptors.into()], 0).unwrap();
                added += 1;
                let full = driver.room() < usize::from(self.descriptors);
                if added % self.batch == 0 || added == self.total || full {
                    driver.publish(memory);
                    if driver.wants_kick(memory) {
                        kick.0.notify();
                    }
                }
            }
            let before = reaped;
            while let Some((_, written)) = driver.reap(memory) {
                assert_eq!(written, 7, "torn");
                let answer = contents[usize::from(reaped)][1].load(Ordering::Relaxed);
                assert_eq!(answer, 2, "used before its content");
                reaped += 1;
            }
            if reaped == before && driver.arm(memory) {
                interrupt.0.wait();
            }
            if self.disarm {
                driver.disarm(memory);
            }
        }
    }

    /// Explores all executions with up to `preemptions` switches away from a thread that could go
    /// on. A lost notification shows as a deadlock.
    fn check(self, preemptions: usize) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(preemptions);
        builder.max_branches = 10_000;
        builder.check(move || self.run());
    }

    /// Checks that the model holds, and that it fails without each of `places`.
    fn needs(self, places: &[Place], preemptions: usize) {
        self.check(preemptions);
        for &place in places {
            REMOVED.set(Some(place));
            let outcome = catch_unwind(AssertUnwindSafe(|| self.check(preemptions)));
            REMOVED.set(None);
            let failure = outcome.expect_err("the model should fail");
            let formatted = failure.downcast_ref::<String>().map(String::as_str);
            let message = formatted.or(failure.downcast_ref::<&str>().copied()).unwrap_or_default();
            println!("without {place:?}: {message}");
            let expected = ["deadlock", "before", "torn", "out of order"];
            assert!(
                expected.iter().any(|e| message.contains(e)),
                "without {place:?} it failed otherwise: {message}"
            );
        }
    }
}

#[test]
fn a_split_queue_with_event_indexes_needs_each_place() {
    Case::new(Format::Split, 2, true).needs(&PLACES, 2);
}

#[test]
fn a_split_queue_with_flags_needs_each_place() {
    Case { disarm: true, ..Case::new(Format::Split, 2, false) }.needs(&PLACES, 2);
}

#[test]
fn a_packed_queue_with_event_indexes_needs_each_place() {
    Case { disarm: true, ..Case::new(Format::Packed, 2, true) }.needs(&PLACES, 2);
    Case::new(Format::Packed, 2, true).check(2);
}

#[test]
fn a_packed_queue_with_flags_needs_each_place() {
    Case { disarm: true, ..Case::new(Format::Packed, 2, false) }.needs(&PLACES, 2);
}

#[test]
fn batches_and_chains_come_whole() {
    for format in [Format::Split, Format::Packed] {
        let case = Case {
            total: 3,
            batch: 2,
            ..Case::new(format, 3 + u16::from(format == Format::Split), true)
        };
        case.check(2);
        Case { descriptors: 2, total: 2, ..case }.check(2);
    }
}

#[test]
fn a_queue_of_one_buffer_wraps_around_each_time() {
    for format in [Format::Split, Format::Packed] {
        Case { total: 3, disarm: true, ..Case::new(format, 1, true) }.check(2);
        Case { total: 3, disarm: true, ..Case::new(format, 1, false) }.check(2);
    }
}
