// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A PCI function as the kernel gives it to its driver: configuration space, BAR 0, Bus Master.
#![allow(unsafe_code, reason = "calls the shim, with handles of the kernel")]

use core::ffi::{CStr, c_void};
use core::fmt;
use core::ptr::NonNull;

use super::errno::Errno;
use super::ffi;

/// The value of everything that is read from a function that has gone.
const GONE: u32 = u32::MAX;

/// A function. Clones are handles to the same one, which the kernel keeps as long.
pub struct Pci(NonNull<c_void>);

// SAFETY: the kernel's functions take the handle in any thread.
unsafe impl Send for Pci {}
// SAFETY: as above.
unsafe impl Sync for Pci {}

/// Whether two handles are of the same function.
impl PartialEq for Pci {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Pci {
    /// The function behind a handle of the kernel.
    ///
    /// # Safety
    /// The handle is that of a function that the kernel has given to this driver.
    pub unsafe fn new(handle: *mut c_void) -> Option<Self> {
        let handle = NonNull::new(handle)?;
        // SAFETY: by the caller's promise.
        unsafe { ffi::shim_pci_get(handle.as_ptr()) };
        Some(Self(handle))
    }

    /// The kernel's handle.
    pub fn handle(&self) -> *mut c_void {
        self.0.as_ptr()
    }

    /// Its address, as /sys/bus/pci/devices has it.
    pub fn address(&self) -> &str {
        // SAFETY: the handle is valid, and so is its name, which does not change.
        unsafe { CStr::from_ptr(ffi::shim_pci_name(self.handle())) }.to_str().unwrap_or("?")
    }

    /// Reads 4 bytes of configuration space at a multiple of 4. All ones: the function has gone.
    pub fn config_read32(&self, offset: u16) -> u32 {
        // SAFETY: the handle is valid.
        unsafe { ffi::shim_pci_config_read32(self.handle(), offset) }
    }

    /// Whether the function answers in configuration space.
    pub fn is_there(&self) -> bool {
        self.config_read32(0) != GONE
    }

    /// Lets the function access memory and send messages, or ends both at once.
    pub fn set_master(&self, on: bool) {
        // SAFETY: the handle is valid.
        unsafe {
            if on {
                ffi::shim_pci_set_master(self.handle());
            } else {
                ffi::shim_pci_clear_master(self.handle());
            }
        }
    }

    /// Keeps configuration space, for [`restore`](Self::restore).
    pub fn save(&self) {
        // SAFETY: the handle is valid.
        unsafe { ffi::shim_pci_save(self.handle()) };
    }

    /// Writes configuration space as it was kept: a function that was reset from outside has lost
    /// it.
    pub fn restore(&self) {
        // SAFETY: the handle is valid.
        unsafe { ffi::shim_pci_restore(self.handle()) };
    }

    /// Sets how many bits of an address the function can use.
    pub fn set_dma_bits(&self, bits: u32) -> Result<(), Errno> {
        // SAFETY: the handle is valid.
        Errno::check(unsafe { ffi::shim_dma_mask(self.handle(), bits) }).map(drop)
    }

    /// Whether an IOMMU translates the function's addresses. Then each map for the function, and
    /// its end, may cost much: a virtual machine's IOMMU tells the device of each. It stays as it
    /// is as long as the driver has the function.
    pub fn is_translated(&self) -> bool {
        // SAFETY: the handle is valid.
        unsafe { ffi::shim_dma_iommu(self.handle()) == ffi::IOMMU_TRANSLATES }
    }
}

impl Clone for Pci {
    fn clone(&self) -> Self {
        // SAFETY: the handle is valid.
        unsafe { ffi::shim_pci_get(self.handle()) };
        Self(self.0)
    }
}

impl Drop for Pci {
    fn drop(&mut self) {
        // SAFETY: this handle was counted.
        unsafe { ffi::shim_pci_put(self.handle()) };
    }
}

impl fmt::Debug for Pci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pci")
    }
}

/// A function that is enabled and whose BAR 0 is this driver's. Dropping it ends all of the
/// function's access to memory, and gives it back.
#[derive(Debug)]
pub struct Claimed(Pci);

impl Claimed {
    /// Enables the function, and claims its BAR 0.
    pub fn new(pci: &Pci) -> Result<Self, Errno> {
        // SAFETY: the handle is valid.
        Errno::check(unsafe { ffi::shim_pci_enable(pci.handle()) })?;
        // SAFETY: the handle is valid.
        if let Err(error) = Errno::check(unsafe { ffi::shim_pci_claim(pci.handle()) }) {
            // SAFETY: it was enabled above.
            unsafe { ffi::shim_pci_disable(pci.handle()) };
            return Err(error);
        }
        Ok(Self(pci.clone()))
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        self.0.set_master(false);
        // SAFETY: `new` has claimed and enabled it.
        unsafe {
            ffi::shim_pci_unclaim(self.0.handle());
            ffi::shim_pci_disable(self.0.handle());
        }
    }
}

/// BAR 0, mapped.
#[derive(Debug)]
pub struct Bar {
    at: NonNull<c_void>,
    bytes: u64,
}

// SAFETY: registers may be accessed from any thread.
unsafe impl Send for Bar {}
// SAFETY: as above.
unsafe impl Sync for Bar {}

impl Bar {
    /// Maps the BAR 0 of a function, if it has `least` bytes at least.
    pub fn map(pci: &Pci, least: u64) -> Result<Self, Errno> {
        // SAFETY: the handle is valid.
        let bytes = unsafe { ffi::shim_pci_bar_bytes(pci.handle()) };
        if bytes < least {
            return Err(Errno::NO_DEVICE);
        }
        // SAFETY: the handle is valid.
        let at = unsafe { ffi::shim_pci_map(pci.handle()) };
        Ok(Self { at: NonNull::new(at).ok_or(Errno::NO_MEMORY)?, bytes })
    }

    /// The place of `bytes` bytes at `offset`, a multiple of `bytes`.
    fn place(&self, offset: u64, bytes: u64) -> Option<*mut c_void> {
        let fits = offset % bytes == 0 && offset.checked_add(bytes)? <= self.bytes;
        let offset = usize::try_from(offset).ok()?;
        fits.then(|| self.at.as_ptr().wrapping_byte_add(offset))
    }

    /// Reads 4 bytes. All ones: the function has gone, or has no such register.
    #[inline]
    pub fn read32(&self, offset: u64) -> u32 {
        // SAFETY: the place is in the mapping.
        self.place(offset, 4).map_or(u32::MAX, |place| unsafe { ffi::shim_read32(place) })
    }

    /// Reads 8 bytes, as [`read32`](Self::read32).
    #[inline]
    pub fn read64(&self, offset: u64) -> u64 {
        // SAFETY: the place is in the mapping.
        self.place(offset, 8).map_or(u64::MAX, |place| unsafe { ffi::shim_read64(place) })
    }

    /// Writes 4 bytes. The device sees it after all earlier writes to memory.
    #[inline]
    pub fn write32(&self, offset: u64, value: u32) {
        if let Some(place) = self.place(offset, 4) {
            // SAFETY: the place is in the mapping.
            unsafe { ffi::shim_write32(place, value) };
        }
    }

    /// Writes 8 bytes, as [`write32`](Self::write32).
    #[inline]
    pub fn write64(&self, offset: u64, value: u64) {
        if let Some(place) = self.place(offset, 8) {
            // SAFETY: the place is in the mapping.
            unsafe { ffi::shim_write64(place, value) };
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        // SAFETY: `map` has mapped it, and nobody uses it any more.
        unsafe { ffi::shim_pci_unmap(self.at.as_ptr()) };
    }
}
