// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The functions of `shim/pic.c`, as `shim/pic.h` declares and describes them.
#![allow(unsafe_code, reason = "declarations of C")]

use core::ffi::c_void;

unsafe extern "C" {
    pub fn shim_sources_lock();
    pub fn shim_sources_unlock();

    pub fn shim_pic_new(pci: *mut c_void, lines: u32, data: *mut c_void) -> *mut c_void;
    pub fn shim_pic_free(pic: *mut c_void);
    pub fn shim_pic_map(pic: *mut c_void, line: u32) -> u32;
    pub fn shim_pic_unmap(number: u32);
    pub fn shim_pic_handle(pic: *mut c_void, line: u32) -> bool;
    pub fn shim_mask_has(mask: *const c_void, cpu: u32) -> bool;
}
