// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same sources over words that count their accesses. A test can stop an end before any of its
//! accesses, as if its process had been killed.

#[path = "../../vbus-shm/src/copy.rs"]
mod copy;
#[path = "../../vbus-shm/src/ledger.rs"]
pub mod ledger;
#[path = "../../vbus-shm/src/memory.rs"]
pub mod memory;
#[path = "../../vbus-shm/src/ring.rs"]
pub mod ring;
#[path = "../../vbus-shm/src/signal.rs"]
pub mod signal;
#[path = "../../vbus-shm/src/state.rs"]
pub mod state;
#[path = "counted_sync.rs"]
pub mod sync;
#[path = "wide.rs"]
mod wide;
