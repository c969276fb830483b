// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Each end tells a memory that keeps a log of every word in which it stores, and of hardly any
//! other: after each call of a device's end, the words that differ from before are among those that
//! it named.

use std::cell::RefCell;

use proptest::prelude::*;
use vbus_shm::memory::Memory;
use vbus_shm::ring::{DeviceEnd, DriverEnd, Entry, Layout, Return, Returns};
use vbus_shm::signal::{self, Receiver, Sender, end};
use vbus_shm::sync::{Ordering, Word};
use vbus_shm::{ledger, pic, state};

use crate::ring::start;

/// Memory that compares what an end says with what it did.
struct Watched {
    words: Vec<Word>,
    seen: RefCell<Seen>,
}

struct Seen {
    /// The words as they were.
    before: Vec<u64>,
    /// The words that an end has named since.
    named: Vec<bool>,
}

impl Memory for &Watched {
    fn words(&self) -> &[Word] {
        &self.words
    }

    fn is_logged(&self) -> bool {
        true
    }

    fn wrote(&self, first: usize, count: usize) {
        self.seen.borrow_mut().named[first..first + count].fill(true);
    }
}

impl Watched {
    fn new(words: usize) -> Watched {
        let seen = Seen { before: vec![0; words], named: vec![false; words] };
        Watched { words: (0..words).map(|_| Word::new(0)).collect(), seen: RefCell::new(seen) }
    }

    /// The driver has stored, of which nobody keeps a log.
    fn forget(&self) {
        self.look(|_, _, _| ());
    }

    /// Calls `each` with every word: its index, whether it has changed, and whether it was named.
    fn look(&self, mut each: impl FnMut(usize, bool, bool)) {
        let seen = &mut *self.seen.borrow_mut();
        for (at, word) in self.words.iter().enumerate() {
            let now = word.load(Ordering::Relaxed);
            each(at, now != seen.before[at], seen.named[at]);
            (seen.before[at], seen.named[at]) = (now, false);
        }
    }

    /// A device's end has had a call. It may name `most` words.
    fn check(&self, what: &str, most: usize) {
        let mut named = 0;
        self.look(|at, changed, is_named| {
            assert!(is_named || !changed, "{what}: word {at} was stored and is not in the log");
            named += usize::from(is_named);
        });
        assert!(named <= most, "{what}: {named} words in the log, at most {most} were stored");
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    /// The driver submits so many, and posts.
    Submit(u8),
    Reap,
    Take(u8),
    GiveBack(u8),
    GiveBackAll(u8),
    ServeAll(u8),
    Post,
    Arm,
    Disarm,
    Resume,
}

fn op() -> impl Strategy<Value = Op> {
    let batch = || prop_oneof![3 => Just(1), 2 => 0..20_u8, 1 => 30..70_u8];
    prop_oneof![
        6 => batch().prop_map(Op::Submit),
        6 => Just(Op::Reap),
        4 => batch().prop_map(Op::Take),
        4 => batch().prop_map(Op::GiveBack),
        4 => batch().prop_map(Op::GiveBackAll),
        6 => batch().prop_map(Op::ServeAll),
        4 => Just(Op::Post),
        1 => Just(Op::Arm),
        1 => Just(Op::Disarm),
        1 => Just(Op::Resume),
    ]
}

fn entry(n: u16) -> Entry {
    Entry { addr: u64::from(n) << 12, len: u32::from(n) * 7 + 1, id: n, flags: 0 }
}

fn back(n: u16) -> Return {
    Return { len: u32::from(n) * 3 + 1, id: n, flags: 0 }
}

fn a_ring_names_what_it_stores(layout: Layout, start: u64, ops: Vec<Op>) {
    let memory = Watched::new(layout.words());
    let mut driver = DriverEnd::create(&memory.words[..], layout, start).unwrap();
    memory.forget();
    let mut device = DeviceEnd::attach(&memory).unwrap();
    memory.check("attach", 0);
    let mut number = 0;
    for op in ops {
        let what = format!("{op:?}");
        // A slot has two words, and two lengths have one. Beside them: the position of what is
        // returning, `seq` and `arm`, and the words at the ends of the lengths.
        let most = |returns: usize| 3 * returns + 6;
        match op {
            Op::Submit(n) => {
                for _ in 0..n {
                    number = (number + 1) % 1000;
                    if driver.submit(entry(number)).is_err() {
                        break;
                    }
                }
                let _ = driver.post();
                memory.forget();
            }
            Op::Reap => {
                while driver.reap().unwrap().is_some() {}
                memory.forget();
            }
            Op::Take(n) => {
                device.take_all(n.into(), |_| ()).unwrap();
                memory.check(&what, 0);
            }
            Op::GiveBack(n) => {
                for i in 0..n {
                    device.give_back(back(i.into()));
                    // A run may become long here, and goes out as a whole.
                    memory.check(&what, most(32));
                }
            }
            Op::GiveBackAll(n) => {
                device.give_back_all((0..n.into()).map(back));
                memory.check(&what, most(n.into()) + most(32));
            }
            Op::ServeAll(n) => {
                let served = device.serve_all(n.into(), |entry| Some(entry.into())).unwrap();
                memory.check(&what, most(served as usize) + most(32));
            }
            Op::Post => {
                let _ = device.post();
                memory.check(&what, most(32));
            }
            Op::Arm => {
                let _ = device.arm(1);
                memory.check(&what, 1);
            }
            Op::Disarm => {
                device.disarm();
                memory.check(&what, 1);
            }
            Op::Resume => {
                (device, _) = DeviceEnd::resume(&memory).unwrap();
                memory.check(&what, signal::BLOCK_BYTES / 8);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn a_ring(
        log in 1..=6_u32,
        returns in prop_oneof![
            Just(Returns::Counted),
            Just(Returns::Entries),
            Just(Returns::Runs),
        ],
        start in start(),
        ops in prop::collection::vec(op(), 1..60),
    ) {
        a_ring_names_what_it_stores(Layout::new(1 << log, returns).unwrap(), start, ops);
    }

    #[test]
    fn a_state_page(
        bytes in 1..=300_u32,
        start in start(),
        values in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..350), 1..12),
    ) {
        let layout = state::Layout::new(bytes, 4).unwrap();
        let memory = Watched::new(layout.words());
        layout.format(&&memory.words[..], start).unwrap();
        memory.forget();
        let mut writer = state::Writer::attach(&memory, end::Device).unwrap();
        let most = layout.value_bytes().div_ceil(8) + 1;
        for value in values {
            let _ = writer.write(&value);
            memory.check("write", most);
            (writer, _) = state::Writer::resume(&memory, end::Device).unwrap();
            memory.check("resume", 1);
        }
        // The same page, read by a device.
        let mut reader = state::Reader::attach(&memory, end::Device).unwrap();
        reader.read(&mut [0; 400]).unwrap();
        memory.check("read", 0);
        let _ = reader.arm_newer(start);
        memory.check("arm_newer", 1);
        reader.disarm();
        memory.check("disarm", 1);
    }

    #[test]
    fn an_interrupt_page(lines in prop::collection::vec(0..256_u16, 1..40)) {
        let memory = Watched::new(pic::PAGE_BYTES / 8);
        let mut driver =
            pic::DriverEnd::create(&memory.words[..], 200, pic::Nesting::Flat).unwrap();
        memory.forget();
        let device = pic::DeviceEnd::attach(&memory).unwrap();
        for line in lines {
            let _ = device.raise(line);
            memory.check("raise", 1);
            device.take_back(line.wrapping_add(1) % 256);
            memory.check("take_back", 1);
            if line % 3 == 0 {
                if let Some(taken) = driver.take() {
                    driver.end(taken);
                }
                memory.forget();
            }
        }
    }

    #[test]
    fn a_ledger(ops in prop::collection::vec(0..4_u8, 1..60), start in start()) {
        let layout = Layout::new(8, Returns::Entries).unwrap();
        let (ring, list) = (Watched::new(layout.words()), Watched::new(ledger::bytes(8) / 8));
        let mut driver = DriverEnd::create(&ring.words[..], layout, start).unwrap();
        ledger::format(&&list.words[..], 8).unwrap();
        for n in 0..8 {
            driver.submit(entry(n)).unwrap();
        }
        let _ = driver.post();
        ring.forget();
        list.forget();
        let mut device = ledger::Ledger::attach(&ring, &list).unwrap();
        let mut held = Vec::new();
        for op in ops {
            match op {
                0 | 1 => held.extend(device.take().unwrap().map(|entry| entry.id)),
                2 => {
                    if let Some(id) = held.pop() {
                        device.give_back(back(id));
                        let _ = device.ring().post();
                    }
                }
                _ => {
                    (device, _) = ledger::Ledger::resume(&ring, &list).unwrap();
                }
            }
            let all = if op == 3 { list.words.len() } else { ledger::RECORD_BYTES / 8 + 1 };
            list.check("ledger", all);
            ring.check("ring of a ledger", 40);
        }
    }
}

#[test]
fn a_signal() {
    let memory = Watched::new(signal::BLOCK_BYTES / 8);
    signal::format(&&memory.words[..], 0, 7).unwrap();
    memory.forget();
    let mut sender = Sender::new(&memory, 0, end::Device, 7).unwrap();
    let mut receiver = Receiver::new(&memory, 0, end::Device).unwrap();
    let _ = sender.post(1);
    memory.check("post", 1);
    let _ = receiver.arm(7);
    memory.check("arm", 1);
    receiver.disarm();
    memory.check("disarm", 1);
    memory.words[signal::DEVICE_SEQ / 8].store(20, Ordering::Relaxed);
    memory.forget();
    let (mut sender, _) = Sender::resume(&memory, 0, end::Device).unwrap();
    memory.check("resume", 1);
    let _ = sender.post(2);
    memory.check("post", 1);
}
