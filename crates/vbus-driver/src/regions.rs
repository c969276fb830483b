// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tables in which a function keeps the memory of its regions. The environment chooses the table,
//! because this crate does not allocate.

use core::fmt;

use crate::error::NoMemory;

/// A table of memory that is registered with a device ([`Hal::Regions`](crate::Hal::Regions)). An
/// entry stays until it is removed or the table is dropped.
pub trait RegionTable<D>: Sized + fmt::Debug {
    /// An empty table. `regions` is the most regions that the device takes. The table may have room
    /// for fewer. The driver can then register only that many.
    fn new(regions: usize) -> Result<Self, NoMemory>;

    /// Keeps `memory` and returns the index of its slot. `None` if the table is full.
    fn insert(&mut self, memory: D) -> Option<usize>;

    /// Drops the memory in slot `slot`.
    fn remove(&mut self, slot: usize);
}

/// A table with room for `N` regions, within the [`Function`](crate::Function) itself.
#[derive(Debug)]
pub struct FixedTable<D, const N: usize>([Option<D>; N]);

impl<D: fmt::Debug, const N: usize> RegionTable<D> for FixedTable<D, N> {
    fn new(_regions: usize) -> Result<Self, NoMemory> {
        Ok(FixedTable([const { None }; N]))
    }

    fn insert(&mut self, memory: D) -> Option<usize> {
        insert(&mut self.0, memory)
    }

    fn remove(&mut self, slot: usize) {
        remove(&mut self.0, slot);
    }
}

/// A table on the heap. It grows up to the number of regions that the device takes, and as many
/// memories beside them ([`Function::keep`](crate::Function::keep)).
#[cfg(feature = "alloc")]
#[derive(Debug)]
pub struct HeapTable<D> {
    slots: alloc::vec::Vec<Option<D>>,
    max: usize,
}

#[cfg(feature = "alloc")]
impl<D: fmt::Debug> RegionTable<D> for HeapTable<D> {
    fn new(regions: usize) -> Result<Self, NoMemory> {
        Ok(HeapTable { slots: alloc::vec::Vec::new(), max: 2 * regions })
    }

    fn insert(&mut self, memory: D) -> Option<usize> {
        if self.slots.len() < self.max && self.slots.iter().all(Option::is_some) {
            self.slots.push(None);
        }
        insert(&mut self.slots, memory)
    }

    fn remove(&mut self, slot: usize) {
        remove(&mut self.slots, slot);
    }
}

fn insert<D>(slots: &mut [Option<D>], memory: D) -> Option<usize> {
    let slot = slots.iter().position(Option::is_none)?;
    slots[slot] = Some(memory);
    Some(slot)
}

fn remove<D>(slots: &mut [Option<D>], slot: usize) {
    if let Some(kept) = slots.get_mut(slot) {
        *kept = None;
    }
}
