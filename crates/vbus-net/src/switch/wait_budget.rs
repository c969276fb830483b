// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits how long the queue of a sender waits for receivers.

use std::time::{Duration, Instant};

/// A sender that has frames for others spends at most this part of its time on waiting for one
/// receiver: 1/64.
const SHARE_EACH: u32 = 64;
/// The same for all receivers together: 1/32.
const SHARE_ALL: u32 = 32;
/// How long the sender may wait for one receiver at a time, after it has not waited for a while.
const SPELL_EACH: Duration = Duration::from_millis(50);
/// The same for all receivers together.
const SPELL_ALL: Duration = Duration::from_millis(100);
/// A sender whose frames go to one receiver may wait for it without a limit of its own, because no
/// other frame waits behind. It counts as such a sender after this time with few other frames.
const ALONE_AFTER: Duration = Duration::from_secs(1);
/// The most changes of the receiver, in [`ALONE_AFTER`], that are few. A frame for another receiver
/// between two others makes two changes. Hosts that exchange data with one peer also resolve names
/// and addresses. Such a frame waits behind those before it in the ring.
const FEW: u32 = 8;

/// The wait budget of one queue of a sender.
///
/// A frame that waits for its receiver's buffers holds up all frames behind it. Those for the same
/// receiver lose nothing: they would wait too. Those for other receivers lose time. So a sender
/// that has both waits only while its allowance lasts, and then its frames that find no buffers are
/// dropped. However slowly and however cleverly receivers post their buffers, the sender spends no
/// more than a fixed part of its time on them. A sender with at most [`FEW`] changes of the
/// receiver has no such limit.
#[derive(Debug)]
pub struct WaitBudget {
    all: Allowance,
    /// The allowance for each receiver that the sender has waited for, by the number of its port.
    each: Vec<(u64, Allowance)>,
    /// The receiver that the sender waits for, and since when.
    waiting: Option<(u64, Instant)>,
    /// The receiver of the last frame.
    last: Option<u64>,
    /// How often the receiver has changed since `counted_at`.
    changes: u32,
    counted_at: Instant,
    /// When there were too many changes.
    mixed_at: Option<Instant>,
}

/// A time that comes back slowly.
#[derive(Clone, Copy, Debug, Default)]
struct Allowance {
    used: Duration,
    at: Option<Instant>,
}

impl Allowance {
    /// What is left of `spell`, if each second gives 1/`share` s back.
    fn left(&mut self, spell: Duration, share: u32, now: Instant) -> Duration {
        if let Some(at) = self.at.replace(now) {
            self.used = self.used.saturating_sub(now.saturating_duration_since(at) / share);
        }
        spell.saturating_sub(self.used)
    }
}

/// Whether the sender waits for a receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It waits, until this time at most, if there is one.
    Wait(Option<Instant>),
    /// It does not wait any more: the frame must be dropped.
    Drop,
}

impl WaitBudget {
    /// The whole budget, of a sender without frames so far.
    pub fn new(now: Instant) -> WaitBudget {
        WaitBudget {
            all: Allowance::default(),
            each: Vec::new(),
            waiting: None,
            last: None,
            changes: 0,
            counted_at: now,
            mixed_at: None,
        }
    }

    /// The head frame has gone to port `receiver`, or was dropped. `None`: it went to several
    /// ports, or to none. Such frames, of which a sender with one receiver has a few too, do not
    /// count as frames for others.
    pub fn went(&mut self, receiver: Option<u64>) {
        if let Some(receiver) = receiver {
            self.turn_to(receiver);
        }
        if self.waiting.is_some() {
            self.ended(Instant::now());
        }
    }

    fn turn_to(&mut self, receiver: u64) {
        let last = self.last.replace(receiver);
        let is_change = last.is_some_and(|last| last != receiver);
        self.changes = self.changes.saturating_add(u32::from(is_change));
    }

    /// The wait has ended: it counts as used.
    fn ended(&mut self, now: Instant) {
        let Some((receiver, since)) = self.waiting.take() else { return };
        if self.is_alone(now) {
            return;
        }
        let waited = now.saturating_duration_since(since);
        self.all.used += waited;
        if let Some((_, each)) = self.each.iter_mut().find(|(port, _)| *port == receiver) {
            each.used += waited;
        }
    }

    /// The head frame finds too few buffers at port `receiver`.
    pub fn blocked(&mut self, receiver: u64, now: Instant) -> Verdict {
        if self.waiting.is_some_and(|(port, _)| port != receiver) {
            self.ended(now);
        }
        self.turn_to(receiver);
        let since = self.waiting.get_or_insert((receiver, now)).1;
        if self.is_alone(now) {
            return Verdict::Wait(None);
        }
        let at = self.each.iter().position(|(port, _)| *port == receiver);
        let at = at.unwrap_or_else(|| {
            // Ports that have gone, and ports that the sender has not waited for lately, are
            // forgotten here.
            self.each.retain_mut(|(_, each)| each.left(SPELL_EACH, SHARE_EACH, now) < SPELL_EACH);
            self.each.push((receiver, Allowance::default()));
            self.each.len() - 1
        });
        // The time since the wait began is used, but not yet counted. It gives nothing back.
        let each = self.each[at].1.left(SPELL_EACH, SHARE_EACH, since);
        let until = since + each.min(self.all.left(SPELL_ALL, SHARE_ALL, since));
        if now < until { Verdict::Wait(Some(until)) } else { Verdict::Drop }
    }

    /// The waiting frame will not be sent again.
    pub fn forget(&mut self) {
        self.waiting = None;
    }

    /// Whether few frames have gone to other receivers for long.
    fn is_alone(&mut self, now: Instant) -> bool {
        // Without a wait nobody reads the clock, so the time may be long.
        let time = now.saturating_duration_since(self.counted_at).max(ALONE_AFTER);
        let is_many = f64::from(self.changes) > f64::from(FEW) * time.div_duration_f64(ALONE_AFTER);
        if is_many {
            self.mixed_at = Some(now);
        }
        if is_many || time > ALONE_AFTER {
            (self.changes, self.counted_at) = (0, now);
        }
        self.mixed_at.is_none_or(|at| now.saturating_duration_since(at) >= ALONE_AFTER)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 20 s of frames.
    const FRAMES: u64 = 2_000_000;

    /// A sender with `hostile` receivers that post one buffer at a time, after these ticks by
    /// turns, and one good receiver. Each frame takes a tick of 10 us of a clock that the test
    /// keeps. `share` frames of 100 go to the hostile ones. Returns the ticks and the frames to the
    /// good one, and the drops.
    fn run(frames: u64, hostile: usize, share: u64, gaps: &[u64]) -> (u64, u64, u64) {
        let start = Instant::now();
        let mut budget = WaitBudget::new(start);
        let mut gaps = gaps.iter().cycle();
        let mut posts = vec![0_u64; hostile];
        let (mut ticks, mut good, mut drops) = (0, 0, 0);
        let mut turns = (0..hostile).cycle();
        for n in 0..frames {
            let now = |ticks: u64| start + Duration::from_micros(10 * ticks);
            ticks += 1;
            if n % 100 >= share {
                budget.turn_to(1000);
                budget.ended(now(ticks));
                good += 1;
                continue;
            }
            let receiver = turns.next().unwrap_or(0);
            loop {
                if ticks >= posts[receiver] {
                    posts[receiver] = ticks + gaps.next().unwrap_or(&0);
                    budget.turn_to(receiver as u64);
                    budget.ended(now(ticks));
                    break;
                }
                match budget.blocked(receiver as u64, now(ticks)) {
                    Verdict::Wait(_) => ticks += 1,
                    Verdict::Drop => {
                        budget.ended(now(ticks));
                        drops += 1;
                        break;
                    }
                }
            }
        }
        (ticks, good, drops)
    }

    #[test]
    fn receivers_that_dribble_cost_less_than_5_percent() {
        for hostile in [1, 2, 10] {
            for share in [1, 10, 50, 90, 99] {
                let (ticks, good, drops) = run(FRAMES, hostile, share, &[95]);
                // Without any wait the run takes as many ticks as frames.
                let wasted = ticks - FRAMES;
                assert!(wasted * 20 < ticks, "{hostile} {share}: {wasted} of {ticks} ticks");
                assert_eq!(good, FRAMES / 100 * (100 - share));
                assert!(drops > 0 || hostile > 1 || share == 1, "they are slower than that");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the receivers post, and when. Those that are slower than 1 ms a buffer use up
        /// their own backpressure budget, which this model leaves out.
        #[test]
        fn no_pattern_of_buffers_costs_more(
            hostile in 1_usize..8,
            share in 1_u64..100,
            gaps in prop::collection::vec(1_u64..100, 1..40),
        ) {
            const FRAMES: u64 = 500_000;
            // Until the sender is known to have frames for others, it waits for each frame of a few
            // hundred.
            const AT_FIRST: u64 = 100 * 100 * (FEW as u64 / 2 + 1);
            let (ticks, good, _) = run(FRAMES, hostile, share, &gaps);
            let wasted = ticks - FRAMES;
            prop_assert!(wasted.saturating_sub(AT_FIRST) * 20 < ticks, "{wasted} of {ticks} ticks");
            prop_assert_eq!(good, FRAMES / 100 * (100 - share));
        }
    }

    #[test]
    fn a_sender_with_one_receiver_waits_as_long_as_it_takes() {
        let start = Instant::now();
        let mut budget = WaitBudget::new(start);
        let at = |seconds| start + Duration::from_secs(seconds);
        for seconds in 0..100 {
            assert_eq!(budget.blocked(1, at(seconds)), Verdict::Wait(None));
        }
        budget.ended(at(100));
        // A few frames for other receivers change nothing: one a second, for example.
        budget.went(None);
        for tenths in 1000..2000 {
            let now = start + Duration::from_millis(100 * tenths);
            if tenths % 10 == 0 {
                budget.went(Some(2));
            }
            assert_eq!(budget.blocked(1, now), Verdict::Wait(None), "{tenths}");
            budget.ended(now + Duration::from_millis(90));
        }
        // Many do, for a second.
        let at = |seconds: u64| start + Duration::from_secs(100 + seconds);
        for _ in 0..=FEW / 2 {
            budget.went(Some(2));
            budget.went(Some(1));
        }
        let Verdict::Wait(Some(until)) = budget.blocked(1, at(100)) else { panic!() };
        assert_eq!(until, at(100) + SPELL_EACH, "what it waited before does not count");
        assert_eq!(budget.blocked(1, until), Verdict::Drop);
        assert_eq!(budget.blocked(1, at(102)), Verdict::Wait(None));
    }

    #[test]
    fn the_allowance_of_all_receivers_is_bounded_too() {
        let start = Instant::now();
        let mut budget = WaitBudget::new(start);
        let mut now = start;
        for receiver in 1..=100 {
            budget.changes = FEW + 1;
            while let Verdict::Wait(Some(until)) = budget.blocked(receiver, now) {
                now = until;
            }
            budget.ended(now);
        }
        assert!(now < start + SPELL_ALL * 11 / 10, "{:?}", now - start);
        assert!(budget.each.len() <= 100);
        budget.changes = u32::MAX;
        budget.blocked(1000, now + Duration::from_secs(100));
        assert!(budget.each.len() <= 3, "those not used for long are forgotten");
    }
}
