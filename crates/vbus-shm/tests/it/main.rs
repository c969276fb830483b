//! Both ends of each layout against plain models, against a hostile peer, and against a peer in C.
#![allow(clippy::unwrap_used)] // Of a test as a whole.

#[cfg(target_os = "linux")]
#[allow(unsafe_code)] // Maps memory.
mod c_peer;
mod pic;
mod ring;
mod state;
