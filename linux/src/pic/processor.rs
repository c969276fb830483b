// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A processor: its page, and what looks at the page if no message does.
#![allow(
    unsafe_code,
    reason = "a processor refers to the controller that has it, and its timer to it"
)]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};

use vbus_driver::pic::{Controller, Wanted};

use super::page::{Drained, Page, Unmasked};
use crate::hal::KernelHal;
use crate::kernel::alloc::NoMemory;
use crate::kernel::timer::Timer;

/// How long nobody looks at a page whose lines come without end, in nanoseconds.
const PAUSE: u64 = 1_000_000;

/// What has processors. Its methods are called in the context of a message or of a timer.
pub trait Owner: Sync {
    /// Calls the handler of a line.
    fn handle(&self, line: u16);

    /// A message was for no line: it may have been for an event of the function.
    fn look_soon(&self);

    /// Far too many messages were for no line. [`look_soon`](Self::look_soon) follows.
    fn fault(&self);
}

/// A processor.
pub struct Processor<T: Owner> {
    owner: NonNull<T>,
    /// The interrupt that belongs to this processor alone; 0: there is none.
    irq: AtomicU32,
    /// None only until the processor is at its place. Dropped before the page, at which it looks.
    timer: Option<Timer<Self>>,
    page: Page,
}

// SAFETY: it shares its owner, which is Sync.
unsafe impl<T: Owner> Send for Processor<T> {}
// SAFETY: as above.
unsafe impl<T: Owner> Sync for Processor<T> {}

impl<T: Owner> Processor<T> {
    /// A processor without a connection, and without an interrupt. The caller may sleep.
    ///
    /// # Safety
    /// `owner` stays valid, at its place, and is only shared, until the processor is dropped.
    pub unsafe fn new(owner: NonNull<T>) -> Result<Self, NoMemory> {
        Ok(Self { owner, irq: AtomicU32::new(0), timer: None, page: Page::new()? })
    }

    /// Lets a timer look, once the processor is at its place. The caller may sleep.
    ///
    /// # Safety
    /// The processor stays at its place until it is dropped.
    pub unsafe fn start_timer(&mut self) -> Result<(), NoMemory> {
        // SAFETY: by the caller's promise. The timer is stopped when the processor is dropped.
        self.timer = Some(unsafe { Timer::new(NonNull::from(&*self), Self::expire) }?);
        Ok(())
    }

    /// The number of the interrupt that belongs to this processor alone; 0: there is none.
    pub fn irq(&self) -> u32 {
        self.irq.load(Ordering::Relaxed)
    }

    /// This interrupt belongs to this processor alone.
    pub fn set_irq(&self, number: u32) {
        self.irq.store(number, Ordering::Relaxed);
    }

    /// Takes lines from this controller from now on, as [`Page::install`].
    pub fn install(&self, controller: Controller<KernelHal>, unmasked: impl FnOnce() -> Unmasked) {
        if self.page.install(controller, unmasked) == Wanted::Pending {
            self.look_after(0);
        }
    }

    /// Takes no lines any more. The caller may sleep.
    pub fn uninstall(&self) {
        drop(self.page.uninstall());
    }

    /// Masks a line, or unmasks it. From any context.
    pub fn set_masked(&self, line: u16, masked: bool) {
        if self.page.set_masked(line, masked) {
            self.look_after(0);
        }
    }

    /// A message has come, in hard interrupt context, or in the thread of a line of PCI.
    pub fn message(&self) {
        match self.look(true) {
            Drained::All | Drained::TooMany => return,
            Drained::Nothing => {}
            Drained::Futile => self.owner().fault(),
        }
        // Vector 0 is that of the function's events too.
        self.owner().look_soon();
    }

    fn owner(&self) -> &T {
        // SAFETY: the owner has this processor.
        unsafe { self.owner.as_ref() }
    }

    /// Handles the lines of the page, in the context of a message or of a timer.
    fn look(&self, by_message: bool) -> Drained {
        let drained = self.page.drain(by_message, |line| self.owner().handle(line));
        if drained == Drained::TooMany {
            self.look_after(PAUSE);
        }
        drained
    }

    /// Looks at the page after this time, in nanoseconds. From any context.
    fn look_after(&self, nanoseconds: u64) {
        if let Some(timer) = &self.timer {
            timer.run_after(nanoseconds);
        }
    }

    fn expire(&self) {
        self.page.resume();
        self.look(false);
    }
}
