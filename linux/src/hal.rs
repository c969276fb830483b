// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel as the environment of a driver ([`vbus_driver::Hal`]).

use core::sync::atomic::{AtomicU32, Ordering};

use vbus_driver::{COMMAND_BOUND, Dma as _, Doorbell, Error, Function, Hal, Memory, RegionTable};
use vbus_shm::abi::{bar0, capability};
use vbus_shm::sync::Word;

use crate::hypercall;
use crate::kernel::alloc::NoMemory;
use crate::kernel::dma::{Coherent, Joined};
use crate::kernel::pci::{Bar, Pci};
use crate::kernel::port::Ports;
use crate::kernel::{Errno, KVec, Ref, time};
use crate::pic::sources;
use crate::{dev_info, dev_warn};

/// How long the driver spins for a command before it sleeps, in nanoseconds: most commands end
/// within the write.
const SPIN: u64 = 20_000;

/// The binary logarithm of the bytes of a part of memory that is too large for one piece.
const PART_SHIFT: u8 = 16;

/// So many connections may end without the device's word that it has let go of their memory, which
/// is then lost. After that the device gets no more of it.
const LOST_MAX: u32 = 4;

/// The environment of one function. Clones are handles to the same.
#[derive(Clone, Debug)]
pub struct KernelHal(Ref<Inner>);

#[derive(Debug)]
struct Inner {
    pci: Pci,
    bar: Bar,
    ports: Ports,
    /// Connections whose memory is lost.
    lost: AtomicU32,
    /// Connections that were opened.
    opens: AtomicU32,
}

impl KernelHal {
    /// The environment of a function, whose BAR 0 this driver has claimed.
    pub fn new(pci: &Pci) -> Result<Self, Errno> {
        let bar = Bar::map(pci, bar0::SIZE)?;
        Ok(Self(Ref::new(Inner {
            pci: pci.clone(),
            bar,
            ports: Ports::new(),
            lost: AtomicU32::new(0),
            opens: AtomicU32::new(0),
        })?))
    }

    /// Claims the I/O ports that ring the function's doorbells, if it offers that. Until then, and
    /// where another driver has one of the ports, this environment rings no ports: a device could
    /// name those of another device.
    pub fn claim_ports(function: &Function<Self>) {
        let last = function.info().max_regions.saturating_sub(1);
        let ports = function
            .doorbells_offered()
            .find(|doorbell| doorbell.kind == capability::KIND_PIO)
            .and_then(|doorbell| {
                let port = |handle| u16::try_from(doorbell.offset(handle)).ok();
                Some((port(0)?, port(last)?))
            });
        if let Some((first, last)) = ports {
            let hal = function.hal();
            if !hal.0.ports.claim(first, last) {
                dev_info!(
                    hal.pci(),
                    "the doorbells at ports {first:#x} to {last:#x} are not used: another driver \
                     has one of these ports"
                );
            }
        }
    }

    /// A function for a class to open, with this kind of doorbell.
    pub fn function(&self, doorbell: u8) -> Result<Function<Self>, Error> {
        let mut function = Function::probe(self.clone())?;
        function.use_doorbell(doorbell)?;
        Ok(function)
    }

    /// Whether the device has kept the memory of so many connections that it gets no more.
    pub fn keeps_memory(&self) -> bool {
        self.0.lost.load(Ordering::Relaxed) >= LOST_MAX
    }

    /// How many connections the function has had.
    pub fn opens(&self) -> u32 {
        self.0.opens.load(Ordering::Relaxed)
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

    fn alloc(&self, bytes: usize) -> Result<Dma, vbus_driver::NoMemory> {
        if self.keeps_memory() {
            return Err(vbus_driver::NoMemory);
        }
        let memory = match Coherent::new(&self.0.pci, bytes) {
            Ok(memory) => Piece::Whole(memory),
            // The kernel has no so large piece, or never has one so large.
            Err(NoMemory) if bytes > Dma::CONTIGUOUS_MIN => {
                Piece::Parts(Joined::new(&self.0.pci, bytes, PART_SHIFT)?)
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Dma(Ref::new(memory)?))
    }

    fn can_ring(&self, kind: u8) -> bool {
        match kind {
            capability::KIND_MMIO => true,
            capability::KIND_PIO => self.0.ports.are_claimed(),
            capability::KIND_HYPERCALL => hypercall::can_ring(),
            _ => false,
        }
    }

    #[inline]
    fn ring(&self, doorbell: Doorbell, handle: u32) {
        let place = doorbell.offset(handle);
        match doorbell.kind {
            capability::KIND_PIO => self.0.ports.write8(place, 1),
            capability::KIND_HYPERCALL => hypercall::ring(place),
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

    fn opened(&self) {
        let opens = self.0.opens.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        sources::opened(self.pci(), opens);
    }

    fn memory_lost(&self) {
        self.0.lost.fetch_add(1, Ordering::Relaxed);
        dev_warn!(
            self.pci(),
            "the device does not confirm that it has let go of the driver's memory: that memory \
             is lost until the system is started again"
        );
        if self.keeps_memory() {
            dev_warn!(self.pci(), "the device gets no more memory; remove it");
        }
    }
}

/// Memory that the function can reach.
#[derive(Clone, Debug)]
pub struct Dma(Ref<Piece>);

#[derive(Debug)]
enum Piece {
    Whole(Coherent),
    Parts(Joined),
}

impl Memory for Dma {
    #[inline]
    fn words(&self) -> &[Word] {
        match &*self.0 {
            Piece::Whole(memory) => memory.words(),
            Piece::Parts(memory) => memory.words(),
        }
    }
}

impl vbus_driver::Dma for Dma {
    fn page_shift(&self) -> u8 {
        match &*self.0 {
            Piece::Whole(_) => 0,
            Piece::Parts(memory) => memory.shift(),
        }
    }

    fn address(&self, offset: usize) -> u64 {
        match &*self.0 {
            Piece::Whole(memory) => memory.address() + offset as u64,
            Piece::Parts(memory) => memory.address(offset),
        }
    }
}

/// The memory of a function's regions. It grows as they come.
#[derive(Debug)]
pub struct Table {
    slots: KVec<Option<Dma>>,
    most: usize,
}

impl RegionTable<Dma> for Table {
    fn new(regions: usize) -> Result<Self, vbus_driver::NoMemory> {
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
