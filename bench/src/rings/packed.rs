// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtio packed virtqueue with both ends by hand, from the layout of virtio 1.x, "Packed
//! Virtqueues". Both ends use buffers in order, so neither has a list of free ids.
//!
//! The queue has two forms. In `EACH`, every descriptor is made available by its own flags, and
//! every one is returned by its own used descriptor. In `BATCH`, the flags of a batch's first
//! descriptor are written last and so make the whole batch available, and one used descriptor
//! returns the whole batch (VIRTIO_F_IN_ORDER). With `EVENTS`, each end looks at the event
//! suppression area of the other end after each batch, which takes a full fence; this is what a
//! queue costs whose ends may sleep. Without it, both ends poll for ever. With `AHEAD`, an end that
//! found a whole batch fetches the descriptors of the next one, as vbus's ring does.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use vbus_shm::sync::prefetch;

use super::{Device, Driver, ENTRIES, pages};

/// Each descriptor is published and returned by itself.
pub const EACH: bool = false;
/// Descriptors are published and returned by the batch.
pub const BATCH: bool = true;

/// The smallest batch after which an end fetches the next one, as for vbus's ring.
const AHEAD_FROM: usize = 16;

/// Flag of a descriptor, as bit of its second word: the driver's wrap counter if it is available.
const AVAIL: u64 = 1 << (48 + 7);
/// Flag of a descriptor, as bit of its second word: the device's wrap counter if it is used.
const USED: u64 = 1 << (48 + 15);

/// Values of the event suppression area's flags, bits 16..18 of the area.
const EVENTS_DISABLE: u32 = 1;
const EVENTS_AT_DESCRIPTOR: u32 = 2;

/// A descriptor: the address; then the length in bits 0..32, the buffer's id in 32..48 and the
/// flags in 48..64.
type Descriptor = [AtomicU64; 2];

/// A cache line with an event suppression area: the descriptor's position in bits 0..15, its wrap
/// counter in bit 15, the flags in 16..32.
#[repr(C, align(128))]
struct Area(AtomicU32);

/// The queue's memory.
#[repr(C)]
struct Queue {
    ring: [Descriptor; ENTRIES],
    /// Written by the driver: when it wants an interrupt.
    driver: Area,
    /// Written by the device: when it wants a notification.
    device: Area,
}

impl Queue {
    #[inline(always)]
    fn at(&self, pos: u32) -> &Descriptor {
        &self.ring[pos as usize % ENTRIES]
    }

    /// Fetches the descriptors of the `n` positions from `pos` on.
    #[inline(always)]
    fn fetch(&self, pos: u32, n: u32) {
        self.stretch(pos, n).chunks(4).for_each(|line| prefetch(&line[0][0]));
    }

    /// The descriptors of the `n` positions from `pos` on, but no further than the ring's end: as
    /// for vbus's ring, a loop over them has no wrap counter to compute.
    #[inline(always)]
    fn stretch(&self, pos: u32, n: u32) -> &[Descriptor] {
        let index = pos as usize % ENTRIES;
        &self.ring[index..(index + n as usize).min(ENTRIES)]
    }
}

/// The wrap counter at position `pos`, which counts on through the laps. It is 1 in the first lap.
#[inline(always)]
fn wrap(pos: u32) -> bool {
    pos & ENTRIES as u32 == 0
}

/// The flags that make a descriptor at `pos` available.
#[inline(always)]
fn available(pos: u32) -> u64 {
    if wrap(pos) { AVAIL } else { USED }
}

/// The flags that make a descriptor at `pos` used.
#[inline(always)]
fn used(pos: u32) -> u64 {
    if wrap(pos) { AVAIL | USED } else { 0 }
}

/// Whether the peer whose event suppression area this is wants to hear of the descriptors from
/// `old` to `new`.
#[inline(always)]
fn wants_event(area: &Area, old: u32, new: u32) -> bool {
    // The descriptors are visible before the area is read: the peer that enables events looks at
    // the descriptors after it has written the area.
    fence(Ordering::SeqCst);
    let area = area.0.load(Ordering::Relaxed);
    match area >> 16 & 3 {
        EVENTS_DISABLE => false,
        EVENTS_AT_DESCRIPTOR => {
            // The position of the event within two laps, which the wrap counter tells apart.
            let event = area & 0x7fff | if area & 0x8000 == 0 { ENTRIES as u32 } else { 0 };
            event.wrapping_sub(old) % (2 * ENTRIES as u32) < new.wrapping_sub(old)
        }
        _ => true,
    }
}

pub struct Near<const FORM: bool, const EVENTS: bool, const AHEAD: bool> {
    queue: &'static Queue,
    submitted: u32,
    reaped: u32,
    number: u64,
}

pub struct Far<const FORM: bool, const EVENTS: bool, const AHEAD: bool> {
    queue: &'static Queue,
    taken: u32,
    number: u64,
}

/// Both ends.
type Ends<const FORM: bool, const EVENTS: bool, const AHEAD: bool> =
    (Near<FORM, EVENTS, AHEAD>, Far<FORM, EVENTS, AHEAD>);

pub fn pair<const FORM: bool, const EVENTS: bool, const AHEAD: bool>() -> Ends<FORM, EVENTS, AHEAD>
{
    // SAFETY: zeroed pages that stay mapped, large enough, of nothing but atomics.
    let queue: &Queue = unsafe { &*pages().pointer().cast() };
    // Both ends poll.
    queue.driver.0.store(EVENTS_DISABLE << 16, Ordering::Relaxed);
    queue.device.0.store(EVENTS_DISABLE << 16, Ordering::Relaxed);
    (Near { queue, submitted: 0, reaped: 0, number: 0 }, Far { queue, taken: 0, number: 0 })
}

impl<const FORM: bool, const EVENTS: bool, const AHEAD: bool> Driver for Near<FORM, EVENTS, AHEAD> {
    #[inline(always)]
    fn submit(&mut self, n: usize) -> u64 {
        let first = self.submitted;
        let end = first.wrapping_add(n as u32);
        let (mut sum, mut addr) = (0, self.number);
        let put = |descriptor: &Descriptor, pos: u32, addr: u64, flags: u64| {
            descriptor[0].store(addr, Ordering::Relaxed);
            let id = u64::from(pos % ENTRIES as u32);
            descriptor[1].store(64 | id << 32 | flags, Ordering::Release);
        };
        let mut pos = first;
        if FORM == BATCH {
            // The device does not look at a descriptor before it has seen all those before it. So
            // the first one is written last.
            (pos, addr) = (pos.wrapping_add(1), addr + 1);
        }
        while pos != end {
            let flags = available(pos);
            for descriptor in self.queue.stretch(pos, end.wrapping_sub(pos)) {
                addr += 1;
                sum += addr & 0xffff_ffff;
                put(descriptor, pos, addr, flags);
                pos = pos.wrapping_add(1);
            }
        }
        if FORM == BATCH {
            put(self.queue.at(first), first, self.number + 1, available(first));
        }
        self.number += n as u64;
        self.submitted = end;
        if EVENTS {
            assert!(!wants_event(&self.queue.device, first, end), "the device polls");
        }
        if FORM == BATCH { n as u64 } else { sum }
    }

    #[inline(always)]
    fn reap(&mut self, max: usize) -> (usize, u64) {
        let (mut sum, mut n) = (0, 0);
        if FORM == BATCH {
            while n < max {
                let in_flight = self.submitted.wrapping_sub(self.reaped);
                let tag = self.queue.at(self.reaped)[1].load(Ordering::Acquire);
                if tag & (AVAIL | USED) != used(self.reaped) {
                    break;
                }
                // The id is that of the last buffer of those which this descriptor returns.
                let last = (tag >> 32 & 0xffff) as u32;
                let count = (last.wrapping_sub(self.reaped) % ENTRIES as u32) + 1;
                assert!(count <= in_flight, "an honest device");
                sum += u64::from(count);
                self.reaped = self.reaped.wrapping_add(count);
                n += count as usize;
            }
            if AHEAD && n >= max.max(AHEAD_FROM) {
                self.queue.fetch(self.reaped, max as u32);
            }
            return (n, sum);
        }
        let first = self.reaped;
        let mut pos = first;
        let end = first.wrapping_add((max as u32).min(self.submitted.wrapping_sub(first)));
        'all: while pos != end {
            let flags = used(pos);
            for descriptor in self.queue.stretch(pos, end.wrapping_sub(pos)) {
                let tag = descriptor[1].load(Ordering::Acquire);
                if tag & (AVAIL | USED) != flags {
                    break 'all;
                }
                sum += tag & 0xffff_ffff;
                pos = pos.wrapping_add(1);
            }
        }
        self.reaped = pos;
        n = pos.wrapping_sub(first) as usize;
        if AHEAD && n >= max.max(AHEAD_FROM) {
            self.queue.fetch(pos, max as u32);
        }
        (n, sum)
    }
}

impl<const FORM: bool, const EVENTS: bool, const AHEAD: bool> Device for Far<FORM, EVENTS, AHEAD> {
    #[inline(always)]
    fn serve(&mut self, max: usize) -> usize {
        let first = self.taken;
        let mut pos = first;
        let mut id = 0;
        let end = first.wrapping_add(max as u32);
        'all: while pos != end {
            let (free, done) = (available(pos), used(pos));
            for descriptor in self.queue.stretch(pos, end.wrapping_sub(pos)) {
                let tag = descriptor[1].load(Ordering::Acquire);
                if tag & (AVAIL | USED) != free {
                    break 'all;
                }
                let addr = descriptor[0].load(Ordering::Relaxed);
                id = tag & 0xffff << 32;
                if FORM == BATCH {
                    self.number += 1;
                    assert!(addr == self.number, "in order");
                } else {
                    descriptor[1].store(addr & 0xffff_ffff | id | done, Ordering::Release);
                }
                pos = pos.wrapping_add(1);
            }
        }
        let n = pos.wrapping_sub(first);
        if AHEAD && n as usize >= max.max(AHEAD_FROM) {
            self.queue.fetch(pos, n);
        }
        if n != 0 {
            if FORM == BATCH {
                self.queue.at(first)[1].store(64 | id | used(first), Ordering::Release);
            }
            self.taken = pos;
            if EVENTS {
                assert!(!wants_event(&self.queue.driver, first, pos), "the driver polls");
            }
        }
        n as usize
    }
}
