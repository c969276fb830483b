// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Time: reading it, and letting it pass.
#![allow(unsafe_code, reason = "calls the shim")]

use super::ffi;

/// Nanoseconds since the start, without the time in which the system sleeps. It never decreases.
pub fn now() -> u64 {
    // SAFETY: it has no conditions.
    unsafe { ffi::shim_now() }
}

/// Sleeps for `least` to `most` microseconds. The caller may sleep: it holds no spin lock and is no
/// interrupt.
pub fn sleep_micros(least: u32, most: u32) {
    // SAFETY: it has no other conditions.
    unsafe { ffi::shim_sleep(least, most) };
}
