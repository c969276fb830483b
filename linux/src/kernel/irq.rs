// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interrupts: the vectors of a function, and their handlers.
#![allow(unsafe_code, reason = "callbacks from the shim")]

use core::ffi::{c_int, c_void};
use core::fmt;
use core::ptr::NonNull;

use super::alloc::KBox;
use super::errno::Errno;
use super::ffi;
use super::pci::Pci;

/// How a function interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Messages, one kind for each vector.
    MsiX,
    /// One message.
    Msi,
    /// A line, which other functions may share.
    Intx,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MsiX => "msix",
            Self::Msi => "msi",
            Self::Intx => "intx",
        })
    }
}

/// The vectors of a function. Their handlers are dropped before.
#[derive(Debug)]
pub struct Vectors {
    pci: Pci,
    kind: Kind,
    count: u16,
}

impl Vectors {
    /// The vectors that the function's MSI-X has; 0: it has none.
    pub fn of_msix(pci: &Pci) -> u32 {
        // SAFETY: the handle is valid.
        unsafe { ffi::shim_pci_msix_vectors(pci.handle()) }
    }

    /// Allocates 1 to `most` vectors of this kind.
    pub fn new(pci: &Pci, kind: Kind, most: u32) -> Result<Self, Errno> {
        let kinds = match kind {
            Kind::MsiX => ffi::MSIX,
            Kind::Msi => ffi::MSI,
            Kind::Intx => ffi::INTX,
        };
        // SAFETY: the handle is valid.
        let count = Errno::check(unsafe { ffi::shim_pci_vectors(pci.handle(), most, kinds) })?;
        let count = u16::try_from(count).map_err(|_| Errno::INVALID)?;
        Ok(Self { pci: pci.clone(), kind, count })
    }

    /// How the function interrupts.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The number by which the kernel knows a vector.
    pub fn number(&self, vector: u16) -> Result<u32, Errno> {
        // SAFETY: the handle is valid.
        let number = unsafe { ffi::shim_pci_vector(self.pci.handle(), vector.into()) };
        u32::try_from(Errno::check(number)?).map_err(|_| Errno::INVALID)
    }

    /// The function.
    pub fn pci(&self) -> &Pci {
        &self.pci
    }

    /// The number of vectors, 1 at least.
    pub fn count(&self) -> u16 {
        self.count
    }
}

impl Drop for Vectors {
    fn drop(&mut self) {
        // SAFETY: `new` has allocated them, and they have no handlers.
        unsafe { ffi::shim_pci_free_vectors(self.pci.handle()) };
    }
}

/// What happens at an interrupt.
pub trait Handler: Send + Sync {
    /// In hard interrupt context. Returns false if the interrupt was not for this handler.
    fn interrupt(&self) -> bool;
}

/// Who handles an interrupt, and where.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traits {
    /// Other functions may have handlers of it too.
    pub is_shared: bool,
    /// The handler only calls other handlers, and never runs in a thread. Not for one that is
    /// shared.
    pub passes_on: bool,
    /// Only the driver says which processor handles it ([`Irq::bind`]).
    pub is_bound: bool,
}

impl Traits {
    fn bits(self) -> u32 {
        let bit = |has: bool, bit: u32| if has { bit } else { 0 };
        bit(self.is_shared, ffi::IRQ_SHARED)
            | bit(self.passes_on, ffi::IRQ_PASSES_ON)
            | bit(self.is_bound, ffi::IRQ_BOUND)
    }
}

/// Lets a processor handle the interrupt of this number, if it is online and does not do so
/// already. The caller may sleep.
pub fn bind(number: u32, cpu: u32) {
    // SAFETY: the shim refuses numbers that there are not.
    unsafe { ffi::shim_irq_bind(number, cpu) };
}

/// Bytes of an interrupt's name at most.
pub const NAME_BYTES: usize = 31;

/// An interrupt with its handler. Dropping it waits until the handler does not run, and frees it.
pub struct Irq<H: Handler> {
    raw: NonNull<c_void>,
    handler: NonNull<H>,
}

// SAFETY: its methods may be called from any thread, and so may the handler.
unsafe impl<H: Handler> Send for Irq<H> {}
// SAFETY: as above.
unsafe impl<H: Handler> Sync for Irq<H> {}

impl<H: Handler> Irq<H> {
    /// Lets `handler` handle the interrupts of this number from now on. `pci` is the function that
    /// interrupts. `name` is what /proc/interrupts calls it, at most [`NAME_BYTES`]. The caller may
    /// sleep.
    pub fn new(
        pci: &Pci,
        number: u32,
        traits: Traits,
        name: &[u8],
        handler: KBox<H>,
    ) -> Result<Self, Errno> {
        let handler = handler.into_raw();
        let mut error: c_int = 0;
        // SAFETY: the handle is valid, the name during the call, and the handler until the
        // interrupt is freed.
        let raw = unsafe {
            ffi::shim_irq_request(
                pci.handle(),
                number,
                traits.bits(),
                name.as_ptr(),
                name.len() as u64,
                trampoline::<H>,
                handler.cast(),
                &raw mut error,
            )
        };
        let Some(raw) = NonNull::new(raw) else {
            // SAFETY: it came from `into_raw` above, and nobody else has it.
            drop(unsafe { KBox::from_raw(handler) });
            return Err(Errno::check(error).err().unwrap_or(Errno::IO));
        };
        // SAFETY: addresses of boxes are not null.
        Ok(Self { raw, handler: unsafe { NonNull::new_unchecked(handler) } })
    }

    /// The number by which the kernel knows it.
    pub fn number(&self) -> u32 {
        // SAFETY: the handle is valid as long as this.
        unsafe { ffi::shim_irq_number(self.raw.as_ptr()) }
    }

    /// Lets the `nth` of the processors near the function handle it. With fewer processors they
    /// take turns. An administrator may set another one.
    pub fn prefer_processor(&self, nth: u32) {
        // SAFETY: the handle is valid as long as this.
        unsafe { ffi::shim_irq_prefer(self.raw.as_ptr(), nth) };
    }
}

extern "C" fn trampoline<H: Handler>(data: *mut c_void) -> bool {
    // SAFETY: the shim calls it with the handler of `Irq::new`, which is freed after the interrupt.
    unsafe { &*data.cast::<H>() }.interrupt()
}

impl<H: Handler> Drop for Irq<H> {
    fn drop(&mut self) {
        // SAFETY: nobody uses the handle again, and no handler runs when this returns.
        unsafe { ffi::shim_irq_free(self.raw.as_ptr()) };
        // SAFETY: it came from `into_raw`, and the interrupt that used it is free.
        drop(unsafe { KBox::from_raw(self.handler.as_ptr()) });
    }
}

impl<H: Handler> fmt::Debug for Irq<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Irq({})", self.number())
    }
}
