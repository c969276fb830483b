// SPDX-License-Identifier: Apache-2.0 OR MIT
//! I/O ports that this driver has claimed.
#![allow(unsafe_code, reason = "calls the shim")]

use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

use super::ffi;

/// A range of I/O ports, or none yet. Nobody else's ports can be written by it.
pub struct Ports {
    /// The first port in the low half, the last one in the high half. 0: none.
    range: AtomicU32,
}

impl Ports {
    /// None.
    pub const fn new() -> Self {
        Self { range: AtomicU32::new(0) }
    }

    /// Claims the ports `first` to `last`, unless this has claimed some before. Returns whether
    /// they are this driver's now: not if anybody else has one of them.
    pub fn claim(&self, first: u16, last: u16) -> bool {
        if first == 0 || last < first || self.are_claimed() {
            return false;
        }
        // SAFETY: it has no conditions.
        let claimed = unsafe { ffi::shim_ports_claim(first, u32::from(last - first) + 1) };
        if claimed {
            self.range.store(u32::from(last) << 16 | u32::from(first), Ordering::Relaxed);
        }
        claimed
    }

    /// Whether ports were claimed.
    pub fn are_claimed(&self) -> bool {
        self.range.load(Ordering::Relaxed) != 0
    }

    /// Writes a byte to a port, if it was claimed.
    #[inline]
    pub fn write8(&self, port: u64, value: u8) {
        let (first, last) = self.range();
        let Ok(port) = u16::try_from(port) else { return };
        if first != 0 && first <= port && port <= last {
            // SAFETY: the port is this driver's.
            unsafe { ffi::shim_port_write8(port, value) };
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "the halves")]
    fn range(&self) -> (u16, u16) {
        let range = self.range.load(Ordering::Relaxed);
        (range as u16, (range >> 16) as u16)
    }
}

impl Default for Ports {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        let (first, last) = self.range();
        if first != 0 {
            // SAFETY: `claim` has claimed them, and nobody writes them any more.
            unsafe { ffi::shim_ports_release(first, u32::from(last - first) + 1) };
        }
    }
}

impl fmt::Debug for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ports({:x?})", self.range())
    }
}
