// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Maps files.
#![allow(unsafe_code)] // The standard library maps no memory.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::null_mut;

const PROT_READ: c_int = 1;
const PROT_WRITE: c_int = 2;
const MAP_SHARED: c_int = 1;

unsafe extern "C" {
    /// A function of the C library, which the standard library links.
    fn mmap(
        at: *mut c_void,
        bytes: usize,
        protection: c_int,
        flags: c_int,
        fd: RawFd,
        offset: i64,
    ) -> *mut c_void;
}

/// Maps `bytes` bytes of a file from `offset` on, shared with all others that have it. Nobody
/// unmaps them unless the caller does.
pub fn map(
    file: &impl AsRawFd,
    offset: u64,
    bytes: usize,
    writable: bool,
) -> io::Result<*mut c_void> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    let protection = if writable { PROT_READ | PROT_WRITE } else { PROT_READ };
    // SAFETY: the kernel chooses the address, so the map replaces nothing.
    let at = unsafe { mmap(null_mut(), bytes, protection, MAP_SHARED, file.as_raw_fd(), offset) };
    if at.addr() == usize::MAX {
        return Err(io::Error::last_os_error());
    }
    Ok(at)
}
