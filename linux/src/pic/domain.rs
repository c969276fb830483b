// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The lines of a controller as interrupts of the kernel: an interrupt domain.
#![allow(unsafe_code, reason = "calls the shim")]

use core::ffi::c_void;
use core::fmt;
use core::ptr::NonNull;

use super::ffi;
use crate::kernel::alloc::NoMemory;
use crate::kernel::pci::Pci;
use crate::kernel::{Errno, cpu};

/// Processors that an administrator or the kernel allows for an interrupt.
#[derive(Clone, Copy)]
pub struct Allowed<'a>(&'a c_void);

impl Allowed<'_> {
    /// The processors of a mask of the kernel's.
    ///
    /// # Safety
    /// The mask is valid as long as the result.
    pub unsafe fn new(mask: *const c_void) -> Self {
        // SAFETY: by the caller's promise. Nobody reads what is behind the reference here.
        Self(unsafe { &*mask })
    }

    /// Whether this processor is allowed, and online.
    pub fn has(self, cpu: u32) -> bool {
        // SAFETY: the mask is valid as long as this.
        unsafe { ffi::shim_mask_has(self.0, cpu) }
    }

    /// The first such processor.
    pub fn first(self) -> Option<u32> {
        (0..cpu::numbers()).find(|cpu| self.has(*cpu))
    }
}

/// The lines of a controller. Each may have a number ([`Number`]), by which a handler is requested.
pub struct Domain {
    raw: NonNull<c_void>,
}

// SAFETY: the shim's functions may be called in any thread.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    /// A domain of `lines` lines of a function. The caller may sleep.
    ///
    /// # Safety
    /// `data` is what the shim's callbacks expect. It stays valid, at its place, and is only
    /// shared, until the domain is dropped.
    pub unsafe fn new<T>(pci: &Pci, lines: u16, data: NonNull<T>) -> Result<Self, NoMemory> {
        // SAFETY: the handle is valid, and the data until the domain is freed.
        let raw = unsafe { ffi::shim_pic_new(pci.handle(), lines.into(), data.as_ptr().cast()) };
        Ok(Self { raw: NonNull::new(raw).ok_or(NoMemory)? })
    }

    /// Gives a line a number by which the kernel knows it. The number is dropped before the domain.
    /// The caller may sleep.
    pub fn number(&self, line: u16) -> Result<Number, Errno> {
        // SAFETY: the handle is valid as long as this.
        match unsafe { ffi::shim_pic_map(self.raw.as_ptr(), line.into()) } {
            0 => Err(Errno::NO_SPACE),
            number => Ok(Number(number)),
        }
    }

    /// Calls the handler of a line that has interrupted. In any context: an interrupt by a line of
    /// PCI may be handled in a thread.
    #[inline]
    pub fn handle(&self, line: u16) {
        // A line without a number is one that nobody waits for.
        // SAFETY: the handle is valid as long as this.
        let _ = unsafe { ffi::shim_pic_handle(self.raw.as_ptr(), line.into()) };
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: nobody uses the handle again, and no line has a number.
        unsafe { ffi::shim_pic_free(self.raw.as_ptr()) };
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Domain")
    }
}

/// The number of a line. Dropping it takes the number back: nobody has requested it any more.
#[derive(Debug)]
pub struct Number(u32);

impl Number {
    /// The number.
    pub fn get(&self) -> u32 {
        self.0
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        // SAFETY: the domain is valid by the promise of `number`, and the number has no handler.
        unsafe { ffi::shim_pic_unmap(self.0) };
    }
}
