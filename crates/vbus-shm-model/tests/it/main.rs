//! Every model, whole and with each of its places taken out.
#![allow(clippy::unwrap_used)] // Of a test as a whole.

mod harness;
mod kill;
mod pic;
mod ring;
mod signal;
mod state;
