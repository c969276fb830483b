// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Backpressure: how long senders wait for a driver that posts too few buffers.

use std::time::{Duration, Instant};

/// The time that each buffer used by a frame adds to the budget.
const GAIN_PER_BUFFER: Duration = Duration::from_millis(1);

/// A time budget: how long senders may still wait for a driver's buffers. When it is used up, the
/// device drops the driver's frames instead. Waiting uses the budget. Each buffer that a frame uses
/// adds 1 ms. So a driver that posts few buffers delays a sender by at most `max`, and 1 ms for
/// each buffer.
#[derive(Debug)]
pub struct Backpressure {
    left: Duration,
    max: Duration,
    since: Option<Instant>,
}

impl Backpressure {
    /// The whole budget.
    pub fn new(max: Duration) -> Backpressure {
        Backpressure { left: max, max, since: None }
    }

    /// A sender waits for buffers. Returns the time at which the wait must end. `None`: the budget
    /// is used up.
    pub fn wait(&mut self, now: Instant) -> Option<Instant> {
        let until = *self.since.get_or_insert(now) + self.left;
        (now < until).then_some(until)
    }

    /// A frame has used `buffers` buffers.
    pub fn fed(&mut self, buffers: usize) {
        if let Some(since) = self.since.take() {
            self.left = self.left.saturating_sub(since.elapsed());
        }
        if self.left < self.max {
            let gain = GAIN_PER_BUFFER.saturating_mul(u32::try_from(buffers).unwrap_or(u32::MAX));
            self.left = (self.left + gain).min(self.max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_used_up_and_comes_back_with_buffers() {
        let now = Instant::now();
        let max = Duration::from_millis(50);
        let mut budget = Backpressure { left: max, max, since: None };
        assert_eq!(budget.wait(now), Some(now + max));
        assert_eq!(budget.wait(now + max / 2), Some(now + max), "waiting does not prolong it");
        assert_eq!(budget.wait(now + max), None);
        budget = Backpressure { left: Duration::ZERO, max, since: Some(now) };
        budget.fed(1);
        assert_eq!(budget.left, GAIN_PER_BUFFER);
        budget.fed(1000);
        assert_eq!(budget.left, max);
    }
}
