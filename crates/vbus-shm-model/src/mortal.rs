// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ends that stop before an access to shared memory, as if their process had been killed.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// The panic of an end that may make no more accesses.
struct Killed;

/// Runs `life`. `None` if it was killed.
pub fn mortal<T>(life: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(life)) {
        Ok(value) => Some(value),
        Err(reason) if reason.is::<Killed>() => None,
        Err(reason) => resume_unwind(reason),
    }
}

/// Counts one access. `left` is how many the end may still make (`None`: any number). Kills the end
/// if there is none left.
pub fn one_less(left: Option<u32>) -> Option<u32> {
    match left {
        Some(0) => resume_unwind(Box::new(Killed)),
        left => left.map(|left| left - 1),
    }
}
