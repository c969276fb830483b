// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel as the environment of a driver ([`vbus_driver::Hal`]).
#![allow(unsafe_code, reason = "I/O ports")]

use vbus_driver::{COMMAND_BOUND, Doorbell, Hal, Memory, NoMemory, RegionTable};
use vbus_shm::abi::{bar0, capability};
use vbus_shm::sync::Word;

use crate::hypercall;
use crate::kernel::dma::Coherent;
use crate::kernel::pci::{Bar, Pci};
use crate::kernel::{Errno, KVec, Ref, time, x86};

/// How long the driver spins for a command before it sleeps, in nanoseconds: most commands end
/// within the write.
const SPIN: u64 = 20_000;

/// The environment of one function. Clones are handles to the same.
#[derive(Clone, Debug)]
pub struct KernelHal(Ref<Inner>);

#[derive(Debug)]
struct Inner {
    pci: Pci,
    bar: Bar,
}

impl KernelHal {
    /// The environment of a function, whose BAR 0 this driver has claimed.
    pub fn new(pci: &Pci) -> Result<Self, Errno> {
        let bar = Bar::map(pci, bar0::SIZE)?;
        Ok(Self(Ref::new(Inner { pci: pci.clone(), bar })?))
    }

    /// The function.
    pub fn pci(&self) -> &Pci {
        &self.0.pci
    }
}

impl Hal for KernelHal {
    type Dma = Dma;
    type Regions = Table;

    fn config_read32(&self, offset: u16) -> u32 {
        self.0.pci.config_read32(offset)
    }

    fn read32(&self, offset: u64) -> u32 {
        self.0.bar.read32(offset)
    }

    fn read64(&self, offset: u64) -> u64 {
        self.0.bar.read64(offset)
    }

    #[inline]
    fn write32(&self, offset: u64, value: u32) {
        self.0.bar.write32(offset, value);
    }

    fn write64(&self, offset: u64, value: u64) {
        self.0.bar.write64(offset, value);
    }

    fn alloc(&self, bytes: usize) -> Result<Dma, NoMemory> {
        let memory = Coherent::new(&self.0.pci, bytes)?;
        Ok(Dma(Ref::new(memory)?))
    }

    fn can_ring(&self, kind: u8) -> bool {
        match kind {
            capability::KIND_MMIO | capability::KIND_PIO => true,
            capability::KIND_HYPERCALL => hypercall::can_ring(),
            _ => false,
        }
    }

    #[inline]
    fn ring(&self, doorbell: Doorbell, handle: u32) {
        let place = doorbell.offset(handle);
        match (doorbell.kind, u16::try_from(place)) {
            // SAFETY: the function's capability names the port, and has been checked for all of its
            // doorbells. A write to it rings, whatever its value.
            (capability::KIND_PIO, Ok(port)) => unsafe { x86::port_write8(port, 1) },
            (capability::KIND_HYPERCALL, _) => hypercall::ring(place),
            _ => self.write32(place, 1),
        }
    }

    fn now(&self) -> u64 {
        time::now()
    }

    /// Commands are for threads that may sleep.
    fn pause(&self, waited: u64) -> bool {
        if waited < SPIN {
            core::hint::spin_loop();
        } else {
            time::sleep_micros(50, 200);
        }
        waited < COMMAND_BOUND
    }
}

/// Memory that the function can reach.
#[derive(Clone, Debug)]
pub struct Dma(Ref<Coherent>);

impl Memory for Dma {
    #[inline]
    fn words(&self) -> &[Word] {
        self.0.words()
    }
}

impl vbus_driver::Dma for Dma {
    /// All of it.
    fn page_shift(&self) -> u8 {
        0
    }

    fn address(&self, offset: usize) -> u64 {
        self.0.address() + offset as u64
    }
}

/// The memory of a function's regions. It grows as they come.
#[derive(Debug)]
pub struct Table {
    slots: KVec<Option<Dma>>,
    most: usize,
}

impl RegionTable<Dma> for Table {
    fn new(regions: usize) -> Result<Self, NoMemory> {
        // A region may keep one more memory.
        Ok(Self { slots: KVec::new(), most: 2 * regions })
    }

    fn insert(&mut self, memory: Dma) -> Option<usize> {
        if let Some(slot) = self.slots.iter().position(Option::is_none) {
            *self.slots.get_mut(slot)? = Some(memory);
            return Some(slot);
        }
        let slot = self.slots.len();
        (slot < self.most && self.slots.push(Some(memory)).is_ok()).then_some(slot)
    }

    fn remove(&mut self, slot: usize) {
        if let Some(kept) = self.slots.get_mut(slot) {
            *kept = None;
        }
    }
}
