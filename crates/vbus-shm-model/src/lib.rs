// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The protocols of `vbus-shm` under a model checker.
//!
//! The modules are the sources of `vbus-shm`, compiled a second time over another [`sync`], which
//! has loom's atomics. A test can take out each named fence, release and acquire there. The tests
//! show that the protocols hold in each interleaving and each outcome of the memory model that loom
//! explores. They also show that a protocol fails when one of its places is missing.
//!
//! [`steps`] has the same sources a third time, for tests in which an end ends before any access.

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
