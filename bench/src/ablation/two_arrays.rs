//! The form of ring that was not chosen.

#[path = "../../../crates/vbus-shm/src/memory.rs"]
mod memory;
#[path = "two_arrays_ring.rs"]
pub mod ring;
pub use vbus_shm::{signal, sync};
