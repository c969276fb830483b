// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which buffers of a queue are in flight, in memory that outlives this process: the region that
//! vhost-user has for this ("Inflight I/O tracking" in QEMU's `docs/interop/vhost-user.rst`). A
//! process that died at any store leaves a region from which the next one goes on: no buffer is
//! lost, and none comes back twice.
//!
//! The front end keeps the region, so this end reads it only when it takes a queue up, and checks
//! it as a message. From then on it writes, from what it knows by itself. The layout is the
//! document's. Two things differ in how it is written, so that each step is one store:
//!
//! - The document has indexes that change together (the used place and its wrap counter, with their
//!   old values; the two heads of the free list). They share a word here as there, and change by
//!   one store of that word.
//! - The entries of a packed queue's used buffers go to the free list when they are published, and
//!   not when they are returned. So no buffer that is taken meanwhile gets the entry of one that
//!   may still have to be served again.
//!
//! One thing comes to what the document says of a packed queue that is taken up: of a batch that
//! was not published, all but the first descriptor may be in the ring as used. They are made
//! available again. Otherwise the driver would find them behind the next buffer that is used.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vbus_core::memory::{DriverSlice, MemoryContext, SharedInteger};
use vbus_core::{ErrorCode, View};

use super::chain::{Chain, Head};
use super::indirect;
use super::layout::{Format, Layout, PARTS_MAX, RingFeatures};
use super::memory::{Areas, Descriptor};
use super::packed::Cursor;
use super::split::{self, Split};
use super::state::{BadState, InFlight, Position};

/// Fields of a queue's region: offsets in bytes.
mod at {
    pub const VERSION: usize = 8;
    pub const DESCRIPTORS: usize = 10;
    /// Split: the head of the list of the last batch, and the used index.
    pub const LAST_BATCH: usize = 12;
    pub const USED: usize = 14;
    /// Packed: the heads of the free list, new and old; a word of 4 bytes.
    pub const FREE: usize = 12;
    /// Packed: the used place and the old one, 2 bytes each, and their wrap counters, 1 byte each;
    /// a word of 8 bytes.
    pub const PLACES: usize = 16;
}

/// Fields of an entry.
mod entry {
    /// Split and packed: 1 byte, whether it is in flight. Its neighbour is padding, so both are
    /// written.
    pub const IN_FLIGHT: usize = 0;
    pub const COUNTER: usize = 8;
    /// Split: the entry after this one in the list of the last batch.
    pub const SPLIT_NEXT: usize = 6;
    /// Packed: the next entry, the last one of the buffer, and how many it has.
    pub const NEXT: usize = 2;
    pub const LAST: usize = 4;
    pub const COUNT: usize = 6;
    /// Packed: a copy of the descriptor.
    pub const ID: usize = 16;
    pub const FLAGS: usize = 18;
    pub const LEN: usize = 20;
    pub const ADDR: usize = 24;
}

/// The version of a region that is in use. 0: nothing is in it.
const VERSION: u16 = 1;
/// Where a region begins is a multiple of this.
const ALIGN: usize = 64;
/// The most parts that all buffers in flight may have, when a queue is taken up. A queue of 1024
/// descriptors may have as many, each a table of its own. A longer one that is forged would take
/// much more memory than its front end has.
const PARTS_OF_ALL: usize = 1024 * PARTS_MAX;

/// Bytes before the entries, and of each entry.
const fn sizes(format: Format) -> (usize, usize) {
    match format {
        Format::Split => (16, 16),
        Format::Packed => (32, 32),
    }
}

/// The region of one queue.
#[derive(Clone, Debug)]
pub struct InFlightRegion {
    memory: Arc<MemoryContext>,
    /// Where it is in the memory.
    base: u64,
    format: Format,
    size: u16,
}

/// What was in flight, while it is read.
struct Reading {
    in_flight: Vec<InFlight>,
    /// Parts that more buffers may have.
    left: usize,
}

impl Reading {
    fn new() -> Reading {
        Reading { in_flight: Vec::new(), left: PARTS_OF_ALL }
    }

    fn add(&mut self, buffer: InFlight) -> Result<(), BadState> {
        self.left = self.left.checked_sub(buffer.parts.len()).ok_or(BadState::Region)?;
        self.in_flight.push(buffer);
        Ok(())
    }
}

/// A region in its memory, for a moment.
struct Words<'v> {
    slice: DriverSlice<'v>,
    format: Format,
}

impl Words<'_> {
    /// A value. What is not there is 0: the region's size was checked.
    fn get<T: SharedInteger + Default>(&self, at: usize) -> T {
        self.slice.load(at, Ordering::Acquire).unwrap_or_default()
    }

    /// Stores are seen in their order, whenever this process dies.
    fn set<T: SharedInteger>(&self, at: usize, value: T) {
        #[cfg(test)]
        if !super::death::spend() {
            return;
        }
        let stored = self.slice.store(at, value, Ordering::Release);
        debug_assert!(stored, "{at}");
    }

    fn entry(&self, number: u16, field: usize) -> usize {
        let (head, entry) = sizes(self.format);
        head + usize::from(number) * entry + field
    }

    fn set_in_flight(&self, number: u16, in_flight: bool) {
        self.set(self.entry(number, entry::IN_FLIGHT), u16::from(in_flight));
    }

    fn is_in_flight(&self, number: u16) -> bool {
        self.get::<u16>(self.entry(number, entry::IN_FLIGHT)) & 0xff != 0
    }
}

impl InFlightRegion {
    /// Bytes of the region of a queue with `size` descriptors, and to the next region.
    pub fn bytes(format: Format, size: u16) -> u64 {
        let (head, entry) = sizes(format);
        (head + usize::from(size) * entry).next_multiple_of(ALIGN) as u64
    }

    /// The region of a queue of `size` descriptors, at `base` of `memory`.
    pub fn new(memory: Arc<MemoryContext>, base: u64, format: Format, size: u16) -> Self {
        InFlightRegion { memory, base, format, size }
    }

    /// Writes anything, as its owner may.
    #[cfg(test)]
    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.view().write(self.base + at, bytes).unwrap();
    }

    fn words<'v>(&self, view: &'v View<'_>) -> Result<Words<'v>, ErrorCode> {
        let bytes = Self::bytes(self.format, self.size);
        Ok(Words { slice: view.slice(self.base, bytes, true)?, format: self.format })
    }

    fn with<O>(&self, work: impl FnOnce(&Words<'_>) -> O) -> Option<O> {
        let view = self.memory.view();
        self.words(&view).ok().map(|words| work(&words))
    }

    /// Whether a queue has it in use.
    pub fn is_in_use(&self) -> bool {
        self.with(|words| words.get::<u16>(at::VERSION) == VERSION).unwrap_or(false)
    }

    /// Nothing is in flight, and somebody else knows where the queue is: the region is as one that
    /// was never used.
    pub fn settle(&self) {
        self.with(|words| words.set(at::VERSION, 0_u16));
    }
}

/// A descriptor of a packed ring as it was taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) id: u16,
    pub(super) flags: u16,
}

/// What this end knows of the region. It reads nothing of it again.
#[derive(Debug)]
enum Known {
    Split {
        /// The head of the list of the last batch.
        last: u16,
        /// Heads that go back with the next publication.
        batch: Vec<u16>,
    },
    Packed {
        /// The entry after each entry. The number of the entries ends a list.
        next: Vec<u16>,
        free: u16,
        /// The first entry and the last one of each buffer that goes back with the next
        /// publication.
        batch: Vec<u16>,
        last: Vec<u16>,
        /// The used place that is published.
        used: Cursor,
    },
}

/// Keeps a queue's region.
#[derive(Debug)]
pub(super) struct Tracker {
    region: InFlightRegion,
    /// The order in which buffers are taken.
    counter: u64,
    known: Known,
}

/// What a region says of a queue that its last user left.
pub(super) struct Found {
    pub(super) position: Position,
    pub(super) in_flight: Vec<InFlight>,
    /// The entry of each of them.
    pub(super) entries: Vec<u16>,
    pub(super) tracker: Tracker,
}

fn of_packed(cursor: Cursor, old: Cursor) -> u64 {
    let (slot, wrap) = cursor.parts();
    let (old_slot, old_wrap) = old.parts();
    u64::from(slot) | u64::from(old_slot) << 16 | u64::from(wrap) << 32 | u64::from(old_wrap) << 40
}

impl Tracker {
    /// Looks at a region. One that is not in use is made one of a queue at `base`.
    pub(super) fn open(
        region: InFlightRegion,
        layout: &Layout,
        features: RingFeatures,
        base: Position,
        areas: &Areas<DriverSlice<'_>>,
        tables: &View<'_>,
    ) -> Result<Found, BadState> {
        let memory = region.memory.clone();
        let view = memory.view();
        let words = region.words(&view).map_err(|_| BadState::Region)?;
        if (region.format, region.size) != (layout.format, layout.size) {
            return Err(BadState::Region);
        }
        match words.get::<u16>(at::VERSION) {
            0 => Ok(Tracker::begin(region, &words, base)),
            VERSION if words.get::<u16>(at::DESCRIPTORS) == layout.size => match layout.format {
                Format::Split => Tracker::of_split(region, &words, features, areas, tables),
                Format::Packed => Tracker::of_packed(region, &words, features, areas, tables),
            },
            _ => Err(BadState::Region),
        }
    }

    fn begin(region: InFlightRegion, words: &Words<'_>, base: Position) -> Found {
        let size = region.size;
        for number in 0..size {
            words.set_in_flight(number, false);
        }
        words.set(0, 0_u64);
        words.set(at::DESCRIPTORS, size);
        let known = match region.format {
            Format::Split => {
                words.set(at::LAST_BATCH, 0_u16);
                words.set(at::USED, base.used);
                Known::Split { last: 0, batch: Vec::new() }
            }
            Format::Packed => {
                for number in 0..size {
                    words.set(words.entry(number, entry::NEXT), number + 1);
                }
                let used = Cursor::new(base.used, base.used_wrap);
                words.set(at::FREE, 0_u32);
                words.set(at::PLACES, of_packed(used, used));
                let next = (1..=size).collect();
                let last = vec![0; usize::from(size)];
                Known::Packed { next, free: 0, batch: Vec::new(), last, used }
            }
        };
        // Only now it is in use.
        words.set(at::VERSION, VERSION);
        let tracker = Tracker { region, counter: 0, known };
        Found { position: base, in_flight: Vec::new(), entries: Vec::new(), tracker }
    }

    /// The entries in flight in the order of their counters, with the counter for the next one.
    fn in_order(words: &Words<'_>, numbers: impl Iterator<Item = u16>) -> (Vec<u16>, u64) {
        let mut order: Vec<(u64, u16)> = numbers
            .filter(|number| words.is_in_flight(*number))
            .map(|number| (words.get(words.entry(number, entry::COUNTER)), number))
            .collect();
        order.sort_unstable();
        let next = order.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        (order.into_iter().map(|(_, number)| number).collect(), next)
    }

    fn of_split(
        region: InFlightRegion,
        words: &Words<'_>,
        features: RingFeatures,
        areas: &Areas<DriverSlice<'_>>,
        tables: &View<'_>,
    ) -> Result<Found, BadState> {
        let size = region.size;
        // Pairs with the store of the index: a process has died between it and the marks.
        let used: u16 = areas.device.load(split::INDEX, Ordering::Acquire).unwrap_or_default();
        let batch = used.wrapping_sub(words.get(at::USED));
        if batch > size {
            return Err(BadState::Region);
        }
        let last: u16 = words.get(at::LAST_BATCH);
        let mut number = last;
        for _ in 0..batch {
            if number >= size {
                return Err(BadState::Region);
            }
            words.set_in_flight(number, false);
            number = words.get(words.entry(number, entry::SPLIT_NEXT));
        }
        words.set(at::USED, used);
        let (entries, counter) = Tracker::in_order(words, 0..size);
        let ring = Split::new(size, features, Position::default(), false);
        let mut reading = Reading::new();
        for &id in &entries {
            let mut chain = Chain::new();
            ring.walk(areas, tables, &mut chain, id)?;
            reading.add(InFlight::of(id, 1, &chain))?;
        }
        let taken = u16::try_from(entries.len()).unwrap_or(u16::MAX);
        let available = used.wrapping_add(taken);
        let position = Position { available, used, ..Position::default() };
        let known = Known::Split { last, batch: Vec::new() };
        let tracker = Tracker { region, counter, known };
        Ok(Found { position, in_flight: reading.in_flight, entries, tracker })
    }

    fn of_packed(
        region: InFlightRegion,
        words: &Words<'_>,
        features: RingFeatures,
        areas: &Areas<DriverSlice<'_>>,
        tables: &View<'_>,
    ) -> Result<Found, BadState> {
        let size = region.size;
        let [u0, u1, o0, o1, wrap, old_wrap, ..] = words.get::<u64>(at::PLACES).to_le_bytes();
        let new = Cursor::new(u16::from_le_bytes([u0, u1]), wrap != 0);
        let old = Cursor::new(u16::from_le_bytes([o0, o1]), old_wrap != 0);
        let [n0, n1, f0, f1] = words.get::<u32>(at::FREE).to_le_bytes();
        let (new_free, old_free) = (u16::from_le_bytes([n0, n1]), u16::from_le_bytes([f0, f1]));
        if new.parts().0 >= size || old.parts().0 >= size {
            return Err(BadState::Region);
        }
        // The last batch counts if the driver can see it: its first descriptor is published last.
        let is_published = new != old && !old.is_available(areas);
        let (used, free) = if is_published { (new, new_free) } else { (old, old_free) };

        // Each entry is free, or of one buffer. What belongs to nothing is free at the end.
        let mut next = vec![size; usize::from(size)];
        let mut owner: Vec<Option<bool>> = vec![None; usize::from(size)];
        let after = |number: u16| words.get::<u16>(words.entry(number, entry::NEXT)).min(size);
        let mut claim = |number: u16, is_free: bool| match owner.get_mut(usize::from(number)) {
            Some(place @ None) => {
                *place = Some(is_free);
                true
            }
            _ => false,
        };
        let mut number = free;
        while number < size {
            if !claim(number, true) {
                return Err(BadState::Region);
            }
            words.set_in_flight(number, false);
            next[usize::from(number)] = after(number);
            number = next[usize::from(number)];
        }
        let (entries, counter) = Tracker::in_order(words, 0..size);
        let (mut reading, mut last_of) = (Reading::new(), vec![0; usize::from(size)]);
        let mut slots_of_all = 0_u16;
        for &head in &entries {
            let count = words.get::<u16>(words.entry(head, entry::COUNT));
            let (mut chain, mut number, mut id) = (Chain::new(), head, 0);
            if count == 0 || count > size - slots_of_all {
                return Err(BadState::Region);
            }
            slots_of_all += count;
            for left in (0..count).rev() {
                if !claim(number, false) {
                    return Err(BadState::Region);
                }
                let field = |field: usize| words.entry(number, field);
                id = words.get(field(entry::ID));
                let descriptor = Descriptor {
                    addr: words.get(field(entry::ADDR)),
                    len: words.get(field(entry::LEN)),
                    flags: words.get(field(entry::FLAGS)),
                    next: 0,
                };
                if descriptor.has(Descriptor::INDIRECT) {
                    let negotiated = features.indirect;
                    indirect::append(&mut chain, descriptor, Format::Packed, negotiated, tables)?;
                } else {
                    let write = descriptor.has(Descriptor::WRITE);
                    chain.push(descriptor.addr, descriptor.len, write)?;
                }
                last_of[usize::from(head)] = number;
                if left > 0 {
                    next[usize::from(number)] = after(number);
                    number = next[usize::from(number)];
                }
            }
            reading.add(InFlight::of(id, count, &chain))?;
        }
        let mut free = free.min(size);
        for number in (0..size).filter(|number| owner[usize::from(*number)].is_none()) {
            // Nothing refers to it: it goes before the others.
            next[usize::from(number)] = free;
            words.set(words.entry(number, entry::NEXT), free);
            free = number;
        }
        let mut slot = used;
        for _ in 0..slots_of_all {
            slot.undo_used(areas);
            slot = slot.forward(1, size);
        }
        words.set(at::FREE, u32::from(free) | u32::from(free) << 16);
        words.set(at::PLACES, of_packed(used, used));

        let available = used.forward(slots_of_all, size);
        let ((used_slot, used_wrap), (slot, wrap)) = (used.parts(), available.parts());
        let position =
            Position { available: slot, used: used_slot, available_wrap: wrap, used_wrap };
        let known = Known::Packed { next, free, batch: Vec::new(), last: last_of, used };
        let tracker = Tracker { region, counter, known };
        Ok(Found { position, in_flight: reading.in_flight, entries, tracker })
    }

    /// A buffer was taken: a split queue's with head `id`, a packed queue's of these descriptors.
    /// Returns its entry.
    pub(super) fn take(&mut self, id: u16, taken: &[Taken]) -> u16 {
        let Tracker { region, counter, known } = self;
        let number = *counter;
        *counter = number.wrapping_add(1);
        let written = region.with(|words| match known {
            Known::Split { .. } => {
                words.set(words.entry(id, entry::COUNTER), number);
                words.set_in_flight(id, true);
                id
            }
            Known::Packed { next, free, last, .. } => {
                // As many entries are free as descriptors are not in flight.
                let head = *free;
                let (mut at, mut end) = (head, head);
                for descriptor in taken {
                    let field = |field: usize| words.entry(at, field);
                    words.set(field(entry::ADDR), descriptor.addr);
                    words.set(field(entry::LEN), descriptor.len);
                    words.set(field(entry::ID), descriptor.id);
                    words.set(field(entry::FLAGS), descriptor.flags);
                    end = at;
                    at = next.get(usize::from(at)).copied().unwrap_or(region.size);
                }
                let field = |field: usize| words.entry(head, field);
                words.set(field(entry::LAST), end);
                words.set(field(entry::COUNT), u16::try_from(taken.len()).unwrap_or(u16::MAX));
                words.set(field(entry::COUNTER), number);
                words.set_in_flight(head, true);
                // While it is in the free list, the mark does not count.
                words.set(at::FREE, u32::from(at) | u32::from(at) << 16);
                if let Some(last) = last.get_mut(usize::from(head)) {
                    *last = end;
                }
                *free = at;
                head
            }
        });
        written.unwrap_or_default()
    }

    /// The buffer that was taken last is available again.
    pub(super) fn put_back(&mut self, number: u16) {
        let Tracker { region, known, .. } = self;
        region.with(|words| {
            if let Known::Packed { free, next, last, .. } = known {
                let end = last.get(usize::from(number)).copied().unwrap_or(number);
                words.set(words.entry(end, entry::NEXT), *free);
                if let Some(next) = next.get_mut(usize::from(end)) {
                    *next = *free;
                }
                words.set(at::FREE, u32::from(number) | u32::from(number) << 16);
                *free = number;
            }
            words.set_in_flight(number, false);
        });
    }

    /// The buffer with this entry goes back with the next publication.
    #[inline]
    pub(super) fn complete(&mut self, number: u16) {
        match &mut self.known {
            Known::Split { batch, .. } | Known::Packed { batch, .. } => batch.push(number),
        }
    }

    /// The driver is about to see all that is complete. `place` is the used place then.
    pub(super) fn publishing(&mut self, place: Position) {
        let Tracker { region, known, .. } = self;
        region.with(|words| match known {
            Known::Split { last, batch } => {
                for &number in &*batch {
                    words.set(words.entry(number, entry::SPLIT_NEXT), *last);
                    words.set(at::LAST_BATCH, number);
                    *last = number;
                }
            }
            Known::Packed { next, free, batch, last, used } => {
                let old = *free;
                for &number in &*batch {
                    let end = last.get(usize::from(number)).copied().unwrap_or(number);
                    words.set(words.entry(end, entry::NEXT), *free);
                    if let Some(next) = next.get_mut(usize::from(end)) {
                        *next = *free;
                    }
                    *free = number;
                }
                let new = Cursor::new(place.used, place.used_wrap);
                words.set(at::FREE, u32::from(*free) | u32::from(old) << 16);
                words.set(at::PLACES, of_packed(new, *used));
            }
        });
    }

    /// The driver can see it.
    pub(super) fn published(&mut self, place: Position) {
        let Tracker { region, known, .. } = self;
        region.with(|words| match known {
            Known::Split { batch, .. } => {
                batch.drain(..).for_each(|number| words.set_in_flight(number, false));
                words.set(at::USED, place.used);
            }
            Known::Packed { free, batch, used, .. } => {
                batch.drain(..).for_each(|number| words.set_in_flight(number, false));
                *used = Cursor::new(place.used, place.used_wrap);
                // In this order: while the places differ, the free list can be told from its old
                // head.
                words.set(at::FREE, u32::from(*free) | u32::from(*free) << 16);
                words.set(at::PLACES, of_packed(*used, *used));
            }
        });
    }
}

/// Gives the chains that a queue resumed with their entries.
pub(super) fn assign(chains: &mut [Chain], entries: &[u16]) {
    for (chain, entry) in chains.iter_mut().zip(entries) {
        chain.head = chain.head.map(|head| Head { entry: *entry, ..head });
    }
}
