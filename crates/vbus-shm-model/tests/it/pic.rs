// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that raise lines, and processors that sleep. A processor must not sleep while a line is
//! pending, and must see the data of a line with the line.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use vbus_shm_model::pic::{DeviceEnd, DriverEnd, Nesting, PAGE_BYTES, Wanted};
use vbus_shm_model::sync::{Edge, Fence, Place};

use crate::harness::{Kick, Shared, check, needs};

const LINES: u16 = 8;
const LOW: u16 = 2;
const HIGH: u16 = 5;

/// What the device has of a processor: its page, its interrupt, the count of messages, and the data
/// of each line.
#[derive(Clone)]
struct Target {
    page: Arc<DeviceEnd<Shared>>,
    message: Kick,
    messages: Arc<AtomicU64>,
    data: Arc<Vec<AtomicU64>>,
}

impl Target {
    fn raise(&self, line: u16) {
        self.data[usize::from(line)].fetch_add(1, Ordering::Relaxed);
        self.raise_again(line);
    }

    fn raise_again(&self, line: u16) {
        if self.page.raise(line).is_wanted() {
            self.messages.fetch_add(1, Ordering::Relaxed);
            self.message.kick();
        }
    }
}

/// A processor.
struct Cpu {
    page: DriverEnd<Shared>,
    target: Target,
    /// For each line, its data as the handler saw it last: how often the line was raised.
    seen: [u64; LINES as usize],
}

impl Cpu {
    fn new(nesting: Nesting, data: &Arc<Vec<AtomicU64>>) -> Cpu {
        let memory = Shared::new(PAGE_BYTES / 8);
        let page = DriverEnd::create(memory.clone(), LINES, nesting).unwrap();
        let target = Target {
            page: Arc::new(DeviceEnd::attach(memory).unwrap()),
            message: Kick::new(),
            messages: Arc::default(),
            data: data.clone(),
        };
        Cpu { page, target, seen: [0; LINES as usize] }
    }

    /// The handler of the message. It returns when `take` returns `None`. With `nest`, the handler
    /// of a lower line waits for the data of line `nest`. Only a message can end that wait.
    fn interrupt(&mut self, nest: Option<u16>) {
        while let Some(line) = self.page.take() {
            let at = usize::from(line);
            let data = self.target.data[at].load(Ordering::Relaxed);
            assert!(data > 0, "line {line} came before its data");
            self.seen[at] = data;
            if let Some(other) = nest.filter(|other| line < *other) {
                while self.seen[usize::from(other)] == 0 {
                    self.target.message.wait();
                    self.interrupt(None);
                }
            }
            self.page.end(line);
        }
    }
}

fn data() -> Arc<Vec<AtomicU64>> {
    Arc::new((0..LINES).map(|_| AtomicU64::new(0)).collect())
}

/// The processor sleeps until all of `raises` have come. One device raises them all. With
/// `together`, two devices raise one half each at the same time.
fn sleeping(nesting: Nesting, raises: &'static [u16], together: bool) {
    let data = data();
    let mut cpu = Cpu::new(nesting, &data);
    let mut wanted = cpu.page.arm();
    let raise = |lines: &'static [u16]| {
        let target = cpu.target.clone();
        thread::spawn(move || lines.iter().for_each(|line| target.raise(*line)))
    };
    let (first, second) = raises.split_at(if together { raises.len() / 2 } else { 0 });
    let others: Vec<_> =
        [first, second].into_iter().filter(|lines| !lines.is_empty()).map(raise).collect();
    let total = |line: u16| raises.iter().filter(|raised| **raised == line).count() as u64;
    while (0..LINES).any(|line| cpu.seen[usize::from(line)] < total(line)) {
        if wanted == Wanted::Waiting {
            cpu.target.message.wait();
        }
        cpu.interrupt(None);
        wanted = Wanted::Waiting;
    }
    others.into_iter().for_each(|other| other.join().unwrap());
    let messages = cpu.target.messages.load(Ordering::Relaxed);
    assert!(messages <= cpu.page.generation(), "{messages} messages");
}

/// The handler of the low line, with interrupts on, waits for the high one.
fn nested() {
    let data = data();
    let mut cpu = Cpu::new(Nesting::Nested, &data);
    assert_eq!(cpu.page.arm(), Wanted::Waiting);
    let device = thread::spawn({
        let target = cpu.target.clone();
        move || {
            target.raise(LOW);
            target.raise(HIGH);
        }
    });
    while cpu.seen[usize::from(LOW)] == 0 || cpu.seen[usize::from(HIGH)] == 0 {
        cpu.target.message.wait();
        cpu.interrupt(Some(HIGH));
    }
    device.join().unwrap();
}

/// The line is masked at first. The processor unmasks it and looks whether it became pending.
fn unmasking() {
    let data = data();
    let mut cpu = Cpu::new(Nesting::Nested, &data);
    cpu.page.mask(LOW);
    let _ = cpu.page.arm();
    let device = thread::spawn({
        let target = cpu.target.clone();
        move || target.raise(LOW)
    });
    let mut wanted = cpu.page.unmask(LOW);
    while cpu.seen[usize::from(LOW)] == 0 {
        if wanted == Wanted::Waiting {
            cpu.target.message.wait();
        }
        cpu.interrupt(None);
        wanted = Wanted::Waiting;
    }
    device.join().unwrap();
}

/// The line moves from one processor to another after it was raised. One of the two takes it, and
/// sees its data.
fn moving() {
    let data = data();
    let (mut old, mut new) = (Cpu::new(Nesting::Flat, &data), Cpu::new(Nesting::Flat, &data));
    let _ = (old.page.arm(), new.page.arm());
    let device = thread::spawn({
        let (old, new) = (old.target.clone(), new.target.clone());
        move || {
            old.raise(LOW);
            // This stands for another thread of the device, which has not seen the data.
            if old.page.take_back(LOW) {
                new.raise_again(LOW);
                true
            } else {
                false
            }
        }
    });
    // A spurious message may come to the old processor at any time.
    old.interrupt(None);
    let moved = device.join().unwrap();
    let cpu = if moved { &mut new } else { &mut old };
    while cpu.seen[usize::from(LOW)] == 0 {
        cpu.target.message.wait();
        cpu.interrupt(None);
    }
    let (old, new) = (old.seen[usize::from(LOW)], new.seen[usize::from(LOW)]);
    assert!(moved == (new > 0), "{old} and {new}");
}

/// A thread that takes a line back and raises it on another page passes on all that the raiser
/// wrote. If the bit is still set, the second raise sets it again and passes no fence. Then only
/// the release of its store publishes its data.
fn passing_on() {
    let data = data();
    let (old, mut new) = (Cpu::new(Nesting::Flat, &data), Cpu::new(Nesting::Flat, &data));
    let _ = new.page.arm();
    let raiser = thread::spawn({
        let old = old.target.clone();
        move || {
            old.raise(LOW);
            old.raise(LOW);
        }
    });
    let moved = old.target.page.take_back(LOW);
    if moved {
        new.target.raise_again(LOW);
        new.interrupt(None);
    }
    raiser.join().unwrap();
    if moved && !old.target.page.take_back(LOW) {
        assert_eq!(new.seen[usize::from(LOW)], 2, "a line came before its data");
    }
}

#[test]
fn no_processor_sleeps_while_a_line_is_pending() {
    for nesting in [Nesting::Flat, Nesting::Nested] {
        check(4, move || sleeping(nesting, &[LOW, HIGH], false));
        check(3, move || sleeping(nesting, &[HIGH, LOW, LOW], false));
    }
}

#[test]
fn two_devices_share_a_message() {
    for nesting in [Nesting::Flat, Nesting::Nested] {
        check(3, move || sleeping(nesting, &[LOW, HIGH], true));
        check(3, move || sleeping(nesting, &[LOW, LOW], true));
    }
}

#[test]
fn urgent_lines_interrupt_handlers() {
    check(4, nested);
}

#[test]
fn unmasking_finds_a_pending_line() {
    check(4, unmasking);
}

#[test]
fn lines_move_with_their_data() {
    check(3, moving);
    check(3, passing_on);
}

const FENCES: [Place; 2] = [Place::Fence(Fence::Raise), Place::Fence(Fence::Level)];
const EDGES: [Place; 2] = [Place::Publish(Edge::Line), Place::Observe(Edge::Line)];

// A full fence is also an acquire and a release in the model. So a test of the edges needs an end
// that passes no full fence.
#[test]
fn sleeping_needs_each_place() {
    needs(&FENCES, 3, || sleeping(Nesting::Flat, &[LOW, HIGH], false));
    needs(&EDGES, 3, || sleeping(Nesting::Flat, &[LOW, HIGH], false));
    needs(&FENCES, 3, || sleeping(Nesting::Nested, &[LOW, HIGH], false));
}

#[test]
fn sharing_a_line_needs_its_edges() {
    needs(&EDGES, 3, || sleeping(Nesting::Nested, &[LOW, LOW], true));
}

#[test]
fn nesting_needs_its_fences() {
    needs(&FENCES, 3, nested);
}

#[test]
fn unmasking_needs_its_fences() {
    needs(&[Place::Fence(Fence::Raise), Place::Fence(Fence::Unmask)], 3, unmasking);
}

#[test]
fn passing_on_needs_the_release() {
    needs(&[Place::Publish(Edge::Line)], 3, passing_on);
}
