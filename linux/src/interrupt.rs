// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The interrupts of a function: MSI-X, else MSI, else INTx (spec/pci.md, "Interrupts").
#![allow(unsafe_code, reason = "handlers refer to what their owner keeps")]

use core::fmt;
use core::ptr::NonNull;

use vbus_driver::{Acknowledger, Function, Name};

use crate::hal::KernelHal;
use crate::kernel::irq::{Handler, Irq, Kind, NAME_BYTES, Traits, Vectors};
use crate::kernel::log::Text;
use crate::kernel::{Errno, KBox, Ref};
use crate::pic::sources::{self, Registered};

/// The vectors of a function. Clones are handles to the same.
#[derive(Clone, Debug)]
pub struct Interrupts(Ref<Inner>);

#[derive(Debug)]
struct Inner {
    vectors: Vectors,
    hal: KernelHal,
    /// The name of the device on its bus.
    name: Name<32>,
    /// Only INTx is acknowledged.
    acknowledger: Acknowledger<KernelHal>,
}

impl Interrupts {
    /// Allocates the vectors of a function, at most `most` of MSI-X.
    pub fn new(function: &Function<KernelHal>, most: u32) -> Result<Self, Errno> {
        let (hal, name) = (function.hal().clone(), function.info().name);
        let pci = hal.pci();
        let has = Vectors::of_msix(pci).min(most);
        let kinds = [(Kind::MsiX, has), (Kind::Msi, 1), (Kind::Intx, 1)];
        let kinds = kinds.into_iter().filter(|(_, count)| *count > 0);
        let mut last = Errno::NO_SPACE;
        for (kind, count) in kinds {
            match Vectors::new(pci, kind, count) {
                Ok(vectors) => {
                    let acknowledger = function.acknowledger();
                    return Ok(Self(Ref::new(Inner { vectors, hal, name, acknowledger })?));
                }
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
    /// are enough: vector 0 is for what is rare. An interrupt controller of the bus may carry the
    /// interrupt meanwhile; then `run` is called for that.
    ///
    /// # Safety
    /// `target` stays valid, at its place, and is only shared, until the result is dropped.
    pub unsafe fn request<T: Sync + 'static>(
        &self,
        vector: u16,
        name: fmt::Arguments<'_>,
        target: NonNull<T>,
        run: fn(&T, u16),
    ) -> Result<Interrupt<T>, Errno> {
        let label = Text::<NAME_BYTES>::new(name);
        let irq = self.irq(vector, label.as_bytes(), Traits::default(), target, run)?;
        if let Some(nth) = vector.checked_sub(1) {
            irq.prefer_processor(nth.into());
        }
        // What is carried needs no acknowledgement.
        let carried = KBox::new(Call { acknowledger: None, target, run, vector })?.into_raw();
        // SAFETY: the address came from `into_raw`, and nobody else has it.
        let carried: KBox<dyn Handler> = unsafe { KBox::from_raw(carried as *mut dyn Handler) };
        let Inner { hal, name, .. } = &*self.0;
        let opens = || hal.opens();
        let source = sources::register(hal.pci(), (*name, vector), label, carried, opens)?;
        Ok(Interrupt { _source: Some(source), irq, _vectors: self.clone() })
    }

    /// The same for a handler that calls those of other interrupts. Nothing else carries it. If
    /// `is_bound`, it stays at the processor that the driver [binds](crate::kernel::irq::bind) it
    /// to.
    ///
    /// # Safety
    /// As of [`request`](Self::request).
    pub unsafe fn request_for_others<T: Sync>(
        &self,
        vector: u16,
        name: fmt::Arguments<'_>,
        target: NonNull<T>,
        is_bound: bool,
        run: fn(&T, u16),
    ) -> Result<Interrupt<T>, Errno> {
        // On a line that is shared all handlers have to run in threads, or none: with threadirqs
        // and PREEMPT_RT the kernel would refuse this one, or that of another driver.
        let passes_on = self.kind() != Kind::Intx;
        let traits = Traits { passes_on, is_bound, ..Traits::default() };
        let label = Text::<NAME_BYTES>::new(name);
        let irq = self.irq(vector, label.as_bytes(), traits, target, run)?;
        Ok(Interrupt { _source: None, irq, _vectors: self.clone() })
    }

    fn irq<T: Sync>(
        &self,
        vector: u16,
        label: &[u8],
        traits: Traits,
        target: NonNull<T>,
        run: fn(&T, u16),
    ) -> Result<Irq<Call<T>>, Errno> {
        let is_shared = self.kind() == Kind::Intx;
        let acknowledger = is_shared.then(|| self.0.acknowledger.clone());
        let call = KBox::new(Call { acknowledger, target, run, vector })?;
        let number = self.0.vectors.number(vector)?;
        Irq::new(self.0.hal.pci(), number, Traits { is_shared, ..traits }, label, call)
    }
}

/// A vector that has a handler. Dropping it waits until the handler does not run.
#[derive(Debug)]
pub struct Interrupt<T: Sync> {
    /// For controllers that may carry it. Dropped first.
    _source: Option<Registered>,
    irq: Irq<Call<T>>,
    /// The vectors are freed after their handlers.
    _vectors: Interrupts,
}

impl<T: Sync> Interrupt<T> {
    /// The number by which the kernel knows the vector.
    pub fn number(&self) -> u32 {
        self.irq.number()
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
