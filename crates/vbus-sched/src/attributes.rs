// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads and sets a thread's scheduling attributes in the kernel.
#![allow(unsafe_code)] // The two system calls have no safe wrapper.

use std::io;

use rustix::io::Errno;
use rustix::process::{Pid, setpriority_process};
use vbus_core::shm::abi::sched as abi;

use crate::policy::Setting;

/// The argument of `sched_getattr` and `sched_setattr`, in its first version, which every kernel
/// knows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const BYTES: u32 = 48;
const _: () = assert!(size_of::<Attributes>() == BYTES as usize);

/// Threads and processes that the thread creates do not inherit its class.
const RESET_ON_FORK: u64 = 1;

const OTHER: u32 = 0;
const FIFO: u32 = 1;
const RR: u32 = 2;
const BATCH: u32 = 3;
const IDLE: u32 = 5;

/// Reads the attributes of thread `tid`.
pub fn get(tid: i32) -> Result<Attributes, Errno> {
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes at most BYTES bytes to the structure, which has BYTES bytes.
    let result =
        unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attributes, BYTES, 0) };
    if result < 0 { Err(last_errno()) } else { Ok(attributes) }
}

/// Gives thread `tid` these attributes.
pub fn set(tid: i32, attributes: Attributes) -> Result<(), Errno> {
    let attributes = Attributes { size: BYTES, ..attributes };
    // SAFETY: the kernel only reads the structure. Its first field is its size.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const attributes, 0) };
    if result < 0 { Err(last_errno()) } else { Ok(()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

impl Attributes {
    /// These attributes, changed to `setting`.
    pub fn with(self, setting: Setting) -> Attributes {
        let policy = match setting.class {
            abi::CLASS_BATCH => BATCH,
            abi::CLASS_IDLE => IDLE,
            abi::CLASS_FIFO => FIFO,
            abi::CLASS_RR => RR,
            _ => OTHER,
        };
        let mut attributes = Attributes { policy, flags: RESET_ON_FORK, ..Attributes::default() };
        if setting.is_real_time() {
            attributes.priority = setting.priority.unsigned_abs();
        } else {
            attributes.nice = setting.priority;
            // Since Linux 6.12 this is the length of the time slice.
            attributes.runtime = if self.is_fair() { self.runtime } else { 0 };
        }
        attributes
    }

    fn is_fair(self) -> bool {
        matches!(self.policy, OTHER | BATCH | IDLE)
    }

    /// Whether setting these attributes sets the nice value too. The other classes keep a nice
    /// value, but it has no effect.
    fn has_nice(self) -> bool {
        matches!(self.policy, OTHER | BATCH)
    }

    /// Whether a thread that was given these attributes still has them; `now` are its present ones.
    /// The kernel does not return all fields as they were set.
    pub fn is_still(self, now: Attributes) -> bool {
        (self.policy, self.priority) == (now.policy, now.priority)
            && (!self.has_nice() || self.nice == now.nice)
    }
}

/// Restores the own class of thread `tid`: `own`, and also `own_nice` if that class has no nice
/// value in effect.
pub fn restore(tid: i32, own: Attributes, own_nice: i32) -> Result<(), Errno> {
    match set(tid, own) {
        // Only a process with CAP_SYS_NICE may clear this flag.
        Err(Errno::PERM) => set(tid, Attributes { flags: own.flags | RESET_ON_FORK, ..own })?,
        result => result?,
    }
    if !own.has_nice() {
        setpriority_process(Pid::from_raw(tid), own_nice)?;
    }
    Ok(())
}
