// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The descriptor of `--ready-fd`.
#![allow(unsafe_code)] // The number of a descriptor comes from the command line.

use std::fs::File;
use std::io::Write;
use std::os::fd::{BorrowedFd, RawFd};

use anyhow::{Context, Result};
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// Where the bus reports that it is up.
pub struct Ready {
    file: File,
    number: u32,
}

impl Ready {
    /// Opens the descriptor `number`, before the process gives up the right to open anything. No
    /// process that this one starts inherits the descriptor.
    ///
    /// # Errors
    /// There is no such descriptor, or it is not for writing.
    pub fn open(number: u32) -> Result<Ready> {
        let open = || {
            let path = format!("/proc/self/fd/{number}");
            let file = File::options().write(true).open(path)?;
            let raw = RawFd::try_from(number).map_err(std::io::Error::other)?;
            // SAFETY: the number was open just now, and the process has one thread yet, so it still
            // is. If it were not, the calls would fail.
            let inherited = unsafe { BorrowedFd::borrow_raw(raw) };
            // The standard descriptors of a process that this one starts are set apart from this.
            if raw > 2 {
                fcntl_setfd(inherited, fcntl_getfd(inherited)? | FdFlags::CLOEXEC)?;
            }
            Ok::<_, std::io::Error>(file)
        };
        let file = open().with_context(|| format!("--ready-fd {number}"))?;
        Ok(Ready { file, number })
    }

    /// Reports that the bus is up.
    ///
    /// # Errors
    /// The descriptor cannot be written to.
    pub fn tell(mut self) -> Result<()> {
        self.file.write_all(b"READY=1\n").with_context(|| format!("--ready-fd {}", self.number))
    }
}
