// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The hand-over of tasks to a worker that may sleep, under a model checker. The worker never
//! sleeps while something waits for it. The model fails without the mutex.

#[path = "../../src/hand_over.rs"]
mod hand_over;

mod sync {
    use std::ops::{Deref, DerefMut};
    use std::sync::atomic::{AtomicBool, Ordering};

    /// The mutex excludes nobody: each thread changes a copy, and puts it back at the end.
    pub static TAKEN_OUT: AtomicBool = AtomicBool::new(false);

    pub struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Mutex<T> {
            Mutex(loom::sync::Mutex::new(value))
        }
    }

    pub enum Guard<'a, T: Clone> {
        Exclusive(loom::sync::MutexGuard<'a, T>),
        Copy(&'a Mutex<T>, T),
    }

    pub fn lock<T: Clone>(mutex: &Mutex<T>) -> Guard<'_, T> {
        let guard = mutex.0.lock().unwrap();
        match TAKEN_OUT.load(Ordering::Relaxed) {
            false => Guard::Exclusive(guard),
            true => Guard::Copy(mutex, guard.clone()),
        }
    }

    impl<T: Clone> Deref for Guard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            match self {
                Guard::Exclusive(guard) => guard,
                Guard::Copy(_, value) => value,
            }
        }
    }

    impl<T: Clone> DerefMut for Guard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            match self {
                Guard::Exclusive(guard) => guard,
                Guard::Copy(_, value) => value,
            }
        }
    }

    impl<T: Clone> Drop for Guard<'_, T> {
        fn drop(&mut self) {
            if let Guard::Copy(mutex, value) = self {
                *mutex.0.lock().unwrap() = value.clone();
            }
        }
    }
}

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;

use hand_over::{HandOver, Next};
use loom::sync::Arc;
use loom::thread;

use crate::alone::alone;

/// Two threads give a worker one task each. When all have ended, the worker has done both, or was
/// kicked after it had gone to sleep and finds the rest.
fn model() {
    loom::model(|| {
        let queue = Arc::new(HandOver::new());
        let givers = [1, 2].map(|task| {
            let queue = queue.clone();
            thread::spawn(move || queue.push(task))
        });
        let (mut done, mut round, mut asleep) = (0, Vec::new(), false);
        for _ in 0..2 {
            match queue.take(&mut round) {
                Next::Work => done += round.drain(..).sum::<u32>(),
                Next::Sleep => asleep = true,
                Next::End => panic!("nobody has ended it"),
            }
            if asleep {
                break;
            }
        }
        let kicks = givers.map(|giver| giver.join().unwrap());
        if done < 3 {
            assert!(!asleep || kicks.contains(&true), "it sleeps, and a task waits");
            queue.wakes();
            assert_eq!(queue.take(&mut round), Next::Work);
            done += round.drain(..).sum::<u32>();
        }
        assert_eq!(done, 3, "each task is done once");
        assert_eq!(queue.take(&mut round), Next::Sleep);
        queue.stop();
        assert_eq!(queue.take(&mut round), Next::End);
    });
}

/// One test for both cases, because the setting belongs to the process.
#[test]
fn holds_and_fails_without_its_mutex() {
    alone("hand_over_model::holds_and_fails_without_its_mutex", all_cases);
}

fn all_cases() {
    model();
    sync::TAKEN_OUT.store(true, Relaxed);
    let result = catch_unwind(AssertUnwindSafe(model));
    sync::TAKEN_OUT.store(false, Relaxed);
    assert!(result.is_err(), "the model does not notice that the mutex is missing");
}
