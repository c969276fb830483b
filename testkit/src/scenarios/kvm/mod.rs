// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Scenarios on a real KVM, in an [`L1`](crate::l1::L1).

pub(super) mod against;
pub(super) mod config;
pub(super) mod counted;
pub(super) mod devices;
pub(super) mod doorbells;
pub(super) mod flat;
pub(super) mod liars;
pub(super) mod linux;
pub(super) mod moved;
pub(super) mod moves_fail;
pub(super) mod pic;
pub(super) mod pins;
pub(super) mod processors;
pub(super) mod sched;
pub(super) mod snapshot;
pub(super) mod vhost;
