//! Signal: who wakes whom, and when (spec/shared-memory.md, "Signal").
//!
//! Each direction has two words with one writer each, in lines of their own: the sender's `seq`, a free-running count of posts, and the
//! receiver's `arm`, a position at which it wants to be kicked, or nothing. From these two follows all that three shared flags used to say:
//! *dirty* is "`seq` differs from what I consumed", *pending* is "`seq` has passed `at`". So a burst costs one kick, and a receiver that
//! polls costs none.
//!
//! Position `at` is the number of the post that shall kick: a receiver that has consumed everything up to `seen` arms at `seen`, to be
//! kicked by the very next post, or at `seen + k`, to be kicked after `k` more (and then it owns the time-out that goes with it).

use super::memory::{Memory, WORD};
use super::sync::{Fence, Ordering, fence};

/// Bytes of a signal block: four lines, for both directions.
pub const BLOCK_BYTES: usize = 256;
/// Alignment of a signal block within its region, in bytes.
pub const BLOCK_ALIGN: usize = 64;

const LINE_WORDS: usize = 64 / WORD;
const ARM_ENABLED: u64 = 1 << 32;

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

    /// Word offsets within the block of (`seq` written by this end, `arm` written by this end). Line 0: the driver's `seq`; line 1: the
    /// device's `arm` for it; line 2: the device's `seq`; line 3: the driver's `arm` for it.
    fn own_words(self) -> (usize, usize) {
        match self {
            End::Driver => (0, 3 * LINE_WORDS),
            End::Device => (2 * LINE_WORDS, LINE_WORDS),
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

/// The sending half of one direction.
#[derive(Debug)]
pub struct Sender<M> {
    mem: M,
    seq_word: usize,
    arm_word: usize,
    seq: u32,
}

impl<M: Memory> Sender<M> {
    /// The half by which `end` sends, over the block at byte `offset` of `mem`, counting from `start`.
    pub fn new(mem: M, offset: usize, end: End, start: u32) -> Result<Self, BadSignal> {
        let base = block(&mem, offset)?;
        let seq_word = base + end.own_words().0;
        let arm_word = base + end.peer().own_words().1;
        Ok(Sender { mem, seq_word, arm_word, seq: start })
    }

    /// Posts so far, as the receiver sees them.
    #[inline]
    pub fn posted(&self) -> u32 {
        self.seq
    }

    /// Makes `n` more posts visible, after everything written before. Returns whether the receiver must be kicked: at most one kick for each
    /// position that the receiver arms at. What is written after `post` is not seen by a peer that has not yet seen these posts.
    #[inline]
    #[must_use = "true asks for a kick; without it the receiver may sleep for ever"]
    pub fn post(&mut self, n: u32) -> bool {
        let old = self.seq;
        self.seq = old.wrapping_add(n);
        let words = self.mem.words();
        // Pairs with the loads of `seq` in Receiver::{seen, arm}.
        words[self.seq_word].store(u64::from(self.seq), Ordering::Release);
        // Store of `seq` before load of `arm`: with the fence in `arm`, one of the two ends sees the other's store.
        fence(Fence::Post);
        // Pairs with the stores of `arm` in Receiver::{arm, disarm}. Read once: the peer may change it at any time.
        let arm = words[self.arm_word].load(Ordering::Relaxed);
        arm & ARM_ENABLED != 0 && (arm as u32).wrapping_sub(old) < n
    }
}

/// What came of arming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a receiver that missed a post must not sleep"]
pub enum Armed {
    /// The post at the position will kick: it is safe to sleep.
    Waiting,
    /// It is already there: go on without sleeping. An honest sender's data is visible; if there is none, the sender is not honest, and the
    /// receiver may sleep all the same (it loses that sender's kick only).
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
        let seq_word = base + end.peer().own_words().0;
        let arm_word = base + end.own_words().1;
        Ok(Receiver { mem, seq_word, arm_word })
    }

    /// The sender's count of posts; everything written before them is visible after this call. It is the peer's word: any value may come.
    #[inline]
    pub fn seen(&self) -> u32 {
        // Pairs with the store of `seq` in Sender::post.
        self.mem.words()[self.seq_word].load(Ordering::Acquire) as u32
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
        Ok(Signal { tx: Sender::new(mem.clone(), offset, end, start)?, rx: Receiver::new(mem, offset, end)? })
    }
}
