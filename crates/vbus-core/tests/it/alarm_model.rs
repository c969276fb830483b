// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The watchdog's rest under a model checker. Whoever waits for the next thread that wakes misses
//! none. The model fails without the fences.

#[path = "../../src/alarm_flag.rs"]
mod alarm_flag;

mod sync {
    pub use loom::sync::atomic::{AtomicBool, Ordering};

    use std::sync::atomic::AtomicBool as Setting;

    /// Whether the model lacks the fences.
    pub static TAKEN_OUT: Setting = Setting::new(false);

    pub fn full_fence() {
        if !TAKEN_OUT.load(Ordering::Relaxed) {
            loom::sync::atomic::fence(Ordering::SeqCst);
        }
    }
}

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;

use loom::sync::Arc;
use loom::sync::atomic::AtomicBool;
use loom::thread;

use crate::alone::alone;

/// A thread wakes while the waiter decides whether to wait.
fn model() {
    loom::model(|| {
        let flag = Arc::new(alarm_flag::AlarmFlag::new());
        let awake = Arc::new(AtomicBool::new(false));
        let worker = {
            let (flag, awake) = (flag.clone(), awake.clone());
            thread::spawn(move || {
                awake.store(true, Relaxed);
                flag.ring()
            })
        };
        flag.set();
        let seen = awake.load(Relaxed);
        if seen {
            flag.unset();
        }
        let rung = worker.join().unwrap();
        assert!(seen || rung, "the waiter sleeps while the thread is awake");
    });
}

/// One test for both cases, because the setting belongs to the process.
#[test]
fn holds_and_fails_without_its_fences() {
    alone("alarm_model::holds_and_fails_without_its_fences", all_cases);
}

fn all_cases() {
    model();
    sync::TAKEN_OUT.store(true, Relaxed);
    let result = catch_unwind(AssertUnwindSafe(model));
    sync::TAKEN_OUT.store(false, Relaxed);
    assert!(result.is_err(), "the model does not notice that the fences are missing");
}
