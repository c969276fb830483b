// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A token bucket: limits a rate, and allows bursts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A bucket that holds `burst` tokens and gets `rate` tokens a second. Several threads may take
/// tokens at the same time.
///
/// Whoever finds at least one token may take as many as the frame costs. The bucket is then in
/// debt, and is empty until new tokens have paid the debt. So a burst that is smaller than a frame
/// delays the next frame, and blocks none.
#[derive(Debug)]
pub struct Bucket {
    /// The tokens a second.
    rate: AtomicU64,
    /// The time in which an empty bucket becomes full, in nanoseconds.
    depth: AtomicU64,
    origin: Instant,
    /// When the bucket will be full, in nanoseconds since the origin. The three words depend on no
    /// other memory, and each is good with any value of the others. So all accesses are relaxed.
    full_at: AtomicU64,
}

impl Bucket {
    /// A full bucket. `rate` is in tokens a second, and `burst` in tokens; both are at least 1.
    pub fn new(rate: u64, burst: u64, now: Instant) -> Bucket {
        let zero = || AtomicU64::new(0);
        let bucket = Bucket { rate: zero(), depth: zero(), origin: now, full_at: zero() };
        bucket.change(rate, burst);
        bucket
    }

    /// Changes the rate and the burst. A debt is paid at the old rate.
    pub fn change(&self, rate: u64, burst: u64) {
        let rate = rate.max(1);
        self.rate.store(rate, Ordering::Relaxed);
        self.depth.store(time(burst, rate).max(1), Ordering::Relaxed);
    }

    /// When there will be a token. `None`: there is one.
    pub fn empty_until(&self, now: Instant) -> Option<Instant> {
        let now = self.since(now);
        let full_at = self.full_at.load(Ordering::Relaxed);
        let wait = full_at.saturating_sub(now).checked_sub(self.depth.load(Ordering::Relaxed))?;
        Some(self.origin + Duration::from_nanos(now) + Duration::from_nanos(wait + 1))
    }

    /// Takes `tokens` tokens, which may be more than there are.
    pub fn charge(&self, tokens: u64, now: Instant) {
        let cost = time(tokens, self.rate.load(Ordering::Relaxed));
        let now = self.since(now);
        let next = |full_at: u64| Some(full_at.max(now).saturating_add(cost));
        let _ = self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    }

    /// Takes `tokens` tokens if there is at least one. Returns whether there was.
    pub fn take(&self, tokens: u64, now: Instant) -> bool {
        let there = self.empty_until(now).is_none();
        if there {
            self.charge(tokens, now);
        }
        there
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
                    assert!(bucket.take(cost, now));
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
        bucket.change(50_000, 200);
        let start = start + Duration::from_secs(10);
        let sent = run(&bucket, start, Duration::from_secs(10), 10);
        assert!((490_000..=500_210).contains(&sent), "{sent}");
        bucket.change(u64::MAX / 8, 100);
        let start = start + Duration::from_secs(11);
        assert!((0..1_000_000).filter(|_| bucket.take(65_000, start)).count() > 999_000);
    }

    #[test]
    fn an_idle_bucket_fills_up_and_no_further() {
        let start = Instant::now();
        let bucket = Bucket::new(1000, 50, start);
        let burst = |at: u64| {
            let now = start + Duration::from_secs(at);
            (0..).take_while(|_| bucket.take(1, now)).count()
        };
        assert_eq!((burst(0), burst(0), burst(1), burst(1000)), (50, 0, 50, 50));
    }
}
