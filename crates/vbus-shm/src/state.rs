// SPDX-License-Identifier: Apache-2.0 OR MIT
//! State page: the newest value is always current (spec/shared-memory.md, "State page").
//!
//! A page is a header, a signal block, and N slots of the value. The version is the owner's `seq`.
//! The owner writes the slot after the current one, and then posts. It never waits for a reader. A
//! reader tries again only if the owner wrote all slots while the reader copied. It tries a bounded
//! number of times. The first value of a fresh page is all zeros.

use super::copy;
use super::memory::{Memory, WORD, low, read_u32};
use super::signal::end::End;
use super::signal::{self, Armed, BLOCK_BYTES, BadSignal, Kick, Rx, Tx};
use super::sync::{Fence, Ordering, Word, fence};

/// First word of the header: "vbusst" and the layout's version.
pub const MAGIC: u64 = 0x0001_7473_7375_6276;
/// Where the signal block is, in bytes.
pub const SIGNAL_OFFSET: usize = 128;
/// Where slot 0 is, in bytes.
pub const SLOTS_OFFSET: usize = SIGNAL_OFFSET + BLOCK_BYTES;
/// The number of slots as a rule.
pub const DEFAULT_SLOTS: u32 = 4;
/// The largest value, in bytes.
pub const MAX_VALUE: u32 = 1 << 20;
/// How often a reader tries before it gives up a hostile owner.
pub const READ_TRIES: u32 = 64;
/// Bytes that a reader may copy in all its tries, if this allows more tries than [`READ_TRIES`]. An
/// owner writes small values faster than a cache line comes from the other core. Many reads of such
/// values need many tries.
const READ_BYTES: usize = 64 << 10;

const SIGNAL: usize = SIGNAL_OFFSET / WORD;
const HEADER_VALUE_BYTES: usize = 1;
const HEADER_SLOTS: usize = 2;

const _: () = {
    assert!(SIGNAL_OFFSET == 128 && SLOTS_OFFSET == 384);
    assert!(SIGNAL_OFFSET % signal::BLOCK_ALIGN == 0 && SLOTS_OFFSET % 64 == 0);
    assert!((HEADER_SLOTS + 1) * WORD <= SIGNAL_OFFSET);
};

/// What is wrong with a layout or a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BadStatePage {
    /// The value's size is 0 or above [`MAX_VALUE`].
    ValueSize,
    /// The number of slots is not a power of two in 4..=64.
    Slots,
    /// The memory is smaller than the layout.
    TooSmall,
    /// The header does not begin with [`MAGIC`].
    Magic,
}

impl From<BadSignal> for BadStatePage {
    fn from(_: BadSignal) -> Self {
        BadStatePage::TooSmall
    }
}

/// The shape of a state page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    value_bytes: u32,
    slots: u32,
    slot_words: u32,
}

impl Layout {
    /// A page for values of `value_bytes` (1..=[`MAX_VALUE`]) with `slots` slots (a power of two,
    /// 4..=64).
    pub fn new(value_bytes: u32, slots: u32) -> Result<Layout, BadStatePage> {
        if value_bytes == 0 || value_bytes > MAX_VALUE {
            return Err(BadStatePage::ValueSize);
        }
        if !(4..=64).contains(&slots) || !slots.is_power_of_two() {
            return Err(BadStatePage::Slots);
        }
        Ok(Layout { value_bytes, slots, slot_words: value_bytes.next_multiple_of(64) / 8 })
    }

    /// Bytes of a value.
    pub fn value_bytes(&self) -> usize {
        self.value_bytes as usize
    }

    /// Bytes from slot to slot: the value, rounded up to a cache line.
    pub fn slot_bytes(&self) -> usize {
        self.slot_words as usize * WORD
    }

    /// Bytes of the whole page.
    pub fn bytes(&self) -> usize {
        SLOTS_OFFSET + self.slot_bytes() * self.slots as usize
    }

    /// Words of the whole page.
    pub fn words(&self) -> usize {
        self.bytes() / WORD
    }

    /// The words of the value in the slot of `version`.
    #[inline(always)]
    fn slot<'a>(&self, words: &'a [Word], version: u64) -> &'a [Word] {
        let first = self.slot_at(version);
        &words[first..first + self.value_bytes().div_ceil(WORD)]
    }

    /// The first word of the slot of `version`.
    #[inline(always)]
    fn slot_at(&self, version: u64) -> usize {
        let slot = (low(version) & (self.slots - 1)) as usize;
        SLOTS_OFFSET / WORD + slot * self.slot_words as usize
    }

    /// Whether the slot of a version is still untouched when `passed` versions have followed it:
    /// the owner may be writing one more.
    #[inline(always)]
    fn is_kept(&self, passed: u64) -> bool {
        passed < u64::from(self.slots - 1)
    }

    /// Writes the header of a fresh page over zeroed memory. Versions count from `start`. The
    /// driver does this before it registers the region, because the memory belongs to it. Either
    /// end may be the owner of the value.
    pub fn format(self, mem: &impl Memory, start: u64) -> Result<(), BadStatePage> {
        let words = mem.words();
        if words.len() < self.words() {
            return Err(BadStatePage::TooSmall);
        }
        words[HEADER_VALUE_BYTES].store(u64::from(self.value_bytes), Ordering::Relaxed);
        words[HEADER_SLOTS].store(u64::from(self.slots), Ordering::Relaxed);
        // This also makes `start` the current version before the first post.
        signal::format(mem, SIGNAL_OFFSET, start)?;
        words[0].store(MAGIC, Ordering::Release);
        Ok(())
    }

    /// Reads the header once and checks it.
    fn load(mem: &impl Memory) -> Result<Layout, BadStatePage> {
        let words = mem.words();
        if words.len() * WORD < SLOTS_OFFSET {
            return Err(BadStatePage::TooSmall);
        }
        if words[0].load(Ordering::Acquire) != MAGIC {
            return Err(BadStatePage::Magic);
        }
        let value_bytes = read_u32(&words[HEADER_VALUE_BYTES]).ok_or(BadStatePage::ValueSize)?;
        let slots = read_u32(&words[HEADER_SLOTS]).ok_or(BadStatePage::Slots)?;
        let layout = Layout::new(value_bytes, slots)?;
        if words.len() < layout.words() {
            return Err(BadStatePage::TooSmall);
        }
        Ok(layout)
    }
}

/// The owner of the value, at end `E`. There is one.
#[derive(Debug)]
pub struct Writer<M, E> {
    mem: M,
    layout: Layout,
    tx: Tx<E>,
}

impl<M: Memory, E: End> Writer<M, E> {
    /// The writer of a formatted page. It goes on from the page's current version.
    pub fn attach(mem: M, end: E) -> Result<Self, BadStatePage> {
        let _ = end;
        let layout = Layout::load(&mem)?;
        let version = mem.words()[SIGNAL + E::SEQ].load(Ordering::Relaxed);
        Ok(Writer { mem, layout, tx: Tx::new(SIGNAL, version) })
    }

    /// A writer in place of one that ended at any moment. It goes on from the page's current
    /// version. No reader has seen a value that the other wrote and did not post. The other may
    /// have ended between a post and its kick, so the kick is wanted if the reader is armed for any
    /// version so far.
    pub fn resume(mem: M, end: E) -> Result<(Self, Kick<E>), BadStatePage> {
        let _ = end;
        let layout = Layout::load(&mem)?;
        let version = mem.words()[SIGNAL + E::SEQ].load(Ordering::Relaxed);
        let (tx, kick) = Tx::resume(mem.words(), SIGNAL, version);
        tx.stored(&mem);
        Ok((Writer { mem, layout, tx }, kick))
    }

    /// The page's shape.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The current version.
    pub fn version(&self) -> u64 {
        self.tx.posted()
    }

    /// Makes `value` current. A shorter value is filled up with zeros, and a longer one is cut.
    #[inline]
    pub fn write(&mut self, value: &[u8]) -> Kick<E> {
        let words = self.mem.words();
        let slot = self.layout.slot(words, self.tx.posted().wrapping_add(1));
        // The release in `post` publishes the value. The fence in the previous `post` keeps the
        // value behind the previous version.
        if value.len() <= self.layout.value_bytes() {
            copy::store(slot, value);
        } else {
            copy::store(slot, &value[..self.layout.value_bytes()]);
        }
        let kick = self.tx.post(words, 1);
        if self.mem.is_logged() {
            let slot = self.layout.slot_at(self.tx.posted());
            self.mem.wrote(slot, self.layout.value_bytes().div_ceil(WORD));
            self.tx.stored(&self.mem);
        }
        kick
    }
}

/// A reader at end `E`. It copies a value that was current at some moment during the call.
#[derive(Debug)]
pub struct Reader<M, E> {
    mem: M,
    layout: Layout,
    rx: Rx<E>,
}

/// The owner wrote all slots during each try of the reader. An honest owner does this only if the
/// system hardly ever runs the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun;

impl<M: Memory, E: End> Reader<M, E> {
    /// A reader at `end` of a page that the other end writes.
    pub fn attach(mem: M, end: E) -> Result<Self, BadStatePage> {
        let _ = end;
        let layout = Layout::load(&mem)?;
        Ok(Reader { mem, layout, rx: Rx::new(SIGNAL) })
    }

    /// The page's shape.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The current version.
    pub fn version(&self) -> u64 {
        self.rx.seen(self.mem.words())
    }

    /// Copies the current value to the front of `out` and returns its version. Copies at most the
    /// bytes of a value.
    #[inline]
    pub fn read(&self, out: &mut [u8]) -> Result<u64, Overrun> {
        if out.len() <= self.layout.value_bytes() {
            // The first try succeeds as a rule.
            if let Some(version) = self.try_read(0, out) {
                return Ok(version);
            }
        }
        self.read_again(0, out)
    }

    /// Copies a part of the current value, from its word `first` on, to the front of `out`, and
    /// returns the value's version. Copies at most what the value has there. For a large value of
    /// which a reader wants little.
    ///
    /// # Errors
    /// [`Overrun`], as of [`read`](Self::read).
    pub fn read_from(&self, first: usize, out: &mut [u8]) -> Result<u64, Overrun> {
        let has = self.layout.value_bytes().saturating_sub(first.saturating_mul(WORD));
        let wanted = out.len().min(has);
        let out = &mut out[..wanted];
        match self.try_read(first, out) {
            Some(version) => Ok(version),
            None => self.read_again(first, out),
        }
    }

    /// As [`read`](Self::read), but tries once only. For a reader that has other work and comes
    /// back: an owner that overruns it costs it one copy each time.
    ///
    /// # Errors
    /// [`Overrun`]: the owner wrote all slots while this end copied.
    pub fn read_once(&self, out: &mut [u8]) -> Result<u64, Overrun> {
        let wanted = out.len().min(self.layout.value_bytes());
        self.try_read(0, &mut out[..wanted]).ok_or(Overrun)
    }

    #[cold]
    fn read_again(&self, first: usize, out: &mut [u8]) -> Result<u64, Overrun> {
        let wanted = out.len().min(self.layout.value_bytes());
        (1..self.tries()).find_map(|_| self.try_read(first, &mut out[..wanted])).ok_or(Overrun)
    }

    /// How often a read tries. Both the tries and the bytes that they copy are bounded.
    fn tries(&self) -> u32 {
        let tries = READ_BYTES / self.layout.value_bytes().max(WORD);
        READ_TRIES.max(u32::try_from(tries).unwrap_or(READ_TRIES)).min(1024)
    }

    #[inline(always)]
    fn try_read(&self, first: usize, out: &mut [u8]) -> Option<u64> {
        let words = self.mem.words();
        let version = self.rx.seen(words);
        copy::load(self.layout.slot(words, version).get(first..).unwrap_or_default(), out);
        // Pairs with the fence in Tx::post. If the copy has a word of a later value in this slot,
        // the load below sees the `seq` of the version before that value.
        fence(Fence::Read);
        let passed = self.rx.seen(words).wrapping_sub(version);
        self.layout.is_kept(passed).then_some(version)
    }

    /// Like [`read`](Self::read), but returns `None` if the version is still `than`.
    pub fn read_if_newer(&self, than: u64, out: &mut [u8]) -> Result<Option<u64>, Overrun> {
        if self.version() == than {
            return Ok(None);
        }
        self.read(out).map(Some)
    }

    /// Asks for a kick by the version that follows `than`. [`Armed::Missed`]: it is there already.
    pub fn arm_newer(&mut self, than: u64) -> Armed {
        let armed = self.rx.arm(self.mem.words(), than);
        self.rx.stored(&self.mem);
        armed
    }

    /// Asks for no kick.
    pub fn disarm(&mut self) {
        self.rx.disarm(self.mem.words());
        self.rx.stored(&self.mem);
    }
}

/// A reader that keeps its own copy of the newest value, of N bytes. It copies from the page only
/// if the page has a newer value. Otherwise a read costs one load of the version. Use it for a
/// value that you read more often than it changes.
#[derive(Debug)]
pub struct Latest<M, E, const N: usize> {
    reader: Reader<M, E>,
    value: [u8; N],
    version: u64,
}

impl<M: Memory, E: End, const N: usize> Latest<M, E, N> {
    /// Reads the page for the first time. The value is cut to N bytes, or filled up with zeros.
    pub fn new(reader: Reader<M, E>) -> Result<Self, Overrun> {
        let mut value = [0; N];
        let version = reader.read(&mut value)?;
        Ok(Latest { reader, value, version })
    }

    /// The newest value. After an error the reader keeps the value before.
    #[inline]
    pub fn read(&mut self) -> Result<&[u8; N], Overrun> {
        if self.reader.version() != self.version {
            self.refresh()?;
        }
        Ok(&self.value)
    }

    #[inline(never)]
    fn refresh(&mut self) -> Result<(), Overrun> {
        let mut value = [0; N];
        self.version = self.reader.read(&mut value)?;
        self.value = value;
        Ok(())
    }

    /// The version of the value that was read last.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The reader, to arm it.
    pub fn reader(&mut self) -> &mut Reader<M, E> {
        &mut self.reader
    }
}

#[cfg(test)]
mod tests {
    use super::super::signal::end::{Device, Driver};
    use super::*;

    fn memory(layout: Layout, start: u64) -> Vec<Word> {
        let memory: Vec<Word> = (0..layout.words()).map(|_| Word::new(0)).collect();
        layout.format(&&memory[..], start).unwrap();
        memory
    }

    /// All layouts that there are, by numbers that do not wrap around.
    #[test]
    fn slots_of_all_layouts_lie_within_the_page_and_apart() {
        assert!(Layout::new(0, 4).is_err() && Layout::new(MAX_VALUE + 1, 4).is_err());
        for slots in 0..=65 {
            let Ok(first) = Layout::new(1, slots) else {
                assert!(![4, 8, 16, 32, 64].contains(&slots), "{slots}");
                continue;
            };
            assert!(first.slots == slots && slots.is_power_of_two());
            for bytes in 1..=MAX_VALUE {
                let layout = Layout::new(bytes, slots).unwrap();
                let stride = u128::from(bytes).div_ceil(64) * 64;
                assert_eq!(layout.slot_bytes() as u128, stride);
                let all = SLOTS_OFFSET as u128 + stride * u128::from(slots);
                assert_eq!((layout.bytes() as u128, layout.words() as u128), (all, all / 8));
                let last = u64::from(slots - 1);
                let end = layout.slot_at(last) + layout.value_bytes().div_ceil(WORD);
                assert!(layout.slot_at(0) * WORD == SLOTS_OFFSET && end <= layout.words());
                let apart = layout.slot_at(last) - layout.slot_at(last - 1);
                assert_eq!((apart * WORD) as u128, stride);
                assert!(layout.value_bytes() <= layout.slot_bytes());
            }
        }
    }

    /// All pages, all versions around what could wrap around, and all numbers of versions that an
    /// owner may have written meanwhile: a copy counts exactly if its slot was not written.
    #[test]
    fn a_value_counts_as_long_as_its_slot_is_untouched() {
        let around = |middle: u64| (0..=256).map(move |n| middle.wrapping_sub(128).wrapping_add(n));
        for slots in [4, 8, 16, 32, 64] {
            let layout = Layout::new(72, slots).unwrap();
            for version in [0, 1 << 31, 1 << 32, 1 << 63].into_iter().flat_map(around) {
                let mut touched = false;
                for passed in 0..=2 * u64::from(slots) {
                    // The owner has written `passed` versions, and may be writing the next one.
                    let written = version.wrapping_add(passed).wrapping_add(1);
                    touched |= layout.slot_at(written) == layout.slot_at(version);
                    assert_eq!(layout.is_kept(passed), !touched, "{slots} {version:#x} {passed}");
                }
            }
        }
    }

    #[test]
    fn latest_keeps_the_newest_value() {
        let layout = Layout::new(16, 4).unwrap();
        let memory = memory(layout, u64::MAX);
        let mut writer = Writer::attach(&memory[..], Device).unwrap();
        let mut latest =
            Latest::<_, _, 16>::new(Reader::attach(&memory[..], Driver).unwrap()).unwrap();
        assert_eq!(latest.read(), Ok(&[0; 16]));
        assert_eq!(latest.version(), u64::MAX);
        for n in 0..9 {
            let _ = writer.write(&[n; 16]);
            for _ in 0..2 {
                assert_eq!(latest.read(), Ok(&[n; 16]));
                assert_eq!(latest.version(), u64::from(n));
            }
        }
        let mut short =
            Latest::<_, _, 4>::new(Reader::attach(&memory[..], Driver).unwrap()).unwrap();
        let mut long =
            Latest::<_, _, 20>::new(Reader::attach(&memory[..], Driver).unwrap()).unwrap();
        assert_eq!(short.read(), Ok(&[8; 4]));
        assert_eq!(long.read().map(|v| (v[15], v[16])), Ok((8, 0)));
    }

    #[test]
    fn a_part_of_a_value_is_read_up_to_its_end() {
        let memory = memory(Layout::new(21, 4).unwrap(), 0);
        let mut writer = Writer::attach(&memory[..], Device).unwrap();
        let value: Vec<u8> = (1..=21).collect();
        let _ = writer.write(&value);
        let reader = Reader::attach(&memory[..], Driver).unwrap();
        for first in [0, 1, 2, 3, usize::MAX] {
            let mut out = [99; 16];
            assert_eq!(reader.read_from(first, &mut out), Ok(1));
            let part = value.get(first.saturating_mul(WORD)..).unwrap_or_default();
            let part = &part[..part.len().min(16)];
            assert_eq!(
                (&out[..part.len()], &out[part.len()..]),
                (part, &vec![99; 16 - part.len()][..])
            );
        }
    }

    #[test]
    fn layouts_are_whole_lines() {
        assert_eq!(Layout::new(1, 4).unwrap().bytes(), 384 + 4 * 64);
        assert_eq!(Layout::new(65, 8).unwrap().bytes(), 384 + 8 * 128);
        assert_eq!(Layout::new(0, 4), Err(BadStatePage::ValueSize));
        assert_eq!(Layout::new(MAX_VALUE + 1, 4), Err(BadStatePage::ValueSize));
        for slots in [0, 1, 2, 3, 5, 128, u32::MAX] {
            assert_eq!(Layout::new(8, slots), Err(BadStatePage::Slots));
        }
    }

    #[test]
    fn the_last_value_of_any_size_is_current() {
        for start in [0, u64::MAX - 2] {
            for size in [1_u32, 7, 8, 9, 63, 64, 65, 1000] {
                let memory = memory(Layout::new(size, 4).unwrap(), start);
                let mut writer = Writer::attach(&memory[..], Device).unwrap();
                let reader = Reader::attach(&memory[..], Driver).unwrap();
                let size = size as usize;
                let mut out = vec![1; size + 3];
                assert_eq!(reader.read(&mut out), Ok(start));
                assert_eq!((&out[..size], &out[size..]), (&vec![0; size][..], &[1; 3][..]));
                for n in 1..=9_u8 {
                    let _ = writer.write(&vec![n; size]);
                    assert_eq!(reader.read(&mut out), Ok(start.wrapping_add(u64::from(n))));
                    assert_eq!((&out[..size], &out[size..]), (&vec![n; size][..], &[1; 3][..]));
                }
            }
        }
    }

    #[test]
    fn short_values_are_filled_up_and_long_values_are_cut() {
        let memory = memory(Layout::new(12, 4).unwrap(), 0);
        let mut writer = Writer::attach(&memory[..], Driver).unwrap();
        let reader = Reader::attach(&memory[..], Device).unwrap();
        let mut out = [9; 12];
        for _ in 0..4 {
            let _ = writer.write(&[7; 20]);
        }
        assert_eq!((reader.read(&mut out), out), (Ok(4), [7; 12]));
        let _ = writer.write(&[5; 9]);
        assert_eq!((reader.read(&mut out), out), (Ok(5), [5, 5, 5, 5, 5, 5, 5, 5, 5, 0, 0, 0]));
        let _ = writer.write(&[]);
        assert_eq!((reader.read(&mut out), out), (Ok(6), [0; 12]));
        let _ = writer.write(&[1, 2, 3]);
        let mut short = [0; 2];
        assert_eq!((reader.read(&mut short), short), (Ok(7), [1, 2]));
    }

    #[test]
    fn a_new_writer_goes_on_from_the_current_version() {
        let memory = memory(Layout::new(8, 4).unwrap(), 0);
        let _ = Writer::attach(&memory[..], Driver).unwrap().write(&[1; 8]);
        let mut writer = Writer::attach(&memory[..], Driver).unwrap();
        assert_eq!(writer.version(), 1);
        let _ = writer.write(&[2; 8]);
        let mut out = [0; 8];
        assert_eq!(Reader::attach(&memory[..], Device).unwrap().read(&mut out), Ok(2));
    }

    #[test]
    fn a_reader_waits_for_a_newer_version() {
        let memory = memory(Layout::new(8, 4).unwrap(), u64::MAX);
        let mut writer = Writer::attach(&memory[..], Driver).unwrap();
        let mut reader = Reader::attach(&memory[..], Device).unwrap();
        let mut out = [0; 8];
        assert_eq!(reader.read_if_newer(u64::MAX, &mut out), Ok(None));
        assert_eq!(reader.arm_newer(u64::MAX), Armed::Waiting);
        assert!(writer.write(&[3; 8]).is_wanted());
        assert_eq!(reader.read_if_newer(u64::MAX, &mut out), Ok(Some(0)));
        assert_eq!(reader.arm_newer(u64::MAX), Armed::Missed);
        reader.disarm();
        assert!(!writer.write(&[4; 8]).is_wanted());
    }

    #[test]
    fn a_reader_at_any_distance_behind_has_missed_the_update() {
        for behind in [(1 << 31) + 5, (1 << 32) + 1, 3 << 32] {
            let memory = memory(Layout::new(8, 4).unwrap(), 0);
            let mut reader = Reader::attach(&memory[..], Device).unwrap();
            memory[SIGNAL + Driver::SEQ].store(behind, Ordering::Relaxed);
            assert_eq!(reader.arm_newer(0), Armed::Missed, "{behind} updates behind");
            assert_eq!(reader.read_if_newer(0, &mut [0; 8]), Ok(Some(behind)));
        }
    }

    #[test]
    fn a_resumed_writer_makes_up_for_a_lost_kick() {
        let memory = memory(Layout::new(8, 4).unwrap(), 5);
        let mut reader = Reader::attach(&memory[..], Device).unwrap();
        let mut writer = Writer::attach(&memory[..], Driver).unwrap();
        assert_eq!(reader.arm_newer(5), Armed::Waiting);
        let _ = writer.write(&[1; 8]); // The writer ends here, and its kick is lost.
        let (writer, kick) = Writer::resume(&memory[..], Driver).unwrap();
        assert!(kick.is_wanted());
        assert_eq!(writer.version(), 6);
        assert_eq!(reader.arm_newer(6), Armed::Waiting);
        assert!(!Writer::resume(&memory[..], Driver).unwrap().1.is_wanted());
    }

    #[test]
    fn attach_checks_the_header() {
        let layout = Layout::new(64, 4).unwrap();
        let memory = memory(layout, 0);
        for (word, value, error) in [
            (0, 0, BadStatePage::Magic),
            (HEADER_VALUE_BYTES, 0, BadStatePage::ValueSize),
            (HEADER_VALUE_BYTES, u64::MAX, BadStatePage::ValueSize),
            (HEADER_VALUE_BYTES, 65, BadStatePage::TooSmall),
            (HEADER_SLOTS, 3, BadStatePage::Slots),
            (HEADER_SLOTS, 8, BadStatePage::TooSmall),
        ] {
            let before = memory[word].swap(value, Ordering::Relaxed);
            assert_eq!(Reader::attach(&memory[..], Driver).unwrap_err(), error);
            assert_eq!(Writer::attach(&memory[..], Driver).unwrap_err(), error);
            memory[word].store(before, Ordering::Relaxed);
        }
        assert_eq!(Reader::attach(&memory[..40], Driver).unwrap_err(), BadStatePage::TooSmall);
        assert_eq!(layout.format(&&memory[..40], 0), Err(BadStatePage::TooSmall));
    }
}
