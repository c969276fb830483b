//! The back ends behind a front that is not `venet`: what a second front has to do, and no more.
#![allow(clippy::unwrap_used)] // A test may panic.

mod front;
mod media;
