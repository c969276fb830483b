// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Scenarios with the Linux driver, the kernel module `vbus`.

pub(super) mod load;
pub(super) mod state;
