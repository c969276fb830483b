//! The protocols of `vbus-shm` under a model checker.
//!
//! The modules are the real sources, compiled a second time over a [`sync`] made of loom's atomics,
//! in which each named fence, release and acquire can be taken out. The tests show that the
//! protocols hold in every interleaving and every outcome of the memory model that loom explores,
//! and that they fail as soon as one of these places is missing.
//!
//! [`steps`] is the same sources once more, for tests in which an end ends before any access.

#![allow(clippy::duplicate_mod, reason = "over other words")]

#[path = "../../vbus-shm/src/copy.rs"]
mod copy;
#[path = "../../vbus-shm/src/ledger.rs"]
pub mod ledger;
#[path = "../../vbus-shm/src/memory.rs"]
pub mod memory;
mod mortal;
#[path = "../../vbus-shm/src/pic.rs"]
pub mod pic;
#[path = "../../vbus-shm/src/ring.rs"]
pub mod ring;
#[path = "../../vbus-shm/src/signal.rs"]
pub mod signal;
#[path = "../../vbus-shm/src/state.rs"]
pub mod state;
pub mod steps;
pub mod sync;
mod wide;
