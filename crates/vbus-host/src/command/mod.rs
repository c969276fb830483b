// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The commands other than `vbus serve`.

pub mod config;
pub mod device;
pub mod qemu_args;
pub mod reload;
pub mod snapshot;
pub mod state;
pub mod stats;
pub mod top;
