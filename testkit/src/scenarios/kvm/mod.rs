//! Scenarios beside a real KVM, in an L1 ([`Rig`](crate::rig::Rig)).

pub(super) mod config;
pub(super) mod counted;
pub(super) mod devices;
pub(super) mod doorbells;
mod exits;
pub(super) mod flat;
pub(super) mod liars;
pub(super) mod linux;
pub(super) mod net;
pub(super) mod pins;
pub(super) mod processors;
pub(super) mod sched;
