// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interrupt page: which lines are pending, and when the device sends a message (spec/pic.md, "The
//! page").
//!
//! There is a page for each of the driver's processors. A *line* is a number below the page's
//! count. The number is also its priority: a higher line is more urgent. The device sets the bit of
//! a line to raise it. A message costs the driver an interrupt. So the device sends one only if the
//! line is not below the driver's *level*, and at most one for each level that the driver
//! publishes. The driver takes the most urgent line first. It clears the bit of a line to take it,
//! and ends the line by a store.
//!
//! The word of the level also holds the *generation*, a count that goes up with every store of the
//! level. The device keeps the generation of its last message in its own memory. So it knows
//! whether it sent a message for this level already, and only the driver writes the level.

use super::memory::{Memory, WORD, stored};
use super::signal::Kick;
use super::signal::end::Device;
use super::sync::{Edge, Fence, Ordering, Word, clear_bits, fence, set_bits};

/// First word of the header: "vbuspc" and the layout's version.
pub const MAGIC: u64 = 0x0001_6370_7375_6276;
/// Offset of the count of lines.
pub const LINES: usize = 8;
/// Offset of the driver's level. It shares a cache line with the masks, because a device that has
/// raised a line reads both.
pub const LEVEL: usize = 64;
/// Offset of the driver's masks: a bit for each line.
pub const MASKED: usize = 96;
/// Offset of the driver's lines in service: a bit for each. They are for people who look at a page.
/// No device needs them.
pub const IN_SERVICE: usize = 128;
/// Offset of the pending lines: a bit for each. The device sets it and the driver clears it.
pub const PENDING: usize = 192;
/// Bytes of a page.
pub const PAGE_BYTES: usize = 256;
/// The most lines of a page.
pub const LINES_MAX: u16 = 256;

/// First bit of the generation in the word of the level. Bits 0 to 8 are the level: lines from
/// there on want a message. The 55 bits of the generation do not wrap around: that would take ten
/// years of nothing but stores of the level.
pub const GENERATION_SHIFT: u32 = 9;

/// Bits in a word: a bit for each line.
const BITS: usize = 64;
/// Words that hold a bit for each line.
const SET: usize = LINES_MAX as usize / BITS;
/// A value that no generation has, because generations have 55 bits.
const NEVER: u64 = u64::MAX;

const _: () = {
    assert!(
        LEVEL == 64 && MASKED == 96 && IN_SERVICE == 128 && PENDING == 192 && PAGE_BYTES == 256
    );
    assert!(
        MASKED + SET * WORD == IN_SERVICE
            && IN_SERVICE + SET * WORD <= PENDING
            && PENDING + SET * WORD <= PAGE_BYTES
    );
};

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BadInterruptPage {
    /// The header does not begin with [`MAGIC`].
    Magic,
    /// The count of lines is 0 or above [`LINES_MAX`].
    Lines,
    /// The memory is smaller than [`PAGE_BYTES`].
    TooSmall,
}

fn check_lines(lines: u64) -> Result<u16, BadInterruptPage> {
    u16::try_from(lines)
        .ok()
        .filter(|lines| (1..=LINES_MAX).contains(lines))
        .ok_or(BadInterruptPage::Lines)
}

/// The word index and the bit of `line` in the set of lines at byte `offset`.
#[inline(always)]
fn word_and_bit(offset: usize, line: u16) -> (usize, u64) {
    (offset / WORD + usize::from(line) / BITS, 1 << (usize::from(line) % BITS))
}

/// The device's end of a page. Several threads of the device may raise lines at the same time, so
/// its methods take `&self`.
#[derive(Debug)]
pub struct DeviceEnd<M> {
    mem: M,
    lines: u16,
    /// The generation for which the device sent its last message. It is not in shared memory.
    told: Word,
}

impl<M: Memory> DeviceEnd<M> {
    /// Attaches to a page that the driver has made. Reads its header once and checks it.
    pub fn attach(mem: M) -> Result<Self, BadInterruptPage> {
        let words = mem.words();
        if words.len() < PAGE_BYTES / WORD {
            return Err(BadInterruptPage::TooSmall);
        }
        if words[0].load(Ordering::Acquire) != MAGIC {
            return Err(BadInterruptPage::Magic);
        }
        let lines = check_lines(words[LINES / WORD].load(Ordering::Relaxed))?;
        Ok(DeviceEnd { mem, lines, told: Word::new(NEVER) })
    }

    /// The number of lines of the page.
    pub fn lines(&self) -> u16 {
        self.lines
    }

    /// Raises `line`. When the driver takes the line, it sees everything that was written before
    /// this call. The kick is the message to the driver. It is wanted at most once for each level
    /// that the driver publishes. If the page does not have `line`, nothing happens.
    ///
    /// A line is an edge. If it is raised while it is pending, the driver takes it once. If it is
    /// raised while it is in service, it becomes pending again.
    #[inline]
    pub fn raise(&self, line: u16) -> Kick<Device> {
        if line >= self.lines {
            return Kick::NONE;
        }
        let words = self.mem.words();
        let (at, bit) = word_and_bit(PENDING, line);
        // Pairs with the driver's clear in `DriverEnd::take`.
        let before = set_bits(&words[at], bit, Edge::Line);
        stored(&self.mem, at, 1);
        if before & bit != 0 {
            // The driver has yet to take the line. The thread that set the bit sends the message,
            // if one is wanted.
            return Kick::NONE;
        }
        // Orders the store of the bit before the loads of level and mask. Together with the fences
        // in `publish` and `unmask` this makes sure that one end sees the other's store.
        fence(Fence::Raise);
        // Pairs with the store in `DriverEnd::publish`. The device reads the word once, because the
        // driver may change it at any time.
        let level = words[LEVEL / WORD].load(Ordering::Relaxed);
        if u64::from(line) < level & ((1 << GENERATION_SHIFT) - 1) {
            return Kick::NONE;
        }
        // Pairs with the stores in `DriverEnd::{mask, unmask}`.
        let (at, bit) = word_and_bit(MASKED, line);
        if words[at].load(Ordering::Relaxed) & bit != 0 {
            return Kick::NONE;
        }
        // One thread sends the message of a generation: the one that stores it in `told` first. If
        // this thread finds its generation there, another thread read the same level and sends the
        // message. If the driver has published another level since, the message comes in vain.
        let generation = level >> GENERATION_SHIFT;
        Kick::new(self.told.swap(generation, Ordering::Relaxed) != generation)
    }

    /// Clears the bit of a pending line, so that the device can raise the line on another page.
    /// Returns false if the line was not pending: nobody raised it, or the driver took it before.
    #[inline]
    pub fn take_back(&self, line: u16) -> bool {
        if line >= self.lines {
            return false;
        }
        let (at, bit) = word_and_bit(PENDING, line);
        // Pairs with `raise`: the caller sees what the raiser of the line wrote, and passes it on
        // when it raises the line on another page.
        let before = clear_bits(&self.mem.words()[at], bit, Edge::Line);
        stored(&self.mem, at, 1);
        before & bit != 0
    }
}

/// Whether a line may interrupt the handler of a less urgent line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nesting {
    /// No: handlers run with interrupts off. No message comes until the driver has drained the
    /// page.
    Flat,
    /// Yes: a line sends a message if it is more urgent than all lines in service.
    Nested,
}

/// What came of asking for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a processor with a line pending must not sleep"]
pub enum Wanted {
    /// The next line that is wanted sends a message.
    Waiting,
    /// A line is pending already, perhaps without a message. The driver has to drain the page.
    Pending,
}

/// The driver's end of a page. It is called with interrupts off, one call at a time: by its
/// processor alone, or behind a lock.
///
/// The driver trusts nothing that the device writes. It takes the pending bits as hints: a hostile
/// device can make it take a line that nobody raised, and can do nothing else.
#[derive(Debug)]
pub struct DriverEnd<M> {
    mem: M,
    lines: u16,
    nesting: Nesting,
    /// The level as it was published last.
    level: u16,
    generation: u64,
    masked: [u64; SET],
    in_service: [u64; SET],
}

impl<M: Memory> DriverEnd<M> {
    /// Makes a page of `lines` lines (1..=[`LINES_MAX`]). The driver does this before it registers
    /// the page. The page asks for no message until the driver calls [`arm`](Self::arm).
    pub fn create(mem: M, lines: u16, nesting: Nesting) -> Result<Self, BadInterruptPage> {
        let words = mem.words();
        if words.len() < PAGE_BYTES / WORD {
            return Err(BadInterruptPage::TooSmall);
        }
        let lines = check_lines(u64::from(lines))?;
        for word in &words[..PAGE_BYTES / WORD] {
            word.store(0, Ordering::Relaxed);
        }
        words[LINES / WORD].store(u64::from(lines), Ordering::Relaxed);
        words[LEVEL / WORD].store(u64::from(lines), Ordering::Relaxed);
        words[0].store(MAGIC, Ordering::Release);
        let (masked, in_service) = ([0; SET], [0; SET]);
        Ok(DriverEnd { mem, lines, nesting, level: lines, generation: 0, masked, in_service })
    }

    /// The number of lines of the page.
    pub fn lines(&self) -> u16 {
        self.lines
    }

    /// How many levels were published so far. An honest device has sent at most as many messages.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Takes the most urgent pending line and puts it in service, if it is more urgent than all
    /// lines in service. Everything that the device wrote before it raised the line is visible.
    /// After `None`, the next such line sends a message: the driver returns from the interrupt, or
    /// sleeps.
    ///
    /// The handler of a message calls this until it returns `None`. It calls this at least once,
    /// because the message is used up.
    #[inline]
    pub fn take(&mut self) -> Option<u16> {
        let floor = self.floor();
        let mut line = match self.scan(floor) {
            Some(line) => line,
            None => {
                self.publish(floor);
                self.scan(floor)?
            }
        };
        // Each turn finds a higher line, so there are at most as many turns as lines.
        loop {
            let level = if self.nesting == Nesting::Nested { line + 1 } else { self.lines };
            if level != self.level {
                self.publish(level);
            }
            // A device that raised a line before it saw this level sent no message for the level.
            // So the driver looks for such a line here.
            match self.scan(line + 1) {
                Some(higher) => line = higher,
                None => break,
            }
        }
        let (at, bit) = word_and_bit(PENDING, line);
        // Pairs with `DeviceEnd::raise`. The bit may be gone, because the device took the line
        // back. Then the handler finds nothing to do.
        clear_bits(&self.mem.words()[at], bit, Edge::Line);
        self.serve(line, true);
        Some(line)
    }

    /// Ends a line that was taken. Less urgent lines have sent no message meanwhile, so the driver
    /// calls [`take`](Self::take) before it returns from the interrupt.
    #[inline]
    pub fn end(&mut self, line: u16) {
        if line < self.lines {
            self.serve(line, false);
        }
    }

    /// Asks for messages. The driver calls this when it has registered the page, and when it has
    /// ended a line outside of a message's handler.
    pub fn arm(&mut self) -> Wanted {
        let floor = self.floor();
        self.publish(floor);
        if self.scan(floor).is_some() { Wanted::Pending } else { Wanted::Waiting }
    }

    /// Asks for no messages until [`arm`](Self::arm), or until [`take`](Self::take) returns `None`.
    /// A message that is under way may still come.
    pub fn disarm(&mut self) {
        self.publish(self.lines);
    }

    /// Masks `line`: it can become pending, but [`take`](Self::take) does not take it. A message
    /// for it may be under way.
    pub fn mask(&mut self, line: u16) {
        self.set_masked(line, true);
    }

    /// Unmasks `line`. [`Wanted::Pending`]: the line became pending meanwhile and sent no message.
    pub fn unmask(&mut self, line: u16) -> Wanted {
        self.set_masked(line, false);
        // Orders the store of the mask before the load of the bit: see `DeviceEnd::raise`.
        fence(Fence::Unmask);
        let (at, bit) = word_and_bit(PENDING, line.min(self.lines - 1));
        let pending = line < self.lines && self.mem.words()[at].load(Ordering::Relaxed) & bit != 0;
        if pending && line >= self.floor() { Wanted::Pending } else { Wanted::Waiting }
    }

    /// The lowest line that may be taken now: the one above all lines in service.
    #[inline]
    fn floor(&self) -> u16 {
        highest(&self.in_service).map_or(0, |line| line + 1)
    }

    #[inline]
    fn publish(&mut self, level: u16) {
        self.level = level;
        self.generation = self.generation.wrapping_add(1);
        let word = u64::from(level) | self.generation << GENERATION_SHIFT;
        // Pairs with the load in `DeviceEnd::raise`.
        self.mem.words()[LEVEL / WORD].store(word, Ordering::Relaxed);
        // Orders the store of the level before the loads of the bits: see `DeviceEnd::raise`.
        fence(Fence::Level);
    }

    /// The most urgent line from `from` on that is pending and not masked.
    #[inline]
    fn scan(&self, from: u16) -> Option<u16> {
        let words = self.mem.words();
        let (first, count) = (usize::from(from) / BITS, usize::from(self.lines).div_ceil(BITS));
        for at in (first..count).rev() {
            let mut bits = words[PENDING / WORD + at].load(Ordering::Relaxed) & !self.masked[at];
            if at == first {
                bits &= u64::MAX << (usize::from(from) % BITS);
            }
            if at + 1 == count {
                // Only a hostile device sets bits beyond the last line.
                bits &= u64::MAX >> (count * BITS - usize::from(self.lines));
            }
            if let Some(bit) = bits.checked_ilog2() {
                return Some(line_of(at, bit));
            }
        }
        None
    }

    #[inline]
    fn serve(&mut self, line: u16, begins: bool) {
        let (at, bit) = word_and_bit(0, line);
        if begins {
            self.in_service[at] |= bit;
        } else {
            self.in_service[at] &= !bit;
        }
        self.mem.words()[IN_SERVICE / WORD + at].store(self.in_service[at], Ordering::Relaxed);
    }

    fn set_masked(&mut self, line: u16, masked: bool) {
        if line < self.lines {
            let (at, bit) = word_and_bit(0, line);
            if masked {
                self.masked[at] |= bit;
            } else {
                self.masked[at] &= !bit;
            }
            // Pairs with the load in `DeviceEnd::raise`.
            self.mem.words()[MASKED / WORD + at].store(self.masked[at], Ordering::Relaxed);
        }
    }
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "below 256")]
fn line_of(at: usize, bit: u32) -> u16 {
    (at * BITS) as u16 + bit as u16
}

#[inline(always)]
fn highest(set: &[u64; SET]) -> Option<u16> {
    (0..SET).rev().find_map(|at| Some(line_of(at, set[at].checked_ilog2()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> [Word; PAGE_BYTES / WORD] {
        core::array::from_fn(|_| Word::new(0))
    }

    /// All lines in all sets: each has a bit of its own in its set, and is found again by it.
    #[test]
    fn every_line_has_a_bit_of_its_own() {
        let sets = [LEVEL, MASKED, IN_SERVICE, PENDING];
        let mut users = [0u64; PAGE_BYTES / WORD];
        for (offset, line) in sets.iter().flat_map(|o| (0..LINES_MAX).map(move |line| (*o, line))) {
            let (word, bit) = word_and_bit(offset, line);
            assert_eq!(word * 64 + bit.ilog2() as usize, offset * 8 + usize::from(line));
            assert!(bit.is_power_of_two() && users[word] & bit == 0, "{offset} {line}");
            users[word] |= bit;
            let at = word - offset / WORD;
            assert_eq!(line_of(at, bit.ilog2()), line);
            let set = core::array::from_fn(|n| if n == at { bit } else { 0 });
            assert_eq!(highest(&set), Some(line));
            // With all below it: the highest is the most urgent.
            let below = core::array::from_fn(|n| match n.cmp(&at) {
                core::cmp::Ordering::Less => u64::MAX,
                core::cmp::Ordering::Equal => bit | (bit - 1),
                core::cmp::Ordering::Greater => 0,
            });
            assert_eq!(highest(&below), Some(line));
        }
        assert_eq!((users[0], highest(&[0; SET])), (0, None), "no set lies over the header");
        for lines in 0..=1 << 16 {
            let good = (1..=u64::from(LINES_MAX)).contains(&lines);
            assert_eq!(check_lines(lines).ok().map(u64::from), good.then_some(lines));
        }
        assert!(check_lines(u64::MAX).is_err() && check_lines(1 << 16 | 1).is_err());
    }

    type Page<'a> = (DriverEnd<&'a [Word]>, DeviceEnd<&'a [Word]>);

    fn page(memory: &[Word], lines: u16, nesting: Nesting) -> Page<'_> {
        let driver = DriverEnd::create(memory, lines, nesting).unwrap();
        (driver, DeviceEnd::attach(memory).unwrap())
    }

    #[test]
    fn a_page_has_to_be_one() {
        let memory = memory();
        assert_eq!(DeviceEnd::attach(&memory[..]).unwrap_err(), BadInterruptPage::Magic);
        assert_eq!(
            DriverEnd::create(&memory[1..], 8, Nesting::Flat).unwrap_err(),
            BadInterruptPage::TooSmall
        );
        for lines in [0, 257, u16::MAX] {
            assert_eq!(
                DriverEnd::create(&memory[..], lines, Nesting::Flat).unwrap_err(),
                BadInterruptPage::Lines
            );
        }
        let (_, device) = page(&memory, 256, Nesting::Flat);
        assert_eq!(device.lines(), 256);
        assert_eq!(DeviceEnd::attach(&memory[..31]).unwrap_err(), BadInterruptPage::TooSmall);
        memory[LINES / WORD].store(1 << 40 | 8, Ordering::Relaxed);
        assert_eq!(DeviceEnd::attach(&memory[..]).unwrap_err(), BadInterruptPage::Lines);
    }

    #[test]
    fn one_message_brings_all_in_by_priority() {
        for nesting in [Nesting::Flat, Nesting::Nested] {
            let memory = memory();
            let (mut driver, device) = page(&memory, 200, nesting);
            assert!(!device.raise(3).is_wanted(), "nothing is wanted yet");
            assert_eq!(driver.arm(), Wanted::Pending);
            assert_eq!(driver.take(), Some(3));
            driver.end(3);
            assert_eq!(driver.take(), None);
            assert!(device.raise(70).is_wanted(), "idle");
            let more = [5, 199, 70, 64, 5].map(|line| device.raise(line).is_wanted());
            assert_eq!(more, [false; 5], "the message is on its way");
            for line in [199, 70, 64, 5] {
                assert_eq!(driver.take(), Some(line));
                driver.end(line);
            }
            assert_eq!(driver.take(), None);
            assert!(device.raise(0).is_wanted());
            assert!(!device.raise(200).is_wanted(), "no such line");
        }
    }

    #[test]
    fn urgent_lines_interrupt_others_only_if_nested() {
        for nesting in [Nesting::Flat, Nesting::Nested] {
            let memory = memory();
            let (mut driver, device) = page(&memory, 16, nesting);
            assert_eq!(driver.arm(), Wanted::Waiting);
            assert!(device.raise(5).is_wanted());
            assert_eq!(driver.take(), Some(5));
            assert!(
                !device.raise(5).is_wanted(),
                "in service: pending again, and not more urgent than itself"
            );
            assert!(!device.raise(2).is_wanted());
            assert_eq!(device.raise(9).is_wanted(), nesting == Nesting::Nested);
            assert!(!device.raise(12).is_wanted(), "one message");
            // A nested handler runs now, or the flat handler looks again.
            assert_eq!(driver.take(), Some(12));
            assert_eq!(memory[IN_SERVICE / WORD].load(Ordering::Relaxed), 1 << 5 | 1 << 12);
            driver.end(12);
            assert_eq!(driver.take(), Some(9));
            driver.end(9);
            assert_eq!(driver.take(), None, "the others wait for the end of 5");
            assert!(!device.raise(4).is_wanted());
            driver.end(5);
            for line in [5, 4, 2] {
                assert_eq!(driver.take(), Some(line));
                driver.end(line);
            }
            assert_eq!(driver.take(), None);
        }
    }

    #[test]
    fn a_masked_line_waits_and_sends_nothing() {
        let memory = memory();
        let (mut driver, device) = page(&memory, 8, Nesting::Nested);
        driver.mask(3);
        assert_eq!(driver.arm(), Wanted::Waiting);
        assert!(!device.raise(3).is_wanted());
        assert_eq!(driver.take(), None);
        assert_eq!(driver.unmask(3), Wanted::Pending);
        assert_eq!(driver.take(), Some(3));
        driver.end(3);
        assert_eq!((driver.take(), driver.unmask(3)), (None, Wanted::Waiting));
        assert!(device.raise(3).is_wanted());
        // Numbers that the page does not have do nothing.
        driver.mask(8);
        assert_eq!(driver.unmask(u16::MAX), Wanted::Waiting);
        driver.end(300);
        assert_eq!(driver.take(), Some(3));
    }

    #[test]
    fn a_line_taken_back_is_taken_once() {
        let memory = memory();
        let (mut driver, device) = page(&memory, 8, Nesting::Nested);
        let _ = driver.arm();
        assert!(device.raise(6).is_wanted());
        assert!(device.take_back(6));
        assert!(!device.take_back(6) && !device.take_back(8));
        assert_eq!(driver.take(), None);
        assert!(device.raise(6).is_wanted(), "the message before is used up");
    }

    #[test]
    fn polling_costs_no_message() {
        let memory = memory();
        let (mut driver, device) = page(&memory, 8, Nesting::Flat);
        let _ = driver.arm();
        driver.disarm();
        assert!(!device.raise(7).is_wanted());
        assert_eq!(driver.arm(), Wanted::Pending);
    }

    #[test]
    fn generations_wrap() {
        let memory = memory();
        let (mut driver, device) = page(&memory, 8, Nesting::Flat);
        driver.generation = (1 << 55) - 2;
        for _ in 0..6 {
            assert_eq!(driver.arm(), Wanted::Waiting);
            assert!(device.raise(1).is_wanted() && !device.raise(2).is_wanted());
            assert_eq!((driver.take(), driver.take()), (Some(2), None));
            driver.end(2);
            assert_eq!(driver.take(), Some(1));
            driver.end(1);
            assert_eq!(driver.take(), None);
        }
    }

    #[test]
    fn any_word_of_the_peer_is_harmless() {
        let memory = memory();
        let (mut driver, device) = page(&memory, 70, Nesting::Nested);
        for hostile in [0, 7, u64::MAX, 1 << 63, 0xffff, 69 << 32 | 3] {
            memory.iter().for_each(|word| word.store(hostile, Ordering::Relaxed));
            let messages = (0..70).filter(|line| device.raise(*line).is_wanted()).count();
            assert!(messages <= 1, "{hostile:#x} brought {messages} messages");
            let mut taken = 0;
            while let Some(line) = driver.take() {
                assert!(line < 70);
                driver.end(line);
                taken += 1;
            }
            assert!(taken <= 70);
        }
    }
}
