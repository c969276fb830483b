// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log of written pages under a model checker: what a peer has copied by the log is what was
//! written last. The model fails without each of its orderings and fences, and with a mark before
//! the store.

#[path = "../../src/page_bits.rs"]
mod page_bits;

mod sync {
    pub use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use std::sync::atomic::AtomicU8;

    /// What the model lacks. 0: nothing. 1: the ordering of mark. 2: the ordering of take. 3: the
    /// fence of those who look at the switch. 4: the fence of the one who turns it on. 5: the mark
    /// comes before the store.
    pub static TAKEN_OUT: AtomicU8 = AtomicU8::new(0);

    pub fn lacks(what: u8) -> bool {
        TAKEN_OUT.load(Ordering::Relaxed) == what
    }

    pub enum Order {
        Mark,
        Take,
    }

    impl Order {
        pub fn get(self) -> Ordering {
            match self {
                Order::Mark if lacks(1) => Ordering::Relaxed,
                Order::Take if lacks(2) => Ordering::Relaxed,
                Order::Mark => Ordering::Release,
                Order::Take => Ordering::Acquire,
            }
        }
    }

    pub fn light_fence() {
        if !lacks(3) {
            loom::sync::atomic::fence(Ordering::SeqCst);
        }
    }

    pub fn heavy_fence() -> bool {
        if !lacks(4) {
            loom::sync::atomic::fence(Ordering::SeqCst);
        }
        true
    }
}

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;

use self::page_bits::{MarkSwitch, PageBits};
use crate::alone::alone;

/// A page, and its mark: bit 3 of its word. Bit 5 is of another page.
struct Shared {
    bits: PageBits,
    switch: MarkSwitch,
    page: AtomicU64,
}

impl Shared {
    fn new() -> Arc<Shared> {
        let (bits, switch) = (PageBits::new(), MarkSwitch::new());
        Arc::new(Shared { bits, switch, page: AtomicU64::new(0) })
    }

    /// A peer that copies the page if the log has it.
    fn report(&self, copy: &mut u64) {
        let taken = self.bits.take(1 << 3);
        assert_eq!(taken & !(1 << 3), 0, "only what was asked for");
        if taken != 0 {
            *copy = self.page.load(Relaxed);
        }
    }
}

/// A device writes the page twice and marks it. A peer looks in the log meanwhile, and once more at
/// the end.
fn marks() {
    loom::model(|| {
        let shared = Shared::new();
        let device = {
            let shared = shared.clone();
            thread::spawn(move || {
                for value in 1..=2 {
                    if sync::lacks(5) {
                        shared.bits.mark(1 << 3);
                        shared.page.store(value, Relaxed);
                    } else {
                        shared.page.store(value, Relaxed);
                        shared.bits.mark(1 << 3);
                    }
                }
                shared.bits.mark(1 << 5);
            })
        };
        let mut copy = 0;
        shared.report(&mut copy);
        shared.report(&mut copy);
        device.join().unwrap();
        shared.report(&mut copy);
        assert_eq!(copy, 2, "the last write is lost");
        assert_eq!(shared.bits.take(!0), 1 << 5, "a mark of another page stays");
    });
}

/// A device writes the page while the log is switched on. The peer then copies all pages.
fn switch() {
    loom::model(|| {
        let shared = Shared::new();
        let device = {
            let shared = shared.clone();
            thread::spawn(move || {
                shared.page.store(1, Relaxed);
                if shared.switch.is_on() {
                    shared.bits.mark(1 << 3);
                }
            })
        };
        assert!(shared.switch.on());
        let mut copy = shared.page.load(Relaxed);
        device.join().unwrap();
        shared.report(&mut copy);
        assert_eq!(copy, 1, "the write is neither visible nor marked");
    });
}

/// One test for all cases, because the setting belongs to the process.
#[test]
fn holds_and_fails_without_each_of_its_orders() {
    alone("page_bits_model::holds_and_fails_without_each_of_its_orders", all_cases);
}

fn all_cases() {
    let fails = |model: fn()| catch_unwind(AssertUnwindSafe(model)).is_err();
    marks();
    switch();
    let cases: [(u8, &str, fn()); 5] = [
        (1, "the ordering of mark", marks),
        (2, "the ordering of take", marks),
        (3, "the fence of those who look at the switch", switch),
        (4, "the fence of the one who turns it on", switch),
        (5, "the mark after the store", marks),
    ];
    for (case, name, model) in cases {
        sync::TAKEN_OUT.store(case, Relaxed);
        let failed = fails(model);
        sync::TAKEN_OUT.store(0, Relaxed);
        assert!(failed, "the model does not notice that it lacks {name}");
    }
}
