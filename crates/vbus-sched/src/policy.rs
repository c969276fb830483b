// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests, and the part of a request that the host's policy grants.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vbus_core::shm::abi::sched as abi;

/// A scheduling class and a priority within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The number of the class (`vbus_shm::abi::sched`, `CLASS_*`).
    pub class: u32,
    /// The real-time priority, 1 to 99; or, in the other classes, the nice value, -20 to 19.
    pub priority: i32,
}

impl Setting {
    /// Whether it precedes every ordinary thread.
    pub fn is_real_time(self) -> bool {
        matches!(self.class, abi::CLASS_FIFO | abi::CLASS_RR)
    }
}

/// A value that is not a valid request.
#[derive(Debug, PartialEq, Eq)]
pub struct BadRequest;

/// Parses the value of a request page. `None` is the thread's own class.
pub fn parse(value: &[u8; abi::request::BYTES as usize]) -> Result<Option<Setting>, BadRequest> {
    let word = |at: usize| [value[at], value[at + 1], value[at + 2], value[at + 3]];
    let class = u32::from_le_bytes(word(abi::request::CLASS));
    let priority = i32::from_le_bytes(word(abi::request::PRIORITY));
    let good = match class {
        abi::CLASS_NORMAL | abi::CLASS_BATCH => (-20..=19).contains(&priority),
        abi::CLASS_FIFO | abi::CLASS_RR => (1..=99).contains(&priority),
        abi::CLASS_NONE | abi::CLASS_IDLE => priority == 0,
        _ => false,
    };
    if !good || value[8..] != [0; 8] {
        return Err(BadRequest);
    }
    Ok((class != abi::CLASS_NONE).then_some(Setting { class, priority }))
}

/// What the host allows the driver.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The allowed classes: bit n is class n.
    pub classes: u32,
    /// The highest real-time priority, 1..=99.
    pub priority_max: i32,
    /// The lowest nice value; `None`: the thread's own.
    pub nice_min: Option<i32>,
    /// How many requests a second the device reads, for each virtual CPU.
    pub changes: u32,
    /// How long a real-time class lasts without another request.
    pub boost: Duration,
    /// The share of a second's processor time that a thread may use at a real-time class, in
    /// percent; 100: no limit.
    pub share: u32,
}

/// The part of a request that the policy grants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// The whole request.
    Whole(Setting),
    /// The class, with the nearest allowed priority.
    Clamped(Setting),
    /// Nothing: the policy does not allow the class.
    Refused,
}

impl Policy {
    /// Decides about a request for a thread. `own_nice` reads the thread's own nice value, which
    /// takes time; it is called only if the decision needs the value.
    ///
    /// # Errors
    /// That of `own_nice`.
    pub fn judge<E>(
        &self,
        wish: Setting,
        own_nice: impl FnOnce() -> Result<i32, E>,
    ) -> Result<Grant, E> {
        if self.classes & 1 << wish.class == 0 {
            return Ok(Grant::Refused);
        }
        let priority = match wish.class {
            abi::CLASS_NORMAL | abi::CLASS_BATCH => {
                wish.priority.max(self.nice_min.map_or_else(own_nice, Ok)?)
            }
            abi::CLASS_FIFO | abi::CLASS_RR => wish.priority.min(self.priority_max),
            _ => wish.priority,
        };
        let setting = Setting { priority, ..wish };
        Ok(if setting == wish { Grant::Whole(setting) } else { Grant::Clamped(setting) })
    }
}

/// A rate limit: in any time T it allows at most `rate * T + burst` uses.
pub struct Budget {
    interval: Duration,
    /// How far the uses may be ahead of the rate.
    ahead: Duration,
    /// When the uses will be even with the rate again.
    even: Option<Instant>,
}

/// The burst is this part of a second's uses.
const BURST: u32 = 10;

impl Budget {
    /// Allows `rate` uses a second. After a rest it allows the uses of a tenth of a second at once,
    /// but at least one.
    pub fn new(rate: u32) -> Budget {
        let interval = Duration::from_secs(1) / rate.max(1);
        Budget { interval, ahead: interval * (burst(rate) - 1), even: None }
    }

    /// Takes one use, or returns when the next one will be allowed.
    pub fn take(&mut self, now: Instant) -> Result<(), Instant> {
        let even = self.even.map_or(now, |even| even.max(now));
        if even > now + self.ahead {
            return Err(even - self.ahead);
        }
        self.even = Some(even + self.interval);
        Ok(())
    }
}

/// How many uses a budget with this rate allows at once.
pub fn burst(rate: u32) -> u32 {
    (rate / BURST).max(1)
}

/// Measures the processor time that a thread uses at real-time classes, and limits it in each
/// window of a second.
pub struct Share {
    allowed: Duration,
    start: Option<Instant>,
    used: Duration,
    /// The thread's processor time at the last reading, while it is at a real-time class.
    mark: Option<Duration>,
}

const WINDOW: Duration = Duration::from_secs(1);
/// The least time between two readings.
const LOOK_MIN: Duration = Duration::from_millis(1);

impl Share {
    /// Makes a share of `percent` of a processor.
    pub fn new(percent: u32) -> Share {
        Share {
            allowed: WINDOW * percent.min(100) / 100,
            start: None,
            used: Duration::ZERO,
            mark: None,
        }
    }

    /// Whether there is a limit at all.
    pub fn is_bounded(&self) -> bool {
        self.allowed < WINDOW
    }

    /// Takes a reading: the thread has used `time` so far in its life. `real_time`: the thread is
    /// at a real-time class from now on.
    pub fn look(&mut self, now: Instant, time: Duration, real_time: bool) {
        if let Some(mark) = self.mark {
            self.used += time.saturating_sub(mark);
        }
        self.mark = real_time.then_some(time);
        self.roll(now);
    }

    /// Starts to account for another thread, which is not at a real-time class.
    pub fn forget(&mut self) {
        self.mark = None;
    }

    fn roll(&mut self, now: Instant) {
        if self.start.is_none_or(|start| now >= start + WINDOW) {
            (self.start, self.used) = (Some(now), Duration::ZERO);
        }
    }

    /// Whether the thread has used up this window's share.
    pub fn is_spent(&mut self, now: Instant) -> bool {
        self.roll(now);
        self.is_bounded() && self.used >= self.allowed
    }

    /// When the next reading is due: before the thread can have used more than its share, or when a
    /// new window begins.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let end = self.start.filter(|_| self.is_bounded())? + WINDOW;
        match self.allowed.checked_sub(self.used).filter(|left| !left.is_zero()) {
            Some(left) => self.mark.map(|_| end.min(now + left.max(LOOK_MIN))),
            None => Some(end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How much of ten seconds a thread that always wants to run spends at a real-time class.
    fn greedy(percent: u32, idle_first: Duration) -> Duration {
        let (mut share, start) = (Share::new(percent), Instant::now());
        let (mut now, mut time, mut real_time) = (start, Duration::ZERO, Duration::ZERO);
        share.look(now, time, true);
        now += idle_first;
        while now < start + Duration::from_secs(10) {
            let boosted = !share.is_spent(now);
            share.look(now, time, boosted);
            let next = share.deadline(now).unwrap();
            assert!(next > now, "looks come to an end");
            time += next - now;
            if boosted {
                real_time += next - now;
            }
            share.look(next, time, boosted);
            now = next;
        }
        real_time
    }

    #[test]
    fn nobody_uses_more_than_its_share() {
        for percent in [1, 10, 50, 99] {
            for idle in [0, 1, 500, 999].map(Duration::from_millis) {
                let real_time = greedy(percent, idle).as_millis();
                let (least, most) = (u128::from(percent) * 89, u128::from(percent) * 111 + 11);
                assert!(
                    (least..=most).contains(&real_time),
                    "{real_time} ms of 10 s with {percent} % after {idle:?}"
                );
            }
        }
        let mut all = Share::new(100);
        let now = Instant::now();
        all.look(now, Duration::ZERO, true);
        all.look(now + WINDOW / 2, WINDOW * 2, true);
        assert!(!all.is_spent(now + WINDOW / 2) && all.deadline(now).is_none());
    }

    #[test]
    fn time_at_other_classes_does_not_count() {
        let (mut share, now) = (Share::new(50), Instant::now());
        let at = |ms| Duration::from_millis(ms);
        share.look(now, at(1000), true);
        share.look(now + at(100), at(1100), false);
        share.look(now + at(600), at(1600), true);
        share.look(now + at(900), at(1900), true);
        assert_eq!(share.used, at(400));
        assert_eq!(share.deadline(now + at(900)), Some(now + at(1000)));
    }

    fn request(class: u32, priority: i32) -> [u8; 16] {
        let mut value = [0; 16];
        value[..4].copy_from_slice(&class.to_le_bytes());
        value[4..8].copy_from_slice(&priority.to_le_bytes());
        value
    }

    #[test]
    fn requests_are_read_strictly() {
        let good = |class, priority| {
            assert_eq!(parse(&request(class, priority)), Ok(Some(Setting { class, priority })))
        };
        let bad = |class, priority| assert_eq!(parse(&request(class, priority)), Err(BadRequest));
        assert_eq!(parse(&[0; 16]), Ok(None));
        for class in [abi::CLASS_NORMAL, abi::CLASS_BATCH] {
            [-20, 0, 19].into_iter().for_each(|nice| good(class, nice));
            [-21, 20, i32::MIN, i32::MAX].into_iter().for_each(|nice| bad(class, nice));
        }
        for class in [abi::CLASS_FIFO, abi::CLASS_RR] {
            [1, 99].into_iter().for_each(|priority| good(class, priority));
            [0, -1, 100, i32::MIN].into_iter().for_each(|priority| bad(class, priority));
        }
        good(abi::CLASS_IDLE, 0);
        bad(abi::CLASS_IDLE, 1);
        bad(abi::CLASS_NONE, 1);
        // The number after the last class, where a reader might expect the deadline class. Linux's
        // own number of that class is out of range too.
        [abi::CLASS_RR + 1, 7, u32::MAX].into_iter().for_each(|class| bad(class, 0));
        for at in 8..16 {
            let mut value = request(abi::CLASS_FIFO, 1);
            value[at] = 1;
            assert_eq!(parse(&value), Err(BadRequest));
        }
    }

    #[test]
    fn grants_never_pass_the_policy() {
        let policy = Policy {
            classes: 1 << abi::CLASS_NORMAL | 1 << abi::CLASS_FIFO,
            priority_max: 10,
            nice_min: None,
            changes: 1,
            boost: Duration::ZERO,
            share: 100,
        };
        let own_nice = || Ok::<_, std::convert::Infallible>(3);
        let judge = |class, priority| {
            let Ok(grant) = policy.judge(Setting { class, priority }, own_nice);
            grant
        };
        let setting = |class, priority| Setting { class, priority };
        assert_eq!(judge(abi::CLASS_FIFO, 10), Grant::Whole(setting(abi::CLASS_FIFO, 10)));
        assert_eq!(judge(abi::CLASS_FIFO, 11), Grant::Clamped(setting(abi::CLASS_FIFO, 10)));
        assert_eq!(judge(abi::CLASS_NORMAL, 3), Grant::Whole(setting(abi::CLASS_NORMAL, 3)));
        assert_eq!(judge(abi::CLASS_NORMAL, -20), Grant::Clamped(setting(abi::CLASS_NORMAL, 3)));
        assert_eq!(judge(abi::CLASS_NORMAL, 19), Grant::Whole(setting(abi::CLASS_NORMAL, 19)));
        for class in [abi::CLASS_RR, abi::CLASS_BATCH, abi::CLASS_IDLE] {
            assert_eq!(judge(class, 0), Grant::Refused);
        }
        let generous = Policy { nice_min: Some(-5), ..policy.clone() };
        let judge = |priority| {
            let wish = Setting { class: abi::CLASS_NORMAL, priority };
            let Ok(grant) = generous.judge(wish, own_nice);
            grant
        };
        assert_eq!(judge(-5), Grant::Whole(setting(abi::CLASS_NORMAL, -5)));
        assert_eq!(judge(-6), Grant::Clamped(setting(abi::CLASS_NORMAL, -5)));
    }

    #[test]
    fn a_budget_limits_any_period_and_recovers_after_a_rest() {
        for rate in [1, 7, 10, 1000] {
            let (mut budget, start) = (Budget::new(rate), Instant::now());
            let (mut now, mut taken) = (start, 0);
            // Take as fast as possible, for ten seconds.
            while now < start + Duration::from_secs(10) {
                match budget.take(now) {
                    Ok(()) => taken += 1,
                    Err(at) => {
                        assert!(
                            at > now && at <= now + budget.interval,
                            "the budget gives all its uses at once"
                        );
                        now = at;
                    }
                }
            }
            let (least, most) = (rate * 10, rate * 10 + burst(rate));
            assert!((least..=most).contains(&taken), "{taken} with a rate of {rate}");
            now += Duration::from_secs(1);
            let at_once =
                std::iter::repeat_with(|| budget.take(now)).take_while(Result::is_ok).count();
            assert_eq!(at_once, burst(rate) as usize);
        }
    }
}
