// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Signals that are not about a guarded range keep their effect. Each test ends a process of its
//! own, which is this program again.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use vbus_mapping::losses;

const SIGBUS: i32 = 7;

/// Runs the ignored test `name` in a process of its own, and returns the signal that ended it.
fn signal_of(name: &str) -> Option<i32> {
    let program = std::env::current_exe().unwrap();
    let name = format!("other_signals::{name}");
    let arguments = ["--ignored", "--exact", &name, "--test-threads=1"];
    Command::new(program).args(arguments).output().unwrap().status.signal()
}

#[test]
fn an_access_outside_of_the_ranges_ends_the_process() {
    assert_eq!(signal_of("accesses_other_memory"), Some(SIGBUS));
}

#[test]
#[ignore = "ends its process"]
fn accesses_other_memory() {
    losses().unwrap();
    let file = memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 4096).unwrap();
    // SAFETY: a fresh mapping.
    let base =
        unsafe { mmap(std::ptr::null_mut(), 4096, ProtFlags::READ, MapFlags::SHARED, &file, 0) };
    ftruncate(&file, 0).unwrap();
    // SAFETY: none. This raises the signal, which is what the test wants.
    unsafe { base.unwrap().cast::<u8>().read_volatile() };
}

#[test]
fn a_signal_that_somebody_sends_ends_the_process() {
    assert_eq!(signal_of("is_sent_a_signal"), Some(SIGBUS));
}

#[test]
#[ignore = "ends its process"]
fn is_sent_a_signal() {
    losses().unwrap();
    // SAFETY: the call is always allowed.
    unsafe { libc::kill(libc::getpid(), SIGBUS) };
}
