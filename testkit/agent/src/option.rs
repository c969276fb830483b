// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Options of sockets that the standard library does not set.
#![allow(unsafe_code)] // A function of the C library.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

unsafe extern "C" {
    fn setsockopt(fd: c_int, level: c_int, name: c_int, value: *const c_void, bytes: u32) -> c_int;
}

/// Sets an option of a socket, by its level and its name.
pub fn set(socket: &impl AsFd, (level, name): (c_int, c_int), value: &[u8]) -> io::Result<()> {
    let bytes = u32::try_from(value.len()).map_err(io::Error::other)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the value has as many bytes, and the kernel copies them during the call.
    let result = unsafe { setsockopt(fd, level, name, value.as_ptr().cast(), bytes) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
