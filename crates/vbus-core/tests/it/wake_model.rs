// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The event loop's wake-up under a model checker. A poll sees everything that was written before
//! the wake-up. The model fails without either of the two orderings.

#[path = "../../src/wake.rs"]
mod wake;

mod sync {
    pub use loom::sync::atomic::AtomicBool;

    use std::sync::atomic::{AtomicU8, Ordering};

    /// The ordering that the model lacks. 0: none, 1: that of raise, 2: that of lower.
    pub static TAKEN_OUT: AtomicU8 = AtomicU8::new(0);

    pub enum Order {
        Raise,
        Lower,
    }

    impl Order {
        pub fn get(self) -> Ordering {
            match (self, TAKEN_OUT.load(Ordering::Relaxed)) {
                (Order::Raise, 1) | (Order::Lower, 2) => Ordering::Relaxed,
                (Order::Raise, _) => Ordering::Release,
                (Order::Lower, _) => Ordering::Acquire,
            }
        }
    }
}

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;

use loom::sync::Arc;
use loom::sync::atomic::AtomicU32;
use loom::thread;

use crate::alone::alone;

/// A worker with one queued task, and a waker. After both have ended, either the last poll has seen
/// the work, or the task is queued for another poll.
fn model() {
    loom::model(|| {
        let flag = Arc::new(wake::WakeFlag::new());
        let work = Arc::new(AtomicU32::new(0));
        assert!(flag.raise(), "the task's first wake-up queues it");
        let waker = {
            let (flag, work) = (flag.clone(), work.clone());
            thread::spawn(move || {
                work.store(1, Relaxed);
                flag.raise()
            })
        };
        flag.lower();
        let seen = work.load(Relaxed) == 1;
        let queued = waker.join().unwrap();
        assert!(seen || queued, "the work is unseen, and nobody will poll for it");
    });
}

/// One test for all three cases, because the setting belongs to the process.
#[test]
fn holds_and_fails_without_its_orderings() {
    alone("wake_model::holds_and_fails_without_its_orderings", all_cases);
}

fn all_cases() {
    model();
    for taken_out in [1, 2] {
        sync::TAKEN_OUT.store(taken_out, Relaxed);
        let result = catch_unwind(AssertUnwindSafe(model));
        sync::TAKEN_OUT.store(0, Relaxed);
        assert!(result.is_err(), "the model does not notice that ordering {taken_out} is missing");
    }
}
