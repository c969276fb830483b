// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An interrupt page against a plain model: sets and a stack.

use std::collections::BTreeSet;

use proptest::prelude::*;
use vbus_shm::pic::{DeviceEnd, DriverEnd, Nesting, PAGE_BYTES, Wanted};
use vbus_shm::sync::{Ordering, Word};

#[derive(Clone, Copy, Debug)]
enum Op {
    Raise(u16),
    TakeBack(u16),
    Take,
    /// The line in service with this index. 0 is the most urgent one.
    End(usize),
    Mask(u16),
    Unmask(u16),
    Arm,
    Disarm,
}

fn op(lines: u16) -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..lines + 1).prop_map(Op::Raise),
        1 => (0..lines + 1).prop_map(Op::TakeBack),
        5 => Just(Op::Take),
        4 => (0..2_usize).prop_map(Op::End),
        1 => (0..lines + 1).prop_map(Op::Mask),
        2 => (0..lines + 1).prop_map(Op::Unmask),
        1 => Just(Op::Arm),
        1 => Just(Op::Disarm),
    ]
}

/// The state that the page should have.
struct Model {
    lines: u16,
    nesting: Nesting,
    pending: BTreeSet<u16>,
    masked: BTreeSet<u16>,
    in_service: BTreeSet<u16>,
    /// The lowest line that wants a message, unless the device has sent one for this level.
    level: u16,
    told: bool,
}

impl Model {
    fn floor(&self) -> u16 {
        self.in_service.last().map_or(0, |line| line + 1)
    }

    fn best(&self) -> Option<u16> {
        self.pending.range(self.floor()..).rev().find(|line| !self.masked.contains(line)).copied()
    }

    fn publish(&mut self, level: u16) {
        (self.level, self.told) = (level, false);
    }

    fn raise(&mut self, line: u16) -> bool {
        if line >= self.lines
            || !self.pending.insert(line)
            || line < self.level
            || self.masked.contains(&line)
        {
            return false;
        }
        !std::mem::replace(&mut self.told, true)
    }

    fn take(&mut self) -> Option<u16> {
        let Some(line) = self.best() else {
            self.publish(self.floor());
            return None;
        };
        let level = if self.nesting == Nesting::Nested { line + 1 } else { self.lines };
        if level != self.level {
            self.publish(level);
        }
        self.pending.remove(&line);
        self.in_service.insert(line);
        Some(line)
    }
}

proptest! {
    #[test]
    fn a_page_behaves_like_the_model(
        (lines, nested, ops) in (1..=256_u16, any::<bool>())
            .prop_flat_map(|(lines, nested)| {
                (Just(lines), Just(nested), prop::collection::vec(op(lines), 0..200))
            })
    ) {
        let memory: Vec<Word> = (0..PAGE_BYTES / 8).map(|_| Word::new(0)).collect();
        let nesting = if nested { Nesting::Nested } else { Nesting::Flat };
        let mut driver = DriverEnd::create(&memory[..], lines, nesting).unwrap();
        let device = DeviceEnd::attach(&memory[..]).unwrap();
        let none = BTreeSet::new;
        let mut model = Model {
            lines,
            nesting,
            pending: none(),
            masked: none(),
            in_service: none(),
            level: lines,
            told: false,
        };
        for op in ops {
            match op {
                Op::Raise(line) => {
                    prop_assert_eq!(device.raise(line).is_wanted(), model.raise(line));
},
                Op::TakeBack(line) => {
                    prop_assert_eq!(device.take_back(line), model.pending.remove(&line));
                }
                Op::Take => prop_assert_eq!(driver.take(), model.take()),
                Op::End(index) => {
                    if let Some(line) = model.in_service.iter().rev().nth(index).copied() {
                        model.in_service.remove(&line);
                        driver.end(line);
                    }
                }
                Op::Mask(line) => {
                    driver.mask(line);
                    model.masked.insert(line);
                }
                Op::Unmask(line) => {
                    model.masked.remove(&line);
                    let pending = model.pending.contains(&line) && line >= model.floor();
                    prop_assert_eq!(driver.unmask(line) == Wanted::Pending, pending);
                }
                Op::Arm => {
                    model.publish(model.floor());
                    prop_assert_eq!(driver.arm() == Wanted::Pending, model.best().is_some());
                }
                Op::Disarm => {
                    driver.disarm();
                    model.publish(lines);
                }
            }
        }
    }

    #[test]
    fn any_words_in_a_page_are_harmless(
        lines in 1..=256_u16,
        writes in prop::collection::vec((0..PAGE_BYTES / 8, any::<u64>(), 0..300_u16), 0..100),
    ) {
        let memory: Vec<Word> = (0..PAGE_BYTES / 8).map(|_| Word::new(0)).collect();
        let mut driver = DriverEnd::create(&memory[..], lines, Nesting::Nested).unwrap();
        let device = DeviceEnd::attach(&memory[..]).unwrap();
        for (at, value, line) in writes {
            memory[at].store(value, Ordering::Relaxed);
            let _ = (device.raise(line), device.take_back(line ^ 1));
            driver.mask(line ^ 2);
            let _ = driver.unmask(line ^ 3);
            if let Some(line) = driver.take() {
                prop_assert!(line < lines);
                driver.end(line);
            }
        }
    }
}
