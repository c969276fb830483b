// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver end of both formats, for the tests of the device end. It follows VIRTIO 1.3, and
//! nothing of the device end's code but its memory.

use std::collections::{HashMap, VecDeque};

use vbus_core::memory::DriverSlice;

use super::layout::{Format, RingFeatures};
use super::memory::{Area, Areas, Edge};
use super::state::Position;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// What a driver needs of memory beside what the device needs.
pub trait DriverArea: Area {
    fn store64(&self, at: usize, value: u64);
    /// The driver's fences: before it looks at what the device wants, and before it looks again for
    /// used buffers.
    fn full_fence();
}

impl DriverArea for DriverSlice<'_> {
    fn store64(&self, at: usize, value: u64) {
        assert!(self.store(at, value, std::sync::atomic::Ordering::Relaxed));
    }

    fn full_fence() {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

/// A descriptor to write. The driver end adds the flag NEXT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raw {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
}

impl Raw {
    /// The second word of a descriptor, with the descriptor `next` after it.
    pub fn second_word(self, next: Option<u16>) -> u64 {
        let flags = self.flags | if next.is_some() { NEXT } else { 0 };
        u64::from(self.len) | u64::from(flags) << 32 | u64::from(next.unwrap_or(0)) << 48
    }
}

/// The driver's view of an index: of all that matters, whether `event` is passed.
fn passes(event: u16, new: u16, old: u16) -> bool {
    // An event is the number of a buffer. It is passed if it is one of old, old + 1 ... new - 1.
    let count = new.wrapping_sub(old);
    event.wrapping_sub(old) < count
}

/// The driver end of a queue.
pub struct Driver {
    size: u16,
    event_idx: bool,
    /// The buffers in flight, if the device returns them in order.
    order: Option<InOrder>,
    ring: Ring,
}

/// What a driver keeps with IN_ORDER.
#[derive(Default)]
struct InOrder {
    /// The id, and the bytes that the device may write, of each buffer in flight, oldest first.
    buffers: VecDeque<(u16, u32)>,
    /// The used element of a run: the id of the run's last buffer, and the bytes written there.
    run: Option<(u16, u32)>,
}

enum Ring {
    Split(Split),
    Packed(Packed),
}

struct Split {
    /// Descriptors that are free.
    free: VecDeque<u16>,
    /// The descriptors of each buffer in flight, by its head.
    in_flight: HashMap<u16, Vec<u16>>,
    next: u16,
    published: u16,
    kicked: u16,
    used: u16,
}

struct Packed {
    free: VecDeque<u16>,
    /// Slots of each buffer in flight, by its id.
    in_flight: HashMap<u16, u16>,
    free_slots: u16,
    next: (u16, bool),
    used: (u16, bool),
    /// The first buffer that is not published: where its flags are, and the flags.
    first: Option<(usize, u16)>,
    /// Slots that are not published, and those of which the device was not told.
    unpublished: u16,
    untold: u16,
}

impl Driver {
    /// A driver with nothing in flight. Ids and descriptors are used in the order of `free`.
    pub fn new(
        format: Format,
        size: u16,
        features: RingFeatures,
        at: Position,
        free: impl IntoIterator<Item = u16>,
    ) -> Driver {
        let free: VecDeque<_> = free.into_iter().collect();
        let ring = match format {
            Format::Split => Ring::Split(Split {
                free,
                in_flight: HashMap::new(),
                next: at.available,
                published: at.available,
                kicked: at.available,
                used: at.used,
            }),
            Format::Packed => Ring::Packed(Packed {
                free,
                in_flight: HashMap::new(),
                free_slots: size,
                next: (at.available, at.available_wrap),
                used: (at.used, at.used_wrap),
                first: None,
                unpublished: 0,
                untold: 0,
            }),
        };
        let order = features.in_order.then(InOrder::default);
        Driver { size, event_idx: features.event_idx, order, ring }
    }

    /// Writes what a driver writes to the areas before it enables a queue at this position.
    pub fn format<A: DriverArea>(&self, areas: &Areas<A>) {
        match &self.ring {
            Ring::Split(ring) => {
                areas.driver.store16(2, ring.next);
                areas.driver.store16(4 + 2 * usize::from(self.size), ring.used);
            }
            Ring::Packed(ring) => {
                for slot in 0..self.size {
                    // As the last lap left them: used.
                    let lap = (slot < ring.next.0) == ring.next.1;
                    let flags = if lap { 0x8080 } else { 0 };
                    areas.descriptors.store16(usize::from(slot) * 16 + 14, flags);
                }
            }
        }
    }

    /// Descriptors that a buffer may still have.
    pub fn room(&self) -> usize {
        match &self.ring {
            Ring::Split(ring) => ring.free.len(),
            Ring::Packed(ring) if ring.free.is_empty() => 0,
            Ring::Packed(ring) => ring.free_slots.into(),
        }
    }

    /// Adds a buffer of which the device may write `writable` bytes. `None`: there is no room for
    /// it. The device does not see it yet.
    pub fn add<A: DriverArea>(
        &mut self,
        areas: &Areas<A>,
        buffer: &[Raw],
        writable: u32,
    ) -> Option<u16> {
        if buffer.len() > self.room() || buffer.is_empty() {
            return None;
        }
        let id = self.write(areas, buffer)?;
        if let Some(order) = &mut self.order {
            order.buffers.push_back((id, writable));
        }
        Some(id)
    }

    fn write<A: DriverArea>(&mut self, areas: &Areas<A>, buffer: &[Raw]) -> Option<u16> {
        match &mut self.ring {
            Ring::Split(ring) => {
                let numbers: Vec<_> = ring.free.drain(..buffer.len()).collect();
                for (i, raw) in buffer.iter().enumerate() {
                    let at = usize::from(numbers[i]) * 16;
                    areas.descriptors.store64(at, raw.addr);
                    areas.descriptors.store64(at + 8, raw.second_word(numbers.get(i + 1).copied()));
                }
                let head = numbers[0];
                areas.driver.store16(4 + usize::from(ring.next % self.size) * 2, head);
                ring.next = ring.next.wrapping_add(1);
                ring.in_flight.insert(head, numbers);
                Some(head)
            }
            Ring::Packed(ring) => {
                let id = ring.free.pop_front()?;
                for (i, raw) in buffer.iter().enumerate() {
                    let (slot, wrap) = ring.next;
                    let at = usize::from(slot) * 16;
                    areas.descriptors.store64(at, raw.addr);
                    areas.descriptors.store32(at + 8, raw.len);
                    areas.descriptors.store16(at + 12, id);
                    let more = if i + 1 < buffer.len() { NEXT } else { 0 };
                    let flags = raw.flags | more | if wrap { 0x80 } else { 0x8000 };
                    if ring.first.is_none() {
                        ring.first = Some((at, flags));
                    } else {
                        areas.descriptors.store16(at + 14, flags);
                    }
                    let last = slot + 1 == self.size;
                    ring.next = if last { (0, !wrap) } else { (slot + 1, wrap) };
                    ring.unpublished += 1;
                    ring.free_slots -= 1;
                }
                ring.in_flight.insert(id, u16::try_from(buffer.len()).unwrap());
                Some(id)
            }
        }
    }

    /// Lets the device see what was added.
    pub fn publish<A: DriverArea>(&mut self, areas: &Areas<A>) {
        match &mut self.ring {
            Ring::Split(ring) => {
                areas.driver.publish16(2, ring.next, Edge::Available);
                ring.published = ring.next;
            }
            Ring::Packed(ring) => {
                if let Some((at, flags)) = ring.first.take() {
                    areas.descriptors.publish16(at + 14, flags, Edge::Available);
                    ring.untold += std::mem::take(&mut ring.unpublished);
                }
            }
        }
    }

    /// Whether the device wants a kick for what was published since the last call.
    pub fn wants_kick<A: DriverArea>(&mut self, areas: &Areas<A>) -> bool {
        A::full_fence();
        match &mut self.ring {
            Ring::Split(ring) => {
                let (new, old) = (ring.published, ring.kicked);
                ring.kicked = new;
                if self.event_idx {
                    let event = areas.device.load16(4 + 8 * usize::from(self.size));
                    passes(event, new, old)
                } else {
                    new != old && areas.device.load16(0) & 1 == 0
                }
            }
            Ring::Packed(ring) => {
                let count = std::mem::take(&mut ring.untold);
                let word = areas.device.load32(0);
                match word >> 16 & 3 {
                    0 => count != 0,
                    2 => {
                        // Laps as a number that only grows, for the two laps that matter.
                        let size = i32::from(self.size);
                        let (slot, wrap) = ((word & 0x7fff) as i32, word >> 15 & 1 != 0);
                        let new = i32::from(ring.next.0) - i32::from(ring.unpublished);
                        let event = if wrap == ring.next.1 { slot } else { slot - size };
                        (new - i32::from(count)..new).contains(&event)
                    }
                    _ => false,
                }
            }
        }
    }

    /// The next used buffer: its id, and the bytes that the device wrote. A buffer of a run before
    /// the last one has no element of its own: the device wrote all that it might.
    pub fn reap<A: DriverArea>(&mut self, areas: &Areas<A>) -> Option<(u16, u32)> {
        if !self.has_used(areas) {
            return None;
        }
        let run = self.order.as_mut().and_then(|order| order.run.take());
        let (last, written) = run.unwrap_or_else(|| self.element(areas));
        let (id, written) = match &mut self.order {
            None => (last, written),
            Some(order) => {
                let (id, writable) = order.buffers.pop_front().expect("before it is in flight");
                if id == last {
                    (id, written)
                } else {
                    order.run = Some((last, written));
                    (id, writable)
                }
            }
        };
        match &mut self.ring {
            Ring::Split(ring) => {
                let numbers = ring.in_flight.remove(&id);
                ring.free.extend(numbers.expect("a buffer before it is in flight"));
                ring.used = ring.used.wrapping_add(1);
            }
            Ring::Packed(ring) => {
                let slots = ring.in_flight.remove(&id).expect("a buffer before it is in flight");
                ring.free.push_back(id);
                ring.free_slots += slots;
                let (slot, wrap) = ring.used;
                let after = slot + slots;
                ring.used =
                    if after >= self.size { (after - self.size, !wrap) } else { (after, wrap) };
            }
        }
        Some((id, written))
    }

    /// The next used element: the id, and the bytes written.
    fn element<A: DriverArea>(&self, areas: &Areas<A>) -> (u16, u32) {
        match &self.ring {
            Ring::Split(ring) => {
                let at = 4 + usize::from(ring.used % self.size) * 8;
                let id = u16::try_from(areas.device.load32(at)).unwrap();
                (id, areas.device.load32(at + 4))
            }
            Ring::Packed(ring) => {
                let at = usize::from(ring.used.0) * 16;
                let written = areas.descriptors.load32(at + 8);
                let flags = areas.descriptors.load16(at + 14);
                assert_eq!(flags & WRITE != 0, written > 0);
                (areas.descriptors.load16(at + 12), written)
            }
        }
    }

    /// Whether there is a used buffer.
    pub fn has_used<A: DriverArea>(&self, areas: &Areas<A>) -> bool {
        if self.order.as_ref().is_some_and(|order| order.run.is_some()) {
            return true;
        }
        match &self.ring {
            Ring::Split(ring) => areas.device.observe16(2, Edge::Used) != ring.used,
            Ring::Packed(ring) => {
                let (slot, wrap) = ring.used;
                let flags = areas.descriptors.observe16(usize::from(slot) * 16 + 14, Edge::Used);
                (flags & 0x80 != 0) == wrap && (flags & 0x8000 != 0) == wrap
            }
        }
    }

    /// Asks for an interrupt with the next used buffer. True: there is none, so it will come.
    pub fn arm<A: DriverArea>(&mut self, areas: &Areas<A>) -> bool {
        match &self.ring {
            Ring::Split(ring) if self.event_idx => {
                areas.driver.store16(4 + 2 * usize::from(self.size), ring.used);
            }
            Ring::Split(_) => areas.driver.store16(0, 0),
            Ring::Packed(ring) if self.event_idx => {
                let (slot, wrap) = ring.used;
                areas.driver.store32(0, u32::from(slot) | u32::from(wrap) << 15 | 2 << 16);
            }
            Ring::Packed(_) => areas.driver.store32(0, 0),
        }
        A::full_fence();
        !self.has_used(areas)
    }

    /// Asks for no interrupts. With EVENT_IDX a split queue's driver does nothing.
    pub fn disarm<A: DriverArea>(&mut self, areas: &Areas<A>) {
        match &self.ring {
            Ring::Split(_) if self.event_idx => {}
            Ring::Split(_) => areas.driver.store16(0, 1),
            Ring::Packed(_) => areas.driver.store32(0, 1 << 16),
        }
    }
}
