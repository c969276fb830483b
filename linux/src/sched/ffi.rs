// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The functions of `shim/sched.c`, as `shim/sched.h` declares and describes them.
#![allow(unsafe_code, reason = "declarations of C")]

use core::ffi::{c_int, c_void};

/// A task, as the scheduler sees it: `struct shim_task`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Task {
    pub pid: u32,
    pub policy: u32,
    pub priority: i32,
    pub cpu: u32,
    pub kernel: bool,
    pub sleeps: bool,
}

unsafe extern "C" {
    pub fn shim_sched_new(data: *mut c_void) -> *mut c_void;
    pub fn shim_sched_start(hook: *mut c_void) -> c_int;
    pub fn shim_sched_free(hook: *mut c_void);
    pub fn shim_sched_renew_soon(hook: *mut c_void);
    pub fn shim_sched_renew_on(hook: *mut c_void, cpu: u32);
    pub fn shim_sched_task(pid: u32, task: *mut Task) -> bool;
    pub fn shim_sched_sleeping() -> bool;
    pub fn shim_sched_clock() -> u64;
}
