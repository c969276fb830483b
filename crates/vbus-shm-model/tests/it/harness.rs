// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The parts that all models use: memory, kicks, and checks of a model whole or without a place.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use loom::sync::Notify;
use vbus_shm_model::memory::Memory;
use vbus_shm_model::sync::{Place, Word, remove};

/// Memory that loom's threads share.
#[derive(Clone)]
pub struct Shared(Arc<Vec<Word>>);

impl Shared {
    pub fn new(words: usize) -> Shared {
        Shared(Arc::new((0..words).map(|_| Word::new(0)).collect()))
    }
}

impl Memory for Shared {
    fn words(&self) -> &[Word] {
        &self.0
    }
}

/// A kick as an eventfd carries it. It lasts until a thread waits for it. A wait may also end
/// without a kick.
#[derive(Clone)]
pub struct Kick(Arc<Notify>);

impl Kick {
    pub fn new() -> Kick {
        Kick(Arc::new(Notify::new()))
    }

    pub fn kick(&self) {
        self.0.notify();
    }

    pub fn wait(&self) {
        self.0.wait();
    }
}

/// Explores all executions of `model` with up to `preemptions` preemptions: switches away from a
/// thread that could go on. A lost kick shows as a deadlock.
pub fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 10_000;
    builder.check(model);
}

/// Checks that `model` holds when it is whole. Then takes out each of `places` alone, and checks
/// that `model` fails by a lost wake-up or by one of its own assertions.
pub fn needs(
    places: &[Place],
    preemptions: usize,
    model: impl Fn() + Copy + Sync + Send + 'static,
) {
    check(preemptions, model);
    for &place in places {
        remove(Some(place));
        let outcome = catch_unwind(AssertUnwindSafe(|| check(preemptions, model)));
        remove(None);
        let failure = outcome.expect_err("the model should fail");
        let formatted = failure.downcast_ref::<String>().map(String::as_str);
        let message = formatted.or(failure.downcast_ref::<&str>().copied()).unwrap_or_default();
        println!("without {place:?}: {message}");
        let expected = ["deadlock", "before", "torn", "out of order", "missed"];
        assert!(
            expected.iter().any(|e| message.contains(e)),
            "without {place:?} it failed otherwise: {message}"
        );
    }
}
