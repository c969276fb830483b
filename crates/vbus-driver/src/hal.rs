//! What the driver needs of the place where it runs.

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
/// A value is a handle to one function; clones are handles to the same one, and each queue keeps
/// one. All methods may be called from several threads if the environment has threads. Interrupts
/// are not part of it: the environment delivers them in its own way (a handler, a descriptor to
/// poll), and the driver code never waits.
pub trait Hal: Clone + fmt::Debug {
    /// Memory that the device can reach.
    type Dma: Dma;

    /// Where a [`Function`](crate::Function) keeps the memory of its regions:
    /// [`FixedTable`](crate::FixedTable), or `HeapTable` (with the crate's feature `alloc`).
    type Regions: RegionTable<Self::Dma>;

    /// Reads 4 bytes at `offset` of the function's configuration space; `offset` is a multiple of 4
    /// below 256.
    fn config_read32(&self, offset: u16) -> u32;

    /// Reads 4 bytes at `offset` of BAR 0, a multiple of 4. A function that has gone (unplugged,
    /// its bus dead) reads as all ones.
    fn read32(&self, offset: u64) -> u32;

    /// Reads 8 bytes at `offset` of BAR 0, a multiple of 8, in one access or as two halves, the
    /// lower first.
    fn read64(&self, offset: u64) -> u64;

    /// Writes 4 bytes at `offset` of BAR 0, a multiple of 4, after everything written to memory
    /// before. Lost if the function has gone.
    fn write32(&self, offset: u64, value: u32);

    /// Writes 8 bytes at `offset` of BAR 0, a multiple of 8, in one access or as two halves, the
    /// lower first.
    fn write64(&self, offset: u64, value: u64);

    /// Allocates `bytes` (more than 0) of zeroed memory that the device can reach, at an address
    /// that is a multiple of 4096 at both ends. Up to [`Dma::CONTIGUOUS_MIN`] bytes are contiguous
    /// for the device. It may be used for other things once the last clone of it has gone. A
    /// [`Function`](crate::Function) keeps a clone of what is registered, until the device has let
    /// go of it. An environment whose memory could then become someone else's altogether keeps it
    /// until the last clone of the Hal has gone too.
    fn alloc(&self, bytes: usize) -> Result<Self::Dma, NoMemory>;

    /// Whether doorbells of this kind ([`capability::KIND_MMIO`] etc.) can be rung here. May be
    /// called often.
    fn can_ring(&self, kind: u8) -> bool {
        kind == capability::KIND_MMIO
    }

    /// Rings doorbell `handle`, which is below the function's limit of regions, after everything
    /// written to memory before. Its kind is one that [`can_ring`](Self::can_ring), and its place
    /// in range for that kind.
    fn ring(&self, doorbell: Doorbell, handle: u32) {
        self.write32(doorbell.offset(handle), 1);
    }

    /// Nanoseconds from any fixed moment on; never goes back.
    fn now(&self) -> u64;

    /// Called again and again while a command is in progress, which began `waited` nanoseconds
    /// ago. An environment that can sleep sleeps a little, or until the function's interrupt
    /// ([`Function::events`](crate::Function::events)). False: it waits no longer, and the
    /// connection ends. What is not overridden spins for [`COMMAND_BOUND`].
    fn pause(&self, waited: u64) -> bool {
        core::hint::spin_loop();
        waited < COMMAND_BOUND
    }
}

/// How long a command may take, in nanoseconds: a minute.
pub const COMMAND_BOUND: u64 = 60_000_000_000;

/// Memory that the device can reach, zeroed at first. Clones are handles to the same memory.
pub trait Dma: Memory + Clone + fmt::Debug {
    /// What an allocation of up to this many bytes has for sure: one run of addresses.
    const CONTIGUOUS_MIN: usize = 64 << 10;

    /// 0 if all of it is one run of addresses for the device, else it consists of pages of `1 <<
    /// page_shift()` bytes, each such a run and aligned to its size, of which the last may be used
    /// in part.
    fn page_shift(&self) -> u8;

    /// The device's address of the byte at `offset`, which is less than [`bytes`](Self::bytes).
    fn address(&self, offset: usize) -> u64;

    /// Bytes.
    fn bytes(&self) -> usize {
        self.words().len() * WORD
    }

    /// Whether the `len` bytes at `offset` lie within and are contiguous for the device.
    fn is_run(&self, offset: usize, len: usize) -> bool {
        let Some(end) = offset.checked_add(len).filter(|end| *end <= self.bytes()) else {
            return false;
        };
        let shift = u32::from(self.page_shift());
        shift == 0 || len == 0 || offset >> shift == (end - 1) >> shift
    }

    /// Copies `bytes` to `offset`, a multiple of 8. The last word is filled up with zeros; what
    /// does not fit is left out.
    fn copy_in(&self, offset: usize, bytes: &[u8]) {
        let words = self.words().get(offset / WORD..).unwrap_or_default();
        let count = bytes.len().div_ceil(WORD).min(words.len());
        copy::store(&words[..count], bytes);
    }

    /// Copies from `offset`, a multiple of 8, to `out`. The device may be writing: the result is
    /// then garbage, but defined.
    fn copy_out(&self, offset: usize, out: &mut [u8]) {
        copy::load(self.words().get(offset / WORD..).unwrap_or_default(), out);
    }

    /// The word at `offset`, a multiple of 8; 0 beyond the end.
    fn word(&self, offset: usize) -> u64 {
        self.words().get(offset / WORD).map_or(0, |word| word.load(Ordering::Relaxed))
    }
}
