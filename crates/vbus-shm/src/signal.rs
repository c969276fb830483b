//! Signal: who wakes whom, and when (spec/shared-memory.md, "Signal").
//!
//! Each direction has two words with one writer each, in lines of their own: the sender's `seq`, a
//! free-running count of posts, and the receiver's `arm`, a position at which it wants to be
//! kicked, or nothing. From these two follows all that three shared flags used to say: *dirty* is
//! "`seq` differs from what I consumed", *pending* is "`seq` has passed `at`". So a burst costs one
//! kick, and a receiver that polls costs none.
//!
//! Position `at` is the number of the post that shall kick: a receiver that has consumed everything
//! up to `seen` arms at `seen`, to be kicked by the very next post, or at `seen + k`, to be kicked
//! after `k` more (and then it owns the time-out that goes with it).

use super::memory::{Memory, WORD, low};
use super::sync::{Edge, Fence, Ordering, fence, observe, publish};

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

/// The bit of `arm` that says that a kick is wanted; its position is in bits 0..32.
pub const ARM_ENABLED: u64 = 1 << 32;

const _: () = {
    assert!(size_of::<super::sync::Word>() >= WORD); // A model checker's word is larger.
    assert!(DRIVER_SEQ == 0 && DEVICE_ARM == 64 && DEVICE_SEQ == 128 && DRIVER_ARM == 192);
    assert!(BLOCK_BYTES == DRIVER_ARM + 64 && BLOCK_ALIGN == 64);
};

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The driver, which owns the memory.
    Driver,
    /// The device, to which the memory was registered.
    Device,
}

impl End {
    /// The other one.
    pub fn peer(self) -> End {
        match self {
            End::Driver => End::Device,
            End::Device => End::Driver,
        }
    }

    fn seq_word(self) -> usize {
        match self {
            End::Driver => DRIVER_SEQ / WORD,
            End::Device => DEVICE_SEQ / WORD,
        }
    }

    fn arm_word(self) -> usize {
        match self {
            End::Driver => DRIVER_ARM / WORD,
            End::Device => DEVICE_ARM / WORD,
        }
    }
}

/// The signal block does not fit its region, or is not aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadSignal;

fn block(mem: &impl Memory, offset: usize) -> Result<usize, BadSignal> {
    let end = offset.checked_add(BLOCK_BYTES).ok_or(BadSignal)?;
    if offset % BLOCK_ALIGN != 0 || end > mem.words().len() * WORD {
        return Err(BadSignal);
    }
    Ok(offset / WORD)
}

/// Makes the block at byte `offset` of `mem` a fresh one: both ends count from `start`, nobody is armed. Done by the driver before it
/// registers the region; a block of zeros is one with `start` 0.
pub fn format(mem: &impl Memory, offset: usize, start: u32) -> Result<(), BadSignal> {
    let base = block(mem, offset)?;
    let words = &mem.words()[base..base + BLOCK_BYTES / WORD];
    for word in words {
        word.store(0, Ordering::Relaxed);
    }
    for end in [End::Driver, End::Device] {
        words[end.seq_word()].store(u64::from(start), Ordering::Relaxed);
    }
    Ok(())
}

/// The sending half of one direction.
#[derive(Debug)]
pub struct Sender<M> {
    mem: M,
    seq_word: usize,
    arm_word: usize,
    seq: u32,
}

impl<M: Memory> Sender<M> {
    /// The half by which `end` sends, over the block at byte `offset` of `mem`, counting on from
    /// `start`: what its `seq` holds now.
    pub fn new(mem: M, offset: usize, end: End, start: u32) -> Result<Self, BadSignal> {
        let base = block(&mem, offset)?;
        Ok(Sender {
            mem,
            seq_word: base + end.seq_word(),
            arm_word: base + end.peer().arm_word(),
            seq: start,
        })
    }

    /// Posts so far, as the receiver sees them.
    #[inline]
    pub fn posted(&self) -> u32 {
        self.seq
    }

    /// Makes `n` more posts visible, after everything written before. Returns whether the receiver
    /// must be kicked: at most one kick for each position that the receiver arms at. What is
    /// written after `post` is not seen by a peer that has not yet seen these posts.
    #[inline]
    #[must_use = "true asks for a kick; without it the receiver may sleep for ever"]
    pub fn post(&mut self, n: u32) -> bool {
        let old = self.seq;
        self.seq = old.wrapping_add(n);
        let words = self.mem.words();
        // Pairs with the loads of `seq` in Receiver::{seen, arm}.
        publish(&words[self.seq_word], u64::from(self.seq), Edge::Seq);
        // Store of `seq` before load of `arm`: with the fence in `arm`, one of the two ends sees
        // the other's store.
        fence(Fence::Post);
        // Pairs with the stores of `arm` in Receiver::{arm, disarm}. Read once: the peer may change
        // it at any time.
        let arm = words[self.arm_word].load(Ordering::Relaxed);
        arm & ARM_ENABLED != 0 && low(arm).wrapping_sub(old) < n
    }
}

/// What came of arming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a receiver that missed a post must not sleep"]
pub enum Armed {
    /// The post at the position will kick: it is safe to sleep.
    Waiting,
    /// It is already there: go on without sleeping. An honest sender's data is visible; if there is
    /// none, the sender is not honest, and the receiver may sleep all the same (it loses that
    /// sender's kick only).
    Missed,
}

/// The receiving half of one direction.
#[derive(Debug)]
pub struct Receiver<M> {
    mem: M,
    seq_word: usize,
    arm_word: usize,
}

impl<M: Memory> Receiver<M> {
    /// The half by which `end` receives, over the block at byte `offset` of `mem`.
    pub fn new(mem: M, offset: usize, end: End) -> Result<Self, BadSignal> {
        let base = block(&mem, offset)?;
        Ok(Receiver {
            mem,
            seq_word: base + end.peer().seq_word(),
            arm_word: base + end.arm_word(),
        })
    }

    /// The sender's count of posts; everything written before them is visible after this call. It
    /// is the peer's word: any value may come.
    #[inline]
    pub fn seen(&self) -> u32 {
        // Pairs with the store of `seq` in Sender::post.
        low(observe(&self.mem.words()[self.seq_word], Edge::Seq))
    }

    /// Asks for a kick by post number `at`.
    #[inline]
    pub fn arm(&mut self, at: u32) -> Armed {
        let words = self.mem.words();
        // Pairs with the load of `arm` in Sender::post.
        words[self.arm_word].store(ARM_ENABLED | u64::from(at), Ordering::Relaxed);
        // Store of `arm` before load of `seq`: see `post`.
        fence(Fence::Arm);
        let passed = self.seen().wrapping_sub(at) as i32 > 0;
        if passed { Armed::Missed } else { Armed::Waiting }
    }

    /// Asks for no kick. One that is already under way may still come.
    #[inline]
    pub fn disarm(&mut self) {
        self.mem.words()[self.arm_word].store(0, Ordering::Relaxed);
    }
}

/// Both halves of one end.
#[derive(Debug)]
pub struct Signal<M> {
    /// Towards the peer.
    pub tx: Sender<M>,
    /// From the peer.
    pub rx: Receiver<M>,
}

impl<M: Memory + Clone> Signal<M> {
    /// Both halves of `end` over the block at byte `offset` of `mem`, sending from `start`.
    pub fn new(mem: M, offset: usize, end: End, start: u32) -> Result<Self, BadSignal> {
        Ok(Signal {
            tx: Sender::new(mem.clone(), offset, end, start)?,
            rx: Receiver::new(mem, offset, end)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::Word;

    fn pair(memory: &[Word], start: u32) -> (Sender<&[Word]>, Receiver<&[Word]>) {
        format(&memory, 0, start).unwrap();
        (
            Sender::new(memory, 0, End::Driver, start).unwrap(),
            Receiver::new(memory, 0, End::Device).unwrap(),
        )
    }

    fn memory() -> [Word; 32] {
        core::array::from_fn(|_| Word::new(0))
    }

    #[test]
    fn block_must_fit_and_be_aligned() {
        let memory = memory();
        assert!(Sender::new(&memory[..], 0, End::Driver, 0).is_ok());
        for offset in [8, 64, usize::MAX, usize::MAX - 63] {
            assert_eq!(
                Sender::new(&memory[..], offset, End::Driver, 0).unwrap_err(),
                BadSignal,
                "offset {offset}"
            );
            assert_eq!(
                Receiver::new(&memory[..], offset, End::Driver).unwrap_err(),
                BadSignal,
                "offset {offset}"
            );
        }
    }

    #[test]
    fn kicks_once_and_only_at_the_armed_position() {
        for start in [0, u32::MAX - 3] {
            let memory = memory();
            let (mut tx, mut rx) = pair(&memory, start);
            assert!(!tx.post(1), "nobody has armed");
            assert_eq!(rx.seen(), start.wrapping_add(1));
            assert_eq!(rx.arm(rx.seen()), Armed::Waiting);
            assert!(tx.post(1));
            assert!(!tx.post(1), "one kick a position");
            assert_eq!(rx.arm(rx.seen().wrapping_sub(1)), Armed::Missed);
            assert_eq!(rx.arm(rx.seen().wrapping_add(2)), Armed::Waiting);
            assert!(!tx.post(2), "two more are let pass");
            assert!(tx.post(5), "a batch that covers the position");
            assert_eq!(rx.arm(rx.seen()), Armed::Waiting);
            rx.disarm();
            assert!(!tx.post(1));
        }
    }

    #[test]
    fn directions_are_apart() {
        let memory = memory();
        let mut driver = Signal::new(&memory[..], 0, End::Driver, 0).unwrap();
        let mut device = Signal::new(&memory[..], 0, End::Device, 0).unwrap();
        assert_eq!(driver.rx.arm(0), Armed::Waiting);
        assert!(!driver.tx.post(3));
        assert!(device.tx.post(1));
        assert_eq!((driver.rx.seen(), device.rx.seen()), (1, 3));
    }

    #[test]
    fn any_word_of_the_peer_is_harmless() {
        let memory = memory();
        let (mut tx, mut rx) = pair(&memory, 7);
        for hostile in [0, 7, u64::MAX, 1 << 32, u64::from(u32::MAX) | ARM_ENABLED, 1 << 63] {
            memory[DRIVER_SEQ / WORD].store(hostile, Ordering::Relaxed);
            let _ = rx.arm(rx.seen());
            memory[DEVICE_ARM / WORD].store(hostile, Ordering::Relaxed);
            let kicks = (0..100).filter(|_| tx.post(1)).count();
            assert!(kicks <= 1, "{hostile:#x} brought {kicks} kicks");
        }
    }
}
