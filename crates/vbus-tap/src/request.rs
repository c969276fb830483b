// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The argument of interface ioctls.
#![allow(unsafe_code)] // ioctl.

use std::os::fd::AsFd;

use rustix::io;
use rustix::ioctl::{Opcode, Updater, ioctl};

/// `struct ifreq` of the kernel: the name of an interface, and a union of 24 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Request {
    name: [u8; 16],
    /// The union.
    pub value: [u8; 24],
}

impl Request {
    /// A request for interface `name` (cut to 15 bytes) with these first bytes of the union.
    pub fn new(name: &str, value: &[u8]) -> Request {
        let mut request = Request { name: [0; 16], value: [0; 24] };
        let len = name.len().min(15);
        request.name[..len].copy_from_slice(&name.as_bytes()[..len]);
        request.value[..value.len()].copy_from_slice(value);
        request
    }

    /// The name. The kernel may have changed it.
    pub fn name(&self) -> String {
        let len = self.name.iter().position(|b| *b == 0).unwrap_or(self.name.len());
        String::from_utf8_lossy(&self.name[..len]).into_owned()
    }

    /// Performs the ioctl `OPCODE`, which takes a pointer to an ifreq.
    pub fn perform<const OPCODE: Opcode>(&mut self, fd: impl AsFd) -> io::Result<()> {
        // SAFETY: every opcode that this crate uses here takes a pointer to an ifreq, and writes
        // nothing beyond it.
        unsafe { ioctl(fd, Updater::<OPCODE, Request>::new(self)) }
    }
}
