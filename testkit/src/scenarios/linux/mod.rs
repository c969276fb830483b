// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Scenarios with the Linux driver, the kernel module `vbus`.

mod copybreak;
pub(super) mod liars;
pub(super) mod lives;
pub(super) mod load;
pub(super) mod memory;
pub(super) mod net;
pub(super) mod pic;
pub(super) mod restart;
pub(super) mod sched;
pub(super) mod state;
pub(super) mod tap;
