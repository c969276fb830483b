// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ring: every value is kept, in order (spec/shared-memory.md, "Ring").
//!
//! A ring has one array of slots. The driver submits an entry in a slot. The device takes it, and
//! marks a slot as returned. The tag of each slot says which end wrote it and in which lap, so a
//! poller reads one cache line only. The number of entries in flight never exceeds the ring's size.
//! There is no other flow control.
//!
//! Both ends signal once for a batch, and make it visible before: all of it at once where returns
//! are counted, else entry by entry or run by run, so that the other end works on the first entries
//! while the last ones are on their way.
//!
//! There are calls for single entries and calls for batches. For batches of 16 and more, the
//! fastest are [`submit_all`](DriverEnd::submit_all), [`reap_all`](DriverEnd::reap_all) and
//! [`serve_all`](DeviceEnd::serve_all), which returns each entry in the slot that it has just read.
//! For one entry at a time, [`submit`](DriverEnd::submit), [`reap`](DriverEnd::reap),
//! [`take`](DeviceEnd::take) and [`give_back`](DeviceEnd::give_back) are as fast or faster
//! (bench/README.md).
//!
//! The class chooses how entries come back:
//!
//! - [`Returns::Counted`]: in order and without content. One tag returns all entries of a post.
//! - [`Returns::Runs`]: in order, each with a length. One tag returns a run of entries, whose
//!   lengths lie together. The tag of a single entry holds its length itself.
//! - [`Returns::Entries`]: each has a tag of its own, in any order.

use super::memory::{Memory, WORD, low, read_u32, stored};
use super::signal::end::{Device, Driver};
use super::signal::{self, Armed, BLOCK_BYTES, BadSignal, Kick, Rx, Tx};
use super::sync::{Edge, Ordering, Word, observe, prefetch, publish};

/// First word of the header: "vbusri" and the layout's version.
pub const MAGIC: u64 = 0x0001_6972_7375_6276;
/// Where the signal block is, in bytes.
pub const SIGNAL_OFFSET: usize = 128;
/// Where the array of entries is, in bytes.
pub const ENTRIES_OFFSET: usize = SIGNAL_OFFSET + BLOCK_BYTES;
/// Bytes of an entry.
pub const ENTRY_BYTES: usize = 16;
/// The largest ring, in entries.
pub const MAX_ENTRIES: u32 = 32768;

const HEADER_ENTRIES: usize = 1;
const HEADER_RETURNS: usize = 2;
const HEADER_START: usize = 3;
const SIGNAL: usize = SIGNAL_OFFSET / WORD;
/// The device's word *returning*, in the line of its `seq`. Where one tag returns many entries, it
/// is the position up to which the tag returns entries that the device stores next.
const RETURNING: usize = (SIGNAL_OFFSET + signal::DEVICE_SEQ) / WORD + 1;
const ENTRY_WORDS: usize = ENTRY_BYTES / WORD;

const _: () = {
    assert!(ENTRY_BYTES == 16 && SIGNAL_OFFSET == 128 && ENTRIES_OFFSET == 384);
    assert!(SIGNAL_OFFSET % signal::BLOCK_ALIGN == 0 && ENTRIES_OFFSET % 64 == 0);
    assert!((HEADER_START + 1) * WORD <= SIGNAL_OFFSET);
    assert!(MAX_ENTRIES.is_power_of_two() && MAX_ENTRIES <= 1 << 15);
};

/// Flag of an entry: the next entry belongs to it (scatter-gather).
pub const NEXT: u16 = 1 << 0;
/// Flag of a slot, the ring's own. It is set in every other lap, beginning with the first.
pub const LAP: u16 = 1 << 15;
/// Flag of a slot, the ring's own. It says that the device has written the tag.
pub const RETURNED: u16 = 1 << 14;

/// Flag of a returned tag where returns are runs, the ring's own. It says that the tag returns as
/// many entries as its length says, and that their lengths are in the array of lengths.
pub const RUN: u16 = 1 << 13;

/// The device publishes a run when it has this many returns, also before the post: two cache lines
/// of lengths. A shorter batch comes back faster slot by slot (bench/README.md).
const RUN_LONG: u32 = 32;
/// From this size on a batch has its next lines fetched ahead. In a smaller batch that costs more
/// than it brings (bench/README.md).
const AHEAD_FROM: u32 = 16;
/// The same where returns are counted: the driver writes those lines next, and does not read them.
const COUNTED_AHEAD_FROM: u32 = 32;

/// The bit of *returning*, where returns are runs, that says that the next tag returns one entry:
/// the last one before that position.
const SINGLE: u64 = 1 << 63;

/// The flag [`NEXT`] in the array of lengths.
const LENGTH_NEXT: u32 = 1 << 31;

/// The ring's own flags within an entry's second word.
const MARKS: u64 = ((LAP | RETURNED) as u64) << 48;
const RETURN: u64 = (RETURNED as u64) << 48;
const LAP_MARK: u64 = (LAP as u64) << 48;

/// A buffer or a value on its way to the device. `flags` are the user's, except [`NEXT`], which
/// chains, and [`LAP`] and [`RETURNED`], which are the ring's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Address in the driver's memory, or any value.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The id that the driver chose for it.
    pub id: u16,
    /// See [`NEXT`].
    pub flags: u16,
}

impl Entry {
    /// The entry in `slot`, whose tag was loaded.
    #[inline(always)]
    fn of(slot: &[Word], tag: u64) -> Entry {
        let Return { len, id, flags } = Return::from_tag(tag);
        Entry { addr: slot[0].load(Ordering::Relaxed), len, id, flags }
    }
}

/// An entry on its way back. It has no address, because the driver knows the address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Return {
    /// The bytes that the device used, as a rule.
    pub len: u32,
    /// The entry's.
    pub id: u16,
    /// See [`NEXT`].
    pub flags: u16,
}

impl From<Entry> for Return {
    /// The return of `entry` with its length and its flags as they are.
    fn from(entry: Entry) -> Return {
        Return { len: entry.len, id: entry.id, flags: entry.flags }
    }
}

impl Return {
    /// The second word: the length in bits 0..32, the id in 32..48, the flags in 48..64.
    #[inline(always)]
    pub(super) fn tag(self, mark: u64) -> u64 {
        let word = u64::from(self.len) | u64::from(self.id) << 32 | u64::from(self.flags) << 48;
        word & !MARKS | mark
    }

    /// The return as the array of lengths has it.
    #[inline(always)]
    fn packed(self) -> u32 {
        self.len & !LENGTH_NEXT | u32::from(self.flags & NEXT) << LENGTH_NEXT.trailing_zeros()
    }

    #[inline(always)]
    fn unpacked(length: u32) -> Return {
        let flags = if length & LENGTH_NEXT != 0 { NEXT } else { 0 };
        Return { len: length & !LENGTH_NEXT, id: 0, flags }
    }

    /// The return as one of [`Returns::Runs`]. It has no more than the array of lengths holds,
    /// whatever the device wrote into its tag.
    #[inline(always)]
    fn of_runs(self) -> Return {
        Return::unpacked(self.packed())
    }

    #[inline(always)]
    pub(super) fn from_tag(tag: u64) -> Return {
        let flags = ((tag & !MARKS) >> 48 & 0xffff) as u16;
        Return { len: low(tag), id: (tag >> 32 & 0xffff) as u16, flags }
    }
}

/// How the device returns entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Returns {
    /// In order and without content. Each post of the device says how many.
    Counted,
    /// In order, each with a length below 2^31 and [`NEXT`]. They have no id and no other flags.
    Runs,
    /// Each with a tag of its own, in any order.
    Entries,
}

impl Returns {
    fn number(self) -> u64 {
        match self {
            Returns::Counted => 0,
            Returns::Entries => 1,
            Returns::Runs => 2,
        }
    }
}

/// What is wrong with a layout or a ring's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BadRing {
    /// The number of entries is not a power of two in 2..=[`MAX_ENTRIES`].
    Entries,
    /// The memory is smaller than the layout.
    TooSmall,
    /// The header does not begin with [`MAGIC`].
    Magic,
    /// The header names an unknown form of return.
    Returns,
}

impl From<BadSignal> for BadRing {
    fn from(_: BadSignal) -> Self {
        BadRing::TooSmall
    }
}

/// The peer broke the protocol: the connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Corrupt {
    /// The driver submitted more than the ring holds.
    Overfull,
    /// The device returned more than it was given.
    Unasked,
    /// The ring has a ledger, and the driver submitted an entry with the id of another entry in
    /// flight, or with an id that is not below the ring's size.
    BadId,
}

/// There is no room: the ring holds no more entries than those in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// The shape of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    entries: u32,
    returns: Returns,
}

impl Layout {
    /// A ring of `entries` entries (a power of two, 2..=[`MAX_ENTRIES`]).
    pub fn new(entries: u32, returns: Returns) -> Result<Layout, BadRing> {
        if !(2..=MAX_ENTRIES).contains(&entries) || !entries.is_power_of_two() {
            return Err(BadRing::Entries);
        }
        Ok(Layout { entries, returns })
    }

    /// Entries in the ring.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// The form in which entries come back.
    pub fn returns(&self) -> Returns {
        self.returns
    }

    /// Bytes of the whole ring: whole cache lines.
    pub fn bytes(&self) -> usize {
        let lengths = if self.returns == Returns::Runs { self.entries as usize * 4 } else { 0 };
        (self.lengths_offset() + lengths).next_multiple_of(64)
    }

    /// Where the array of lengths is, in bytes.
    #[inline(always)]
    fn lengths_offset(&self) -> usize {
        ENTRIES_OFFSET + self.entries as usize * ENTRY_BYTES
    }

    /// Words of the whole ring.
    pub fn words(&self) -> usize {
        self.bytes() / WORD
    }

    /// Index of position `pos` within the arrays.
    #[inline(always)]
    fn index(&self, pos: u64) -> usize {
        (low(pos) & (self.entries - 1)) as usize
    }

    /// The two words of the slot at position `pos`.
    #[inline(always)]
    fn slot<'a>(&self, words: &'a [Word], pos: u64) -> &'a [Word] {
        let at = ENTRIES_OFFSET / WORD + self.index(pos) * ENTRY_WORDS;
        &words[at..at + ENTRY_WORDS]
    }

    /// The word with the length of the return at position `pos`, and the length's shift within it.
    #[inline(always)]
    fn length<'a>(&self, words: &'a [Word], pos: u64) -> (&'a Word, u32) {
        let index = self.index(pos);
        (&words[self.lengths_offset() / WORD + index / 2], low(pos) % 2 * 32)
    }

    /// The words of the lengths from position `pos` on, for an even `pos`, and for as many pairs as
    /// `n` positions have before the end of the array.
    #[inline(always)]
    fn lengths<'a>(&self, words: &'a [Word], pos: u64, n: u32) -> &'a [Word] {
        let index = self.index(pos);
        let pairs = (n as usize).min(self.entries as usize - index) / 2;
        let at = self.lengths_offset() / WORD + index / 2;
        &words[at..at + pairs]
    }

    /// Stores the length of the return at position `pos`, and leaves that of its neighbour. Only
    /// the device stores lengths.
    #[inline(always)]
    fn put_length(&self, words: &[Word], pos: u64, length: u32) {
        let (word, shift) = self.length(words, pos);
        let neighbour = word.load(Ordering::Relaxed) & !(u64::from(u32::MAX) << shift);
        word.store(neighbour | u64::from(length) << shift, Ordering::Relaxed);
    }

    /// Fetches the slots of the `n` positions from `pos` on: the next batch, if this one was whole.
    /// What is fetched before a fence comes while the end waits at the fence.
    #[inline(always)]
    fn fetch(&self, words: &[Word], pos: u64, n: u32) {
        let (slots, _) = self.stretch(words, pos, n);
        slots.chunks(64 / WORD).for_each(|line| prefetch(&line[0]));
    }

    /// The slots of the `n` positions from `pos` on, but no further than the end of the array; and
    /// the lap, which is the same for all of them. A loop over them has no bounds to check and no
    /// lap to compute, which is half of the instructions of an entry.
    #[inline(always)]
    fn stretch<'a>(&self, words: &'a [Word], pos: u64, n: u32) -> (&'a [Word], u64) {
        let index = self.index(pos);
        let n = (n as usize).min(self.entries as usize - index);
        let at = ENTRIES_OFFSET / WORD + index * ENTRY_WORDS;
        (&words[at..at + n * ENTRY_WORDS], self.lap(pos))
    }

    /// The lap at position `pos`, as a mark. Memory of zeros holds no entry of the first lap.
    #[inline(always)]
    fn lap(&self, pos: u64) -> u64 {
        u64::from(pos & u64::from(self.entries) == 0) << LAP_MARK.trailing_zeros()
    }

    /// Reads the header once and checks it. Returns the layout and the start.
    fn load(words: &[Word]) -> Result<(Layout, u64), BadRing> {
        if words.len() * WORD < ENTRIES_OFFSET {
            return Err(BadRing::TooSmall);
        }
        if words[0].load(Ordering::Acquire) != MAGIC {
            return Err(BadRing::Magic);
        }
        let entries = read_u32(&words[HEADER_ENTRIES]).ok_or(BadRing::Entries)?;
        let number = words[HEADER_RETURNS].load(Ordering::Relaxed);
        let returns = [Returns::Counted, Returns::Entries, Returns::Runs]
            .into_iter()
            .find(|returns| returns.number() == number)
            .ok_or(BadRing::Returns)?;
        let start = words[HEADER_START].load(Ordering::Relaxed);
        let layout = Layout::new(entries, returns)?;
        if words.len() < layout.words() {
            return Err(BadRing::TooSmall);
        }
        Ok((layout, start))
    }
}

/// A difference of two positions of the same ring.
#[inline(always)]
fn count(to: u64, from: u64) -> u32 {
    low(to.wrapping_sub(from)) // At most the entries of a ring.
}

/// The driver's end: submits, and reaps what comes back.
#[derive(Debug)]
pub struct DriverEnd<M> {
    mem: M,
    layout: Layout,
    tx: Tx<Driver>,
    rx: Rx<Driver>,
    submitted: u64,
    reaped: u64,
    /// Returns of the run that was found last and are not reaped.
    run: u32,
}

impl<M: Memory> DriverEnd<M> {
    /// Formats `mem` as a fresh ring whose positions begin at `start` (0, but for tests of the
    /// wrap-around).
    pub fn create(mem: M, layout: Layout, start: u64) -> Result<Self, BadRing> {
        let words = mem.words();
        if words.len() < layout.words() {
            return Err(BadRing::TooSmall);
        }
        for pos in (0..layout.entries).map(|i| start.wrapping_add(u64::from(i))) {
            // The tag that the device would have left in the lap before.
            let before = layout.lap(pos.wrapping_sub(u64::from(layout.entries))) | RETURN;
            let slot = layout.slot(words, pos);
            slot[0].store(0, Ordering::Relaxed);
            slot[1].store(before, Ordering::Relaxed);
        }
        signal::format(&mem, SIGNAL_OFFSET, start)?;
        words[RETURNING].store(start, Ordering::Relaxed);
        words[HEADER_ENTRIES].store(u64::from(layout.entries), Ordering::Relaxed);
        words[HEADER_RETURNS].store(layout.returns.number(), Ordering::Relaxed);
        words[HEADER_START].store(start, Ordering::Relaxed);
        words[0].store(MAGIC, Ordering::Release);
        Ok(DriverEnd {
            mem,
            layout,
            tx: Tx::new(SIGNAL, start),
            rx: Rx::new(SIGNAL),
            submitted: start,
            reaped: start,
            run: 0,
        })
    }

    /// The ring's shape.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Entries that can be submitted now. Grows when returns are reaped.
    #[inline(always)]
    pub fn space(&self) -> u32 {
        self.layout.entries - self.in_flight()
    }

    /// Entries that were submitted and not yet reaped.
    #[inline(always)]
    pub fn in_flight(&self) -> u32 {
        count(self.submitted, self.reaped)
    }

    /// Puts an entry into the ring. A device that polls may see it at once. Call
    /// [`post`](Self::post) once after a batch, to wake a device that sleeps.
    #[inline(always)]
    pub fn submit(&mut self, entry: Entry) -> Result<(), Full> {
        if self.space() == 0 {
            return Err(Full);
        }
        let pos = self.submitted;
        let slot = self.layout.slot(self.mem.words(), pos);
        slot[0].store(entry.addr, Ordering::Relaxed);
        // Pairs with the load in `DeviceEnd::take`: the address is visible with its tag.
        publish(&slot[1], Return::from(entry).tag(self.layout.lap(pos)), Edge::Tag);
        self.submitted = pos.wrapping_add(1);
        Ok(())
    }

    /// Submits all of `entries`, in order, or none where the ring has no room for them. A device
    /// that polls may see them at once, as by [`submit`](Self::submit).
    ///
    /// Where returns are counted, it writes the oldest entry last, so that the device finds the
    /// whole batch and returns it by one tag. Where each entry has a return of its own, it writes
    /// them in their order, so that the device begins while the driver still writes.
    #[inline(always)]
    pub fn submit_all<E>(&mut self, entries: E) -> Result<(), Full>
    where
        E: IntoIterator<Item = Entry, IntoIter: ExactSizeIterator>,
    {
        let mut entries = entries.into_iter();
        let n = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        if n > self.space() {
            return Err(Full);
        }
        let (layout, words) = (self.layout, self.mem.words());
        let first = self.submitted;
        let end = first.wrapping_add(u64::from(n));
        let oldest = if layout.returns == Returns::Counted { entries.next() } else { None };
        let mut submitted = first.wrapping_add(u64::from(oldest.is_some()));
        'all: while submitted != end {
            let (slots, lap) = layout.stretch(words, submitted, count(end, submitted));
            for slot in slots.chunks_exact(ENTRY_WORDS) {
                // An iterator may have fewer entries than it says.
                let Some(entry) = entries.next() else { break 'all };
                slot[0].store(entry.addr, Ordering::Relaxed);
                // As in `submit`.
                publish(&slot[1], Return::from(entry).tag(lap), Edge::Tag);
                submitted = submitted.wrapping_add(1);
            }
        }
        if let Some(oldest) = oldest {
            let slot = layout.slot(words, first);
            slot[0].store(oldest.addr, Ordering::Relaxed);
            // As in `submit`. It covers the whole batch: the device looks at no later entry first.
            publish(&slot[1], Return::from(oldest).tag(layout.lap(first)), Edge::Tag);
        }
        self.submitted = submitted;
        Ok(())
    }

    /// Posts what was submitted since the last post.
    #[inline(always)]
    pub fn post(&mut self) -> Kick<Driver> {
        let n = self.submitted.wrapping_sub(self.tx.posted());
        if n == 0 {
            return Kick::NONE;
        }
        self.tx.post(self.mem.words(), n)
    }

    /// The next return, of a ring with [`Returns::Entries`] or [`Returns::Runs`].
    #[inline(always)]
    pub fn reap(&mut self) -> Result<Option<Return>, Corrupt> {
        let (layout, pos) = (self.layout, self.reaped);
        if self.run != 0 {
            return Ok(Some(self.reap_of_run()));
        }
        // Pairs with the publications in `DeviceEnd`: what the device wrote is visible with its
        // tag.
        let tag = observe(&layout.slot(self.mem.words(), pos)[1], Edge::Tag);
        if tag & MARKS != layout.lap(pos) | RETURN {
            return Ok(None);
        }
        if self.in_flight() == 0 {
            return Err(Corrupt::Unasked);
        }
        let mut back = Return::from_tag(tag);
        if layout.returns == Returns::Runs {
            if back.flags & RUN != 0 {
                self.run = self.check(back.len)?;
                return Ok(Some(self.reap_of_run()));
            }
            back = back.of_runs();
        }
        self.reaped = pos.wrapping_add(1);
        Ok(Some(back))
    }

    /// The next return of the run that was found.
    #[inline(always)]
    fn reap_of_run(&mut self) -> Return {
        let (word, shift) = self.layout.length(self.mem.words(), self.reaped);
        // It was written before the run's tag, which was observed.
        let length = low(word.load(Ordering::Relaxed) >> shift);
        self.run -= 1;
        self.reaped = self.reaped.wrapping_add(1);
        Return::unpacked(length)
    }

    /// The number of returns of a tag that returns many: no more than are in flight, and not 0.
    #[inline(always)]
    fn check(&self, n: u32) -> Result<u32, Corrupt> {
        if n == 0 || n > self.in_flight() { Err(Corrupt::Unasked) } else { Ok(n) }
    }

    /// Reaps up to `max` returns of a ring with [`Returns::Entries`] or [`Returns::Runs`], and
    /// gives each to `back`, oldest first. Says how many there were.
    #[inline(always)]
    pub fn reap_all(&mut self, max: u32, mut back: impl FnMut(Return)) -> Result<u32, Corrupt> {
        if self.layout.returns == Returns::Runs {
            return self.reap_runs(max, back);
        }
        let wanted = max.min(self.in_flight());
        let n = self.reap_slots::<false>(wanted, &mut back);
        if n == wanted && n < max {
            // Nothing is in flight: `reap` says whether the device returns more nevertheless.
            self.reap()?;
        }
        self.fetch_behind(n, max);
        Ok(n)
    }

    /// Reaps up to `max` returns, each of which has a slot. The tag of a run ends it.
    #[inline(always)]
    fn reap_slots<const RUNS: bool>(&mut self, max: u32, back: &mut impl FnMut(Return)) -> u32 {
        let (layout, words, first) = (self.layout, self.mem.words(), self.reaped);
        // Where returns are runs, the mark of a run counts as a mark too.
        let marks = if RUNS { MARKS | u64::from(RUN) << 48 } else { MARKS };
        let mut reaped = first;
        let end = first.wrapping_add(u64::from(max));
        // A poller finds nothing most of the time. So the first slot comes alone, and the stretch
        // that follows it is computed when something was there.
        let (mut slots, mut lap) = (layout.slot(words, reaped), layout.lap(reaped));
        'all: while reaped != end {
            for slot in slots.chunks_exact(ENTRY_WORDS) {
                // As in `reap`.
                let tag = observe(&slot[1], Edge::Tag);
                if tag & marks != lap | RETURN {
                    break 'all;
                }
                let one = Return::from_tag(tag);
                back(if RUNS { one.of_runs() } else { one });
                reaped = reaped.wrapping_add(1);
            }
            if reaped == end {
                break;
            }
            (slots, lap) = layout.stretch(words, reaped, count(end, reaped));
        }
        self.reaped = reaped;
        count(reaped, first)
    }

    /// [`reap_all`](Self::reap_all) where returns are runs.
    #[inline(always)]
    fn reap_runs(&mut self, max: u32, mut back: impl FnMut(Return)) -> Result<u32, Corrupt> {
        let mut n = 0;
        while n < max {
            if self.run == 0 {
                let wanted = (max - n).min(self.in_flight());
                let slots = self.reap_slots::<true>(wanted, &mut back);
                n += slots;
                if n == max {
                    break;
                }
                // A run, or nothing, or a slot that came meanwhile.
                let Some(one) = self.reap()? else { break };
                back(one);
                n += 1;
            }
            let all = self.run.min(max - n);
            self.reap_lengths(all, &mut back);
            n += all;
        }
        self.fetch_behind(n, max);
        Ok(n)
    }

    /// Reaps the next `n` returns of the run that was found.
    #[inline(always)]
    fn reap_lengths(&mut self, n: u32, back: &mut impl FnMut(Return)) {
        let end = self.reaped.wrapping_add(u64::from(n));
        while self.reaped != end {
            if self.reaped % 2 == 1 || count(end, self.reaped) == 1 {
                back(self.reap_of_run());
                continue;
            }
            let pairs = self.layout.lengths(self.mem.words(), self.reaped, count(end, self.reaped));
            for pair in pairs {
                // As in `reap_of_run`.
                let pair = pair.load(Ordering::Relaxed);
                back(Return::unpacked(low(pair)));
                back(Return::unpacked(low(pair >> 32)));
            }
            let reaped = low(2 * pairs.len() as u64);
            self.run -= reaped;
            self.reaped = self.reaped.wrapping_add(u64::from(reaped));
        }
    }

    /// Fetches the next batch if this one, of `n` returns, was as large as the caller wanted.
    #[inline(always)]
    fn fetch_behind(&self, n: u32, max: u32) {
        if n == max && n >= AHEAD_FROM {
            self.layout.fetch(self.mem.words(), self.reaped, n);
        }
    }

    /// How many entries came back since the last call, oldest first. It looks no further when it
    /// has found `enough`: what came back at the same post counts too, and what came back later
    /// is for the next call. It is for a ring with [`Returns::Counted`].
    #[inline(always)]
    pub fn reap_count(&mut self, enough: u32) -> Result<u32, Corrupt> {
        let (layout, words, first) = (self.layout, self.mem.words(), self.reaped);
        let mut reaped = first;
        // Each turn reaps a post of the device.
        for _ in 0..2 {
            // As in `reap`.
            let tag = observe(&layout.slot(words, reaped)[1], Edge::Tag);
            if tag & MARKS != layout.lap(reaped) | RETURN {
                self.reaped = reaped;
                return Ok(count(reaped, first));
            }
            let n = low(tag);
            if n == 0 || n > count(self.submitted, reaped) {
                return Err(Corrupt::Unasked);
            }
            reaped = reaped.wrapping_add(u64::from(n));
            if count(reaped, first) >= enough {
                self.reaped = reaped;
                return Ok(count(reaped, first));
            }
        }
        // Where there are two posts there may be many, and each tag is in another line. The
        // device's `seq` counts them all, but for one that is on its way.
        let more = self.rx.seen(words).wrapping_sub(reaped);
        if more <= u64::from(count(self.submitted, reaped)) {
            reaped = reaped.wrapping_add(more);
        } else if more >> 63 == 0 {
            return Err(Corrupt::Unasked);
        }
        self.reaped = reaped;
        Ok(count(reaped, first))
    }

    /// Asks for a kick by the return that follows `after` more returns (0: by the next return that
    /// is not reaped).
    pub fn arm(&mut self, after: u32) -> Armed {
        self.rx.arm(self.mem.words(), self.reaped.wrapping_add(u64::from(after)))
    }

    /// Asks for no kick.
    pub fn disarm(&mut self) {
        self.rx.disarm(self.mem.words());
    }
}

/// The device's end: takes entries, and gives them back.
#[derive(Debug)]
pub struct DeviceEnd<M> {
    mem: M,
    layout: Layout,
    tx: Tx<Device>,
    rx: Rx<Device>,
    taken: u64,
    given: u64,
    /// Where returns are runs, the position up to which tags return entries. The returns from there
    /// to `given` are the next run.
    published: u64,
    /// Where returns are runs, the first length of the next run, and its last one at an even
    /// position.
    first: u32,
    even: u32,
    /// `seq` as it is in memory: up to a ring behind the returns that have tags, so that `resume`
    /// can count.
    stored: u64,
}

impl<M: Memory> DeviceEnd<M> {
    /// Attaches to a fresh ring that the driver has formatted. Reads the header once and checks it.
    pub fn attach(mem: M) -> Result<Self, BadRing> {
        let (layout, start) = Layout::load(mem.words())?;
        Ok(Self::at(mem, layout, Tx::new(SIGNAL, start), start))
    }

    fn at(mem: M, layout: Layout, tx: Tx<Device>, given: u64) -> Self {
        let rx = Rx::new(SIGNAL);
        let (taken, published, stored) = (given, given, given);
        DeviceEnd { mem, layout, tx, rx, taken, given, published, first: 0, even: 0, stored }
    }

    /// Resumes a ring in place of a device end that ended at any moment. It needs the region only.
    /// This end takes again the entries that were taken and not returned. It does not return again
    /// what the driver may have seen returned. The kick is for returns of the other end that had
    /// none.
    ///
    /// A class that returns out of order also has to know which entries were in flight: see
    /// [`Ledger`](super::ledger::Ledger).
    pub fn resume(mem: M) -> Result<(Self, Kick<Device>), BadRing> {
        let words = mem.words();
        let (layout, _) = Layout::load(words)?;
        let seq = words[SIGNAL + signal::DEVICE_SEQ / WORD].load(Ordering::Relaxed);
        let given = match layout.returns {
            Returns::Counted | Returns::Runs => returned(words, layout, seq),
            Returns::Entries => published(words, layout, seq),
        };
        // The end before may have armed in order to sleep.
        Rx::<Device>::new(SIGNAL).disarm(words);
        let (tx, kick) = Tx::resume(words, SIGNAL, given);
        stored(&mem, SIGNAL, BLOCK_BYTES / WORD);
        Ok((Self::at(mem, layout, tx, given), kick))
    }

    /// The ring's shape.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The position of the next entry to take.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// The position of the next return.
    pub(super) fn given(&self) -> u64 {
        self.given
    }

    /// Counts `n` entries as taken, but no more than the ring holds.
    pub(super) fn skip(&mut self, n: usize) {
        let room = (self.layout.entries - self.held()) as usize;
        self.taken = self.taken.wrapping_add(n.min(room) as u64);
    }

    /// Entries taken and not yet given back.
    #[inline(always)]
    pub fn held(&self) -> u32 {
        count(self.taken, self.given)
    }

    /// Entries posted and not yet taken, by the driver's count; at most what the ring holds.
    pub fn pending(&self) -> u32 {
        let ahead = self.rx.seen(self.mem.words()).wrapping_sub(self.taken);
        // Below 0: the device took entries before their post.
        if ahead >> 63 != 0 { 0 } else { low(ahead.min(u64::from(self.layout.entries))) }
    }

    /// Takes the next submitted entry. The driver may have written any content: check it before
    /// use.
    #[inline(always)]
    pub fn take(&mut self) -> Result<Option<Entry>, Corrupt> {
        self.take_if(|_| true)
    }

    /// Takes the next submitted entry if `wanted` says so of it. If not, it stays in the ring, and
    /// [`arm`](Self::arm) says that it was missed.
    #[inline(always)]
    pub fn take_if(
        &mut self,
        wanted: impl FnOnce(&Entry) -> bool,
    ) -> Result<Option<Entry>, Corrupt> {
        let entry = self.peek()?.filter(wanted);
        self.taken = self.taken.wrapping_add(u64::from(entry.is_some()));
        Ok(entry)
    }

    /// Takes up to `max` entries, and gives each to `entry`, oldest first. Says how many there
    /// were. Their content is the peer's word, as in [`take`](Self::take).
    #[inline(always)]
    pub fn take_all(&mut self, max: u32, mut entry: impl FnMut(Entry)) -> Result<u32, Corrupt> {
        let (first, wanted) = (self.taken, max.min(self.layout.entries - self.held()));
        let (layout, words) = (self.layout, self.mem.words());
        let mut taken = first;
        let end = first.wrapping_add(u64::from(wanted));
        let (mut slots, mut lap) = (layout.slot(words, taken), layout.lap(taken));
        'all: while taken != end {
            for slot in slots.chunks_exact(ENTRY_WORDS) {
                // As in `peek`.
                let tag = observe(&slot[1], Edge::Tag);
                if tag & MARKS != lap {
                    break 'all;
                }
                entry(Entry::of(slot, tag));
                taken = taken.wrapping_add(1);
            }
            if taken == end {
                break;
            }
            (slots, lap) = layout.stretch(words, taken, count(end, taken));
        }
        self.taken = taken;
        let n = count(taken, first);
        if n == wanted && n < max {
            // The device holds all that the ring has: `peek` says whether there is more
            // nevertheless.
            self.peek()?;
        }
        Ok(n)
    }

    /// The next submitted entry, which is not taken.
    #[inline(always)]
    pub(super) fn peek(&self) -> Result<Option<Entry>, Corrupt> {
        let (layout, pos) = (self.layout, self.taken);
        let slot = layout.slot(self.mem.words(), pos);
        // Pairs with the store of the tag in `DriverEnd::submit`. The address is visible with its
        // tag, or with an older tag of the batch.
        let tag = observe(&slot[1], Edge::Tag);
        if tag & MARKS != layout.lap(pos) {
            return Ok(None);
        }
        if self.held() == layout.entries {
            return Err(Corrupt::Overfull);
        }
        Ok(Some(Entry::of(slot, tag)))
    }

    /// Gives one entry back; without an entry held, nothing happens. Where returns are counted or
    /// runs, this stands for the oldest entry held. Counted, nothing of `back` is passed on; of a
    /// run, its length below 2^31 and [`NEXT`]. The driver sees it after [`post`](Self::post) at
    /// the latest: call that once for a batch. A driver that polls sees a return with a tag of its
    /// own at once, and a long run before the post.
    #[inline(always)]
    pub fn give_back(&mut self, back: Return) {
        if self.held() == 0 {
            return;
        }
        let pos = self.given;
        match self.layout.returns {
            Returns::Counted => {}
            Returns::Runs => return self.lengthen(back),
            Returns::Entries => {
                self.keep_up();
                let tag = back.tag(self.layout.lap(pos) | RETURN);
                // Pairs with the load in `DriverEnd::reap`. The address is left as it is: until
                // this store the slot holds the submission, whole.
                publish(&self.layout.slot(self.mem.words(), pos)[1], tag, Edge::Tag);
                self.stored_slots(pos, 1);
            }
        }
        self.given = pos.wrapping_add(1);
    }

    /// Gives back as many entries as there are `backs`, in their order, and no more than are held.
    /// Each is as by [`give_back`](Self::give_back).
    #[inline(always)]
    pub fn give_back_all(&mut self, backs: impl IntoIterator<Item = Return>) {
        let (backs, held) = (backs.into_iter(), self.held());
        match self.layout.returns {
            Returns::Counted => {
                self.given = self.given.wrapping_add(backs.take(held as usize).count() as u64);
                return;
            }
            Returns::Runs => return backs.take(held as usize).for_each(|back| self.lengthen(back)),
            Returns::Entries => {}
        }
        let first = self.given;
        self.give_back_entries(backs);
        self.stored_slots(first, count(self.given, first));
    }

    /// [`give_back_all`](Self::give_back_all) where each return has a slot.
    #[inline(always)]
    fn give_back_entries(&mut self, mut backs: impl Iterator<Item = Return>) {
        while self.held() != 0 {
            let n = self.keep_up().min(self.held());
            let (slots, lap) = self.layout.stretch(self.mem.words(), self.given, n);
            let mut given = self.given;
            for slot in slots.chunks_exact(ENTRY_WORDS) {
                let Some(back) = backs.next() else {
                    self.given = given;
                    return;
                };
                // As in `give_back`.
                publish(&slot[1], back.tag(lap | RETURN), Edge::Tag);
                given = given.wrapping_add(1);
            }
            self.given = given;
        }
    }

    /// Takes up to `max` entries and gives each back at once, in their order: with what `serve`
    /// makes of it, or, where returns are counted, without content. If `serve` returns `None`, its
    /// entry is not taken, and no other entry either. Says how many were given back. The driver
    /// sees them after [`post`](Self::post) at the latest.
    ///
    /// Each entry's return goes into the slot that was just read, so this is the fastest way
    /// through a batch. Where returns are runs, and 32 entries or more are there, they go back as
    /// one run. If the device holds entries already, it holds as many after the call: each return
    /// goes to the next position, as by [`give_back`](Self::give_back).
    #[inline(always)]
    pub fn serve_all(
        &mut self,
        max: u32,
        serve: impl FnMut(Entry) -> Option<Return>,
    ) -> Result<u32, Corrupt> {
        let max = max.min(self.layout.entries - self.held());
        if self.layout.returns == Returns::Counted {
            return Ok(self.serve_counted(max, serve));
        }
        if self.taken != self.given {
            return self.serve_behind(max, serve);
        }
        if self.layout.returns == Returns::Runs {
            self.publish_run();
            let last = self.taken.wrapping_add(u64::from(RUN_LONG - 1));
            if max >= RUN_LONG && self.is_there(self.taken) && self.is_there(last) {
                return Ok(self.serve_run(max, serve));
            }
            return Ok(self.serve_in_place::<true>(max, serve));
        }
        Ok(self.serve_in_place::<false>(max, serve))
    }

    /// Whether the entry at position `pos` was submitted.
    #[inline(always)]
    fn is_there(&self, pos: u64) -> bool {
        // As in `peek`.
        let tag = observe(&self.layout.slot(self.mem.words(), pos)[1], Edge::Tag);
        tag & MARKS == self.layout.lap(pos)
    }

    /// [`serve_all`](Self::serve_all) where returns are counted.
    #[inline(always)]
    fn serve_counted(&mut self, max: u32, mut serve: impl FnMut(Entry) -> Option<Return>) -> u32 {
        let (layout, words, first) = (self.layout, self.mem.words(), self.taken);
        let mut pos = first;
        let end = first.wrapping_add(u64::from(max));
        // As in `DriverEnd::reap_slots`.
        let (mut slots, mut lap) = (layout.slot(words, pos), layout.lap(pos));
        'all: while pos != end {
            for slot in slots.chunks_exact(ENTRY_WORDS) {
                // As in `peek`.
                let tag = observe(&slot[1], Edge::Tag);
                if tag & MARKS != lap || serve(Entry::of(slot, tag)).is_none() {
                    break 'all;
                }
                pos = pos.wrapping_add(1);
            }
            if pos == end {
                break;
            }
            (slots, lap) = layout.stretch(words, pos, count(end, pos));
        }
        let n = count(pos, first);
        self.taken = pos;
        self.given = self.given.wrapping_add(u64::from(n));
        if n >= COUNTED_AHEAD_FROM {
            self.fetch_behind(n, max);
        }
        n
    }

    /// [`serve_all`](Self::serve_all) of a device that holds nothing: each return goes into the
    /// slot that was just read.
    #[inline(always)]
    fn serve_in_place<const RUNS: bool>(
        &mut self,
        max: u32,
        mut serve: impl FnMut(Entry) -> Option<Return>,
    ) -> u32 {
        let (layout, first) = (self.layout, self.taken);
        if count(first, self.stored) + max > layout.entries {
            self.store_seq(first);
        }
        let words = self.mem.words();
        let mut pos = first;
        let end = first.wrapping_add(u64::from(max));
        // As in `DriverEnd::reap_slots`.
        let (mut slots, mut lap) = (layout.slot(words, pos), layout.lap(pos));
        'all: while pos != end {
            for slot in slots.chunks_exact(ENTRY_WORDS) {
                // As in `peek`.
                let tag = observe(&slot[1], Edge::Tag);
                if tag & MARKS != lap {
                    break 'all;
                }
                let Some(back) = serve(Entry::of(slot, tag)) else { break 'all };
                pos = pos.wrapping_add(1);
                if RUNS {
                    // As in `publish_run`.
                    publish(&words[RETURNING], pos | SINGLE, Edge::Tag);
                }
                // As in `give_back`.
                let back = if RUNS { Return::unpacked(back.packed()) } else { back };
                publish(&slot[1], back.tag(lap | RETURN), Edge::Tag);
            }
            if pos == end {
                break;
            }
            (slots, lap) = layout.stretch(words, pos, count(end, pos));
        }
        (self.taken, self.given, self.published) = (pos, pos, pos);
        let n = count(pos, first);
        self.stored_slots(first, n);
        self.fetch_behind(n, max);
        n
    }

    /// [`serve_all`](Self::serve_all) of a device that holds nothing, as one run.
    #[inline(always)]
    fn serve_run(&mut self, max: u32, mut serve: impl FnMut(Entry) -> Option<Return>) -> u32 {
        let (layout, words, start) = (self.layout, self.mem.words(), self.taken);
        let mut pos = start;
        let end = start.wrapping_add(u64::from(max));
        // As in `lengthen`.
        let (mut first, mut even) = (0, 0);
        let mut one = |slot: &[Word], lap| {
            // As in `peek`.
            let tag = observe(&slot[1], Edge::Tag);
            if tag & MARKS != lap {
                return None;
            }
            serve(Entry::of(slot, tag)).map(Return::packed)
        };
        'all: while pos != end {
            // An odd position shares its word of lengths with the position before it.
            let n = if pos % 2 == 1 { 1 } else { count(end, pos) };
            let (slots, lap) = layout.stretch(words, pos, n);
            let lengths = layout.lengths(words, pos, n);
            let pairs = slots.chunks_exact(2 * ENTRY_WORDS);
            let rest = pairs.remainder();
            for (pair, length) in pairs.zip(lengths) {
                let (slot, next) = pair.split_at(ENTRY_WORDS);
                let Some(a) = one(slot, lap) else { break 'all };
                even = a;
                pos = pos.wrapping_add(1);
                let Some(b) = one(next, lap) else { break 'all };
                length.store(u64::from(a) | u64::from(b) << 32, Ordering::Relaxed);
                pos = pos.wrapping_add(1);
            }
            if !rest.is_empty() {
                let Some(a) = one(rest, lap) else { break 'all };
                if pos == start {
                    first = a;
                }
                even = a;
                pos = pos.wrapping_add(1);
            }
        }
        let n = count(pos, start);
        self.first = if n == 1 && start % 2 == 0 { even } else { first };
        self.even = even;
        (self.taken, self.given) = (pos, pos);
        self.publish_run();
        self.fetch_behind(n, max);
        n
    }

    /// [`serve_all`](Self::serve_all) of a device that holds entries.
    #[inline(always)]
    fn serve_behind(
        &mut self,
        max: u32,
        mut serve: impl FnMut(Entry) -> Option<Return>,
    ) -> Result<u32, Corrupt> {
        for n in 0..max {
            let Some(back) = self.peek()?.and_then(&mut serve) else { return Ok(n) };
            self.taken = self.taken.wrapping_add(1);
            self.give_back(back);
        }
        Ok(max)
    }

    /// Fetches the next batch if this one, of `n` entries, was as large as the caller wanted.
    #[inline(always)]
    fn fetch_behind(&self, n: u32, max: u32) {
        if n == max && n >= AHEAD_FROM {
            self.layout.fetch(self.mem.words(), self.taken, n);
        }
    }

    /// Adds a return to the next run, and publishes the run when it is long.
    #[inline(always)]
    fn lengthen(&mut self, back: Return) {
        let (pos, n) = (self.given, count(self.given, self.published));
        if n == 0 {
            // The tag of a single return holds its length, so there may be nothing to write here.
            self.first = back.packed();
        }
        if pos % 2 == 0 {
            self.even = back.packed();
        } else if n != 0 {
            // Both lengths of this word belong to the run.
            let pair = u64::from(self.even) | u64::from(back.packed()) << 32;
            self.layout.length(self.mem.words(), pos).0.store(pair, Ordering::Relaxed);
            if self.mem.is_logged() {
                self.wrote_lengths(pos, 1);
            }
        }
        self.given = pos.wrapping_add(1);
        if count(self.given, self.published) == RUN_LONG {
            self.publish_run();
        }
    }

    /// Stores the tag of the next run, if it is not empty.
    #[inline(always)]
    fn publish_run(&mut self) {
        let (first, given) = (self.published, self.given);
        let n = count(given, first);
        if n == 0 {
            return;
        }
        // For `resume`: a run begins at `seq`, and a single return is less than a ring ahead of it.
        let is_far = count(given, self.stored) > self.layout.entries;
        if n > 1 && self.stored != first || is_far {
            self.store_seq(first);
        }
        let (layout, words) = (self.layout, self.mem.words());
        let (mark, back) = if n == 1 {
            (SINGLE, Return::unpacked(self.first))
        } else {
            // The lengths that share their words with positions beyond the run.
            if first % 2 == 1 {
                layout.put_length(words, first, self.first);
            }
            if given % 2 == 1 {
                layout.put_length(words, given.wrapping_sub(1), self.even);
            }
            (0, Return { len: n, id: 0, flags: RUN })
        };
        // Pairs with nothing while this end lives. The next end must not find it without the `seq`
        // before it, nor the tag without it.
        publish(&words[RETURNING], given & !SINGLE | mark, Edge::Tag);
        let tag = back.tag(layout.lap(first) | RETURN);
        // Pairs with the load in `DriverEnd::reap`. It covers the lengths of the run.
        publish(&layout.slot(words, first)[1], tag, Edge::Tag);
        self.published = given;
        self.stored_slots(first, n);
    }

    /// Sees to it that there is room for a return between `stored` and a ring behind it, and says
    /// for how many.
    #[inline(always)]
    fn keep_up(&mut self) -> u32 {
        let behind = count(self.given, self.stored);
        if behind < self.layout.entries {
            return self.layout.entries - behind;
        }
        self.store_seq(self.given);
        self.layout.entries
    }

    /// Stores `seq` ahead of the next post, for `resume`. Whether the driver wants a kick, that
    /// post finds out.
    fn store_seq(&mut self, seq: u64) {
        self.tx.store(self.mem.words(), seq);
        self.tx.stored(&self.mem);
        self.stored = seq;
    }

    /// Tells the memory of stores in the slots of the `n` positions from `pos` on, and in what a
    /// return writes beside its slot.
    #[inline(always)]
    fn stored_slots(&self, pos: u64, n: u32) {
        if self.mem.is_logged() {
            self.wrote_slots(pos, n);
        }
    }

    #[cold]
    fn wrote_slots(&self, pos: u64, n: u32) {
        if self.layout.returns != Returns::Entries {
            self.mem.wrote(RETURNING, 1);
        }
        self.wrote_stretches(pos, n, |first, n| {
            self.mem.wrote(ENTRIES_OFFSET / WORD + first * ENTRY_WORDS, n * ENTRY_WORDS);
        });
        if self.layout.returns == Returns::Runs && n > 1 {
            self.wrote_lengths(pos, n);
        }
    }

    /// Tells the memory of stores in the lengths of the `n` positions from `pos` on.
    #[cold]
    fn wrote_lengths(&self, pos: u64, n: u32) {
        let at = self.layout.lengths_offset() / WORD;
        self.wrote_stretches(pos, n, |first, n| {
            self.mem.wrote(at + first / 2, (first + n).div_ceil(2) - first / 2);
        });
    }

    /// Calls `each` with the first index and the length of the stretches of the `n` positions from
    /// `pos` on: one, or two around the end of the array.
    fn wrote_stretches(&self, pos: u64, n: u32, each: impl Fn(usize, usize)) {
        let (index, n) = (self.layout.index(pos), n as usize);
        let front = n.min(self.layout.entries as usize - index);
        for (first, n) in [(index, front), (0, n - front)] {
            if n > 0 {
                each(first, n);
            }
        }
    }

    /// Posts the returns that were given back since the last post.
    #[inline(always)]
    pub fn post(&mut self) -> Kick<Device> {
        let n = self.given.wrapping_sub(self.tx.posted());
        if n == 0 {
            return Kick::NONE;
        }
        if self.layout.returns == Returns::Runs {
            self.publish_run();
        }
        self.stored = self.given;
        let words = self.mem.words();
        if self.layout.returns == Returns::Counted {
            let first = self.tx.posted();
            // For `resume`: the tag may be gone by then, and with it how many entries came back.
            words[RETURNING].store(self.given, Ordering::Relaxed);
            let tag = Return { len: low(n), id: 0, flags: 0 }.tag(self.layout.lap(first) | RETURN);
            // Pairs with the load in `DriverEnd::reap_count`.
            publish(&self.layout.slot(words, first)[1], tag, Edge::Tag);
            self.stored_slots(first, 1);
        }
        let kick = self.tx.post(words, n);
        self.tx.stored(&self.mem);
        kick
    }

    /// Asks for a kick by the entry that follows `after` more entries (0: by the next entry that is
    /// not taken).
    pub fn arm(&mut self, after: u32) -> Armed {
        let armed = self.rx.arm(self.mem.words(), self.taken.wrapping_add(u64::from(after)));
        self.rx.stored(&self.mem);
        armed
    }

    /// Asks for no kick.
    pub fn disarm(&mut self) {
        self.rx.disarm(self.mem.words());
        self.rx.stored(&self.mem);
    }
}

/// The position up to which a device that has gone had published returns, where one tag may return
/// many. Its `seq` was `seq`.
fn returned(words: &[Word], layout: Layout, seq: u64) -> u64 {
    let returning = words[RETURNING].load(Ordering::Relaxed);
    let n = returning.wrapping_sub(seq) & !SINGLE;
    if n == 0 || n > u64::from(layout.entries) {
        return seq;
    }
    let end = seq.wrapping_add(n);
    // The tag that may be missing, and where the returns end without it.
    let last = if layout.returns == Returns::Runs && returning & SINGLE != 0 {
        end.wrapping_sub(1)
    } else {
        seq
    };
    if is_published(words, layout, last) { end } else { last }
}

/// The position up to which a device that has gone had published returns of a slot each. Its `seq`
/// was `seq`, up to a ring behind.
fn published(words: &[Word], layout: Layout, seq: u64) -> u64 {
    (0..layout.entries)
        .map(|ahead| seq.wrapping_add(u64::from(ahead)))
        .find(|pos| !is_published(words, layout, *pos))
        .unwrap_or(seq.wrapping_add(u64::from(layout.entries)))
}

/// Whether the tag of a return was stored in the slot of position `pos`.
fn is_published(words: &[Word], layout: Layout, pos: u64) -> bool {
    // Pairs with nothing: the other device's stores are complete.
    let marks = layout.slot(words, pos)[1].load(Ordering::Relaxed) & MARKS;
    let lap = layout.lap(pos);
    // Or the driver has seen the return, and has submitted anew.
    marks == lap | RETURN || marks == lap ^ LAP_MARK
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Positions around which something could wrap around.
    const STARTS: [u64; 7] =
        [0, 3, (1 << 31) - 2, (1 << 32) - 3, (1 << 48) - 2, (1 << 63) - 3, u64::MAX - 1];

    const FORMS: [Returns; 3] = [Returns::Counted, Returns::Entries, Returns::Runs];

    fn memory(layout: Layout) -> Vec<Word> {
        (0..layout.words()).map(|_| Word::new(0)).collect()
    }

    fn entry(n: u64) -> Entry {
        Entry { addr: n, len: 5, id: 6, flags: NEXT }
    }

    /// What the driver gets of an entry that was given back with this length.
    fn back(len: u32) -> Return {
        Return { len, id: 6, flags: NEXT }
    }

    /// The same, by a ring with these returns.
    fn back_by(returns: Returns, len: u32) -> Return {
        Return { id: if returns == Returns::Runs { 0 } else { 6 }, ..back(len) }
    }

    /// All layouts up to 32 entries, with all places in them, and the largest ones; and all
    /// stretches that fit. What they name lies within the ring, and no two of them share a byte.
    #[test]
    fn positions_of_all_small_rings_lie_within_them_and_apart() {
        let large = [1 << 10, MAX_ENTRIES];
        for (entries, returns) in
            (0..=33).chain(large).flat_map(|entries| FORMS.map(|returns| (entries, returns)))
        {
            let Ok(layout) = Layout::new(entries, returns) else {
                assert!(entries < 2 || !entries.is_power_of_two(), "{entries}");
                continue;
            };
            let words = memory(layout);
            // The longest stretch that is tried.
            let longest = if entries <= 32 { entries } else { 0 };
            let place = |of: &[Word]| {
                (of.as_ptr() as usize - words.as_ptr() as usize) / WORD
                    ..(of.as_ptr() as usize - words.as_ptr() as usize) / WORD + of.len()
            };
            let mut users = vec![0; words.len()];
            users[..ENTRIES_OFFSET / WORD].fill(1);
            for start in STARTS {
                // Each place once, whatever the position begins with.
                for pos in (0..u64::from(entries)).map(|i| start.wrapping_add(i)) {
                    let slot = place(layout.slot(&words, pos));
                    assert_eq!(slot.len(), ENTRY_WORDS);
                    if start == 0 {
                        users[slot.clone()].iter_mut().for_each(|user| *user += 1);
                    }
                    // One lap on, it is the same place with another mark.
                    let next = pos.wrapping_add(u64::from(entries));
                    assert_eq!(place(layout.slot(&words, next)), slot);
                    assert_ne!(layout.lap(next), layout.lap(pos));
                    for n in 0..=longest {
                        let (slots, lap) = layout.stretch(&words, pos, n);
                        let slots = place(slots);
                        assert_eq!(slots.start, slot.start);
                        assert!(slots.len() <= n as usize * ENTRY_WORDS);
                        for i in 0..slots.len() / ENTRY_WORDS {
                            let pos = pos.wrapping_add(i as u64);
                            let one = place(layout.slot(&words, pos));
                            assert_eq!(one.start, slots.start + i * ENTRY_WORDS);
                            assert_eq!(layout.lap(pos), lap);
                        }
                    }
                    if returns != Returns::Runs {
                        continue;
                    }
                    let (word, shift) = layout.length(&words, pos);
                    let at = place(core::slice::from_ref(word)).start;
                    assert_eq!(shift, if pos % 2 == 0 { 0 } else { 32 });
                    if start == 0 && pos % 2 == 0 {
                        users[at] += 1;
                    }
                    for n in (0..=longest).filter(|_| pos % 2 == 0) {
                        let lengths = place(layout.lengths(&words, pos, n));
                        assert!(lengths.start == at && lengths.len() <= n as usize / 2);
                    }
                }
            }
            assert!(users.iter().all(|users| *users <= 1), "{layout:?}");
            assert!(layout.bytes() % 64 == 0 && words.len() * WORD == layout.bytes());
        }
    }

    #[test]
    fn layouts_are_whole_lines() {
        let bytes = |entries, returns| Layout::new(entries, returns).unwrap().bytes();
        assert_eq!(bytes(2, Returns::Counted), 448);
        assert_eq!(bytes(256, Returns::Counted), 384 + 4096);
        assert_eq!(bytes(256, Returns::Entries), 384 + 4096);
        assert_eq!((bytes(256, Returns::Runs), bytes(2, Returns::Runs)), (384 + 4096 + 1024, 448));
        for entries in [0, 1, 3, 65536, u32::MAX] {
            assert_eq!(Layout::new(entries, Returns::Counted), Err(BadRing::Entries));
        }
    }

    /// A hostile device writes all bits of the tag of a single return, but for those that mark it.
    #[test]
    fn a_single_return_of_runs_has_only_a_length_and_next() {
        for all in [false, true] {
            let layout = Layout::new(4, Returns::Runs).unwrap();
            let memory = memory(layout);
            let mut driver = DriverEnd::create(&memory[..], layout, 0).unwrap();
            driver.submit(entry(0)).unwrap();
            let _ = driver.post();
            let tag = !(MARKS | u64::from(RUN) << 48) | layout.lap(0) | RETURN;
            layout.slot(&memory[..], 0)[1].store(tag, Ordering::Release);
            let back = if all {
                let mut found = Vec::new();
                assert_eq!(driver.reap_all(4, |back| found.push(back)), Ok(1));
                found.pop()
            } else {
                driver.reap().unwrap()
            };
            assert_eq!(back, Some(Return { len: (1 << 31) - 1, id: 0, flags: NEXT }));
        }
    }

    #[test]
    fn batches_of_every_size_come_and_go() {
        for returns in FORMS {
            for start in STARTS {
                let layout = Layout::new(16, returns).unwrap();
                let memory = memory(layout);
                let mut driver = DriverEnd::create(&memory[..], layout, start).unwrap();
                let mut device = DeviceEnd::attach(&memory[..]).unwrap();
                let (mut sent, mut taken) = (0, 0);
                for n in (1..=16).chain([5, 16, 16, 3]) {
                    assert_eq!(device.take(), Ok(None));
                    for _ in 0..n {
                        assert_eq!(driver.submit(entry(sent)), Ok(()));
                        sent += 1;
                    }
                    let _ = driver.post();
                    for _ in 0..n {
                        assert_eq!(device.take(), Ok(Some(entry(taken))));
                        taken += 1;
                    }
                    assert_eq!(device.take(), Ok(None));
                    for i in 0..n {
                        device.give_back(Return { len: 100 + i, ..entry(0).into() });
                    }
                    let _ = device.post();
                    if returns == Returns::Counted {
                        assert_eq!(driver.reap_count(u32::MAX), Ok(n));
                        continue;
                    }
                    for i in 0..n {
                        assert_eq!(driver.reap(), Ok(Some(back_by(returns, 100 + i))));
                    }
                    assert_eq!(driver.reap(), Ok(None));
                }
            }
        }
    }

    #[test]
    fn entries_are_served_in_place_up_to_the_one_that_is_refused() {
        for returns in FORMS {
            for start in STARTS {
                let layout = Layout::new(8, returns).unwrap();
                let memory = memory(layout);
                let mut driver = DriverEnd::create(&memory[..], layout, start).unwrap();
                let mut device = DeviceEnd::attach(&memory[..]).unwrap();
                let serve = |taken: Entry| {
                    (taken.addr != 5).then(|| Return { len: low(taken.addr), ..taken.into() })
                };
                driver.submit_all((0..8_u32).map(|n| entry(n.into()))).unwrap();
                // One entry is held meanwhile: returns are for the positions before.
                assert_eq!(device.take(), Ok(Some(entry(0))));
                assert_eq!(device.serve_all(2, serve), Ok(2));
                assert_eq!(device.serve_all(100, serve), Ok(2));
                assert_eq!(device.serve_all(100, serve), Ok(0), "the entry is refused again");
                device.give_back(back(0));
                let _ = device.post();
                if returns == Returns::Counted {
                    assert_eq!(driver.reap_count(u32::MAX), Ok(5));
                } else {
                    for len in [1, 2, 3, 4, 0] {
                        assert_eq!(driver.reap(), Ok(Some(back_by(returns, len))));
                    }
                }
                assert_eq!(device.serve_all(100, |taken| Some(taken.into())), Ok(3));
                assert_eq!((device.held(), device.take()), (0, Ok(None)));
            }
        }
    }

    #[test]
    fn full_is_full_until_reaped() {
        let layout = Layout::new(4, Returns::Counted).unwrap();
        let memory = memory(layout);
        let mut driver = DriverEnd::create(&memory[..], layout, u64::MAX - 1).unwrap();
        let mut device = DeviceEnd::attach(&memory[..]).unwrap();
        for n in 0..4 {
            assert_eq!(driver.submit(entry(n)), Ok(()));
        }
        assert_eq!(driver.submit(entry(4)), Err(Full));
        let _ = driver.post();
        for n in 0..4 {
            assert_eq!(device.take(), Ok(Some(entry(n))));
        }
        assert_eq!(device.take(), Ok(None));
        device.give_back(entry(0).into());
        assert_eq!(driver.reap_count(u32::MAX), Ok(0), "not posted yet");
        let _ = device.post();
        assert_eq!((driver.reap_count(u32::MAX), driver.space()), (Ok(1), 1));
        for _ in 0..10 {
            device.give_back(entry(0).into());
        }
        let _ = device.post();
        assert_eq!((device.held(), driver.reap_count(u32::MAX)), (0, Ok(3)));
    }

    #[test]
    fn a_post_that_was_seen_does_not_kick() {
        let layout = Layout::new(4, Returns::Counted).unwrap();
        let memory = memory(layout);
        let mut driver = DriverEnd::create(&memory[..], layout, 0).unwrap();
        let mut device = DeviceEnd::attach(&memory[..]).unwrap();
        assert_eq!(device.arm(0), Armed::Waiting);
        driver.submit(entry(1)).unwrap();
        assert_eq!(device.pending(), 0);
        assert!(driver.post().is_wanted());
        assert_eq!(device.pending(), 1);
        assert!(device.take().unwrap().is_some());
        assert_eq!(device.pending(), 0);
        assert_eq!(device.arm(0), Armed::Waiting);
        assert!(!driver.post().is_wanted(), "nothing was submitted");
        driver.submit(entry(2)).unwrap();
        assert!(driver.post().is_wanted());
        // Another implementation may publish entries one by one, before their post.
        memory[SIGNAL].store(0, Ordering::Relaxed);
        assert!(device.take().unwrap().is_some());
        assert_eq!(device.pending(), 0, "taken before its post");
        assert_eq!(device.arm(0), Armed::Waiting);
    }

    #[test]
    fn attach_checks_the_header() {
        let layout = Layout::new(8, Returns::Entries).unwrap();
        let memory = memory(layout);
        let attach = || DeviceEnd::attach(&memory[..]).map(|d| d.layout());
        assert_eq!(attach(), Err(BadRing::Magic));
        DriverEnd::create(&memory[..], layout, 0).unwrap();
        assert_eq!(attach(), Ok(layout));
        for (word, value, error) in [
            (HEADER_ENTRIES, 9, BadRing::Entries),
            (HEADER_ENTRIES, 1 << 32 | 8, BadRing::Entries),
            (HEADER_ENTRIES, 16, BadRing::TooSmall),
            (HEADER_RETURNS, 3, BadRing::Returns),
        ] {
            let before = memory[word].swap(value, Ordering::Relaxed);
            assert_eq!(attach(), Err(error));
            memory[word].store(before, Ordering::Relaxed);
        }
        assert_eq!(DeviceEnd::attach(&memory[..10]).unwrap_err(), BadRing::TooSmall);
        assert_eq!(DriverEnd::create(&memory[..10], layout, 0).unwrap_err(), BadRing::TooSmall);
    }

    /// Stores what an honest peer does not: an entry or a return at position `pos`.
    fn forge(memory: &[Word], layout: Layout, pos: u64, mark: u64, back: Return) {
        layout.slot(memory, pos)[1].store(back.tag(layout.lap(pos) | mark), Ordering::Relaxed);
    }

    #[test]
    fn a_peer_that_sends_too_much_is_corrupt() {
        let layout = Layout::new(2, Returns::Entries).unwrap();
        let memory = memory(layout);
        let mut driver = DriverEnd::create(&memory[..], layout, 0).unwrap();
        let mut device = DeviceEnd::attach(&memory[..]).unwrap();
        driver.submit(entry(0)).unwrap();
        driver.submit(entry(1)).unwrap();
        let _ = driver.post();
        assert!(device.take().unwrap().is_some() && device.take().unwrap().is_some());
        forge(&memory, layout, 2, 0, Return::default());
        assert_eq!(device.take(), Err(Corrupt::Overfull));
        assert_eq!(driver.reap(), Ok(None));
        for pos in 0..2 {
            forge(&memory, layout, pos, RETURN, Return::default());
            assert!(driver.reap().unwrap().is_some());
        }
        forge(&memory, layout, 2, RETURN, Return::default());
        assert_eq!(driver.reap(), Err(Corrupt::Unasked));
    }

    #[test]
    fn a_count_of_more_than_was_given_is_corrupt() {
        let layout = Layout::new(2, Returns::Counted).unwrap();
        let memory = memory(layout);
        let mut driver = DriverEnd::create(&memory[..], layout, 0).unwrap();
        driver.submit(entry(0)).unwrap();
        for len in [0, 2, 3, 1 << 31, u32::MAX] {
            forge(&memory, layout, 0, RETURN, Return { len, ..Return::default() });
            assert_eq!(driver.reap_count(u32::MAX), Err(Corrupt::Unasked), "{len:#x}");
        }
        forge(&memory, layout, 0, RETURN, Return { len: 1, ..Return::default() });
        assert_eq!(driver.reap_count(u32::MAX), Ok(1));
        forge(&memory, layout, 1, RETURN, Return { len: 1, ..Return::default() });
        assert_eq!(driver.reap_count(u32::MAX), Err(Corrupt::Unasked), "nothing is in flight");
    }

    #[test]
    fn a_ring_is_taken_up_again() {
        for returns in FORMS {
            for start in STARTS {
                let layout = Layout::new(8, returns).unwrap();
                let memory = memory(layout);
                let mut driver = DriverEnd::create(&memory[..], layout, start).unwrap();
                let (mut device, kick) = DeviceEnd::resume(&memory[..]).unwrap();
                assert!(!kick.is_wanted() && device.held() == 0);
                (0..7).for_each(|n| driver.submit(entry(n)).unwrap());
                let _ = (driver.post(), driver.arm(0));
                for n in 0..6 {
                    assert_eq!(device.take(), Ok(Some(entry(n))));
                }
                (0..5).for_each(|_| device.give_back(back(1)));
                let _ = device.post(); // Its kick is lost with it.
                let (mut device, kick) = DeviceEnd::resume(&memory[..]).unwrap();
                assert!(kick.is_wanted());
                assert_eq!(device.take(), Ok(Some(entry(5))), "taken, and not returned");
                assert_eq!(device.take(), Ok(Some(entry(6))));
                (0..2).for_each(|_| device.give_back(back(1)));
                let _ = device.post();
                let reaped = match returns {
                    Returns::Counted => driver.reap_count(u32::MAX).unwrap() as usize,
                    _ => std::iter::from_fn(|| driver.reap().unwrap()).count(),
                };
                assert_eq!((reaped, driver.in_flight()), (7, 0));
            }
        }
    }
}
