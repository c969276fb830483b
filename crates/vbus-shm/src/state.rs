//! State page: the newest value is always current (spec/shared-memory.md, "State page").
//!
//! A header, a signal block, then N slots of the value. The version is the owner's `seq`: writing fills the slot after the current one and
//! posts. The writer is wait-free and never waits for a reader; a reader tries again only if the writer came all the way round while it
//! copied, a bounded number of times. Version 0 of a fresh page is a value of zeros.

use super::memory::{Memory, WORD};
use super::signal::{Armed, BLOCK_BYTES, BadSignal, End, Receiver, Sender};
use super::sync::{Fence, Ordering, fence};

/// First word of the header: "vbusst" and the layout's version.
pub const MAGIC: u64 = 0x0001_7473_7375_6276;
/// Where the signal block is, in bytes.
pub const SIGNAL_OFFSET: usize = 128;
/// Where slot 0 is, in bytes.
pub const SLOTS_OFFSET: usize = SIGNAL_OFFSET + BLOCK_BYTES;
/// Slots unless one asks for more.
pub const DEFAULT_SLOTS: u32 = 4;
/// The largest value, in bytes.
pub const MAX_VALUE: u32 = 1 << 20;
/// How often a reader tries before it gives the writer up as hostile.
pub const READ_TRIES: u32 = 64;

const HEADER_VALUE_BYTES: usize = 1;
const HEADER_SLOTS: usize = 2;
const HEADER_START: usize = 3;

/// What is wrong with a layout or a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadState {
    /// The value's size is 0 or above [`MAX_VALUE`].
    ValueSize,
    /// The number of slots is not a power of two in 4..=64.
    Slots,
    /// The memory is smaller than the layout.
    TooSmall,
    /// The header does not begin with [`MAGIC`].
    Magic,
}

impl From<BadSignal> for BadState {
    fn from(_: BadSignal) -> Self {
        BadState::TooSmall
    }
}

/// The shape of a state page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    value_bytes: u32,
    slots: u32,
}

impl Layout {
    /// A page for values of `value_bytes` (1..=[`MAX_VALUE`]) with `slots` slots (a power of two, 4..=64).
    pub fn new(value_bytes: u32, slots: u32) -> Result<Layout, BadState> {
        if value_bytes == 0 || value_bytes > MAX_VALUE {
            return Err(BadState::ValueSize);
        }
        if !(4..=64).contains(&slots) || !slots.is_power_of_two() {
            return Err(BadState::Slots);
        }
        Ok(Layout { value_bytes, slots })
    }

    /// Bytes of a value.
    pub fn value_bytes(&self) -> usize {
        self.value_bytes as usize
    }

    /// Bytes from slot to slot: the value, rounded up to a cache line.
    pub fn slot_bytes(&self) -> usize {
        (self.value_bytes as usize).next_multiple_of(64)
    }

    /// Bytes of the whole page.
    pub fn bytes(&self) -> usize {
        SLOTS_OFFSET + self.slot_bytes() * self.slots as usize
    }

    /// Words of the whole page.
    pub fn words(&self) -> usize {
        self.bytes() / WORD
    }

    fn slot_word(&self, version: u32) -> usize {
        (SLOTS_OFFSET + self.slot_bytes() * (version % self.slots) as usize) / WORD
    }

    /// Writes the header of a fresh page over zeroed memory, with versions counting from `start`. Done by the driver, which owns the
    /// memory, before it registers the region, whichever end will own the value.
    pub fn format(self, mem: &impl Memory, start: u32) -> Result<(), BadState> {
        let words = mem.words();
        if words.len() < self.words() {
            return Err(BadState::TooSmall);
        }
        words[HEADER_VALUE_BYTES].store(u64::from(self.value_bytes), Ordering::Relaxed);
        words[HEADER_SLOTS].store(u64::from(self.slots), Ordering::Relaxed);
        words[HEADER_START].store(u64::from(start), Ordering::Relaxed);
        for end in [End::Driver, End::Device] {
            // The version is there before the first post.
            let line = if end == End::Driver { 0 } else { 128 };
            words[(SIGNAL_OFFSET + line) / WORD].store(u64::from(start), Ordering::Relaxed);
        }
        words[0].store(MAGIC, Ordering::Release);
        Ok(())
    }

    /// Reads the header once and checks it: (layout, start).
    fn load(mem: &impl Memory) -> Result<(Layout, u32), BadState> {
        let words = mem.words();
        if words.len() * WORD < SLOTS_OFFSET {
            return Err(BadState::TooSmall);
        }
        if words[0].load(Ordering::Acquire) != MAGIC {
            return Err(BadState::Magic);
        }
        let value_bytes =
            u32::try_from(words[HEADER_VALUE_BYTES].load(Ordering::Relaxed)).map_err(|_| BadState::ValueSize)?;
        let slots = u32::try_from(words[HEADER_SLOTS].load(Ordering::Relaxed)).map_err(|_| BadState::Slots)?;
        let start = words[HEADER_START].load(Ordering::Relaxed) as u32;
        let layout = Layout::new(value_bytes, slots)?;
        if words.len() < layout.words() {
            return Err(BadState::TooSmall);
        }
        Ok((layout, start))
    }
}

/// The end that owns the value. There is one.
#[derive(Debug)]
pub struct Writer<M> {
    mem: M,
    layout: Layout,
    tx: Sender<M>,
}

impl<M: Memory + Clone> Writer<M> {
    /// The writer of a formatted page, at the version that the header says it starts from.
    pub fn attach(mem: M, end: End) -> Result<Self, BadState> {
        let (layout, start) = Layout::load(&mem)?;
        let tx = Sender::new(mem.clone(), SIGNAL_OFFSET, end, start)?;
        Ok(Writer { mem, layout, tx })
    }

    /// The page's shape.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The current version.
    pub fn version(&self) -> u32 {
        self.tx.posted()
    }

    /// Makes `value` current. Shorter values are filled up with zeros, longer ones are cut. Returns whether to kick the reader.
    #[must_use = "true asks for a kick"]
    pub fn write(&mut self, value: &[u8]) -> bool {
        let first = self.layout.slot_word(self.tx.posted().wrapping_add(1));
        let count = self.layout.value_bytes().div_ceil(WORD);
        let value = &value[..value.len().min(self.layout.value_bytes())];
        let slot = &self.mem.words()[first..first + count];
        let (whole, rest) = value.split_at(value.len() / WORD * WORD);
        let mut words = slot.iter();
        for (bytes, word) in whole.chunks_exact(WORD).zip(&mut words) {
            let mut b = [0; WORD];
            b.copy_from_slice(bytes);
            // Relaxed: published by the release in post; kept behind the previous version by its fence.
            word.store(u64::from_le_bytes(b), Ordering::Relaxed);
        }
        if let (false, Some(word)) = (rest.is_empty(), words.next()) {
            let mut b = [0; WORD];
            b[..rest.len()].copy_from_slice(rest);
            word.store(u64::from_le_bytes(b), Ordering::Relaxed);
        }
        for word in words {
            word.store(0, Ordering::Relaxed);
        }
        self.tx.post(1)
    }
}

/// A reading end; its value is a copy that was current at some moment during the call.
#[derive(Debug)]
pub struct Reader<M> {
    mem: M,
    layout: Layout,
    rx: Receiver<M>,
}

/// The writer came round again and again while we copied. An honest one does that only if this reader is hardly ever scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun;

impl<M: Memory + Clone> Reader<M> {
    /// A reader at `end` of a page that the other end writes.
    pub fn attach(mem: M, end: End) -> Result<Self, BadState> {
        let (layout, _) = Layout::load(&mem)?;
        let rx = Receiver::new(mem.clone(), SIGNAL_OFFSET, end)?;
        Ok(Reader { mem, layout, rx })
    }

    /// The page's shape.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The current version.
    pub fn version(&self) -> u32 {
        self.rx.seen()
    }

    /// Copies the current value into the front of `out`, which gets at most a value's bytes, and returns its version.
    pub fn read(&self, out: &mut [u8]) -> Result<u32, Overrun> {
        let words = self.mem.words();
        for _ in 0..READ_TRIES {
            let version = self.rx.seen();
            let first = self.layout.slot_word(version);
            let wanted = out.len().min(self.layout.value_bytes());
            for (bytes, word) in out[..wanted].chunks_mut(WORD).zip(&words[first..]) {
                bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes()[..bytes.len()]);
            }
            // Pairs with the fence in Sender::post: if a word was of the next round, its predecessor's `seq` is seen below.
            fence(Fence::Read);
            if self.rx.seen().wrapping_sub(version) < self.layout.slots - 1 {
                return Ok(version);
            }
        }
        Err(Overrun)
    }

    /// Like [`read`](Self::read), but nothing if the version is still `than`.
    pub fn read_if_newer(&self, than: u32, out: &mut [u8]) -> Result<Option<u32>, Overrun> {
        if self.rx.seen() == than {
            return Ok(None);
        }
        self.read(out).map(Some)
    }

    /// Asks for a kick by the update that follows version `than`. [`Armed::Missed`]: it is there already.
    pub fn arm_newer(&mut self, than: u32) -> Armed {
        self.rx.arm(than)
    }

    /// Asks for no kick.
    pub fn disarm(&mut self) {
        self.rx.disarm();
    }
}
