// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The text of an attribute of sysfs.
#![allow(unsafe_code, reason = "writes a page of the kernel")]

use core::ffi::{c_long, c_ulong};
use core::fmt;

use super::errno::Errno;
use super::log::Text;

pub use super::ffi::{
    SHOW_CLASS, SHOW_COSTS, SHOW_DOORBELL, SHOW_INCARNATION, SHOW_INTERRUPTS, SHOW_NAME,
};

/// Bytes of a text at most.
const BYTES: usize = 256;

/// Puts the text that `write` writes into `out`. Returns its bytes, or a negative error number.
///
/// # Safety
/// There is room for `bytes` bytes.
pub unsafe fn show(
    out: *mut u8,
    bytes: c_ulong,
    write: impl FnOnce(&mut dyn fmt::Write) -> Result<(), Errno>,
) -> c_long {
    let mut text = Text::<BYTES>::new(format_args!(""));
    if let Err(error) = write(&mut text) {
        return c_long::from(error.negative());
    }
    let from = text.as_bytes();
    let length = from.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
    // SAFETY: there is room by the caller's promise, and the text is elsewhere.
    unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), out, length) };
    // There are few bytes.
    length as c_long
}
