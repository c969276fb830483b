//! A complete device of one's own, with its driver: [`shout`]. `tests/shout.rs` runs them against
//! each other, through the bus, in two threads of one process that share no more than a socket and
//! a memory file.

pub mod shout;
