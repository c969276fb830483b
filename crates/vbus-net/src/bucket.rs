// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A token bucket: limits a rate, and allows bursts.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use vbus_core::lock;

/// A bucket that holds `burst` tokens and gets `rate` tokens a second. Several threads may take
/// tokens at the same time.
///
/// Whoever finds at least one token may take as many as the frame costs. The bucket is then in
/// debt, and is empty until new tokens have paid the debt. So a burst that is smaller than a frame
/// delays the next frame, and blocks none.
#[derive(Debug)]
pub struct Bucket {
    origin: Instant,
    /// One lock for all of it: a cost at one rate must not meet a time of fullness at another rate.
    /// Nobody waits while holding it.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The tokens a second.
    rate: u64,
    /// The time in which an empty bucket becomes full, in nanoseconds; at least 1.
    depth: u64,
    /// When the bucket will be full, in nanoseconds since the origin.
    full_at: u64,
}

impl State {
    /// A full bucket.
    fn new(rate: u64, burst: u64) -> State {
        let rate = rate.max(1);
        State { rate, depth: time(burst, rate).max(1), full_at: 0 }
    }

    /// The nanoseconds from `now` until there will be a token, less 1. `None`: there is one.
    fn wait(&self, now: u64) -> Option<u64> {
        self.full_at.saturating_sub(now).checked_sub(self.depth)
    }

    fn charge(&mut self, tokens: u64, now: u64) {
        self.full_at = self.full_at.max(now).saturating_add(time(tokens, self.rate));
    }
}

impl Bucket {
    /// A full bucket. `rate` is in tokens a second, and `burst` in tokens; both are at least 1.
    pub fn new(rate: u64, burst: u64, now: Instant) -> Bucket {
        Bucket { origin: now, state: Mutex::new(State::new(rate, burst)) }
    }

    /// Changes the rate and the burst. The tokens that the bucket lacks, it lacks at the new rate
    /// too; but it is in no debt any more, so there is a token at once.
    pub fn change(&self, rate: u64, burst: u64, now: Instant) {
        let now = self.since(now);
        let mut state = lock(&self.state);
        let lacks = u128::from(state.full_at.saturating_sub(now)) * u128::from(state.rate);
        *state = State::new(rate, burst);
        let most = state.depth - 1;
        let time = u64::try_from(lacks / u128::from(state.rate)).unwrap_or(most).min(most);
        state.full_at = now.saturating_add(time);
    }

    /// When there will be a token. `None`: there is one.
    pub fn empty_until(&self, now: Instant) -> Option<Instant> {
        let now = self.since(now);
        lock(&self.state).wait(now).map(|wait| self.after(now, wait))
    }

    /// Takes `tokens` tokens, which may be more than there are.
    pub fn charge(&self, tokens: u64, now: Instant) {
        lock(&self.state).charge(tokens, self.since(now));
    }

    /// Takes `tokens` tokens if there is at least one.
    ///
    /// # Errors
    /// There is none before this time.
    pub fn take(&self, tokens: u64, now: Instant) -> Result<(), Instant> {
        let now = self.since(now);
        let mut state = lock(&self.state);
        if let Some(wait) = state.wait(now) {
            return Err(self.after(now, wait));
        }
        state.charge(tokens, now);
        Ok(())
    }

    /// When a bucket that has to wait, as [`State::wait`] says at `now`, has a token.
    fn after(&self, now: u64, wait: u64) -> Instant {
        self.origin + Duration::from_nanos(now) + Duration::from_nanos(wait + 1)
    }

    fn since(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.origin);
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The nanoseconds in which `tokens` tokens come.
fn time(tokens: u64, rate: u64) -> u64 {
    let nanoseconds = u128::from(tokens) * 1_000_000_000 / u128::from(rate);
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends frames of `cost` tokens as fast as the bucket allows, for `time`. Returns the tokens.
    fn run(bucket: &Bucket, start: Instant, time: Duration, cost: u64) -> u64 {
        let (mut now, mut sent) = (start, 0);
        while now < start + time {
            match bucket.empty_until(now) {
                Some(at) => {
                    assert!(at > now);
                    now = at;
                }
                None => {
                    assert_eq!(bucket.take(cost, now), Ok(()));
                    sent += cost;
                }
            }
        }
        sent
    }

    #[test]
    fn the_rate_holds_after_the_burst() {
        let start = Instant::now();
        for (rate, burst, cost) in [(1_000_000, 5000, 100), (1_000_000, 1, 65_000), (10, 3, 1)] {
            let bucket = Bucket::new(rate, burst, start);
            let sent = run(&bucket, start, Duration::from_secs(10), cost);
            let least = 10 * rate;
            assert!((least..=least + burst + cost).contains(&sent), "{rate} {burst}: {sent}");
        }
    }

    #[test]
    fn another_rate_holds_at_once() {
        let start = Instant::now();
        let bucket = Bucket::new(1000, 100, start);
        run(&bucket, start, Duration::from_secs(10), 10);
        let start = start + Duration::from_secs(10);
        bucket.change(50_000, 200, start);
        let sent = run(&bucket, start, Duration::from_secs(10), 10);
        assert!((500_000..=500_210).contains(&sent), "{sent}");
        let start = start + Duration::from_secs(10);
        bucket.change(u64::MAX / 8, 100, start);
        assert!((0..1_000_000).all(|_| bucket.take(65_000, start).is_ok()));
        bucket.change(1000, 100, start);
        let sent = run(&bucket, start, Duration::from_secs(10), 10);
        assert!((10_000..=10_110).contains(&sent), "{sent}");
    }

    #[test]
    fn no_change_leaves_a_bucket_without_a_token() {
        let start = Instant::now();
        let burst = |rate: u64| (rate / 50).max(128 << 10);
        let rates = [1, 1000, 125_000_000, u64::MAX / 8, u64::MAX];
        for (old, new) in rates.into_iter().flat_map(|old| rates.map(|new| (old, new))) {
            // A bucket without debt; one in the debt of a frame; one in a debt that is never paid.
            for tokens in [burst(old) - 1, burst(old) + 65_000, u64::MAX] {
                let bucket = Bucket::new(old, burst(old), start);
                bucket.charge(tokens, start);
                bucket.change(new, burst(new), start);
                assert!(bucket.take(1, start).is_ok(), "from {old} to {new} after {tokens}");
            }
        }
    }

    #[test]
    fn a_change_keeps_the_tokens_that_are_lacking() {
        let start = Instant::now();
        for (rate, burst, tokens) in [(1_000_000, 100, 60), (10, 100, 60), (1000, 200, 160)] {
            let bucket = Bucket::new(1000, 100, start);
            bucket.charge(40, start);
            bucket.change(rate, burst, start);
            let count = (0..).take_while(|_| bucket.take(1, start).is_ok()).count();
            assert_eq!(count, tokens, "{rate} {burst}");
        }
    }

    #[test]
    fn an_idle_bucket_fills_up_and_no_further() {
        let start = Instant::now();
        let bucket = Bucket::new(1000, 50, start);
        let burst = |at: u64| {
            let now = start + Duration::from_secs(at);
            (0..).take_while(|_| bucket.take(1, now).is_ok()).count()
        };
        assert_eq!((burst(0), burst(0), burst(1), burst(1000)), (50, 0, 50, 50));
    }
}
