// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interrupts through `/dev/uioN` of `uio_pci_generic`. The kernel's handler sets Interrupt Disable
//! and makes the descriptor readable.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use crate::source::Interrupt;

/// The offset of the command register in the configuration space.
pub const COMMAND: u64 = 4;
const MEMORY: u16 = 1 << 1;
const MASTER: u16 = 1 << 2;
const INTERRUPT_DISABLE: u16 = 1 << 10;

/// The interrupt of a function that is bound to `uio_pci_generic`.
#[derive(Debug)]
pub struct UioInterrupt {
    uio: File,
    config: File,
    enabled: bool,
}

impl UioInterrupt {
    /// Makes the interrupt, and permits the function to access memory. `uio` is the open
    /// `/dev/uioN`, non-blocking. `config` is the sysfs file of the configuration space.
    pub fn new(uio: File, config: File) -> Result<UioInterrupt> {
        let command = (MEMORY | MASTER) | INTERRUPT_DISABLE;
        config
            .write_all_at(&command.to_le_bytes(), COMMAND)
            .context("cannot write the command register")?;
        Ok(UioInterrupt { uio, config, enabled: false })
    }
}

impl Interrupt for UioInterrupt {
    fn fd(&self) -> BorrowedFd<'_> {
        self.uio.as_fd()
    }

    fn lifeline(&self) -> BorrowedFd<'_> {
        self.uio.as_fd()
    }

    fn take(&mut self) -> Result<()> {
        // The kernel gives the number of interrupts, which does not matter: there was one, and
        // Interrupt Disable is set now.
        let mut count = [0; 4];
        match self.uio.read(&mut count) {
            Ok(n) => ensure!(n == 4, "the function has gone"),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error).context("the function has gone"),
        }
        self.enabled = false;
        Ok(())
    }

    fn enable(&mut self) -> Result<()> {
        if !self.enabled {
            self.config
                .write_all_at(&(MEMORY | MASTER).to_le_bytes(), COMMAND)
                .context("the function has gone")?;
            self.enabled = true;
        }
        Ok(())
    }
}

impl Drop for UioInterrupt {
    fn drop(&mut self) {
        // The device releases all memory when bus mastering is disabled.
        let _ = self.config.write_all_at(&(MEMORY | INTERRUPT_DISABLE).to_le_bytes(), COMMAND);
    }
}
