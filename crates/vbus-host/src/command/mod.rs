//! The commands that talk to a running bus.

pub mod config;
pub mod device;
pub mod qemu_args;
pub mod state;
pub mod stats;
