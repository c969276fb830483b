// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The functions of `shim/state.c`, as `shim/state.h` declares and describes them.
#![allow(unsafe_code, reason = "declarations of C")]

use core::ffi::{c_int, c_uint, c_void};

/// An attribute of a page.
pub const STATE_OWNER: c_uint = 0;
/// An attribute of a page.
pub const STATE_BYTES: c_uint = 1;
/// An attribute of a page.
pub const STATE_NUMBER: c_uint = 2;
/// An attribute of a page.
pub const STATE_PAGE: c_uint = 3;

/// What is ready at a poll.
pub const POLL_IN: u32 = 1;
/// What is ready at a poll.
pub const POLL_OUT: u32 = 2;
/// What is ready at a poll.
pub const POLL_GONE: u32 = 4;

unsafe extern "C" {
    pub fn shim_folder_new(
        pci: *mut c_void,
        name: *const u8,
        bytes: u64,
        error: *mut c_int,
    ) -> *mut c_void;
    pub fn shim_folder_free(folder: *mut c_void);
    pub fn shim_node_new(
        folder: *mut c_void,
        name: *const u8,
        bytes: u64,
        mode: c_uint,
        page: *mut c_void,
        error: *mut c_int,
    ) -> *mut c_void;
    pub fn shim_node_free(node: *mut c_void);
    pub fn shim_node_wake(node: *mut c_void);
    pub fn shim_node_unmap(node: *mut c_void);

    pub fn shim_copy_to_user(user: *mut c_void, from: *const c_void, bytes: u64) -> c_int;
    pub fn shim_copy_from_user(to: *mut c_void, user: *const c_void, bytes: u64) -> c_int;
    pub fn shim_fault_insert(fault: *mut c_void, place: *const c_void, shared: bool) -> u32;
    pub fn shim_pages_new(bytes: u64) -> *mut c_void;
    pub fn shim_pages_free(memory: *mut c_void);
}
