// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Signal: who wakes whom, and when (spec/shared-memory.md, "Signal").
//!
//! Each direction has two words. Each word has one writer and a cache line of its own. The sender
//! writes `seq`, a free-running count of its posts. The receiver writes `arm`: the position at
//! which it wants a kick, or "no kick". Three facts follow from these two words. There are new
//! posts if `seq` differs from the count that the receiver has consumed. A kick was sent if `seq`
//! has passed the position in `arm`. A burst of posts costs one kick. A receiver that polls costs
//! no kick at all.
//!
//! Position `at` is the number of the post that kicks. A receiver that has consumed `seen` posts
//! arms at `seen`: the next post kicks. Or it arms at `seen + k`: `k` posts do not kick, and the
//! one after them does. Then the receiver needs a time-out of its own.

use core::fmt;
use core::marker::PhantomData;

use super::memory::{Memory, WORD, stored};
use super::sync::{Edge, Fence, Ordering, Word, fence, observe, publish};

/// Bytes of a signal block: four lines, for both directions.
pub const BLOCK_BYTES: usize = 256;
/// Alignment of a signal block within its region, in bytes.
pub const BLOCK_ALIGN: usize = 64;

/// Offset within the block of the driver's `seq`: it sends to the device. Each word is alone in its
/// line.
pub const DRIVER_SEQ: usize = 0;
/// Offset within the block of the device's `arm`, for the driver's posts.
pub const DEVICE_ARM: usize = 64;
/// Offset within the block of the device's `seq`: it sends to the driver.
pub const DEVICE_SEQ: usize = 128;
/// Offset within the block of the driver's `arm`, for the device's posts.
pub const DRIVER_ARM: usize = 192;

/// The bit of `arm` that says that a kick is wanted. Bits 0..63 are the low bits of a position.
pub const ARM_ENABLED: u64 = 1 << 63;

const BLOCK_WORDS: usize = BLOCK_BYTES / WORD;

const _: () = {
    assert!(size_of::<Word>() >= WORD); // A model checker's word is larger.
    assert!(DRIVER_SEQ == 0 && DEVICE_ARM == 64 && DEVICE_SEQ == 128 && DRIVER_ARM == 192);
    assert!(BLOCK_BYTES == DRIVER_ARM + 64 && BLOCK_ALIGN == 64);
};

/// The two ends of a connection, as types. The type of a sender, of a receiver and of a [`Kick`]
/// names the end that has it.
pub mod end {
    use super::{DEVICE_ARM, DEVICE_SEQ, DRIVER_ARM, DRIVER_SEQ, WORD};

    /// The driver, which owns the memory.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Driver;

    /// The device, to which the memory was registered.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Device;

    /// [`Driver`] or [`Device`].
    pub trait End: Copy + core::fmt::Debug + sealed::End {
        /// The other end.
        type Peer: End<Peer = Self>;
        /// This end as a value.
        const SELF: Self;
        /// Index of the end's `seq` within the words of a signal block.
        const SEQ: usize;
        /// Index of the end's `arm` within the words of a signal block.
        const ARM: usize;

        /// The other end as a value.
        fn peer(self) -> Self::Peer {
            Self::Peer::SELF
        }
    }

    impl End for Driver {
        type Peer = Device;
        const SELF: Self = Driver;
        const SEQ: usize = DRIVER_SEQ / WORD;
        const ARM: usize = DRIVER_ARM / WORD;
    }

    impl End for Device {
        type Peer = Driver;
        const SELF: Self = Device;
        const SEQ: usize = DEVICE_SEQ / WORD;
        const ARM: usize = DEVICE_ARM / WORD;
    }

    mod sealed {
        pub trait End {}
        impl End for super::Driver {}
        impl End for super::Device {}
    }
}

use end::End;

/// The signal block does not fit its region, or is not aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadSignal;

/// The result of a post by end `E`: whether the caller must wake the other end now.
///
/// Give a kick by the driver to a doorbell, and a kick by the device to an interrupt. The types do
/// not allow the kick of the wrong end, nor the use of a kick twice.
///
/// ```compile_fail
/// use vbus_shm::signal::{Kick, end};
/// fn doorbell(_: Kick<end::Driver>) {}
/// fn interrupted(kick: Kick<end::Device>) {
///     doorbell(kick); // An interrupt's kick does not ring a doorbell.
/// }
/// ```
#[must_use = "without its kick the other end may sleep for ever"]
#[derive(PartialEq, Eq)]
pub struct Kick<E> {
    wanted: bool,
    by: PhantomData<E>,
}

impl<E> Kick<E> {
    /// The other end need not be woken.
    pub const NONE: Kick<E> = Kick::new(false);

    #[inline(always)]
    pub(super) const fn new(wanted: bool) -> Self {
        Kick { wanted, by: PhantomData }
    }

    /// Whether the other end must be woken.
    #[inline(always)]
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.wanted
    }

    /// One kick in place of two. It is wanted if one of the two is wanted. Both must be kicks of
    /// the same signal, or of signals that wake the same sleeper.
    #[inline(always)]
    pub fn or(self, other: Kick<E>) -> Kick<E> {
        Kick::new(self.wanted | other.wanted)
    }
}

impl<E: End> fmt::Debug for Kick<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kick({:?}, {})", E::SELF, self.wanted)
    }
}

/// The arithmetic of positions in words of a type, `$signed` with a sign. The tests have it for
/// words so narrow that they try all there is.
macro_rules! positions {
    ($word:ty, $signed:ty) => {
        /// The bit of `arm` that says that the receiver wants a kick.
        pub(super) const ENABLED: $word = 1 << (<$word>::BITS - 1);

        /// Position `a` minus position `b`. Positions in `arm` have one bit less than a word, so
        /// the difference is a number of as many bits with a sign.
        #[inline(always)]
        #[allow(clippy::cast_possible_wrap, reason = "to a difference with a sign")]
        pub(super) fn difference(a: $word, b: $word) -> $signed {
            (a.wrapping_sub(b) << 1) as $signed >> 1
        }

        /// Whether a receiver with this `arm` waits for one of the `n` posts from `old` on.
        #[inline(always)]
        pub(super) fn is_due(arm: $word, old: $word, n: $word) -> bool {
            let ahead = arm.wrapping_sub(old) & !ENABLED;
            arm & ENABLED != 0 && ahead < n
        }

        /// Whether a receiver with this `arm` waits for any post before `seq`.
        #[inline(always)]
        pub(super) fn was_due(arm: $word, seq: $word) -> bool {
            arm & ENABLED != 0 && difference(arm, seq) < 0
        }
    };
}

mod position {
    positions!(u64, i64);
}
use self::position::{difference, is_due, was_due};

const _: () = assert!(position::ENABLED == ARM_ENABLED);

/// The sending half of end `E`, over words that each call is given.
#[derive(Debug)]
pub(super) struct Tx<E> {
    base: usize,
    seq: u64,
    end: PhantomData<E>,
}

impl<E: End> Tx<E> {
    /// Over the block whose first word is `base`, counting on from `start`.
    pub(super) fn new(base: usize, start: u64) -> Self {
        Tx { base, seq: start, end: PhantomData }
    }

    /// Resumes the half of a sender that ended. Posts, up to `seq`, what that sender made visible
    /// and did not post.
    pub(super) fn resume(words: &[Word], base: usize, seq: u64) -> (Self, Kick<E>) {
        let half = Tx::new(base, seq);
        let kick = half.repost(words);
        (half, kick)
    }

    #[inline(always)]
    pub(super) fn posted(&self) -> u64 {
        self.seq
    }

    /// Tells the memory of a store of `seq`.
    #[inline(always)]
    pub(super) fn stored(&self, mem: &impl Memory) {
        stored(mem, self.base + E::SEQ, 1);
    }

    /// Stores `seq` again. The kick is wanted if the receiver is armed at any post so far, because
    /// the sender before may have ended without its kick.
    fn repost(&self, words: &[Word]) -> Kick<E> {
        // Pairs with the loads of `seq` in Rx::{seen, arm}.
        publish(&words[self.base + E::SEQ], self.seq, Edge::Seq);
        // The sender before may have ended between its store of `seq` and its fence, so this end
        // needs a fence of its own. It does for the new store what the fence in `post` does.
        fence(Fence::Resume);
        // Pairs with the stores of `arm` in Rx::{arm, disarm}.
        let arm = words[self.base + E::Peer::ARM].load(Ordering::Relaxed);
        Kick::new(was_due(arm, self.seq))
    }

    /// Stores `seq` ahead of the next post, which is for it too: that finds out who is to be woken.
    #[inline(always)]
    pub(super) fn store(&self, words: &[Word], seq: u64) {
        // Pairs with the loads of `seq` in Rx::{seen, arm}.
        publish(&words[self.base + E::SEQ], seq, Edge::Seq);
    }

    #[inline(always)]
    pub(super) fn post(&mut self, words: &[Word], n: u64) -> Kick<E> {
        let old = self.seq;
        self.seq = old.wrapping_add(n);
        // Pairs with the loads of `seq` in Rx::{seen, arm}.
        publish(&words[self.base + E::SEQ], self.seq, Edge::Seq);
        // Orders the store of `seq` before the load of `arm`. Together with the fence in `arm` this
        // makes sure that one end sees the other's store.
        fence(Fence::Post);
        // Pairs with the stores of `arm` in Rx::{arm, disarm}. This end reads the word once,
        // because the peer may change it at any time.
        let arm = words[self.base + E::Peer::ARM].load(Ordering::Relaxed);
        Kick::new(is_due(arm, old, n))
    }
}

/// The receiving half of end `E`, over words that each call is given.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rx<E> {
    base: usize,
    end: PhantomData<E>,
}

impl<E: End> Rx<E> {
    /// Over the block whose first word is `base`.
    pub(super) fn new(base: usize) -> Self {
        Rx { base, end: PhantomData }
    }

    /// Tells the memory of a store of `arm`.
    #[inline(always)]
    pub(super) fn stored(self, mem: &impl Memory) {
        stored(mem, self.base + E::ARM, 1);
    }

    #[inline(always)]
    pub(super) fn seen(self, words: &[Word]) -> u64 {
        // Pairs with the store of `seq` in Tx::post.
        observe(&words[self.base + E::Peer::SEQ], Edge::Seq)
    }

    #[inline]
    pub(super) fn arm(self, words: &[Word], at: u64) -> Armed {
        // Pairs with the load of `arm` in Tx::post.
        words[self.base + E::ARM].store(ARM_ENABLED | at, Ordering::Relaxed);
        // Orders the store of `arm` before the load of `seq`: see `post`.
        fence(Fence::Arm);
        if difference(self.seen(words), at) > 0 { Armed::Missed } else { Armed::Waiting }
    }

    #[inline]
    pub(super) fn disarm(self, words: &[Word]) {
        // Pairs with the load of `arm` in Tx::post.
        words[self.base + E::ARM].store(0, Ordering::Relaxed);
    }
}

fn block(mem: &impl Memory, offset: usize) -> Result<usize, BadSignal> {
    let end = offset.checked_add(BLOCK_BYTES).ok_or(BadSignal)?;
    if offset % BLOCK_ALIGN != 0 || end > mem.words().len() * WORD {
        return Err(BadSignal);
    }
    Ok(offset / WORD)
}

/// Makes the block at byte `offset` of `mem` a fresh one. Both ends count from `start`, and neither
/// is armed. The driver does this before it registers the region. A block of zeros is a fresh block
/// with `start` 0.
pub fn format(mem: &impl Memory, offset: usize, start: u64) -> Result<(), BadSignal> {
    let base = block(mem, offset)?;
    let words = &mem.words()[base..base + BLOCK_WORDS];
    for word in words {
        word.store(0, Ordering::Relaxed);
    }
    for seq in [end::Driver::SEQ, end::Device::SEQ] {
        words[seq].store(start, Ordering::Relaxed);
    }
    Ok(())
}

/// The sending half of one direction: end `E` sends.
#[derive(Debug)]
pub struct Sender<M, E> {
    mem: M,
    half: Tx<E>,
}

impl<M: Memory, E: End> Sender<M, E> {
    /// The half by which `end` sends, over the block at byte `offset` of `mem`. It counts on from
    /// `start`, the value of its `seq` now.
    pub fn new(mem: M, offset: usize, end: E, start: u64) -> Result<Self, BadSignal> {
        let _ = end;
        let half = Tx::new(block(&mem, offset)?, start);
        Ok(Sender { mem, half })
    }

    /// The half by which `end` sends, in place of a sender that ended at any moment. It counts on
    /// from the `seq` in memory. The sender before may have ended between a post and its kick, so
    /// there is a kick here if the receiver is armed for any post so far.
    pub fn resume(mem: M, offset: usize, end: E) -> Result<(Self, Kick<E>), BadSignal> {
        let _ = end;
        let base = block(&mem, offset)?;
        let seq = mem.words()[base + E::SEQ].load(Ordering::Relaxed);
        let (half, kick) = Tx::resume(mem.words(), base, seq);
        half.stored(&mem);
        Ok((Sender { mem, half }, kick))
    }

    /// Posts so far, as the receiver sees them.
    #[inline]
    pub fn posted(&self) -> u64 {
        self.half.posted()
    }

    /// Makes `n` more posts visible. A receiver that sees them sees everything that was written
    /// before. The kick is wanted at most once for each position at which the receiver arms. A peer
    /// that has not yet seen these posts does not see what is written after them.
    #[inline]
    pub fn post(&mut self, n: u32) -> Kick<E> {
        let kick = self.half.post(self.mem.words(), u64::from(n));
        self.half.stored(&self.mem);
        kick
    }
}

/// The result of arming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a receiver that missed a post must not sleep"]
pub enum Armed {
    /// The post at the position will kick. The receiver may sleep.
    Waiting,
    /// The post is already there, and so is an honest sender's data. The receiver goes on without
    /// sleeping. If it finds no data the sender is not honest. Then the receiver may sleep anyway:
    /// it loses no kick but that sender's.
    Missed,
}

/// The receiving half of one direction: end `E` receives.
#[derive(Debug)]
pub struct Receiver<M, E> {
    mem: M,
    half: Rx<E>,
}

impl<M: Memory, E: End> Receiver<M, E> {
    /// The half by which `end` receives, over the block at byte `offset` of `mem`. A receiver that
    /// takes the place of another is made in the same way; it finds the posts that the other had
    /// not consumed.
    pub fn new(mem: M, offset: usize, end: E) -> Result<Self, BadSignal> {
        let _ = end;
        let half = Rx::new(block(&mem, offset)?);
        Ok(Receiver { mem, half })
    }

    /// The sender's count of posts. After this call everything is visible that the sender wrote
    /// before them. The peer may write any value.
    #[inline]
    pub fn seen(&self) -> u64 {
        self.half.seen(self.mem.words())
    }

    /// Asks for a kick by post number `at`, counted from 0.
    #[inline]
    pub fn arm(&mut self, at: u64) -> Armed {
        let armed = self.half.arm(self.mem.words(), at);
        self.half.stored(&self.mem);
        armed
    }

    /// Asks for no kick. A kick that is already under way may still come.
    #[inline]
    pub fn disarm(&mut self) {
        self.half.disarm(self.mem.words());
        self.half.stored(&self.mem);
    }
}

/// Both halves of end `E`.
#[derive(Debug)]
#[non_exhaustive]
pub struct Signal<M, E> {
    /// Towards the peer.
    pub tx: Sender<M, E>,
    /// From the peer.
    pub rx: Receiver<M, E>,
}

impl<M: Memory + Clone, E: End> Signal<M, E> {
    /// Both halves of `end` over the block at byte `offset` of `mem`, sending from `start`.
    pub fn new(mem: M, offset: usize, end: E, start: u64) -> Result<Self, BadSignal> {
        Ok(Signal {
            tx: Sender::new(mem.clone(), offset, end, start)?,
            rx: Receiver::new(mem, offset, end)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Positions around which something could wrap around.
    const STARTS: [u64; 6] =
        [0, (1 << 31) - 2, (1 << 32) - 3, (1 << 63) - 3, u64::MAX - 3, u64::MAX];

    type Pair<'a> = (Sender<&'a [Word], end::Driver>, Receiver<&'a [Word], end::Device>);

    fn pair(memory: &[Word], start: u64) -> Pair<'_> {
        format(&memory, 0, start).unwrap();
        (
            Sender::new(memory, 0, end::Driver, start).unwrap(),
            Receiver::new(memory, 0, end::Device).unwrap(),
        )
    }

    fn memory() -> [Word; BLOCK_WORDS] {
        core::array::from_fn(|_| Word::new(0))
    }

    #[test]
    fn block_must_fit_and_be_aligned() {
        let memory = memory();
        assert!(Sender::new(&memory[..], 0, end::Driver, 0).is_ok());
        for offset in [8, 64, usize::MAX, usize::MAX - 63] {
            assert_eq!(
                Sender::new(&memory[..], offset, end::Driver, 0).unwrap_err(),
                BadSignal,
                "offset {offset}"
            );
            assert_eq!(
                Receiver::new(&memory[..], offset, end::Driver).unwrap_err(),
                BadSignal,
                "offset {offset}"
            );
        }
    }

    #[test]
    fn kicks_once_and_only_at_the_armed_position() {
        for start in STARTS {
            let memory = memory();
            let (mut tx, mut rx) = pair(&memory, start);
            assert!(!tx.post(1).is_wanted(), "the receiver has not armed");
            assert_eq!(rx.seen(), start.wrapping_add(1));
            assert_eq!(rx.arm(rx.seen()), Armed::Waiting);
            assert!(tx.post(1).is_wanted());
            assert!(!tx.post(1).is_wanted(), "the position has had its kick");
            assert_eq!(rx.arm(rx.seen().wrapping_sub(1)), Armed::Missed);
            assert_eq!(rx.arm(rx.seen().wrapping_add(2)), Armed::Waiting);
            assert!(!tx.post(2).is_wanted(), "two posts come before the position");
            assert!(tx.post(5).is_wanted(), "the batch covers the position");
            assert_eq!(rx.arm(rx.seen()), Armed::Waiting);
            rx.disarm();
            assert!(!tx.post(1).is_wanted());
        }
    }

    #[test]
    fn a_receiver_at_any_distance_behind_has_missed_the_post() {
        for behind in [1, (1 << 31) + 5, (1 << 32) + 1, (1 << 40) + 7, (1 << 62) - 1] {
            for start in STARTS {
                let memory = memory();
                let (_, mut rx) = pair(&memory, start);
                memory[end::Driver::SEQ].store(start.wrapping_add(behind), Ordering::Relaxed);
                assert_eq!(rx.arm(start), Armed::Missed, "{behind} posts behind, from {start}");
            }
        }
    }

    #[test]
    fn no_position_stands_for_another() {
        for ahead in [1 << 31, 1 << 32, 5 << 32, 1 << 62] {
            for start in STARTS {
                let memory = memory();
                let (mut tx, mut rx) = pair(&memory, start);
                assert_eq!(rx.arm(start.wrapping_add(ahead)), Armed::Waiting);
                assert!(!tx.post(1).is_wanted(), "{ahead} posts too early");
                assert!(!tx.post(u32::MAX).is_wanted() || ahead <= u64::from(u32::MAX));
            }
        }
    }

    /// The same arithmetic in words of 8 bits, with all inputs, against numbers that do not wrap
    /// around. Two ends are less than a quarter of all positions apart, as positions of 64 bits
    /// always are.
    #[test]
    fn all_positions_of_narrow_words() {
        mod narrow {
            positions!(u8, i8);
        }
        const POSITIONS: i128 = 1 << 7;
        let narrow = |position: i128| u8::try_from(position.rem_euclid(256)).unwrap();
        for start in 0..=u8::MAX {
            // As the receiver stores it, `arm` has a bit less.
            for distance in -POSITIONS / 2..POSITIONS / 2 {
                let at = i128::from(start) + distance;
                let (arm, seq) = (narrow(at) | narrow::ENABLED, start);
                assert_eq!(i128::from(narrow::difference(arm, seq)), distance, "{start} {at}");
                assert_eq!(i128::from(narrow::difference(narrow(at), seq)), distance);
                assert_eq!(narrow::was_due(arm, seq), distance < 0, "{start} {at}");
                assert!(!narrow::was_due(arm & !narrow::ENABLED, seq));
            }
            // A position that is ahead is met by the posts that reach it, and by no others.
            for (ahead, n) in
                (0..POSITIONS).flat_map(|ahead| (0..=u8::MAX).map(move |n| (ahead, n)))
            {
                let arm = narrow(i128::from(start) + ahead) | narrow::ENABLED;
                let met = (0..i128::from(n)).contains(&ahead);
                assert_eq!(narrow::is_due(arm, start, n), met, "{start} {ahead} {n}");
                assert!(!narrow::is_due(arm & !narrow::ENABLED, start, n));
            }
        }
    }

    #[test]
    fn the_two_directions_are_independent() {
        let memory = memory();
        let mut driver = Signal::new(&memory[..], 0, end::Driver, 0).unwrap();
        let mut device = Signal::new(&memory[..], 0, end::Device, 0).unwrap();
        assert_eq!(driver.rx.arm(0), Armed::Waiting);
        assert!(!driver.tx.post(3).is_wanted());
        assert!(device.tx.post(1).is_wanted());
        assert_eq!((driver.rx.seen(), device.rx.seen()), (1, 3));
    }

    #[test]
    fn a_resumed_sender_makes_up_for_a_lost_kick() {
        for start in STARTS {
            let memory = memory();
            let (mut tx, mut rx) = pair(&memory, start);
            let (_, kick) = Sender::resume(&memory[..], 0, end::Driver).unwrap();
            assert!(!kick.is_wanted(), "nobody has armed");
            assert_eq!(rx.arm(start), Armed::Waiting);
            let (_, kick) = Sender::resume(&memory[..], 0, end::Driver).unwrap();
            assert!(!kick.is_wanted(), "nothing was posted");
            let _ = tx.post(1); // The sender ends here, and its kick is lost.
            let (mut tx, kick) = Sender::resume(&memory[..], 0, end::Driver).unwrap();
            assert!(kick.is_wanted());
            assert_eq!(tx.posted(), start.wrapping_add(1));
            assert_eq!(rx.arm(rx.seen()), Armed::Waiting);
            assert!(tx.post(1).is_wanted());
        }
    }

    #[test]
    fn any_word_of_the_peer_is_harmless() {
        let memory = memory();
        let (mut tx, mut rx) = pair(&memory, 7);
        for hostile in [0, 7, u64::MAX, 1 << 32, u64::from(u32::MAX) | ARM_ENABLED, 1 << 63] {
            memory[end::Driver::SEQ].store(hostile, Ordering::Relaxed);
            let _ = rx.arm(rx.seen());
            memory[end::Device::ARM].store(hostile, Ordering::Relaxed);
            let kicks = (0..100).filter(|_| tx.post(1).is_wanted()).count();
            assert!(kicks <= 1, "{hostile:#x} brought {kicks} kicks");
        }
    }
}
