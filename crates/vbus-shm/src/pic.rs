//! Interrupt page: which lines are pending, and whether anybody need be told (spec/pic.md, "The
//! page").
//!
//! There is a page for each of the driver's processors. A *line* is a number below the page's
//! count, and also its priority: the higher, the more urgent. The device raises a line by setting
//! its bit. It sends a message, which costs the driver an interrupt, only if the driver's *level*
//! says that a line so urgent is wanted now, and at most one for each level that the driver
//! published. The driver drains the page by priority; taking a line clears its bit, and ending it
//! is a store.
//!
//! The level carries a count of its own, the *generation*, that goes up with every store. So the
//! device can tell, by a word that it keeps to itself, whether a message for this very level is on
//! its way already, and the driver's word has one writer.

use super::memory::{Memory, WORD};
use super::signal::Kick;
use super::signal::end::Device;
use super::sync::{Edge, Fence, Ordering, Word, clear_bits, fence, set_bits};

/// First word of the header: "vbuspc" and the layout's version.
pub const MAGIC: u64 = 0x0001_6370_7375_6276;
/// Offset of the count of lines.
pub const LINES: usize = 8;
/// Offset of the driver's level. It has a line with the masks: what a device looks at when it has
/// raised a line.
pub const LEVEL: usize = 64;
/// Offset of the driver's masks: a bit for each line.
pub const MASKED: usize = 96;
/// Offset of the driver's lines in service: a bit for each. For people who look at a page; no
/// device needs it.
pub const IN_SERVICE: usize = 128;
/// Offset of the pending lines: a bit for each, set by the device and cleared by the driver.
pub const PENDING: usize = 192;
/// Bytes of a page.
pub const PAGE_BYTES: usize = 256;
/// The most lines of a page.
pub const LINES_MAX: u16 = 256;

/// The level's bits 0 to 8: lines from here on want a message. From bit 9 on: the generation. Its
/// 55 bits do not come round: that would take ten years of nothing but stores of the level.
pub const GENERATION_SHIFT: u32 = 9;

/// Bits in a word, and so lines.
const BITS: usize = 64;
/// Words of a bit for each line.
const SET: usize = LINES_MAX as usize / BITS;
/// No generation: they have 55 bits.
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
pub enum BadPage {
    /// The header does not begin with [`MAGIC`].
    Magic,
    /// The count of lines is 0 or above [`LINES_MAX`].
    Lines,
    /// The memory is smaller than [`PAGE_BYTES`].
    TooSmall,
}

fn check_lines(lines: u64) -> Result<u16, BadPage> {
    u16::try_from(lines).ok().filter(|lines| (1..=LINES_MAX).contains(lines)).ok_or(BadPage::Lines)
}

/// Where the bit of `line` is in a set at byte `offset`: the word's index, and the bit.
#[inline(always)]
fn place(offset: usize, line: u16) -> (usize, u64) {
    (offset / WORD + usize::from(line) / BITS, 1 << (usize::from(line) % BITS))
}

/// The device's end of a page. It is shared by all that raise lines there: its methods take
/// `&self`.
#[derive(Debug)]
pub struct DeviceEnd<M> {
    mem: M,
    lines: u16,
    /// The generation that the last message was for. Not in shared memory.
    told: Word,
}

impl<M: Memory> DeviceEnd<M> {
    /// The device's end of a page that the driver has made. Its header is read once, and checked.
    pub fn attach(mem: M) -> Result<Self, BadPage> {
        let words = mem.words();
        if words.len() < PAGE_BYTES / WORD {
            return Err(BadPage::TooSmall);
        }
        if words[0].load(Ordering::Acquire) != MAGIC {
            return Err(BadPage::Magic);
        }
        let lines = check_lines(words[LINES / WORD].load(Ordering::Relaxed))?;
        Ok(DeviceEnd { mem, lines, told: Word::new(NEVER) })
    }

    /// Lines of the page.
    pub fn lines(&self) -> u16 {
        self.lines
    }

    /// Raises `line`; everything written before is visible to the driver when it has taken it.
    /// The kick is the message that the driver must be sent: at most one is wanted for each level
    /// that it publishes. A line that the page does not have is nothing.
    ///
    /// A line is an edge: raised while pending it is one with what is pending, raised while in
    /// service it is pending again.
    #[inline]
    pub fn raise(&self, line: u16) -> Kick<Device> {
        if line >= self.lines {
            return Kick::NONE;
        }
        let words = self.mem.words();
        let (at, bit) = place(PENDING, line);
        // Pairs with the driver's clear in `DriverEnd::take`.
        if set_bits(&words[at], bit, Edge::Line) & bit != 0 {
            // Whoever raised it before has asked below, or is about to, and the driver has yet to
            // take it.
            return Kick::NONE;
        }
        // Store of the bit before loads of level and mask: with the fences of `publish` and
        // `unmask`, one end sees the other's store.
        fence(Fence::Raise);
        // Pairs with the store in `DriverEnd::publish`. Read once: the peer may change it at any
        // time.
        let level = words[LEVEL / WORD].load(Ordering::Relaxed);
        if u64::from(line) < level & ((1 << GENERATION_SHIFT) - 1) {
            return Kick::NONE;
        }
        // Pairs with the stores in `DriverEnd::{mask, unmask}`.
        let (at, bit) = place(MASKED, line);
        if words[at].load(Ordering::Relaxed) & bit != 0 {
            return Kick::NONE;
        }
        // Whose message it is. A generation that has passed since is told in vain; but none stays
        // untold: who finds it told here reads the word of somebody who read that same generation,
        // and sends its message.
        let generation = level >> GENERATION_SHIFT;
        Kick::new(self.told.swap(generation, Ordering::Relaxed) != generation)
    }

    /// Takes a pending line away again, for it is to be raised elsewhere. False: it was not
    /// pending, or the driver was faster and has it.
    #[inline]
    pub fn take_back(&self, line: u16) -> bool {
        if line >= self.lines {
            return false;
        }
        let (at, bit) = place(PENDING, line);
        // Pairs with `raise`, so that what its raiser wrote is visible to who takes the line
        // elsewhere.
        clear_bits(&self.mem.words()[at], bit, Edge::Line) & bit != 0
    }
}

/// Whether lines may interrupt the handlers of less urgent ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nesting {
    /// No: handlers run with interrupts off. No message comes until the page is drained.
    Flat,
    /// Yes: a line more urgent than all in service sends a message.
    Nested,
}

/// What came of asking for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a processor with a line pending must not sleep"]
pub enum Wanted {
    /// The next line that is wanted sends a message.
    Waiting,
    /// One is pending already, perhaps without a message: drain.
    Pending,
}

/// The driver's end of a page. Its processor calls it with interrupts off, one call at a time.
///
/// Nothing that the device wrote is believed but the pending bits, and those as a hint: a line may
/// come that nobody raised, and nothing else.
#[derive(Debug)]
pub struct DriverEnd<M> {
    mem: M,
    lines: u16,
    nesting: Nesting,
    /// As published.
    level: u16,
    generation: u64,
    masked: [u64; SET],
    in_service: [u64; SET],
}

impl<M: Memory> DriverEnd<M> {
    /// Makes a page of `lines` lines (1..=[`LINES_MAX`]) over zeroed memory, which wants nothing
    /// yet: see [`arm`](Self::arm). Done before the page is registered.
    pub fn create(mem: M, lines: u16, nesting: Nesting) -> Result<Self, BadPage> {
        let words = mem.words();
        if words.len() < PAGE_BYTES / WORD {
            return Err(BadPage::TooSmall);
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

    /// Lines of the page.
    pub fn lines(&self) -> u16 {
        self.lines
    }

    /// Levels published so far: no more messages than that have come.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Takes the most urgent pending line, if it is more urgent than all in service, and puts it in
    /// service; everything that its device wrote before raising it is visible. After `None` the
    /// next such line sends a message: return from the interrupt, or sleep.
    ///
    /// Called by the message's handler until it returns `None`, also if it was `None` at once: the
    /// message is used up.
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
        // At most once for each line.
        loop {
            let level = if self.nesting == Nesting::Nested { line + 1 } else { self.lines };
            if level != self.level {
                self.publish(level);
            }
            // What was raised before that level was seen has sent no message for it: it is taken
            // here, now.
            match self.scan(line + 1) {
                Some(higher) => line = higher,
                None => break,
            }
        }
        let (at, bit) = place(PENDING, line);
        // Pairs with `DeviceEnd::raise`. Whether the bit is still there does not matter: a device
        // that took it back leaves us with nothing to do.
        clear_bits(&self.mem.words()[at], bit, Edge::Line);
        self.serve(line, true);
        Some(line)
    }

    /// Ends a line that was taken. Then, before returning from the interrupt, [`take`](Self::take):
    /// less urgent lines have sent no message.
    #[inline]
    pub fn end(&mut self, line: u16) {
        if line < self.lines {
            self.serve(line, false);
        }
    }

    /// Asks for messages, when the page is registered and when lines were ended outside of a
    /// message's handler.
    pub fn arm(&mut self) -> Wanted {
        let floor = self.floor();
        self.publish(floor);
        if self.scan(floor).is_some() { Wanted::Pending } else { Wanted::Waiting }
    }

    /// Asks for no messages, until [`arm`](Self::arm) or a `None` of [`take`](Self::take). One that
    /// is under way may still come.
    pub fn disarm(&mut self) {
        self.publish(self.lines);
    }

    /// Masks `line`: it can become pending, and is not taken. A message for it may be under way.
    pub fn mask(&mut self, line: u16) {
        self.set_masked(line, true);
    }

    /// Unmasks `line`. *Pending*: it has become so in the meantime, and sent no message.
    pub fn unmask(&mut self, line: u16) -> Wanted {
        self.set_masked(line, false);
        // Store of the mask before load of the bit: see `DeviceEnd::raise`.
        fence(Fence::Unmask);
        let (at, bit) = place(PENDING, line.min(self.lines - 1));
        let pending = line < self.lines && self.mem.words()[at].load(Ordering::Relaxed) & bit != 0;
        if pending && line >= self.floor() { Wanted::Pending } else { Wanted::Waiting }
    }

    /// The least urgent line that may be taken now: the one above all in service.
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
        // Store of the level before loads of the bits: see `raise`.
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
                // Bits beyond the last line are a device's that means harm.
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
        let (at, bit) = place(0, line);
        if begins {
            self.in_service[at] |= bit;
        } else {
            self.in_service[at] &= !bit;
        }
        self.mem.words()[IN_SERVICE / WORD + at].store(self.in_service[at], Ordering::Relaxed);
    }

    fn set_masked(&mut self, line: u16, masked: bool) {
        if line < self.lines {
            let (at, bit) = place(0, line);
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

    type Page<'a> = (DriverEnd<&'a [Word]>, DeviceEnd<&'a [Word]>);

    fn page(memory: &[Word], lines: u16, nesting: Nesting) -> Page<'_> {
        let driver = DriverEnd::create(memory, lines, nesting).unwrap();
        (driver, DeviceEnd::attach(memory).unwrap())
    }

    #[test]
    fn a_page_has_to_be_one() {
        let memory = memory();
        assert_eq!(DeviceEnd::attach(&memory[..]).unwrap_err(), BadPage::Magic);
        assert_eq!(
            DriverEnd::create(&memory[1..], 8, Nesting::Flat).unwrap_err(),
            BadPage::TooSmall
        );
        for lines in [0, 257, u16::MAX] {
            assert_eq!(
                DriverEnd::create(&memory[..], lines, Nesting::Flat).unwrap_err(),
                BadPage::Lines
            );
        }
        let (_, device) = page(&memory, 256, Nesting::Flat);
        assert_eq!(device.lines(), 256);
        assert_eq!(DeviceEnd::attach(&memory[..31]).unwrap_err(), BadPage::TooSmall);
        memory[LINES / WORD].store(1 << 40 | 8, Ordering::Relaxed);
        assert_eq!(DeviceEnd::attach(&memory[..]).unwrap_err(), BadPage::Lines);
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
            // The nested handler, or for flat ones a handler that looks again by itself.
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
        // Bad numbers are nothing.
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
