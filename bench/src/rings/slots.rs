//! The floor: bare rings of slots, raw pointers, no check, no fence, no signal, in the two forms
//! that a ring can have.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Device, Driver, ENTRIES, pages};

const LAP: u64 = 1 << 63;
const RETURNED: u64 = 1 << 62;

/// A slot: address, then length and tag.
#[derive(Clone, Copy)]
struct Slots(*const [AtomicU64; 2]);

// SAFETY: memory that stays mapped, accessed atomically.
unsafe impl Send for Slots {}

impl Slots {
    fn new() -> Slots {
        Slots(pages().pointer().cast_const().cast())
    }

    #[inline(always)]
    fn at(&self, pos: usize) -> &[AtomicU64; 2] {
        // SAFETY: below ENTRIES, which the pages hold.
        unsafe { &*self.0.add(pos % ENTRIES) }
    }

    #[inline(always)]
    fn put(&self, pos: usize, addr: u64, tag: u64) {
        let slot = self.at(pos);
        slot[0].store(addr, Ordering::Relaxed);
        slot[1].store(tag, Ordering::Release);
    }

    /// The slot at `pos`, if the bits `mask` of its tag are `bits`.
    #[inline(always)]
    fn get(&self, pos: usize, mask: u64, bits: u64) -> Option<(u64, u64)> {
        let slot = self.at(pos);
        let tag = slot[1].load(Ordering::Acquire);
        (tag & mask == bits).then(|| (slot[0].load(Ordering::Relaxed), tag))
    }
}

fn lap(pos: usize) -> u64 {
    if pos & ENTRIES == 0 { LAP } else { 0 }
}

pub struct Near<const IN_PLACE: bool> {
    out: Slots,
    back: Slots,
    submitted: usize,
    reaped: usize,
}

pub struct Far<const IN_PLACE: bool> {
    out: Slots,
    back: Slots,
    taken: usize,
}

/// Two arrays, each written by one end.
pub fn two_arrays() -> (Near<false>, Far<false>) {
    let (out, back) = (Slots::new(), Slots::new());
    (Near { out, back, submitted: 0, reaped: 0 }, Far { out, back, taken: 0 })
}

/// One array, whose slots pass back and forth.
pub fn in_place() -> (Near<true>, Far<true>) {
    let both = Slots::new();
    (
        Near { out: both, back: both, submitted: 0, reaped: 0 },
        Far { out: both, back: both, taken: 0 },
    )
}

const LENGTH: u64 = 0xffff_ffff;

impl<const IN_PLACE: bool> Driver for Near<IN_PLACE> {
    #[inline]
    fn submit(&mut self, n: usize) -> u64 {
        let mut sum = 0;
        for _ in 0..n {
            let addr = self.submitted as u64;
            sum += addr & LENGTH;
            self.out.put(self.submitted, addr, lap(self.submitted) | 64);
            self.submitted += 1;
        }
        sum
    }

    #[inline]
    fn reap(&mut self, max: usize) -> (usize, u64) {
        let mut sum = 0;
        for n in 0..max {
            let bits = lap(self.reaped) | if IN_PLACE { RETURNED } else { 0 };
            let Some((_, tag)) = self.back.get(self.reaped, LAP | RETURNED, bits) else {
                return (n, sum);
            };
            sum += tag & LENGTH;
            self.reaped += 1;
        }
        (max, sum)
    }
}

impl<const IN_PLACE: bool> Device for Far<IN_PLACE> {
    #[inline]
    fn serve(&mut self, max: usize) -> usize {
        for n in 0..max {
            let Some((addr, _)) = self.out.get(self.taken, LAP | RETURNED, lap(self.taken)) else {
                return n;
            };
            let tag = lap(self.taken) | if IN_PLACE { RETURNED } else { 0 } | addr & LENGTH;
            self.back.put(self.taken, addr, tag);
            self.taken += 1;
        }
        max
    }
}
