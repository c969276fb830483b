// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bare rings of slots: raw pointers, no check. Without a fence they are the floor, in the two
//! forms that a ring can have. With the fence of a signal, but no signal, they show what other
//! orders of writing would bring to a ring that has one.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

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

    /// The length of the return at position `pos`.
    #[inline(always)]
    fn length(&self, pos: usize) -> &AtomicU32 {
        // SAFETY: below ENTRIES, behind the slots, which the pages hold.
        unsafe { &*self.0.add(ENTRIES).cast::<AtomicU32>().add(pos % ENTRIES) }
    }

    /// The slots of the `n` positions from `pos` on, but no further than the array's end, and the
    /// lap of all of them.
    #[inline(always)]
    fn stretch(&self, pos: usize, n: usize) -> (&[[AtomicU64; 2]], u64) {
        let n = n.min(ENTRIES - pos % ENTRIES);
        // SAFETY: up to ENTRIES, which the pages hold.
        (unsafe { std::slice::from_raw_parts(self.0.add(pos % ENTRIES), n) }, lap(pos))
    }
}

#[inline(always)]
fn put(slot: &[AtomicU64; 2], addr: u64, tag: u64) {
    slot[0].store(addr, Ordering::Relaxed);
    slot[1].store(tag, Ordering::Release);
}

#[inline(always)]
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
/// The same with lengths of 32 bits, which lie together behind the slots.
pub const LENGTHS: u8 = 5;

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
    #[inline(always)]
    fn submit(&mut self, n: usize) -> u64 {
        let mut sum = 0;
        let end = self.submitted + n;
        if FORM == OLDEST_LAST {
            for pos in (self.submitted..end).rev() {
                sum += pos as u64 & LENGTH;
                put(self.out.at(pos), pos as u64, lap(pos) | 64);
            }
            self.submitted = end;
        }
        while self.submitted != end {
            let (slots, lap) = self.out.stretch(self.submitted, end - self.submitted);
            for slot in slots {
                let addr = self.submitted as u64;
                sum += addr & LENGTH;
                put(slot, addr, lap | 64);
                self.submitted += 1;
            }
        }
        end_of_batch::<FORM>();
        if FORM == RUNS { n as u64 } else { sum }
    }

    #[inline(always)]
    fn reap(&mut self, max: usize) -> (usize, u64) {
        let (mut n, mut sum) = (0, 0);
        'all: while n < max {
            // A run's tag stands in the first of its slots.
            let (slots, lap) =
                self.back.stretch(self.reaped, if FORM >= RUNS { 1 } else { max - n });
            for slot in slots {
                let tag = slot[1].load(Ordering::Acquire);
                if tag & (LAP | RETURNED) != lap | returned::<FORM>() {
                    break 'all;
                }
                let run = if FORM >= RUNS { (tag & LENGTH) as usize } else { 1 };
                if FORM == LENGTHS {
                    for pos in self.reaped..self.reaped + run {
                        sum += u64::from(self.back.length(pos).load(Ordering::Relaxed));
                    }
                } else {
                    sum += tag & LENGTH;
                }
                self.reaped += run;
                n += run;
            }
        }
        (n, sum)
    }
}

impl<const FORM: u8> Device for Far<FORM> {
    #[inline(always)]
    fn serve(&mut self, max: usize) -> usize {
        let first = self.taken;
        'all: while self.taken - first < max {
            let (slots, lap) = self.out.stretch(self.taken, max - (self.taken - first));
            let (back, _) = self.back.stretch(self.taken, slots.len());
            for (slot, back) in slots.iter().zip(back) {
                if slot[1].load(Ordering::Acquire) & (LAP | RETURNED) != lap {
                    break 'all;
                }
                let addr = slot[0].load(Ordering::Relaxed);
                if FORM == RUNS {
                    assert!(addr == self.taken as u64, "in order");
                } else if FORM == LENGTHS {
                    self.back.length(self.taken).store(addr as u32, Ordering::Relaxed);
                } else {
                    // Where the array is the same, the address stays.
                    back[1].store(lap | returned::<FORM>() | addr & LENGTH, Ordering::Release);
                }
                self.taken += 1;
            }
        }
        let n = self.taken - first;
        if n != 0 {
            if FORM >= RUNS {
                put(self.back.at(first), 0, lap(first) | RETURNED | n as u64);
            }
            end_of_batch::<FORM>();
        }
        n
    }
}
