//! Ends that end before an access to shared memory, as if their process had been killed.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// What an end unwinds with that may make no more accesses.
struct Killed;

/// Runs `life`. `None` if it was killed.
pub fn mortal<T>(life: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(life)) {
        Ok(value) => Some(value),
        Err(reason) if reason.is::<Killed>() => None,
        Err(reason) => resume_unwind(reason),
    }
}

/// The accesses that are left after one more; kills if there is none. `None` is any number.
pub fn one_less(left: Option<u32>) -> Option<u32> {
    match left {
        Some(0) => resume_unwind(Box::new(Killed)),
        left => left.map(|left| left - 1),
    }
}
