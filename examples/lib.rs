//! A complete device of one's own, with its driver: [`shout`]. The same device without the help of
//! `vbus_core::service`, with a ring of its own: [`shout_by_hand`]. `tests/shout.rs` runs them
//! against each other, through the bus, in two threads of one process that share no more than a
//! socket and a memory file.

pub mod shout;
pub mod shout_by_hand;
