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
    /// Duplicates the descriptor `number`. No process that this one starts inherits it.
    ///
    /// # Errors
    /// There is no such descriptor.
    pub fn open(number: u32) -> Result<Ready> {
        let open = || {
            let raw = RawFd::try_from(number).map_err(std::io::Error::other)?;
            // SAFETY: nothing in this process closes the descriptor while this function runs. If
            // there is no such descriptor, the calls fail.
            let inherited = unsafe { BorrowedFd::borrow_raw(raw) };
            // A duplicate needs no permission. To open it by its path would need one, if another
            // user has made it.
            let file = File::from(inherited.try_clone_to_owned()?);
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
