// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Both ends of a queue against a plain model, over memory as a device has it.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vbus_core::memory::{DriverSlice, PAGE};
use vbus_core::shm::signal::Armed;
use vbus_core::{Access, MemoryContext, View};

use super::driver::{Driver, INDIRECT, Raw, WRITE};
use super::memory::Areas;
use super::{
    BadState, Chain, Format, InFlightRegion, Layout, Part, Position, Queue, RingFeatures, State,
    Violation,
};

const PAGES: u64 = 64;
/// Where the areas and the tables are. Each area has some pages.
const DESCRIPTORS: u64 = 0;
const DRIVER_AREA: u64 = 8 * PAGE;
const DEVICE_AREA: u64 = 16 * PAGE;
const TABLES: u64 = 32 * PAGE;
/// Bytes between two tables.
const TABLE_STRIDE: u64 = 256;

/// The guest's memory. `scattered`: each page is a map of its own, at another place of the file.
pub fn memory(scattered: bool) -> MemoryContext {
    let file: OwnedFd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, PAGES * PAGE).unwrap();
    let context = MemoryContext::new();
    if scattered {
        for page in 0..PAGES {
            let place = (file.try_clone().unwrap(), (PAGES - 1 - page) * PAGE);
            context.map(page * PAGE, PAGE, Some(place), Access::BOTH).unwrap();
        }
    } else {
        context.map(0, PAGES * PAGE, Some((file, 0)), Access::BOTH).unwrap();
    }
    context
}

/// The driver's areas of a queue.
pub fn driver_areas<'v>(layout: &Layout, view: &'v View<'_>) -> Areas<DriverSlice<'v>> {
    let [descriptors, driver, device] =
        layout.ranges().map(|(addr, len)| view.slice(addr, len, true).unwrap());
    Areas { descriptors, driver, device }
}

/// A fresh region for a queue.
fn region(layout: &Layout) -> InFlightRegion {
    let bytes = InFlightRegion::bytes(layout.format, layout.size).next_multiple_of(PAGE);
    let file: OwnedFd = memfd_create("region", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, bytes).unwrap();
    let memory = MemoryContext::new();
    memory.map(0, bytes, Some((file, 0)), Access::BOTH).unwrap();
    InFlightRegion::new(Arc::new(memory), 0, layout.format, layout.size)
}

/// A queue's shape.
#[derive(Clone, Debug)]
struct Shape {
    layout: Layout,
    features: RingFeatures,
    start: Position,
    scattered: bool,
    /// Bytes from a multiple of 16 to each table.
    skew: u64,
}

fn shape() -> impl Strategy<Value = Shape> {
    let size = prop_oneof![
        (0..8_u32).prop_map(|log| (Format::Split, 1 << log)),
        (1..40_u16).prop_map(|size| (Format::Packed, size)),
        Just((Format::Packed, 600)),
        Just((Format::Split, 512)),
    ];
    let bools = any::<[bool; 6]>();
    // Areas that begin anywhere in a page, and cross into the next.
    let places = [0..200_u64, 0..2000, 0..1000];
    (size, bools, any::<(u16, u16)>(), places, 0..16_u64).prop_map(
        |((format, size), bools, (start, near), places, skew)| {
            let [event_idx, indirect, in_order, scattered, wrap, aligned] = bools;
            let [a, b, c] = places;
            let (align, skew) = if aligned { (2, 0) } else { (1, skew) };
            let layout = Layout {
                format,
                size,
                descriptors: DESCRIPTORS + a * 16,
                driver_area: DRIVER_AREA + b * if format == Format::Split { 2 } else { 4 } * align,
                device_area: DEVICE_AREA + c * 4,
            };
            let start = match format {
                // Often shortly before the index wraps around.
                Format::Split => {
                    let at = if wrap { start } else { 0_u16.wrapping_sub(near % 40) };
                    Position { available: at, used: at, ..Position::default() }
                }
                Format::Packed => {
                    let at = start % size;
                    Position { available: at, used: at, available_wrap: wrap, used_wrap: wrap }
                }
            };
            let features = RingFeatures { event_idx, indirect, in_order };
            Shape { layout, features, start, scattered, skew }
        },
    )
}

/// A buffer of the driver.
#[derive(Clone, Debug)]
struct Buffer {
    parts: Vec<(Part, bool)>,
    /// How many of the parts come before the indirect table. `None`: there is no table.
    direct: Option<usize>,
}

impl Buffer {
    /// Bytes that the device may write.
    fn writable(&self) -> u32 {
        self.parts.iter().filter(|part| part.1).map(|part| part.0.len).sum()
    }
}

fn buffer() -> impl Strategy<Value = Buffer> {
    let part = (any::<u64>(), 1..100_000_u32)
        .prop_map(|(addr, len)| Part { addr: addr.min(u64::MAX - u64::from(len)), len });
    let parts = proptest::collection::vec(part, 1..9);
    (parts, 0..9_usize, any::<bool>(), 0..4_usize).prop_map(|(parts, readable, table, direct)| {
        let parts: Vec<_> =
            parts.into_iter().enumerate().map(|(i, part)| (part, i >= readable)).collect();
        let direct = table.then(|| direct.min(parts.len() - 1));
        Buffer { parts, direct }
    })
}

#[derive(Clone, Debug)]
enum Op {
    Add(Buffer),
    /// As many of the same.
    AddMany(u8, Buffer),
    DriverPublish,
    DriverArm,
    DriverDisarm,
    Reap(u8),
    Take(u8),
    PutBack,
    /// Completes one of those in work, with so many bytes written.
    Complete(prop::sample::Index, u32),
    /// Completes so many, the oldest first, with all bytes written.
    CompleteOldest(u8),
    Flush,
    /// The two halves of it.
    DevicePublish,
    Notification,
    DeviceArm,
    DeviceDisarm,
    /// Another process takes up the queue.
    HandOver,
    /// The process dies after so many stores of this work, and another one takes up the queue.
    Die(u32, Dying),
}

/// What a process does when it dies.
#[derive(Clone, Debug)]
enum Dying {
    Take(u8),
    PutBack,
    /// Completes some, the newest first if so, and publishes them.
    Return(u8, bool),
}

fn death() -> impl Strategy<Value = Op> {
    let work = prop_oneof![
        2 => (1..20_u8).prop_map(Dying::Take),
        1 => Just(Dying::PutBack),
        3 => (1..12_u8, any::<bool>()).prop_map(|(many, newest)| Dying::Return(many, newest)),
    ];
    (prop_oneof![3 => 0..40_u32, 1 => 0..400_u32], work)
        .prop_map(|(step, work)| Op::Die(step, work))
}

fn op() -> impl Strategy<Value = Op> {
    let many = || prop_oneof![3 => 1..4_u8, 1 => 1..60_u8];
    prop_oneof![
        6 => buffer().prop_map(Op::Add),
        3 => (many(), buffer()).prop_map(|(n, buffer)| Op::AddMany(n, buffer)),
        6 => Just(Op::DriverPublish),
        3 => Just(Op::DriverArm),
        1 => Just(Op::DriverDisarm),
        6 => many().prop_map(Op::Reap),
        8 => many().prop_map(Op::Take),
        1 => Just(Op::PutBack),
        4 => (any::<prop::sample::Index>(), prop_oneof![Just(0), any::<u32>()])
            .prop_map(|(at, written)| Op::Complete(at, written)),
        4 => many().prop_map(Op::CompleteOldest),
        4 => Just(Op::Flush),
        2 => Just(Op::DevicePublish),
        2 => Just(Op::Notification),
        3 => Just(Op::DeviceArm),
        1 => Just(Op::DeviceDisarm),
        1 => Just(Op::HandOver),
    ]
}

/// The plain model: which buffers are where, and who sleeps.
#[derive(Default)]
struct Model {
    /// Added and not published.
    added: VecDeque<(u16, Buffer)>,
    /// Published and not taken.
    available: VecDeque<(u16, Buffer)>,
    /// Taken, oldest first; the bytes written once complete.
    taken: VecDeque<(u16, Buffer, Option<u32>)>,
    /// Given back and not published.
    complete: VecDeque<(u16, u32)>,
    /// What the region has to say: taken and not used, in the order of taking.
    in_flight: Vec<(u16, Buffer)>,
    /// Used and not reaped.
    used: VecDeque<(u16, u32)>,
    device_sleeps: bool,
    driver_sleeps: bool,
    /// A buffer was used while the driver slept.
    owed: bool,
    /// Interrupts, and how many the driver may have got.
    interrupts: u32,
    allowed: u32,
}

struct World<'v> {
    shape: Shape,
    view: &'v View<'v>,
    areas: Areas<DriverSlice<'v>>,
    driver: Driver,
    queue: Queue,
    /// What the device has, in the order of taking.
    held: Vec<Chain>,
    model: Model,
    tables: u64,
    region: Option<InFlightRegion>,
}

impl World<'_> {
    fn add(&mut self, buffer: &Buffer) {
        let raw = |part: &(Part, bool)| Raw {
            addr: part.0.addr,
            len: part.0.len,
            flags: if part.1 { WRITE } else { 0 },
        };
        let mut raws: Vec<_> = buffer.parts.iter().map(raw).collect();
        if let Some(direct) = buffer.direct.filter(|_| self.shape.features.indirect) {
            let indirect = raws.split_off(direct);
            // Buffers in flight have tables of their own.
            let addr = TABLES + self.tables % 400 * TABLE_STRIDE + self.shape.skew;
            self.tables += 1;
            let packed = self.shape.layout.format == Format::Packed;
            // A split queue's table may have any order. This one has every second entry first.
            let count = indirect.len();
            let order: Vec<usize> = if packed {
                (0..count).collect()
            } else {
                let rest = (1..count).step_by(2).rev();
                (0..count).step_by(2).chain(rest).collect()
            };
            for (i, raw) in indirect.iter().enumerate() {
                let next = (!packed).then(|| order.get(i + 1)).flatten();
                let next = next.map(|next| u16::try_from(*next).unwrap());
                let at = addr + 16 * order[i] as u64;
                let words = [raw.addr.to_le_bytes(), raw.second_word(next).to_le_bytes()];
                self.view.write(at, words.as_flattened()).unwrap();
            }
            // WRITE has no meaning here.
            let flags = INDIRECT | if count % 2 == 0 { WRITE } else { 0 };
            raws.push(Raw { addr, len: u32::try_from(count * 16).unwrap(), flags });
        }
        if let Some(id) = self.driver.add(&self.areas, &raws, buffer.writable()) {
            self.model.added.push_back((id, buffer.clone()));
        }
    }

    fn publish(&mut self) {
        self.driver.publish(&self.areas);
        let any = !self.model.added.is_empty();
        self.model.available.append(&mut self.model.added);
        let kick = self.driver.wants_kick(&self.areas);
        if self.model.device_sleeps && any {
            assert!(kick, "a kick is lost");
        }
        self.model.device_sleeps &= !kick;
    }

    fn reap(&mut self, most: u8) {
        for _ in 0..most {
            let reaped = self.driver.reap(&self.areas);
            assert_eq!(reaped, self.model.used.pop_front());
            if reaped.is_none() {
                break;
            }
        }
    }

    fn take(&mut self, most: u8) {
        let mut turn = self.queue.turn(self.view).unwrap();
        for _ in 0..most {
            let mut chain = Chain::new();
            let taken = turn.next(&mut chain).unwrap();
            let expected = self.model.available.pop_front();
            assert_eq!(taken, expected.is_some());
            let Some((id, buffer)) = expected else { break };
            let parts = |write| buffer.parts.iter().filter(move |p| p.1 == write).map(|p| p.0);
            assert_eq!(chain.id(), Some(id));
            assert_eq!(chain.readable(), parts(false).collect::<Vec<_>>());
            assert_eq!(chain.writable(), parts(true).collect::<Vec<_>>());
            self.held.push(chain);
            self.model.in_flight.push((id, buffer.clone()));
            self.model.taken.push_back((id, buffer, None));
        }
    }

    fn put_back(&mut self) {
        let mut turn = self.queue.turn(self.view).unwrap();
        // Only the one that was taken last can go back, and only while it is not complete.
        let newest = self.model.taken.back().map(|(id, ..)| *id);
        let Some(mut chain) = self.held.pop() else { return };
        let is_newest =
            chain.id() == newest && self.model.taken.back().is_some_and(|t| t.2.is_none());
        if turn.put_back(&mut chain) {
            assert!(is_newest && !chain.is_taken());
            let (id, buffer, _) = self.model.taken.pop_back().unwrap();
            self.model.in_flight.pop();
            self.model.available.push_front((id, buffer));
        } else {
            assert!(chain.is_taken());
            self.held.push(chain);
        }
    }

    fn complete(&mut self, at: usize, written: u32) {
        let mut chain = self.held.remove(at);
        let id = chain.id().unwrap();
        self.queue.turn(self.view).unwrap().complete(&mut chain, written);
        assert!(!chain.is_taken());
        let taken = &mut self.model.taken;
        let at = taken.iter().position(|(other, ..)| *other == id).unwrap();
        if self.shape.features.in_order {
            taken[at].2 = Some(written);
            while let Some((id, _, Some(written))) = taken.front().cloned() {
                taken.pop_front();
                self.model.complete.push_back((id, written));
            }
        } else {
            taken.remove(at);
            self.model.complete.push_back((id, written));
        }
    }

    fn device_publish(&mut self) {
        self.queue.turn(self.view).unwrap().publish();
        self.model.owed |= self.model.driver_sleeps && !self.model.complete.is_empty();
        let complete = &self.model.complete;
        self.model.in_flight.retain(|(id, _)| complete.iter().all(|(other, _)| other != id));
        self.model.used.append(&mut self.model.complete);
    }

    fn notification(&mut self) {
        let interrupt = self.queue.turn(self.view).unwrap().notification().is_wanted();
        assert!(interrupt || !self.model.owed, "an interrupt is lost");
        if interrupt {
            (self.model.driver_sleeps, self.model.owed) = (false, false);
            self.model.interrupts += 1;
            // An index of a packed queue comes again after two laps, and passes an old event again.
            let split = self.shape.layout.format == Format::Split;
            if split && self.shape.features.event_idx {
                assert!(self.model.interrupts <= self.model.allowed, "an interrupt too many");
            }
        }
    }

    fn flush(&mut self) {
        self.device_publish();
        self.notification();
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Add(buffer) => self.add(buffer),
            Op::AddMany(count, buffer) => (0..*count).for_each(|_| self.add(buffer)),
            Op::DriverPublish => self.publish(),
            Op::DriverArm => {
                let waits = self.driver.arm(&self.areas);
                assert_eq!(waits, self.model.used.is_empty());
                (self.model.driver_sleeps, self.model.owed) = (waits, false);
                self.model.allowed += 1;
            }
            Op::DriverDisarm => {
                self.driver.disarm(&self.areas);
                (self.model.driver_sleeps, self.model.owed) = (false, false);
            }
            Op::Reap(most) => self.reap(*most),
            Op::Take(most) => self.take(*most),
            Op::PutBack => self.put_back(),
            Op::Complete(..) | Op::CompleteOldest(_) if self.held.is_empty() => {}
            Op::Complete(at, written) => self.complete(at.index(self.held.len()), *written),
            Op::CompleteOldest(most) => {
                for _ in 0..usize::from(*most).min(self.held.len()) {
                    self.complete(0, self.held[0].writable_bytes());
                }
            }
            Op::Flush => self.flush(),
            Op::DevicePublish => self.device_publish(),
            Op::Notification => self.notification(),
            Op::DeviceArm => {
                let armed = self.queue.turn(self.view).unwrap().arm();
                let none = self.model.available.is_empty();
                assert_eq!(armed, if none { Armed::Waiting } else { Armed::Missed });
                self.model.device_sleeps = armed == Armed::Waiting;
            }
            Op::DeviceDisarm => {
                self.queue.turn(self.view).unwrap().disarm();
                self.model.device_sleeps = false;
            }
            // It would take a region that nobody keeps from then on.
            Op::HandOver if self.region.is_some() => {}
            Op::HandOver => self.hand_over(),
            Op::Die(step, work) => self.die(*step, work),
        }
        assert_eq!(usize::from(self.queue.held()), self.held.len());
    }

    /// The process dies, and another one goes on. It has all that was taken and is not used: what
    /// was published, all of it or nothing, and nothing twice.
    fn die(&mut self, step: u32, work: &Dying) {
        let Some(region) = self.region.clone() else { return };
        let (queue, held) = (&mut self.queue, &mut self.held);
        let mut turn = queue.turn(self.view).unwrap();
        super::death::after(step, || match work {
            Dying::Take(most) => {
                for _ in 0..*most {
                    let mut chain = Chain::new();
                    if !turn.next(&mut chain).unwrap() {
                        break;
                    }
                }
            }
            Dying::PutBack => {
                if let Some(chain) = held.last_mut() {
                    turn.put_back(chain);
                }
            }
            Dying::Return(most, newest) => {
                for _ in 0..usize::from(*most).min(held.len()) {
                    let mut chain = if *newest { held.pop().unwrap() } else { held.remove(0) };
                    let all = chain.writable_bytes();
                    turn.complete(&mut chain, all);
                }
                turn.publish();
            }
        });
        let Shape { layout, features, start, .. } = self.shape;
        let recovered = Queue::recover(layout, features, region, start, self.view).unwrap();
        (self.queue, self.held) = recovered;

        // What the driver sees as used tells whether the death was after the publication.
        let mut used = Vec::new();
        while let Some(one) = self.driver.reap(&self.areas) {
            used.push(one);
        }
        let mut expected: Vec<_> = self.model.used.drain(..).collect();
        assert_eq!(used[..expected.len()], expected, "what was used before");
        let fresh = used.split_off(expected.len());
        expected.clear();
        let of = |id: u16| fresh.iter().any(|(other, _)| *other == id);
        if !fresh.is_empty() {
            assert!(self.model.complete.iter().all(|(id, _)| of(*id)), "a part was published");
        }
        self.model.in_flight.retain(|(id, _)| !of(*id));
        // What was put back, or taken, came as far as the region says.
        let have = self.held.len();
        while self.model.in_flight.len() > have {
            assert!(matches!(work, Dying::PutBack), "a buffer is lost");
            self.model.available.push_front(self.model.in_flight.pop().unwrap());
        }
        while self.model.in_flight.len() < have {
            assert!(matches!(work, Dying::Take(_)), "a buffer comes twice");
            self.model.in_flight.push(self.model.available.pop_front().unwrap());
        }
        for (chain, (id, buffer)) in self.held.iter().zip(&self.model.in_flight) {
            assert_eq!(chain.id(), Some(*id));
            let parts = |write| buffer.parts.iter().filter(move |p| p.1 == write).map(|p| p.0);
            assert_eq!(chain.readable(), parts(false).collect::<Vec<_>>());
            assert_eq!(chain.writable(), parts(true).collect::<Vec<_>>());
        }
        let model = &mut self.model;
        model.complete.clear();
        model.taken = model.in_flight.iter().map(|(id, buf)| (*id, buf.clone(), None)).collect();
        // Nobody knows what was asked for, or told.
        (model.device_sleeps, model.driver_sleeps, model.owed) = (false, false, false);
        model.allowed += 1;
    }

    fn hand_over(&mut self) {
        self.flush();
        let state = self.queue.state(&self.held).unwrap();
        assert!(self.held.is_empty() || self.queue.state(&[]).is_err());
        let resumed = Queue::resume(self.shape.layout, self.shape.features, &state).unwrap();
        let mut stale = std::mem::take(&mut self.held);
        (self.queue, self.held) = resumed;
        assert_eq!(self.queue.state(&self.held).unwrap(), state);
        // The interrupt for nothing.
        self.model.allowed += 1;
        // Chains of the former object do nothing.
        let mut turn = self.queue.turn(self.view).unwrap();
        for chain in &mut stale {
            assert!(!turn.put_back(chain));
            turn.complete(chain, 0);
        }
    }
}

fn run(shape: &Shape, ops: &[Op]) {
    run_with(shape, ops, false);
}

/// `kept`: a region of the buffers in flight is kept.
fn run_with(shape: &Shape, ops: &[Op], kept: bool) {
    let memory = memory(shape.scattered);
    let view = memory.view();
    let areas = driver_areas(&shape.layout, &view);
    let Layout { format, size, .. } = shape.layout;
    // Ids and descriptors in some order that is not the plain one.
    let free = (0..size).map(|i| (size - 1 - i) ^ u16::from(size.is_power_of_two() && size > 1));
    let driver = Driver::new(format, size, shape.features, shape.start, free);
    driver.format(&areas);
    if format == Format::Split {
        view.write(shape.layout.device_area + 2, &shape.start.used.to_le_bytes()).unwrap();
    }
    let state = State::at(shape.start);
    let region = kept.then(|| region(&shape.layout));
    let (queue, chains) = match region.clone() {
        None => Queue::resume(shape.layout, shape.features, &state).unwrap(),
        Some(region) => {
            let Shape { layout, features, start, .. } = *shape;
            Queue::recover(layout, features, region, start, &view).unwrap()
        }
    };
    assert!(chains.is_empty());
    let model = Model { allowed: 2, ..Model::default() };
    let shape = shape.clone();
    let mut world = World {
        shape,
        view: &view,
        areas,
        driver,
        queue,
        held: Vec::new(),
        model,
        tables: 0,
        region,
    };
    for op in ops {
        world.run(op);
    }
    // At the end everything comes back.
    world.publish();
    world.take(u8::MAX);
    world.take(u8::MAX);
    world.take(u8::MAX);
    while !world.held.is_empty() {
        world.complete(world.held.len() / 2, 1);
    }
    world.flush();
    while !world.model.used.is_empty() {
        world.reap(u8::MAX);
    }
    assert!(world.model.available.is_empty() && world.model.taken.is_empty());
    assert_eq!(world.driver.room(), usize::from(size));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_queue_is_a_list_of_buffers(
        shape in shape(),
        ops in proptest::collection::vec(op(), 1..120),
    ) {
        run(&shape, &ops);
    }

    /// A process may die at each of its stores.
    #[test]
    fn a_queue_outlives_its_process(
        shape in shape(),
        ops in proptest::collection::vec(prop_oneof![4 => op(), 1 => death()], 1..120),
    ) {
        run_with(&shape, &ops, true);
    }

    /// Whatever a region has, a queue goes on or is refused, and holds no more than it is long.
    #[test]
    fn any_region_is_borne(
        shape in shape(),
        writes in proptest::collection::vec((any::<u16>(), any::<u64>(), 0..4_u32), 1..40),
    ) {
        let memory = memory(shape.scattered);
        let view = memory.view();
        let Shape { layout, features, start, .. } = shape.clone();
        let place = region(&layout);
        let (mut queue, _) =
            Queue::recover(layout, features, place.clone(), start, &view).unwrap();
        for (round, (at, value, log)) in (0..).zip(writes) {
            // Small values are likely to mean something.
            let value = if value % 3 == 0 { value } else { value & 0x0101_0003_0007_0007 };
            let len = 1 << log;
            let end = InFlightRegion::bytes(layout.format, layout.size) - 8;
            // Mostly in the fields before the entries, and in the first entries.
            let reach = if round % 2 == 0 { end.min(200) } else { end };
            let at = u64::from(at) % reach & !(len - 1);
            let bytes = value.to_le_bytes();
            place.write(if at < 8 { 8 } else { at }, &bytes[..usize::try_from(len).unwrap()]);
            match Queue::recover(layout, features, place.clone(), start, &view) {
                Ok((recovered, chains)) => {
                    prop_assert!(chains.len() <= usize::from(layout.size));
                    prop_assert_eq!(usize::from(recovered.held()), chains.len());
                    queue = recovered;
                    let mut turn = queue.turn(&view).unwrap();
                    for mut chain in chains {
                        prop_assert!(chain.is_taken());
                        turn.complete(&mut chain, 0);
                    }
                    _ = turn.flush();
                }
                Err(error) => prop_assert!(!error.to_string().is_empty()),
            }
            prop_assert!(queue.retired().is_none());
        }
    }

    /// Whatever the driver's memory has, and however it changes, the queue gives out only chains
    /// within its bounds, and at most as many as it is long. After a violation it does nothing.
    #[test]
    fn any_memory_is_borne(
        shape in shape(),
        steps in proptest::collection::vec((0..3_u8, any::<u16>(), any::<u64>(), 0..8_u8), 1..200),
    ) {
        let memory = memory(shape.scattered);
        let view = memory.view();
        let mut queue = Queue::new(shape.layout, shape.features).unwrap();
        let mut held = Vec::new();
        for (area, at, value, action) in steps {
            let (addr, len) = shape.layout.ranges()[usize::from(area)];
            // Small values are likely to be sizes, flags and indexes that mean something.
            let value = if value % 3 == 0 { value } else { value & 0x0003_0007_8087_0007 };
            let at = addr + u64::from(at) % len & !1;
            view.write(at, &value.to_le_bytes()[..2 << (value % 3)]).unwrap();
            let was_retired = queue.retired().is_some();
            let mut turn = queue.turn(&view).unwrap();
            match action {
                0..=3 => {
                    let mut chain = Chain::new();
                    match turn.next(&mut chain) {
                        Ok(true) => held.push(chain),
                        Ok(false) => prop_assert!(!chain.is_taken()),
                        Err(_) => prop_assert!(!was_retired, "an error comes once"),
                    }
                }
                4 => if let Some(mut chain) = held.pop() { turn.complete(&mut chain, 3); },
                5 => _ = turn.flush(),
                6 => _ = turn.arm(),
                _ => turn.disarm(),
            }
            prop_assert!(held.len() <= usize::from(shape.layout.size));
            prop_assert_eq!(usize::from(queue.held()), held.len());
            for chain in &held {
                prop_assert!(!chain.readable().is_empty() || !chain.writable().is_empty());
                prop_assert!(chain.readable().len() + chain.writable().len() <= super::PARTS_MAX);
            }
        }
        if let Some(violation) = queue.retired() {
            prop_assert!(!violation.to_string().is_empty());
            let mut turn = queue.turn(&view).unwrap();
            prop_assert_eq!(turn.next(&mut Chain::new()), Ok(false));
            prop_assert!(!turn.flush().is_wanted());
            prop_assert_eq!(turn.arm(), Armed::Waiting);
        }
    }
}

#[test]
fn a_queue_whose_areas_go_away_is_retired_once() {
    for format in [Format::Split, Format::Packed] {
        let layout = Layout {
            format,
            size: 8,
            descriptors: 0,
            driver_area: DRIVER_AREA,
            device_area: PAGES * PAGE - 4,
        };
        let mut queue = Queue::new(layout, RingFeatures::default()).unwrap();
        let memory = memory(false);
        let view = memory.view();
        match format {
            Format::Packed => assert!(queue.turn(&view).is_ok(), "it has just room"),
            Format::Split => {
                let error = queue.turn(&view).err();
                assert_eq!(error, Some(Violation::Unmapped("used ring")));
                assert!(queue.turn(&view).is_ok());
                assert_eq!(queue.retired(), error);
            }
        }
    }
}

/// Buffers in flight are taken up only as long as their parts fit in a bounded memory: a forged
/// region may have all of a long queue in flight, each with a whole table.
#[test]
fn forged_buffers_in_flight_have_a_bounded_number_of_parts() {
    let layout = Layout {
        format: Format::Split,
        size: 2048,
        descriptors: DESCRIPTORS,
        driver_area: DRIVER_AREA,
        device_area: DEVICE_AREA,
    };
    let features = RingFeatures { indirect: true, ..RingFeatures::default() };
    let start = Position::start(layout.format);
    let memory = memory(false);
    let view = memory.view();
    let parts = u32::try_from(super::PARTS_MAX).unwrap();
    let descriptor = |addr: u64, len: u32, flags: u16, next: u16| {
        let word = Raw { addr, len, flags }.second_word((next != 0).then_some(next));
        [addr, word].map(u64::to_le_bytes).concat()
    };
    for number in 0..parts {
        let next = u16::try_from((number + 1) % parts).unwrap();
        view.write(TABLES + 16 * u64::from(number), &descriptor(1, 1, 0, next)).unwrap();
    }
    for head in 0..u64::from(layout.size) {
        let table = descriptor(TABLES, 16 * parts, INDIRECT, 0);
        view.write(DESCRIPTORS + 16 * head, &table).unwrap();
    }
    let region = region(&layout);
    let recover = |in_flight: u64| {
        region.write(16 + 16 * (in_flight - 1), &[1]);
        Queue::recover(layout, features, region.clone(), start, &view)
    };
    recover(1).unwrap();
    for head in 0..1023 {
        region.write(16 + 16 * head, &[1]);
    }
    let (_, chains) = recover(1024).unwrap();
    assert_eq!(chains.len(), 1024, "a queue of 1024 descriptors may have that");
    assert_eq!(chains[1023].readable().len(), super::PARTS_MAX);
    assert!(matches!(recover(1025), Err(BadState::Region)));
}

/// The owner of a region may write to it while a queue is taken up. The queue has a free entry for
/// each buffer nevertheless.
#[test]
fn a_region_that_changes_while_it_is_read_is_borne() {
    // Nothing lies behind the entries of this one.
    let layout = Layout {
        format: Format::Packed,
        size: 3,
        descriptors: DESCRIPTORS,
        driver_area: DRIVER_AREA,
        device_area: DEVICE_AREA,
    };
    let (features, start) = (RingFeatures::default(), Position::start(Format::Packed));
    let memory = memory(false);
    let view = memory.view();
    for slot in 0..3_u16 {
        let word = Raw { addr: 1, len: 1, flags: 0x80 }.second_word(None);
        let descriptor = [1, word | u64::from(slot) << 32].map(u64::to_le_bytes).concat();
        view.write(DESCRIPTORS + 16 * u64::from(slot), &descriptor).unwrap();
        view.write(DESCRIPTORS + 16 * u64::from(slot) + 14, &0x80_u16.to_le_bytes()).unwrap();
    }
    let region = region(&layout);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for next in [1_u16, 3, 2] {
                    region.write(32 + 2, &next.to_le_bytes());
                }
            }
        });
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| {
            for _ in 0..5000 {
                region.settle();
                Queue::recover(layout, features, region.clone(), start, &view).unwrap();
                let again = Queue::recover(layout, features, region.clone(), start, &view);
                let Ok((mut queue, chains)) = again else { continue };
                assert!(chains.is_empty());
                let mut turn = queue.turn(&view).unwrap();
                for _ in 0..3 {
                    assert!(turn.next(&mut Chain::new()).unwrap());
                }
            }
        }));
        done.store(true, Ordering::Relaxed);
        assert!(outcome.is_ok());
    });
}

/// The most that a thread waits for the other.
const BOUND: Duration = Duration::from_secs(60);

/// Two threads, which sleep whenever they have nothing to do. A notification that is lost shows as
/// a thread that waits for ever.
fn two_threads(format: Format, size: u16, features: RingFeatures, scattered: bool) {
    const BUFFERS: u32 = 20_000;
    let descriptors = PAGE - 64;
    let layout =
        Layout { format, size, descriptors, driver_area: DRIVER_AREA, device_area: DEVICE_AREA };
    let memory = memory(scattered);
    let view = memory.view();
    let areas = driver_areas(&layout, &view);
    let mut driver = Driver::new(format, size, features, Position::start(format), 0..size);
    driver.format(&areas);
    let (kick, kicked) = sync_channel(1);
    let (interrupt, interrupted) = sync_channel(1);
    std::thread::scope(|scope| {
        let memory = &memory;
        scope.spawn(move || {
            let mut queue = Queue::new(layout, features).unwrap();
            let (mut chain, mut done) = (Chain::new(), 0);
            while done < BUFFERS {
                let view = memory.view();
                let mut turn = queue.turn(&view).unwrap();
                turn.disarm();
                while turn.next(&mut chain).unwrap() {
                    assert_eq!(chain.writable(), [Part { addr: 1, len: done + 1 }]);
                    turn.complete(&mut chain, done % 3);
                    done += 1;
                    // Batches of any size.
                    if done % 7 == 0 && turn.flush().is_wanted() {
                        _ = interrupt.try_send(());
                    }
                }
                if turn.flush().is_wanted() {
                    _ = interrupt.try_send(());
                }
                if done < BUFFERS && turn.arm() == Armed::Waiting {
                    drop(view);
                    kicked.recv_timeout(BOUND).expect("a kick is lost");
                }
            }
        });
        let (mut added, mut reaped) = (0, 0);
        while reaped < BUFFERS {
            driver.disarm(&areas);
            while added < BUFFERS && driver.room() > 0 {
                let raw = Raw { addr: 1, len: added + 1, flags: WRITE };
                driver.add(&areas, &[raw], added + 1).unwrap();
                added += 1;
            }
            driver.publish(&areas);
            if driver.wants_kick(&areas) {
                _ = kick.try_send(());
            }
            let before = reaped;
            while let Some((_, written)) = driver.reap(&areas) {
                assert_eq!(written, reaped % 3);
                reaped += 1;
            }
            // Nothing came back: there is no room, or all was added.
            if reaped == before && driver.arm(&areas) {
                interrupted.recv_timeout(BOUND).expect("an interrupt is lost");
            }
        }
    });
}

#[test]
fn two_threads_lose_no_buffer_and_no_notification() {
    for (format, size) in [(Format::Split, 16), (Format::Packed, 13)] {
        for event_idx in [false, true] {
            for in_order in [false, true] {
                let features = RingFeatures { event_idx, in_order, indirect: false };
                two_threads(format, size, features, in_order);
            }
        }
    }
}

/// A device that holds interrupts back asks late. A driver that looks by itself meanwhile, and asks
/// for no other interrupt, is owed the one that it has asked for, however many laps that is ago.
#[test]
fn an_interrupt_is_owed_for_any_number_of_laps() {
    for (format, size) in [(Format::Split, 2), (Format::Packed, 1), (Format::Packed, 3)] {
        let layout = Layout {
            format,
            size,
            descriptors: DESCRIPTORS,
            driver_area: DRIVER_AREA,
            device_area: DEVICE_AREA,
        };
        let features = RingFeatures { event_idx: true, ..RingFeatures::default() };
        let start = Position::start(format);
        let shape = Shape { layout, features, start, scattered: false, skew: 0 };
        let buffer = Buffer { parts: vec![(Part { addr: 0, len: 1 }, true)], direct: None };
        for buffers in 1..20 {
            let one = |_| {
                [
                    Op::Add(buffer.clone()),
                    Op::DriverPublish,
                    Op::Take(1),
                    Op::CompleteOldest(1),
                    Op::DevicePublish,
                    Op::Reap(1),
                ]
            };
            // What the queue does not know of the time before is asked first.
            let mut ops = Vec::from(one(0));
            ops.extend([Op::Notification, Op::DriverArm]);
            ops.extend((0..buffers).flat_map(one));
            ops.push(Op::Notification);
            run(&shape, &ops);
        }
    }
}

/// A driver behind an IOMMU maps a buffer, and perhaps its table, just before it makes it
/// available. A view that is older has neither. The device takes the buffer with a newer one.
#[test]
fn a_buffer_that_was_mapped_after_the_view_is_taken_later() {
    const LATE: u64 = PAGES * PAGE;
    const NOWHERE: u64 = LATE + PAGE;
    let features = RingFeatures { indirect: true, ..RingFeatures::default() };
    let formats = [Format::Split, Format::Packed];
    // Where the buffer's table is, if it has one.
    for (format, table) in formats
        .into_iter()
        .flat_map(|format| [None, Some(TABLES), Some(LATE)].map(|table| (format, table)))
    {
        let layout = Layout {
            format,
            size: 8,
            descriptors: DESCRIPTORS,
            driver_area: DRIVER_AREA,
            device_area: DEVICE_AREA,
        };
        let memory = memory(false);
        let old = memory.view();
        let file = memfd_create("late", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, PAGE).unwrap();
        memory.map(LATE, PAGE, Some((file, 0)), Access::BOTH).unwrap();
        let new = memory.view();
        assert!(new.is_current() && !old.is_current());
        let areas = driver_areas(&layout, &new);
        let start = Position::start(format);
        let mut driver = Driver::new(format, 8, features, start, 0..8);
        driver.format(&areas);
        let mut offer = |raw: Raw, table: Option<u64>| {
            let raw = table.map_or(raw, |addr| {
                let words = [raw.addr.to_le_bytes(), raw.second_word(None).to_le_bytes()];
                // A table that is nowhere cannot be written.
                let _ = new.write(addr, words.as_flattened());
                Raw { addr, len: 16, flags: INDIRECT }
            });
            driver.add(&areas, &[raw], 0).unwrap();
            driver.publish(&areas);
        };
        let mut queue = Queue::new(layout, features).unwrap();
        let mut chain = Chain::new();
        let raw = |addr| Raw { addr, len: 64, flags: 0 };
        offer(raw(0x3000), None);
        offer(raw(LATE + 0x100), table);
        offer(raw(0x4000), None);
        let mut turn = queue.turn(&old).unwrap();
        assert_eq!(turn.next(&mut chain), Ok(true), "the old view has the first");
        turn.complete(&mut chain, 0);
        for _ in 0..2 {
            assert_eq!(turn.next(&mut chain), Ok(false), "{format:?} {table:x?}");
            assert_eq!(turn.arm(), Armed::Missed);
        }
        turn.publish();
        let mut turn = queue.turn(&new).unwrap();
        for addr in [LATE + 0x100, 0x4000] {
            assert_eq!(turn.next(&mut chain), Ok(true), "{format:?} {table:x?}");
            assert_eq!(chain.readable(), [Part { addr, len: 64 }]);
            turn.complete(&mut chain, 0);
        }
        // What no view has is no buffer to wait for.
        offer(raw(NOWHERE), None);
        assert_eq!(turn.next(&mut chain), Ok(true));
        turn.complete(&mut chain, 0);
        offer(raw(NOWHERE), Some(NOWHERE));
        assert_eq!(turn.next(&mut chain), Err(Violation::IndirectUnmapped));
        assert_eq!(turn.arm(), Armed::Waiting, "it is retired");
    }
}
