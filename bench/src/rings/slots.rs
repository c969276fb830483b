// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bare rings of slots: raw pointers, no check. Without a fence they are the floor, in the two
//! forms that a ring can have. With the fence of a signal, but no signal, they show what other
//! orders of writing would bring to a ring that has one.

use std::sync::atomic::{AtomicU64, Ordering, fence};

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

/// Two arrays, each written by one end.
pub const TWO_ARRAYS: u8 = 0;
/// One array, whose slots pass back and forth.
pub const IN_PLACE: u8 = 1;
/// In place, with a fence for each batch at each end.
pub const FENCED: u8 = 2;
/// The same, and a batch is written backwards: its oldest tag comes last.
pub const OLDEST_LAST: u8 = 3;
/// As [`FENCED`], but a batch is returned by one tag, without contents.
pub const RUNS: u8 = 4;

pub struct Near<const FORM: u8> {
    out: Slots,
    back: Slots,
    submitted: usize,
    reaped: usize,
}

pub struct Far<const FORM: u8> {
    out: Slots,
    back: Slots,
    taken: usize,
}

pub fn pair<const FORM: u8>() -> (Near<FORM>, Far<FORM>) {
    let out = Slots::new();
    let back = if FORM == TWO_ARRAYS { Slots::new() } else { out };
    (Near { out, back, submitted: 0, reaped: 0 }, Far { out, back, taken: 0 })
}

#[inline(always)]
fn end_of_batch<const FORM: u8>() {
    if FORM >= FENCED {
        fence(Ordering::SeqCst);
    }
}

fn returned<const FORM: u8>() -> u64 {
    if FORM == TWO_ARRAYS { 0 } else { RETURNED }
}

const LENGTH: u64 = 0xffff_ffff;

impl<const FORM: u8> Driver for Near<FORM> {
    #[inline]
    fn submit(&mut self, n: usize) -> u64 {
        let mut sum = 0;
        for i in 0..n {
            let i = if FORM == OLDEST_LAST { n - 1 - i } else { i };
            let addr = (self.submitted + i) as u64;
            sum += addr & LENGTH;
            self.out.put(self.submitted + i, addr, lap(self.submitted + i) | 64);
        }
        self.submitted += n;
        end_of_batch::<FORM>();
        if FORM == RUNS { n as u64 } else { sum }
    }

    #[inline]
    fn reap(&mut self, max: usize) -> (usize, u64) {
        let (mut n, mut sum) = (0, 0);
        while n < max {
            let bits = lap(self.reaped) | returned::<FORM>();
            let Some((_, tag)) = self.back.get(self.reaped, LAP | RETURNED, bits) else { break };
            sum += tag & LENGTH;
            let run = if FORM == RUNS { (tag & LENGTH) as usize } else { 1 };
            self.reaped += run;
            n += run;
        }
        (n, sum)
    }
}

impl<const FORM: u8> Device for Far<FORM> {
    #[inline]
    fn serve(&mut self, max: usize) -> usize {
        let first = self.taken;
        while self.taken - first < max {
            let pos = self.taken;
            let Some((addr, _)) = self.out.get(pos, LAP | RETURNED, lap(pos)) else { break };
            if FORM != RUNS {
                self.back.put(pos, addr, lap(pos) | returned::<FORM>() | addr & LENGTH);
            } else {
                assert_eq!(addr, pos as u64, "in order");
            }
            self.taken += 1;
        }
        let n = self.taken - first;
        if n != 0 {
            if FORM == RUNS {
                self.back.put(first, 0, lap(first) | RETURNED | n as u64);
            }
            end_of_batch::<FORM>();
        }
        n
    }
}
