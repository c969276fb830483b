// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtio split ring with both ends by hand: published once a batch, no fence, no notification,
//! each end with its own copy of all that it need not read from memory.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::{Device, Driver, ENTRIES, pages};

/// As the specification lays it out, each part on pages of its own.
#[repr(C)]
struct Descriptor {
    addr: AtomicU64,
    len: AtomicU32,
    flags: AtomicU16,
    next: AtomicU16,
}

#[repr(C)]
struct Available {
    flags: AtomicU16,
    idx: AtomicU16,
    ring: [AtomicU16; ENTRIES],
}

#[repr(C)]
struct Element {
    id: AtomicU32,
    len: AtomicU32,
}

#[repr(C)]
struct Used {
    flags: AtomicU16,
    idx: AtomicU16,
    ring: [Element; ENTRIES],
}

#[derive(Clone, Copy)]
struct Ring {
    table: &'static [Descriptor; ENTRIES],
    available: &'static Available,
    used: &'static Used,
}

pub struct Near {
    ring: Ring,
    free: Vec<u16>,
    submitted: u16,
    reaped: u16,
    used_idx: u16,
    number: u64,
}

pub struct Far {
    ring: Ring,
    taken: u16,
    available_idx: u16,
}

pub fn pair() -> (Near, Far) {
    let (table, available, used) = (pages().pointer(), pages().pointer(), pages().pointer());
    // SAFETY: zeroed pages that stay mapped, large enough for each part, of nothing but atomics.
    let ring = unsafe {
        Ring { table: &*table.cast(), available: &*available.cast(), used: &*used.cast() }
    };
    let free = (0..ENTRIES as u16).rev().collect();
    (
        Near { ring, free, submitted: 0, reaped: 0, used_idx: 0, number: 0 },
        Far { ring, taken: 0, available_idx: 0 },
    )
}

fn slot(pos: u16) -> usize {
    pos as usize % ENTRIES
}

impl Driver for Near {
    #[inline(always)]
    fn submit(&mut self, n: usize) -> u64 {
        let mut sum = 0;
        for _ in 0..n {
            self.number += 1;
            sum += self.number & 0xffff_ffff;
            let id = self.free.pop().expect("there is room");
            let descriptor = &self.ring.table[slot(id)];
            descriptor.addr.store(self.number, Ordering::Relaxed);
            descriptor.len.store(64, Ordering::Relaxed);
            descriptor.flags.store(0, Ordering::Relaxed);
            descriptor.next.store(0, Ordering::Relaxed);
            self.ring.available.ring[slot(self.submitted)].store(id, Ordering::Relaxed);
            self.submitted = self.submitted.wrapping_add(1);
        }
        self.ring.available.idx.store(self.submitted, Ordering::Release);
        sum
    }

    #[inline(always)]
    fn reap(&mut self, max: usize) -> (usize, u64) {
        if self.used_idx == self.reaped {
            self.used_idx = self.ring.used.idx.load(Ordering::Acquire);
        }
        let n = usize::from(self.used_idx.wrapping_sub(self.reaped)).min(max);
        let mut sum = 0;
        for _ in 0..n {
            let element = &self.ring.used.ring[slot(self.reaped)];
            sum += u64::from(element.len.load(Ordering::Relaxed));
            self.free.push(element.id.load(Ordering::Relaxed) as u16);
            self.reaped = self.reaped.wrapping_add(1);
        }
        (n, sum)
    }
}

impl Device for Far {
    #[inline(always)]
    fn serve(&mut self, max: usize) -> usize {
        if self.available_idx == self.taken {
            self.available_idx = self.ring.available.idx.load(Ordering::Acquire);
        }
        let n = usize::from(self.available_idx.wrapping_sub(self.taken)).min(max);
        for _ in 0..n {
            let id = self.ring.available.ring[slot(self.taken)].load(Ordering::Relaxed);
            let descriptor = &self.ring.table[slot(id)];
            let addr = descriptor.addr.load(Ordering::Relaxed);
            let _ =
                (descriptor.len.load(Ordering::Relaxed), descriptor.flags.load(Ordering::Relaxed));
            let element = &self.ring.used.ring[slot(self.taken)];
            element.id.store(u32::from(id), Ordering::Relaxed);
            element.len.store(addr as u32, Ordering::Relaxed);
            self.taken = self.taken.wrapping_add(1);
        }
        if n != 0 {
            self.ring.used.idx.store(self.taken, Ordering::Release);
        }
        n
    }
}
