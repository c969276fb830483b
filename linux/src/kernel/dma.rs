// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Coherent memory that a function can reach: [`Coherent`], and [`Joined`] of several parts.
#![allow(unsafe_code, reason = "shares memory with a device")]

use core::ffi::c_void;
use core::fmt;
use core::ptr::NonNull;
use core::slice;

use vbus_shm::memory::WORD;
use vbus_shm::sync::Word;

use super::alloc::{KVec, NoMemory};
use super::pci::Pci;
use super::{ffi, power};

/// Bytes of a page of memory.
pub const PAGE: usize = 4096;

/// Coherent memory, zeroed at first, contiguous for the function. It begins with a page on both
/// sides.
pub struct Coherent {
    pci: Pci,
    memory: NonNull<c_void>,
    address: u64,
    bytes: usize,
}

// SAFETY: the memory consists of atomics.
unsafe impl Send for Coherent {}
// SAFETY: as above.
unsafe impl Sync for Coherent {}

impl Coherent {
    /// At least `bytes` bytes, a whole number of pages. The caller may sleep.
    pub fn new(pci: &Pci, bytes: usize) -> Result<Self, NoMemory> {
        let bytes = bytes.max(1).checked_next_multiple_of(PAGE).ok_or(NoMemory)?;
        let mut address = 0;
        // SAFETY: the handle is valid, and there is room for the address.
        let memory = unsafe { ffi::shim_dma_alloc(pci.handle(), bytes as u64, &raw mut address) };
        let memory = NonNull::new(memory).ok_or(NoMemory)?;
        Ok(Self { pci: pci.clone(), memory, address, bytes })
    }

    /// The memory.
    pub fn words(&self) -> &[Word] {
        // SAFETY: the memory is there as long as this, aligned to a page, and was zeroed.
        unsafe { slice::from_raw_parts(self.memory.cast().as_ptr(), self.bytes / WORD) }
    }

    /// The function's address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Coherent {
    fn drop(&mut self) {
        if power::goes_down() {
            return;
        }
        // SAFETY: it came from `shim_dma_alloc` with these numbers, and nobody uses it any more.
        unsafe {
            let (handle, memory) = (self.pci.handle(), self.memory.as_ptr());
            ffi::shim_dma_free(handle, self.bytes as u64, memory, self.address);
        }
    }
}

impl fmt::Debug for Coherent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Coherent({} bytes)", self.bytes)
    }
}

/// Coherent memory in parts of the same size, each contiguous for the function, one behind the
/// other for the driver. For memory that is too large to be contiguous.
pub struct Joined {
    parts: KVec<Coherent>,
    joined: NonNull<c_void>,
    shift: u8,
}

// SAFETY: the memory consists of atomics.
unsafe impl Send for Joined {}
// SAFETY: as above.
unsafe impl Sync for Joined {}

impl Joined {
    /// At least `bytes` bytes, in parts of `1 << shift`, whole pages. The caller may sleep.
    pub fn new(pci: &Pci, bytes: usize, shift: u8) -> Result<Self, NoMemory> {
        let part = 1_usize.checked_shl(shift.into()).ok_or(NoMemory)?.max(PAGE);
        let parts = KVec::from_fn(bytes.max(1).div_ceil(part), |_| {
            let memory = Coherent::new(pci, part)?;
            // The kernel aligns memory of this kind to its size, for both sides.
            if memory.address % part as u64 == 0 { Ok(memory) } else { Err(NoMemory) }
        })?;
        let places = KVec::from_fn(parts.len(), |at| {
            parts.get(at).map(|p| p.memory.as_ptr()).ok_or(NoMemory)
        })?;
        // SAFETY: the parts have as many bytes, and stay as long as what is made of them.
        let joined =
            unsafe { ffi::shim_dma_join(places.as_ptr(), places.len() as u64, part as u64) };
        let joined = NonNull::new(joined).ok_or(NoMemory)?;
        Ok(Self { parts, joined, shift })
    }

    /// The memory.
    pub fn words(&self) -> &[Word] {
        let words = (self.parts.len() << self.shift) / WORD;
        // SAFETY: the parts are there as long as this, one behind the other, aligned to a page, and
        // were zeroed.
        unsafe { slice::from_raw_parts(self.joined.cast().as_ptr(), words) }
    }

    /// The binary logarithm of a part's bytes.
    pub fn shift(&self) -> u8 {
        self.shift
    }

    /// The function's address of the byte at `offset`. 0 beyond the end.
    pub fn address(&self, offset: usize) -> u64 {
        let within = (offset & ((1 << self.shift) - 1)) as u64;
        self.parts.get(offset >> self.shift).map_or(0, |part| part.address + within)
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        // SAFETY: it came from `shim_dma_join`, and nobody uses it any more. The parts go after it.
        unsafe { ffi::shim_dma_part(self.joined.as_ptr()) };
    }
}

impl fmt::Debug for Joined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Joined({} parts)", self.parts.len())
    }
}
