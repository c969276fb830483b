// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Integers in the driver's memory that both ends access at once: the indexes and flags of a layout
//! that is not made of words, as a virtqueue is.
#![allow(unsafe_code)] // Makes references to atomics out of addresses in the driver's memory.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use vbus_shm::sync::prefetch;

use super::slice::DriverSlice;

/// An integer that a [`DriverSlice`] loads and stores by one access: [`u16`], [`u32`] or [`u64`].
/// Its bytes are little-endian, as this machine's are.
pub trait SharedInteger: Copy + sealed::Atomic {}

impl SharedInteger for u16 {}
impl SharedInteger for u32 {}
impl SharedInteger for u64 {}

mod sealed {
    use super::Ordering;

    pub trait Atomic: Sized {
        type Atomic;

        fn load(from: &Self::Atomic, order: Ordering) -> Self;
        fn store(to: &Self::Atomic, value: Self, order: Ordering);
    }
}

macro_rules! atomic {
    ($integer:ty, $atomic:ty) => {
        impl sealed::Atomic for $integer {
            type Atomic = $atomic;

            #[inline(always)]
            fn load(from: &$atomic, order: Ordering) -> $integer {
                from.load(order)
            }

            #[inline(always)]
            fn store(to: &$atomic, value: $integer, order: Ordering) {
                to.store(value, order);
            }
        }
    };
}

atomic!(u16, AtomicU16);
atomic!(u32, AtomicU32);
atomic!(u64, AtomicU64);

impl<'a> DriverSlice<'a> {
    /// The atomic at byte `at`. `None`: it is not wholly within the slice, or its address is not a
    /// multiple of its size.
    #[inline(always)]
    fn atomic<T: SharedInteger>(&self, at: usize) -> Option<&'a T::Atomic> {
        let place = self.place(at, size_of::<T>())?.cast::<T::Atomic>();
        if !place.is_aligned() {
            return None;
        }
        // SAFETY: the view keeps the mapping for 'a, with as many bytes at `place`. This process
        // accesses them only through atomics, raw copies and system calls.
        Some(unsafe { place.as_ref() })
    }

    /// Loads the integer at byte `at` by one access. `None`: it is not wholly within the slice, or
    /// its address is not a multiple of its size.
    #[inline(always)]
    pub fn load<T: SharedInteger>(&self, at: usize, order: Ordering) -> Option<T> {
        self.atomic::<T>(at).map(|atomic| T::load(atomic, order))
    }

    /// Stores `value` at byte `at` by one access. False: nothing is stored, because the slice is
    /// only for reading, or for a reason that [`load`](Self::load) names.
    #[inline(always)]
    pub fn store<T: SharedInteger>(&self, at: usize, value: T, order: Ordering) -> bool {
        let atomic = if self.is_for_writing() { self.atomic::<T>(at) } else { None };
        let Some(atomic) = atomic else { return false };
        T::store(atomic, value, order);
        self.wrote_at(at, size_of::<T>());
        true
    }

    /// Asks the processor to fetch the cache line of byte `at`, which the device reads soon. It
    /// does nothing for a byte that is not in the first of the slice's pieces.
    #[inline(always)]
    pub fn prefetch(&self, at: usize) {
        if let Some(word) = self.near(at & !7, 8).map(|place| place.cast::<AtomicU64>()) {
            if word.is_aligned() {
                // SAFETY: as in `atomic`.
                prefetch(unsafe { word.as_ref() });
            }
        }
    }
}
