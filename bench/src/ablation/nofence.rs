// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Without fences: what they cost. (And without them a wake-up can be lost: see vbus-shm-model.)

#[path = "../../../crates/vbus-shm/src/memory.rs"]
pub mod memory;
#[path = "../../../crates/vbus-shm/src/ring.rs"]
pub mod ring;
#[path = "../../../crates/vbus-shm/src/signal.rs"]
pub mod signal;

pub mod sync {
    //! vbus-shm's, but for the fences.

    pub use vbus_shm::sync::{Edge, Fence, Ordering, Word, observe, prefetch, publish};

    #[inline(always)]
    pub fn fence(_: Fence) {
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
    }
}
