// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keeps an idle virtual machine of KVM while this program runs.
#![allow(unsafe_code)] // The standard library has no ioctl.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `KVM_CREATE_VM`.
const CREATE_VM: u64 = 0xae01;

unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, ...) -> i32;
}

/// Makes the virtual machine, prints `held`, and keeps it until this program ends.
pub fn hold() -> io::Result<()> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    // SAFETY: the call takes a number and returns a descriptor. It touches no memory.
    if unsafe { ioctl(kvm.as_raw_fd(), CREATE_VM, 0u64) } < 0 {
        return Err(io::Error::last_os_error());
    }
    println!("held");
    loop {
        std::thread::park();
    }
}
