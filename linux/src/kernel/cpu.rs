// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The processors of the machine.
#![allow(unsafe_code, reason = "calls the shim")]

use super::ffi;

/// The processors of this machine have numbers below this, also those that may come.
pub fn numbers() -> u32 {
    // SAFETY: it has no conditions.
    unsafe { ffi::shim_cpus() }
}

/// Whether a processor is online.
pub fn is_online(cpu: u32) -> bool {
    // SAFETY: it has no conditions.
    unsafe { ffi::shim_cpu_online(cpu) }
}
