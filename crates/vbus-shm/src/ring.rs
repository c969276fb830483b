//! Ring: every value is kept, in order (spec/shared-memory.md, "Ring").
//!
//! Two arrays with one writer each: the driver submits entries in one, the device returns them in the other (or, where a return carries
//! nothing, only counts them in its `seq`). An entry carries a lap tag, so that a poller touches nothing but the entry's own line. The
//! number of entries in flight never exceeds the ring's size, which is all the flow control there is.

use super::memory::{Memory, WORD};
use super::signal::{Armed, BLOCK_BYTES, BadSignal, End, Receiver, Sender};
use super::sync::Ordering;

/// First word of the header: "vbusri" and the layout's version.
pub const MAGIC: u64 = 0x0001_6972_7375_6276;
/// Where the signal block is, in bytes.
pub const SIGNAL_OFFSET: usize = 128;
/// Where the array of submissions is, in bytes.
pub const SUBMIT_OFFSET: usize = SIGNAL_OFFSET + BLOCK_BYTES;
/// Bytes of an entry.
pub const ENTRY_BYTES: usize = 16;
/// The largest ring, in entries.
pub const MAX_ENTRIES: u32 = 32768;

const HEADER_ENTRIES: usize = 1;
const HEADER_RETURNS: usize = 2;
const HEADER_START: usize = 3;
const ENTRY_WORDS: usize = ENTRY_BYTES / WORD;

/// Flag of an entry: the next one belongs to it (scatter-gather).
pub const NEXT: u16 = 1 << 0;
/// Flag bits that are the ring's own: the lap tag.
pub const LAP: u16 = 1 << 15;

/// A buffer or a value in flight. `flags` are the user's, except [`NEXT`], which chains, and [`LAP`], which is the ring's.
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
    fn tag(self, lap: bool) -> u64 {
        let flags = (self.flags & !LAP) | if lap { LAP } else { 0 };
        u64::from(self.len) | u64::from(self.id) << 32 | u64::from(flags) << 48
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

    /// Bytes of the whole ring.
    pub fn bytes(&self) -> usize {
        let arrays = if self.returns == Returns::Entries { 2 } else { 1 };
        (SUBMIT_OFFSET + arrays * self.entries as usize * ENTRY_BYTES).next_multiple_of(64)
    }

    /// Words of the whole ring.
    pub fn words(&self) -> usize {
        self.bytes() / WORD
    }

    fn submit_word(&self, pos: u32) -> usize {
        SUBMIT_OFFSET / WORD + (pos & (self.entries - 1)) as usize * ENTRY_WORDS
    }

    fn return_word(&self, pos: u32) -> usize {
        self.submit_word(pos) + self.entries as usize * ENTRY_WORDS
    }

    /// The lap tag of position `pos`. Memory of zeros holds no entry of the first lap.
    fn lap(&self, pos: u32) -> bool {
        pos & self.entries == 0
    }
}

/// Reads the entry at word `at` if it is of lap `lap`.
#[inline(always)]
fn load(words: &[super::sync::Word], at: usize, lap: bool) -> Option<Entry> {
    // Pairs with the release in `store`: the address is visible with its tag.
    let tag = words[at + 1].load(Ordering::Acquire);
    let flags = (tag >> 48) as u16;
    if (flags & LAP != 0) != lap {
        return None;
    }
    let addr = words[at].load(Ordering::Relaxed);
    Some(Entry { addr, len: tag as u32, id: (tag >> 32) as u16, flags: flags & !LAP })
}

#[inline(always)]
fn store(words: &[super::sync::Word], at: usize, lap: bool, entry: Entry) {
    words[at].store(entry.addr, Ordering::Relaxed);
    // Pairs with the acquire in `load`.
    words[at + 1].store(entry.tag(lap), Ordering::Release);
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
    /// Formats `mem` as a fresh ring whose counts begin at `start` (0, but for tests of the wrap-around).
    pub fn create(mem: M, layout: Layout, start: u32) -> Result<Self, BadRing> {
        let words = mem.words();
        if words.len() < layout.words() {
            return Err(BadRing::TooSmall);
        }
        for pos in (0..layout.entries).map(|i| start.wrapping_add(i)) {
            let none = Entry::default();
            store(words, layout.submit_word(pos), !layout.lap(pos), none);
            if layout.returns == Returns::Entries {
                store(words, layout.return_word(pos), !layout.lap(pos), none);
            }
        }
        for word in &words[SIGNAL_OFFSET / WORD..SUBMIT_OFFSET / WORD] {
            word.store(0, Ordering::Relaxed);
        }
        words[SIGNAL_OFFSET / WORD].store(u64::from(start), Ordering::Relaxed);
        words[(SIGNAL_OFFSET + 128) / WORD].store(u64::from(start), Ordering::Relaxed);
        words[HEADER_ENTRIES].store(u64::from(layout.entries), Ordering::Relaxed);
        words[HEADER_RETURNS].store(u64::from(layout.returns == Returns::Entries), Ordering::Relaxed);
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

    /// Puts an entry into the ring. A device that polls may see it at once; one that sleeps is told by [`post`](Self::post).
    #[inline]
    pub fn submit(&mut self, entry: Entry) -> Result<(), Full> {
        if self.space() == 0 {
            return Err(Full);
        }
        let at = self.layout.submit_word(self.submitted);
        store(self.mem.words(), at, self.layout.lap(self.submitted), entry);
        self.submitted = self.submitted.wrapping_add(1);
        Ok(())
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
        let at = self.layout.return_word(self.reaped);
        if self.layout.returns == Returns::Counted {
            return Ok(None);
        }
        let Some(entry) = load(self.mem.words(), at, self.layout.lap(self.reaped)) else { return Ok(None) };
        if self.in_flight() == 0 {
            return Err(Corrupt::Unasked);
        }
        self.reaped = self.reaped.wrapping_add(1);
        Ok(Some(entry))
    }

    /// How many entries came back since the last call, oldest first, of a ring with [`Returns::Counted`].
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
        if words.len() * WORD < SUBMIT_OFFSET {
            return Err(BadRing::TooSmall);
        }
        if words[0].load(Ordering::Acquire) != MAGIC {
            return Err(BadRing::Magic);
        }
        let entries = u32::try_from(words[HEADER_ENTRIES].load(Ordering::Relaxed)).map_err(|_| BadRing::Entries)?;
        let returns = match words[HEADER_RETURNS].load(Ordering::Relaxed) {
            0 => Returns::Counted,
            1 => Returns::Entries,
            _ => return Err(BadRing::Returns),
        };
        let start = words[HEADER_START].load(Ordering::Relaxed) as u32;
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
        let at = self.layout.submit_word(self.taken);
        let Some(entry) = load(self.mem.words(), at, self.layout.lap(self.taken)) else { return Ok(None) };
        if self.held() == self.layout.entries {
            return Err(Corrupt::Overfull);
        }
        self.taken = self.taken.wrapping_add(1);
        Ok(Some(entry))
    }

    /// Gives one entry back. In a ring with [`Returns::Counted`] its content is not passed on, and it stands for the oldest one held.
    /// Without an entry held, nothing happens.
    #[inline]
    pub fn give_back(&mut self, entry: Entry) {
        if self.held() == 0 {
            return;
        }
        if self.layout.returns == Returns::Entries {
            store(self.mem.words(), self.layout.return_word(self.given), self.layout.lap(self.given), entry);
        }
        self.given = self.given.wrapping_add(1);
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
