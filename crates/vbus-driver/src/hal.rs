// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a driver needs from its environment.

use core::fmt;

use vbus_shm::abi::capability;
use vbus_shm::memory::WORD;
use vbus_shm::sync::Ordering;
use vbus_shm::{Memory, copy};

use crate::doorbell::Doorbell;
use crate::error::NoMemory;
use crate::regions::RegionTable;

/// The environment's part of a driver: registers, memory that the device can reach, doorbells,
/// time.
///
/// A value is a handle to one function. Clones are handles to the same function, and each queue
/// keeps a clone. If the environment has threads, several threads may call all methods. Interrupts
/// are not part of it. The environment delivers them in its own way (a handler, a descriptor to
/// poll), and the code of this crate does not wait for them.
pub trait Hal: Clone + fmt::Debug {
    /// Memory that the device can reach.
    type Dma: Dma;

    /// Where a [`Function`](crate::Function) keeps the memory of its regions:
    /// [`FixedTable`](crate::FixedTable), or `HeapTable` (with the crate's feature `alloc`).
    type Regions: RegionTable<Self::Dma>;

    /// Reads 4 bytes at `offset` of the function's configuration space. `offset` is a multiple of 4
    /// below 256.
    fn config_read32(&self, offset: u16) -> u32;

    /// Reads 4 bytes at `offset` of BAR 0, a multiple of 4. A function that has gone (it was
    /// unplugged, or its bus died) reads as all ones.
    fn read32(&self, offset: u64) -> u32;

    /// Reads 8 bytes at `offset` of BAR 0, a multiple of 8, in one access or as two halves, the
    /// lower first.
    fn read64(&self, offset: u64) -> u64;

    /// Writes 4 bytes at `offset` of BAR 0, a multiple of 4. The device sees the write after all
    /// earlier writes to memory. The write is lost if the function has gone.
    fn write32(&self, offset: u64, value: u32);

    /// Writes 8 bytes at `offset` of BAR 0, a multiple of 8, in one access or as two halves, the
    /// lower first.
    fn write64(&self, offset: u64, value: u64);

    /// Allocates `bytes` (more than 0) of zeroed memory that the device can reach. Its address is a
    /// multiple of 4096 both for the driver and for the device. Up to [`Dma::CONTIGUOUS_MIN`] bytes
    /// are contiguous for the device. The environment may reuse the memory once its last clone has
    /// been dropped. A [`Function`](crate::Function) keeps a clone of registered memory until the
    /// device has let go of it. An environment that could hand freed memory to another program
    /// keeps it until the last clone of the Hal has been dropped too.
    fn alloc(&self, bytes: usize) -> Result<Self::Dma, NoMemory>;

    /// Whether this environment can ring doorbells of this kind ([`capability::KIND_MMIO`] etc.).
    /// The driver may call it often.
    fn can_ring(&self, kind: u8) -> bool {
        kind == capability::KIND_MMIO
    }

    /// Rings doorbell `handle`. The device sees the ring after all earlier writes to memory.
    /// `handle` is below the function's limit of regions. [`can_ring`](Self::can_ring) is true for
    /// the doorbell's kind, and its address is valid for that kind.
    fn ring(&self, doorbell: Doorbell, handle: u32) {
        self.write32(doorbell.offset(handle), 1);
    }

    /// Nanoseconds since any fixed moment. The value never decreases.
    fn now(&self) -> u64;

    /// The driver calls it again and again while a command is in progress. The driver has waited
    /// for the command for `waited` nanoseconds. Of each read of a register with the pause before
    /// it, one second at most counts: a device that stands still is not slow. An environment that
    /// can sleep sleeps for a short time, or until the function's interrupt
    /// ([`Function::events`](crate::Function::events)). If it returns false, the driver waits no
    /// longer and closes the connection. The provided method spins, for [`COMMAND_BOUND`] at most.
    fn pause(&self, waited: u64) -> bool {
        core::hint::spin_loop();
        waited < COMMAND_BOUND
    }

    /// A connection has been opened. From now on an interrupt controller of the bus
    /// ([`Pic`](crate::pic::Pic)) may carry the function's interrupts. The provided method does
    /// nothing.
    fn opened(&self) {}

    /// A connection has ended, and the device has not confirmed that it has let go of the memory of
    /// that connection (64 KiB, and all regions). The driver never frees it. It calls this once for
    /// each such connection, so that an environment can count them, and refuse more memory to such
    /// a device. The provided method does nothing.
    fn memory_lost(&self) {}
}

/// How long a command may take, in nanoseconds: one minute.
pub const COMMAND_BOUND: u64 = 60_000_000_000;

/// Memory that the device can reach, zeroed at first. Clones are handles to the same memory.
pub trait Dma: Memory + Clone + fmt::Debug {
    /// An allocation of up to this many bytes is always contiguous for the device.
    const CONTIGUOUS_MIN: usize = 64 << 10;

    /// 0 if the memory is contiguous for the device. Otherwise it consists of pages of `1 <<
    /// page_shift()` bytes. Each page is contiguous and aligned to its size. The last page may be
    /// used in part.
    fn page_shift(&self) -> u8;

    /// The device's address of the byte at `offset`, which is less than [`bytes`](Self::bytes).
    fn address(&self, offset: usize) -> u64;

    /// Bytes.
    fn bytes(&self) -> usize {
        self.words().len() * WORD
    }

    /// Whether the `len` bytes at `offset` lie within the memory and are contiguous for the device.
    fn is_run(&self, offset: usize, len: usize) -> bool {
        let Some(end) = offset.checked_add(len).filter(|end| *end <= self.bytes()) else {
            return false;
        };
        let shift = u32::from(self.page_shift());
        shift == 0 || len == 0 || offset >> shift == (end - 1) >> shift
    }

    /// Copies `bytes` to `offset`, a multiple of 8. Fills the last word up with zeros. Leaves out
    /// bytes that do not fit.
    fn copy_in(&self, offset: usize, bytes: &[u8]) {
        let words = self.words().get(offset / WORD..).unwrap_or_default();
        let count = bytes.len().div_ceil(WORD).min(words.len());
        copy::store(&words[..count], bytes);
    }

    /// Copies from `offset`, a multiple of 8, to `out`. If the device writes at the same time, the
    /// result may be any mix of old and new bytes.
    fn copy_out(&self, offset: usize, out: &mut [u8]) {
        copy::load(self.words().get(offset / WORD..).unwrap_or_default(), out);
    }

    /// The word at `offset`, a multiple of 8. 0 beyond the end.
    fn word(&self, offset: usize) -> u64 {
        self.words().get(offset / WORD).map_or(0, |word| word.load(Ordering::Relaxed))
    }
}
