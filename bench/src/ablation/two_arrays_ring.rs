//! The form of ring that was not chosen: two arrays, each written by one end. Otherwise vbus-shm's,
//! line by line.

use super::memory::{low, read_u32};
use super::signal::{self, Armed, BLOCK_BYTES, BadSignal, End, Receiver, Sender};
use super::sync::{Edge, Ordering, Word, observe, publish};
use vbus_shm::memory::{Memory, WORD};

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
const ENTRY_WORDS: usize = ENTRY_BYTES / WORD;

const _: () = {
    assert!(ENTRY_BYTES == 16 && SIGNAL_OFFSET == 128 && ENTRIES_OFFSET == 384);
    assert!(SIGNAL_OFFSET % signal::BLOCK_ALIGN == 0 && ENTRIES_OFFSET % 64 == 0);
    assert!((HEADER_START + 1) * WORD <= SIGNAL_OFFSET);
    assert!(MAX_ENTRIES.is_power_of_two() && MAX_ENTRIES <= i32::MAX as u32);
};

/// Flag of an entry: the next one belongs to it (scatter-gather).
pub const NEXT: u16 = 1 << 0;
/// Flag of an entry, the ring's own: set in every other lap, beginning with the first.
pub const LAP: u16 = 1 << 15;
/// Flag of an entry, the ring's own: the device has written it.
pub const RETURNED: u16 = 1 << 14;

/// The ring's own flags within an entry's second word.
const MARKS: u64 = ((LAP | RETURNED) as u64) << 48;

/// A buffer or a value in flight. `flags` are the user's, except [`NEXT`], which chains, and
/// [`LAP`] and [`RETURNED`], which are the ring's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Address in the driver's memory, or any value.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The submitter's name for it; returned as it came.
    pub id: u16,
    /// See [`NEXT`].
    pub flags: u16,
}

impl Entry {
    /// The second word: the length in bits 0..32, the id in 32..48, the flags in 48..64.
    #[inline(always)]
    fn tag(self, mark: u64) -> u64 {
        let word = u64::from(self.len) | u64::from(self.id) << 32 | u64::from(self.flags) << 48;
        word & !MARKS | mark
    }
}

/// How the device returns entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Returns {
    /// In order and without content: the device's `seq` counts them.
    Counted,
    /// Each with an entry, in any order.
    Entries,
}

/// What is wrong with a layout or a ring's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
pub enum Corrupt {
    /// The driver submitted more than the ring holds.
    Overfull,
    /// The device returned more than it was given.
    Unasked,
}

/// No room: as many entries are in flight as the ring holds.
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

    /// How entries come back.
    pub fn returns(&self) -> Returns {
        self.returns
    }

    /// Bytes of the whole ring: whole cache lines.
    pub fn bytes(&self) -> usize {
        ENTRIES_OFFSET + 2 * (self.entries as usize * ENTRY_BYTES).next_multiple_of(64)
    }

    /// Words of the whole ring.
    pub fn words(&self) -> usize {
        self.bytes() / WORD
    }

    /// The two words of the slot at position `pos`.
    #[inline(always)]
    fn slot<'a>(&self, words: &'a [Word], pos: u32) -> &'a [Word] {
        let at = ENTRIES_OFFSET / WORD + (pos & (self.entries - 1)) as usize * ENTRY_WORDS;
        &words[at..at + ENTRY_WORDS]
    }

    /// The two words of the return slot at position `pos`.
    #[inline(always)]
    fn back<'a>(&self, words: &'a [Word], pos: u32) -> &'a [Word] {
        let at = ENTRIES_OFFSET / WORD
            + ((pos & (self.entries - 1)) + self.entries.next_multiple_of(4)) as usize
                * ENTRY_WORDS;
        &words[at..at + ENTRY_WORDS]
    }

    /// The lap at position `pos`, as a mark. Memory of zeros holds no entry of the first lap.
    #[inline(always)]
    fn lap(&self, pos: u32) -> u64 {
        if pos & self.entries == 0 { u64::from(LAP) << 48 } else { 0 }
    }
}

/// Reads the entry in `slot` if it bears `mark`.
#[inline(always)]
fn load(slot: &[Word], mark: u64) -> Option<Entry> {
    // Pairs with the publication in `store`: the address is visible with its tag.
    let tag = observe(&slot[1], Edge::Tag);
    if tag & MARKS != mark {
        return None;
    }
    let addr = slot[0].load(Ordering::Relaxed);
    let flags = ((tag & !MARKS) >> 48 & 0xffff) as u16;
    Some(Entry { addr, len: low(tag), id: (tag >> 32 & 0xffff) as u16, flags })
}

#[inline(always)]
fn store(slot: &[Word], mark: u64, entry: Entry) {
    slot[0].store(entry.addr, Ordering::Relaxed);
    // Pairs with `load`.
    publish(&slot[1], entry.tag(mark), Edge::Tag);
}

/// The driver's end: submits, and reaps what comes back.
#[derive(Debug)]
pub struct DriverEnd<M> {
    mem: M,
    layout: Layout,
    tx: Sender<M>,
    rx: Receiver<M>,
    submitted: u32,
    reaped: u32,
}

impl<M: Memory + Clone> DriverEnd<M> {
    /// Formats `mem` as a fresh ring whose counts begin at `start` (0, but for tests of the
    /// wrap-around).
    pub fn create(mem: M, layout: Layout, start: u32) -> Result<Self, BadRing> {
        let words = mem.words();
        if words.len() < layout.words() {
            return Err(BadRing::TooSmall);
        }
        for pos in (0..layout.entries).map(|i| start.wrapping_add(i)) {
            // What the lap before would have left.
            let before = layout.lap(pos.wrapping_sub(layout.entries));
            store(layout.slot(words, pos), before, Entry::default());
            store(layout.back(words, pos), before, Entry::default());
        }
        signal::format(&mem, SIGNAL_OFFSET, start)?;
        words[HEADER_ENTRIES].store(u64::from(layout.entries), Ordering::Relaxed);
        words[HEADER_RETURNS]
            .store(u64::from(layout.returns == Returns::Entries), Ordering::Relaxed);
        words[HEADER_START].store(u64::from(start), Ordering::Relaxed);
        words[0].store(MAGIC, Ordering::Release);
        let tx = Sender::new(mem.clone(), SIGNAL_OFFSET, End::Driver, start)?;
        let rx = Receiver::new(mem.clone(), SIGNAL_OFFSET, End::Driver)?;
        Ok(DriverEnd { mem, layout, tx, rx, submitted: start, reaped: start })
    }

    /// The ring's shape.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Entries that can be submitted now. Grows when returns are reaped.
    #[inline]
    pub fn space(&self) -> u32 {
        self.layout.entries - self.submitted.wrapping_sub(self.reaped)
    }

    /// Entries that are with the device, or were returned and not yet reaped.
    #[inline]
    pub fn in_flight(&self) -> u32 {
        self.submitted.wrapping_sub(self.reaped)
    }

    /// Puts an entry into the ring. A device that polls may see it at once; one that sleeps is told
    /// by [`post`](Self::post).
    #[inline]
    pub fn submit(&mut self, entry: Entry) -> Result<(), Full> {
        if self.space() == 0 {
            return Err(Full);
        }
        store(
            self.layout.slot(self.mem.words(), self.submitted),
            self.layout.lap(self.submitted),
            entry,
        );
        self.submitted = self.submitted.wrapping_add(1);
        Ok(())
    }

    /// Puts entries into the ring as long as there is room, and returns how many. For a batch, this
    /// is the faster way.
    #[inline]
    pub fn submit_all(&mut self, entries: impl IntoIterator<Item = Entry>) -> u32 {
        let (words, layout, first) = (self.mem.words(), self.layout, self.submitted);
        let mut pos = first;
        for entry in entries.into_iter().take(self.space() as usize) {
            store(layout.slot(words, pos), layout.lap(pos), entry);
            pos = pos.wrapping_add(1);
        }
        self.submitted = pos;
        pos.wrapping_sub(first)
    }

    /// Posts what was submitted since the last post. Returns whether to kick the device.
    #[inline]
    #[must_use = "true asks for a kick"]
    pub fn post(&mut self) -> bool {
        let n = self.submitted.wrapping_sub(self.tx.posted());
        n != 0 && self.tx.post(n)
    }

    /// The next returned entry, of a ring with [`Returns::Entries`].
    #[inline]
    pub fn reap(&mut self) -> Result<Option<Entry>, Corrupt> {
        let mark = self.layout.lap(self.reaped);
        let Some(entry) = load(self.layout.back(self.mem.words(), self.reaped), mark) else {
            return Ok(None);
        };
        if self.in_flight() == 0 {
            return Err(Corrupt::Unasked);
        }
        self.reaped = self.reaped.wrapping_add(1);
        Ok(Some(entry))
    }

    /// Hands up to `max` returned entries to `each`, of a ring with [`Returns::Entries`], and
    /// returns how many. For a batch, this is the faster way.
    #[inline]
    pub fn reap_all(&mut self, max: u32, mut each: impl FnMut(Entry)) -> Result<u32, Corrupt> {
        let (words, layout, first) = (self.mem.words(), self.layout, self.reaped);
        let mut pos = first;
        let mut outcome = Ok(());
        while pos.wrapping_sub(first) < max {
            let Some(entry) = load(layout.back(words, pos), layout.lap(pos)) else { break };
            if pos == self.submitted {
                outcome = Err(Corrupt::Unasked);
                break;
            }
            pos = pos.wrapping_add(1);
            each(entry);
        }
        self.reaped = pos;
        outcome.map(|()| pos.wrapping_sub(first))
    }

    /// How many entries came back since the last call, oldest first, of a ring with
    /// [`Returns::Counted`].
    #[inline]
    pub fn reap_count(&mut self) -> Result<u32, Corrupt> {
        let n = self.rx.seen().wrapping_sub(self.reaped);
        if n > self.in_flight() {
            return Err(Corrupt::Unasked);
        }
        self.reaped = self.reaped.wrapping_add(n);
        Ok(n)
    }

    /// Asks for a kick after `after` more returns than those reaped (0: by the very next).
    pub fn arm(&mut self, after: u32) -> Armed {
        self.rx.arm(self.reaped.wrapping_add(after))
    }

    /// Asks for no kick.
    pub fn disarm(&mut self) {
        self.rx.disarm();
    }
}

/// The device's end: takes entries, and gives them back.
#[derive(Debug)]
pub struct DeviceEnd<M> {
    mem: M,
    layout: Layout,
    tx: Sender<M>,
    rx: Receiver<M>,
    taken: u32,
    given: u32,
}

impl<M: Memory + Clone> DeviceEnd<M> {
    /// Attaches to a ring that the driver has formatted. The header is read once and checked.
    pub fn attach(mem: M) -> Result<Self, BadRing> {
        let words = mem.words();
        if words.len() * WORD < ENTRIES_OFFSET {
            return Err(BadRing::TooSmall);
        }
        if words[0].load(Ordering::Acquire) != MAGIC {
            return Err(BadRing::Magic);
        }
        let entries = read_u32(&words[HEADER_ENTRIES]).ok_or(BadRing::Entries)?;
        let returns = match words[HEADER_RETURNS].load(Ordering::Relaxed) {
            0 => Returns::Counted,
            1 => Returns::Entries,
            _ => return Err(BadRing::Returns),
        };
        let start = low(words[HEADER_START].load(Ordering::Relaxed));
        let layout = Layout::new(entries, returns)?;
        if words.len() < layout.words() {
            return Err(BadRing::TooSmall);
        }
        let tx = Sender::new(mem.clone(), SIGNAL_OFFSET, End::Device, start)?;
        let rx = Receiver::new(mem.clone(), SIGNAL_OFFSET, End::Device)?;
        Ok(DeviceEnd { mem, layout, tx, rx, taken: start, given: start })
    }

    /// The ring's shape.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Entries taken and not yet given back.
    #[inline]
    pub fn held(&self) -> u32 {
        self.taken.wrapping_sub(self.given)
    }

    /// The next submitted entry. Its content is the peer's word: check it before use.
    #[inline]
    pub fn take(&mut self) -> Result<Option<Entry>, Corrupt> {
        let mark = self.layout.lap(self.taken);
        let Some(entry) = load(self.layout.slot(self.mem.words(), self.taken), mark) else {
            return Ok(None);
        };
        if self.held() == self.layout.entries {
            return Err(Corrupt::Overfull);
        }
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(entry))
    }

    /// Gives one entry back. In a ring with [`Returns::Counted`] its content is not passed on, and
    /// it stands for the oldest one held. Without an entry held, nothing happens.
    #[inline]
    pub fn give_back(&mut self, entry: Entry) {
        if self.held() == 0 {
            return;
        }
        if self.layout.returns == Returns::Entries {
            let mark = self.layout.lap(self.given);
            store(self.layout.back(self.mem.words(), self.given), mark, entry);
        }
        self.given = self.given.wrapping_add(1);
    }

    /// Takes up to `max` entries and gives each back at once as `each` makes it; returns how many.
    /// For a batch, this is the faster way. Entries that are held meanwhile stay held; where
    /// returns are only counted, these stand for them.
    #[inline]
    pub fn serve(
        &mut self,
        max: u32,
        mut each: impl FnMut(Entry) -> Entry,
    ) -> Result<u32, Corrupt> {
        let (words, layout, first) = (self.mem.words(), self.layout, self.taken);
        let held = self.held();
        let mut pos = first;
        let mut outcome = Ok(());
        while pos.wrapping_sub(first) < max {
            let Some(entry) = load(layout.slot(words, pos), layout.lap(pos)) else { break };
            if held == layout.entries {
                outcome = Err(Corrupt::Overfull);
                break;
            }
            let back = each(entry);
            if layout.returns == Returns::Entries {
                let given = pos.wrapping_sub(held);
                store(layout.back(words, given), layout.lap(given), back);
            }
            pos = pos.wrapping_add(1);
        }
        self.taken = pos;
        self.given = pos.wrapping_sub(held);
        outcome.map(|()| pos.wrapping_sub(first))
    }

    /// Posts what was given back since the last post. Returns whether to kick the driver.
    #[inline]
    #[must_use = "true asks for a kick"]
    pub fn post(&mut self) -> bool {
        let n = self.given.wrapping_sub(self.tx.posted());
        n != 0 && self.tx.post(n)
    }

    /// Asks for a kick after `after` more entries than those taken (0: by the very next).
    pub fn arm(&mut self, after: u32) -> Armed {
        self.rx.arm(self.taken.wrapping_add(after))
    }

    /// Asks for no kick.
    pub fn disarm(&mut self) {
        self.rx.disarm();
    }
}
