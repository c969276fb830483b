//! Every model, whole and with each of its places taken out.
#![allow(clippy::unwrap_used)] // Of a test as a whole.

#[path = "model/harness.rs"]
mod harness;
#[path = "model/pic.rs"]
mod pic;
#[path = "model/ring.rs"]
mod ring;
#[path = "model/signal.rs"]
mod signal;
#[path = "model/state.rs"]
mod state;
