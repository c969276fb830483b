// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The programs `vbus` and `vbus-guest`, run as a user runs them.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod control;
mod descriptors;
mod full;
mod fuse;
mod guest;
mod hotplug;
mod keeper;
mod logs;
mod metrics;
mod plug;
mod plug_vmm;
mod reload;
mod rights;
mod sched;
mod serve;
mod snapshot;
mod state;
mod support;
mod take_over;
mod take_over_net;
mod top;
