// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A queue's memory: its three areas, and indirect tables.
//!
//! The formats ([`split`](super::split), [`packed`](super::packed)) reach memory by these traits
//! only. Where a format depends on an order, it names the place ([`Fence`], [`Edge`]) and not the
//! ordering. The models put another memory in its place, and take out each place in turn.

use std::sync::atomic::{Ordering, fence};

use vbus_core::View;
use vbus_core::memory::DriverSlice;

use super::layout::{DESCRIPTOR_BYTES, Format, Layout};
use super::violation::Violation;

/// The places that need a full fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fence {
    /// Between the store that publishes used buffers and the load of what the driver wants to be
    /// notified of.
    Notify,
    /// Between the store that asks for notifications and the look for available buffers.
    Arm,
}

/// The stores by which one end publishes, with release, and the loads by which the other end
/// observes, with acquire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Edge {
    /// Buffers are available: the available index (split), a descriptor's flags (packed). The
    /// driver publishes.
    Available,
    /// Buffers are used: the used index (split), a descriptor's flags (packed). The device
    /// publishes.
    Used,
}

/// One of a queue's areas. `at` is an offset in bytes. It lies within the area, at a multiple of
/// the integer's size. Each place of an area has one size of access.
pub(super) trait Area {
    fn load16(&self, at: usize) -> u16;
    fn load32(&self, at: usize) -> u32;
    fn load64(&self, at: usize) -> u64;
    fn store16(&self, at: usize, value: u16);
    fn store32(&self, at: usize, value: u32);
    /// Loads a value that the driver publishes, and makes visible what the driver wrote before.
    fn observe16(&self, at: usize, edge: Edge) -> u16;
    /// Stores a value. A driver that observes it sees all that was written before.
    fn publish16(&self, at: usize, value: u16, edge: Edge);
    /// Fetches the cache line into the processor.
    fn prefetch(&self, at: usize);
    fn fence(at: Fence);
}

/// The areas of a queue.
pub(super) struct Areas<A> {
    pub(super) descriptors: A,
    pub(super) driver: A,
    pub(super) device: A,
}

/// Where indirect tables are.
pub(super) trait Tables {
    type Table<'t>: Table
    where
        Self: 't;

    /// The table of `bytes` bytes at `addr`. `None`: the device cannot reach all of it.
    fn table(&self, addr: u64, bytes: u32) -> Option<Self::Table<'_>>;
}

/// An indirect table.
pub(super) trait Table {
    /// Copies a descriptor once. The table has one with this number.
    fn descriptor(&self, number: usize) -> Descriptor;
}

/// A descriptor's private copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    /// The number of the next descriptor.
    pub(super) next: u16,
}

impl Descriptor {
    pub(super) const NEXT: u16 = 1;
    pub(super) const WRITE: u16 = 2;
    pub(super) const INDIRECT: u16 = 4;

    /// A descriptor of a split queue or of its indirect tables, from its two words. The second has
    /// the length in bits 0..32, the flags in 32..48, the next descriptor in 48..64.
    pub(super) fn of([addr, rest]: [u64; 2]) -> Descriptor {
        let [l0, l1, l2, l3, f0, f1, n0, n1] = rest.to_le_bytes();
        Descriptor {
            addr,
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The areas in a view's memory. The device can reach them whole for as long as the view is held.
pub(super) fn areas<'v>(
    layout: &Layout,
    view: &'v View<'_>,
) -> Result<Areas<DriverSlice<'v>>, Violation> {
    let [descriptors, driver, device] = layout.places();
    let slice = |place: super::layout::Place, write| {
        let unmapped = |_| Violation::Unmapped(place.name);
        view.slice(place.addr, place.len, write).map_err(unmapped)
    };
    let packed = layout.format == Format::Packed;
    if packed {
        // The device reads it too.
        slice(descriptors, false)?;
    }
    Ok(Areas {
        descriptors: slice(descriptors, packed)?,
        driver: slice(driver, false)?,
        device: slice(device, true)?,
    })
}

impl Area for DriverSlice<'_> {
    #[inline(always)]
    fn load16(&self, at: usize) -> u16 {
        self.load(at, Ordering::Relaxed).unwrap_or_default()
    }

    #[inline(always)]
    fn load32(&self, at: usize) -> u32 {
        self.load(at, Ordering::Relaxed).unwrap_or_default()
    }

    #[inline(always)]
    fn load64(&self, at: usize) -> u64 {
        self.load(at, Ordering::Relaxed).unwrap_or_default()
    }

    #[inline(always)]
    fn store16(&self, at: usize, value: u16) {
        #[cfg(test)]
        if !super::death::spend() {
            return;
        }
        let stored = self.store(at, value, Ordering::Relaxed);
        debug_assert!(stored, "{at}");
    }

    #[inline(always)]
    fn store32(&self, at: usize, value: u32) {
        #[cfg(test)]
        if !super::death::spend() {
            return;
        }
        let stored = self.store(at, value, Ordering::Relaxed);
        debug_assert!(stored, "{at}");
    }

    #[inline(always)]
    fn observe16(&self, at: usize, _edge: Edge) -> u16 {
        self.load(at, Ordering::Acquire).unwrap_or_default()
    }

    #[inline(always)]
    fn publish16(&self, at: usize, value: u16, _edge: Edge) {
        #[cfg(test)]
        if !super::death::spend() {
            return;
        }
        let stored = self.store(at, value, Ordering::Release);
        debug_assert!(stored, "{at}");
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        DriverSlice::prefetch(self, at);
    }

    #[inline(always)]
    fn fence(_at: Fence) {
        fence(Ordering::SeqCst);
    }
}

impl Tables for View<'_> {
    type Table<'t>
        = DriverSlice<'t>
    where
        Self: 't;

    fn table(&self, addr: u64, bytes: u32) -> Option<DriverSlice<'_>> {
        self.slice(addr, bytes.into(), false).ok()
    }
}

impl Table for DriverSlice<'_> {
    #[inline]
    fn descriptor(&self, number: usize) -> Descriptor {
        let at = number * DESCRIPTOR_BYTES;
        let words = [at, at + 8].map(|at| self.load(at, Ordering::Relaxed));
        if let [Some(first), Some(second)] = words {
            return Descriptor::of([first, second]);
        }
        // A table may be at any address, and a descriptor may cross from one map into the next.
        let mut words = [[0; 8]; 2];
        self.split_at(at).1.copy_to(words.as_flattened_mut());
        Descriptor::of(words.map(u64::from_le_bytes))
    }
}
