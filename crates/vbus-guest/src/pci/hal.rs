// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The Hal for a function on the PCI bus of a Linux machine.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vbus_driver::{Doorbell, Hal, HeapTable, NoMemory};
use vbus_process::clock;
use vbus_shm::abi::{bar0, capability};

use super::bar::Bar;
use super::huge::{HugeMemory, Pool};
use super::port;

/// Drives a function through its mapped BAR, its configuration space in sysfs, and huge pages.
#[derive(Clone, Debug)]
pub struct PciHal(Arc<OpenFunction>);

#[derive(Debug)]
struct OpenFunction {
    bar: Bar,
    config: File,
    pool: Pool,
    /// The open file that holds the lock of the function.
    _claim: Option<File>,
}

impl PciHal {
    /// Makes the Hal of a function. `claim` is a file that stays open until the last clone is
    /// dropped.
    pub fn new(bar: Bar, config: File, claim: Option<File>) -> PciHal {
        PciHal(Arc::new(OpenFunction { bar, config, pool: Pool::default(), _claim: claim }))
    }
}

impl Hal for PciHal {
    type Dma = HugeMemory;
    type Regions = HeapTable<HugeMemory>;

    fn config_read32(&self, offset: u16) -> u32 {
        let mut word = [0xff; 4];
        match self.0.config.read_exact_at(&mut word, u64::from(offset)) {
            Ok(()) => u32::from_le_bytes(word),
            Err(_) => u32::MAX,
        }
    }

    fn read32(&self, offset: u64) -> u32 {
        self.0.bar.read(offset).unwrap_or(u32::MAX)
    }

    fn read64(&self, offset: u64) -> u64 {
        self.0.bar.read(offset).unwrap_or(u64::MAX)
    }

    fn write32(&self, offset: u64, value: u32) {
        self.0.bar.write(offset, value);
    }

    fn write64(&self, offset: u64, value: u64) {
        self.0.bar.write(offset, value);
    }

    fn alloc(&self, bytes: usize) -> Result<HugeMemory, NoMemory> {
        self.0.pool.alloc(bytes).map_err(|error| {
            tracing::error!("{error:#}");
            NoMemory
        })
    }

    fn can_ring(&self, kind: u8) -> bool {
        match kind {
            capability::KIND_MMIO => true,
            capability::KIND_PIO => port::can_have(),
            // The other kinds are for kernels only.
            _ => false,
        }
    }

    fn ring(&self, doorbell: Doorbell, handle: u32) {
        let offset = doorbell.offset(handle);
        if doorbell.kind == capability::KIND_MMIO {
            self.write32(offset, 1);
        } else if !u16::try_from(offset).is_ok_and(port::write) {
            // The kernel did not permit the port for this thread, although it has for another one.
            // The same doorbell is also in the BAR.
            self.write32(bar0::DOORBELLS + u64::from(handle) * bar0::DOORBELL_STRIDE, 1);
        }
    }

    fn now(&self) -> u64 {
        clock::now()
    }

    fn pause(&self, waited: u64) -> bool {
        clock::pause(waited)
    }
}
