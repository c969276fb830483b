//! The class from end to end, against drivers in this process.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // A test may panic, and its numbers are small.

mod sched;
