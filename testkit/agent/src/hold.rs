//! A virtual machine of KVM that does nothing, as long as this program runs.
#![allow(unsafe_code)] // The standard library has no ioctl.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `KVM_CREATE_VM`.
const CREATE_VM: u64 = 0xae01;

unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, ...) -> i32;
}

/// Makes it, says so, and keeps it until the end.
pub fn hold() -> io::Result<()> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    // SAFETY: Takes a number, and makes a descriptor.
    if unsafe { ioctl(kvm.as_raw_fd(), CREATE_VM, 0u64) } < 0 {
        return Err(io::Error::last_os_error());
    }
    println!("held");
    loop {
        std::thread::park();
    }
}
