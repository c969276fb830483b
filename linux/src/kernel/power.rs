// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The end of the system.
#![allow(unsafe_code, reason = "calls the shim")]

use super::ffi;

/// Whether the system goes down, or another kernel starts. From then on the driver unmaps nothing,
/// and frees nothing that a function can reach: an IOMMU that is a device itself may have been shut
/// down before, and would not answer. Nobody needs the memory any more.
pub fn goes_down() -> bool {
    // SAFETY: it has no conditions.
    unsafe { ffi::shim_goes_down() }
}
