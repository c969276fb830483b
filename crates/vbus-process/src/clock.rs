// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Time for a [`Hal`](vbus_driver::Hal) on Linux.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use vbus_driver::COMMAND_BOUND;

/// Nanoseconds of the monotonic clock. For [`Hal::now`](vbus_driver::Hal::now).
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs().wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec.unsigned_abs())
}

/// Sleeps while a command runs that the driver has waited for since `waited` nanoseconds. The pause
/// grows with that time, so that a long command causes few reads of registers. Returns false when
/// the command has taken longer than [`COMMAND_BOUND`]. For
/// [`Hal::pause`](vbus_driver::Hal::pause).
pub fn pause(waited: u64) -> bool {
    std::thread::sleep(Duration::from_nanos((waited / 4).clamp(10_000, 1_000_000)));
    waited < COMMAND_BOUND
}
