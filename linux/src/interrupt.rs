// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The interrupts of a function: MSI-X, else MSI, else INTx (spec/pci.md, "Interrupts").
#![allow(unsafe_code, reason = "handlers refer to what their owner keeps")]

use core::fmt;
use core::ptr::NonNull;

use vbus_driver::Acknowledger;

use crate::hal::KernelHal;
use crate::kernel::irq::{Handler, Irq, Kind, Vectors};
use crate::kernel::pci::Pci;
use crate::kernel::{Errno, KBox, Ref};

/// The vectors of a function. Clones are handles to the same.
#[derive(Clone, Debug)]
pub struct Interrupts(Ref<Inner>);

#[derive(Debug)]
struct Inner {
    vectors: Vectors,
    /// Only INTx is acknowledged.
    acknowledger: Acknowledger<KernelHal>,
}

impl Interrupts {
    /// Allocates the function's vectors, at most `most` of MSI-X.
    pub fn new(pci: &Pci, most: u32, acknowledger: Acknowledger<KernelHal>) -> Result<Self, Errno> {
        let has = Vectors::of_msix(pci).min(most);
        let kinds = [(Kind::MsiX, has), (Kind::Msi, 1), (Kind::Intx, 1)];
        let kinds = kinds.into_iter().filter(|(_, count)| *count > 0);
        let mut last = Errno::NO_SPACE;
        for (kind, count) in kinds {
            match Vectors::new(pci, kind, count) {
                Ok(vectors) => return Ok(Self(Ref::new(Inner { vectors, acknowledger })?)),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// How the function interrupts.
    pub fn kind(&self) -> Kind {
        self.0.vectors.kind()
    }

    /// The number of vectors that differ. With MSI and INTx it is 1, and all interrupts of the
    /// function come on vector 0.
    pub fn count(&self) -> u16 {
        self.0.vectors.count()
    }

    /// Calls `run` with `target` and the vector's number at each interrupt of `vector`, in hard
    /// interrupt context. INTx has been acknowledged before: it is time to look at the signals.
    /// `name` is what /proc/interrupts calls it, at most 31 bytes. The caller may sleep.
    ///
    /// With several vectors, each from vector 1 on goes to a processor of its own, as long as there
    /// are enough: vector 0 is for what is rare.
    ///
    /// # Safety
    /// `target` stays valid, at its place, and is only shared, until the result is dropped.
    pub unsafe fn request<T: Sync>(
        &self,
        vector: u16,
        name: fmt::Arguments<'_>,
        target: NonNull<T>,
        run: fn(&T, u16),
    ) -> Result<Interrupt<T>, Errno> {
        let acknowledger = (self.kind() == Kind::Intx).then(|| self.0.acknowledger.clone());
        let call = KBox::new(Call { acknowledger, target, run, vector })?;
        let irq = Irq::new(&self.0.vectors, vector, name, call)?;
        if let Some(nth) = vector.checked_sub(1) {
            irq.prefer_processor(nth.into());
        }
        Ok(Interrupt { irq, _vectors: self.clone() })
    }
}

/// A vector that has a handler. Dropping it waits until the handler does not run.
#[derive(Debug)]
pub struct Interrupt<T: Sync> {
    irq: Irq<Call<T>>,
    /// The vectors are freed after their handlers.
    _vectors: Interrupts,
}

impl<T: Sync> Interrupt<T> {
    /// The number by which the kernel knows the vector.
    pub fn number(&self) -> u32 {
        self.irq.number()
    }

    /// Waits until the handler does not run, and keeps it from running. It sleeps.
    pub fn disable(&self) {
        self.irq.disable();
    }

    /// Lets the handler run again after [`disable`](Self::disable).
    pub fn enable(&self) {
        self.irq.enable();
    }
}

struct Call<T> {
    acknowledger: Option<Acknowledger<KernelHal>>,
    target: NonNull<T>,
    run: fn(&T, u16),
    vector: u16,
}

// SAFETY: it shares the target, which is Sync.
unsafe impl<T: Sync> Send for Call<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Call<T> {}

impl<T: Sync> Handler for Call<T> {
    fn interrupt(&self) -> bool {
        // A line is shared. Its interrupt may be another function's.
        if self.acknowledger.as_ref().is_some_and(|acknowledger| !acknowledger.take()) {
            return false;
        }
        // SAFETY: the caller of `request` keeps it valid.
        (self.run)(unsafe { self.target.as_ref() }, self.vector);
        true
    }
}
