// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ring: every value is kept, in order (spec/shared-memory.md, "Ring").
//!
//! A ring has one array of slots. The driver submits an entry in a slot. The device takes it, and
//! marks a slot as returned. The tag of each slot says which end wrote it and in which lap, so a
//! poller reads one cache line only. The number of entries in flight never exceeds the ring's size.
//! There is no other flow control.
//!
//! Both ends signal once for a batch, and make it visible before: all of it at once where returns
//! are counted, else entry by entry, so that the other end works on the first entries while the
//! last ones are on their way.
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
//! - [`Returns::Entries`]: each has a tag of its own, in any order.

use super::memory::{Memory, WORD, low, read_u32};
use super::signal::end::{Device, Driver};
use super::signal::{self, Armed, BLOCK_BYTES, BadSignal, Kick, Rx, Tx};
use super::sync::{Edge, Ordering, Word, observe, publish};

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
/// The device's word *returning*, in the line of its `seq`. Where returns are counted, it is the
/// position up to which the tag returns entries that the device stores next.
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
    /// Each with a tag of its own, in any order.
    Entries,
}

impl Returns {
    fn number(self) -> u64 {
        match self {
            Returns::Counted => 0,
            Returns::Entries => 1,
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
        (ENTRIES_OFFSET + self.entries as usize * ENTRY_BYTES).next_multiple_of(64)
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
        let returns = [Returns::Counted, Returns::Entries]
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

    /// The next return, of a ring with [`Returns::Entries`].
    #[inline(always)]
    pub fn reap(&mut self) -> Result<Option<Return>, Corrupt> {
        let (layout, pos) = (self.layout, self.reaped);
        // Pairs with the publications in `DeviceEnd`: what the device wrote is visible with its
        // tag.
        let tag = observe(&layout.slot(self.mem.words(), pos)[1], Edge::Tag);
        if tag & MARKS != layout.lap(pos) | RETURN {
            return Ok(None);
        }
        if self.in_flight() == 0 {
            return Err(Corrupt::Unasked);
        }
        self.reaped = pos.wrapping_add(1);
        Ok(Some(Return::from_tag(tag)))
    }

    /// Reaps up to `max` returns of a ring with [`Returns::Entries`], and gives each to `back`,
    /// oldest first. Says how many there were.
    #[inline(always)]
    pub fn reap_all(&mut self, max: u32, mut back: impl FnMut(Return)) -> Result<u32, Corrupt> {
        let (first, wanted) = (self.reaped, max.min(self.in_flight()));
        let (layout, words) = (self.layout, self.mem.words());
        let mut reaped = first;
        let end = first.wrapping_add(u64::from(wanted));
        let (mut slots, mut lap) = (layout.slot(words, reaped), layout.lap(reaped));
        'all: while reaped != end {
            for slot in slots.chunks_exact(ENTRY_WORDS) {
                // As in `reap`.
                let tag = observe(&slot[1], Edge::Tag);
                if tag & MARKS != lap | RETURN {
                    break 'all;
                }
                back(Return::from_tag(tag));
                reaped = reaped.wrapping_add(1);
            }
            if reaped == end {
                break;
            }
            (slots, lap) = layout.stretch(words, reaped, count(end, reaped));
        }
        self.reaped = reaped;
        let n = count(reaped, first);
        if n == wanted && n < max {
            // Nothing is in flight: `reap` says whether the device returns more nevertheless.
            self.reap()?;
        }
        Ok(n)
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
    /// `seq` as it is in memory: up to a ring behind `given`, so that `resume` can count.
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
        DeviceEnd { mem, layout, tx, rx, taken: given, given, stored: given }
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
            Returns::Counted => counted(words, layout, seq),
            Returns::Entries => published(words, layout, seq),
        };
        // The end before may have armed in order to sleep.
        Rx::<Device>::new(SIGNAL).disarm(words);
        let (tx, kick) = Tx::resume(words, SIGNAL, given);
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
        let entry = self.peek()?;
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
                let Return { len, id, flags } = Return::from_tag(tag);
                entry(Entry { addr: slot[0].load(Ordering::Relaxed), len, id, flags });
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
        let Return { len, id, flags } = Return::from_tag(tag);
        Ok(Some(Entry { addr: slot[0].load(Ordering::Relaxed), len, id, flags }))
    }

    /// Gives one entry back; without an entry held, nothing happens. Where returns are counted this
    /// stands for the oldest entry held, and nothing of `back` is passed on. The driver sees it
    /// after [`post`](Self::post) at the latest: call that once for a batch. A driver that polls
    /// sees a return with a tag of its own at once.
    #[inline(always)]
    pub fn give_back(&mut self, back: Return) {
        if self.held() == 0 {
            return;
        }
        let pos = self.given;
        if self.layout.returns == Returns::Entries {
            self.keep_up();
            let tag = back.tag(self.layout.lap(pos) | RETURN);
            // Pairs with the load in `DriverEnd::reap`. The address is left as it is: until this
            // store the slot holds the submission, whole.
            publish(&self.layout.slot(self.mem.words(), pos)[1], tag, Edge::Tag);
        }
        self.given = pos.wrapping_add(1);
    }

    /// Gives back as many entries as there are `backs`, in their order, and no more than are held.
    /// Each is as by [`give_back`](Self::give_back).
    #[inline(always)]
    pub fn give_back_all(&mut self, backs: impl IntoIterator<Item = Return>) {
        let (backs, held) = (backs.into_iter(), self.held());
        if self.layout.returns == Returns::Counted {
            self.given = self.given.wrapping_add(backs.take(held as usize).count() as u64);
            return;
        }
        let mut backs = backs;
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
    /// through a batch. If the device holds entries already, it holds as many after the call: each
    /// return goes to the next position, as by [`give_back`](Self::give_back).
    #[inline(always)]
    pub fn serve_all(
        &mut self,
        max: u32,
        mut serve: impl FnMut(Entry) -> Option<Return>,
    ) -> Result<u32, Corrupt> {
        let (layout, first, held) = (self.layout, self.taken, self.held());
        let wanted = max.min(layout.entries - held);
        let has_tags = layout.returns == Returns::Entries;
        let in_place = has_tags && held == 0;
        if has_tags && count(self.given, self.stored) + wanted > layout.entries {
            self.store_seq();
        }
        let words = self.mem.words();
        let mut pos = first;
        let end = first.wrapping_add(u64::from(wanted));
        // A poller finds nothing most of the time. So the first slot comes alone, and the stretch
        // that follows it is computed when something was there.
        let (mut slots, mut lap) = (layout.slot(words, pos), layout.lap(pos));
        'all: while pos != end {
            for slot in slots.chunks_exact(ENTRY_WORDS) {
                // As in `peek`.
                let tag = observe(&slot[1], Edge::Tag);
                if tag & MARKS != lap {
                    break 'all;
                }
                let Return { len, id, flags } = Return::from_tag(tag);
                let entry = Entry { addr: slot[0].load(Ordering::Relaxed), len, id, flags };
                let Some(back) = serve(entry) else { break 'all };
                if in_place {
                    // As in `give_back`.
                    publish(&slot[1], back.tag(lap | RETURN), Edge::Tag);
                } else if has_tags {
                    let given = pos.wrapping_sub(u64::from(held));
                    let tag = back.tag(layout.lap(given) | RETURN);
                    publish(&layout.slot(words, given)[1], tag, Edge::Tag);
                }
                pos = pos.wrapping_add(1);
                self.taken = pos;
                self.given = pos.wrapping_sub(u64::from(held));
            }
            if pos == end {
                break;
            }
            (slots, lap) = layout.stretch(words, pos, count(end, pos));
        }
        Ok(count(pos, first))
    }

    /// Sees to it that there is room for a return between `stored` and a ring behind it, and says
    /// for how many.
    #[inline(always)]
    fn keep_up(&mut self) -> u32 {
        let behind = count(self.given, self.stored);
        if behind < self.layout.entries {
            return self.layout.entries - behind;
        }
        self.store_seq();
        self.layout.entries
    }

    /// Stores `seq` ahead of the next post, for `resume`. Whether the driver wants a kick, that
    /// post finds out.
    fn store_seq(&mut self) {
        self.tx.store(self.mem.words(), self.given);
        self.stored = self.given;
    }

    /// Posts the returns that were given back since the last post.
    #[inline(always)]
    pub fn post(&mut self) -> Kick<Device> {
        let n = self.given.wrapping_sub(self.tx.posted());
        if n == 0 {
            return Kick::NONE;
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
        }
        self.tx.post(words, n)
    }

    /// Asks for a kick by the entry that follows `after` more entries (0: by the next entry that is
    /// not taken).
    pub fn arm(&mut self, after: u32) -> Armed {
        self.rx.arm(self.mem.words(), self.taken.wrapping_add(u64::from(after)))
    }

    /// Asks for no kick.
    pub fn disarm(&mut self) {
        self.rx.disarm(self.mem.words());
    }
}

/// The position up to which a device that has gone had counted returns. Its `seq` was `seq`, at
/// most one post behind.
fn counted(words: &[Word], layout: Layout, seq: u64) -> u64 {
    let returning = words[RETURNING].load(Ordering::Relaxed);
    let n = returning.wrapping_sub(seq);
    let is_plausible = n != 0 && n <= u64::from(layout.entries);
    if is_plausible && is_published(words, layout, seq) { returning } else { seq }
}

/// The position up to which a device that has gone had published returns. Its `seq` was `seq`, up
/// to a ring behind.
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

    #[test]
    fn layouts_are_whole_lines() {
        let bytes = |entries, returns| Layout::new(entries, returns).unwrap().bytes();
        assert_eq!(bytes(2, Returns::Counted), 448);
        assert_eq!(bytes(256, Returns::Counted), 384 + 4096);
        assert_eq!(bytes(256, Returns::Entries), 384 + 4096);
        for entries in [0, 1, 3, 65536, u32::MAX] {
            assert_eq!(Layout::new(entries, Returns::Counted), Err(BadRing::Entries));
        }
    }

    #[test]
    fn batches_of_every_size_come_and_go() {
        for returns in [Returns::Counted, Returns::Entries] {
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
                        assert_eq!(driver.reap(), Ok(Some(back(100 + i))));
                    }
                    assert_eq!(driver.reap(), Ok(None));
                }
            }
        }
    }

    #[test]
    fn entries_are_served_in_place_up_to_the_one_that_is_refused() {
        for returns in [Returns::Counted, Returns::Entries] {
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
                        assert_eq!(driver.reap(), Ok(Some(back(len))));
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
            (HEADER_RETURNS, 2, BadRing::Returns),
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
        for returns in [Returns::Counted, Returns::Entries] {
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
