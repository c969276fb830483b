// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Coherent memory that a function can reach.
#![allow(unsafe_code, reason = "shares memory with a device")]

use core::ffi::c_void;
use core::fmt;
use core::ptr::NonNull;
use core::slice;

use vbus_shm::memory::WORD;
use vbus_shm::sync::Word;

use super::alloc::NoMemory;
use super::ffi;
use super::pci::Pci;

/// Bytes of a page.
const PAGE: usize = 4096;

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
