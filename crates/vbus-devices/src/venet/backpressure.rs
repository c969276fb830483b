//! How long senders wait for a driver that posts too few buffers.

use std::time::{Duration, Instant};

/// What the budget gains with each buffer that the driver posts.
const GAIN_PER_BUFFER: Duration = Duration::from_millis(1);

/// The time that senders may still be made to wait for a driver's buffers, before its frames are
/// dropped instead. Waiting uses the budget up, and each buffer restores a little: a driver that
/// posts hardly any buffers holds a sender up for `max`, and 1 ms for each buffer.
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

    /// A sender waits for buffers: until the returned moment at most. `None`: the budget is used
    /// up.
    pub fn wait(&mut self, now: Instant) -> Option<Instant> {
        let until = *self.since.get_or_insert(now) + self.left;
        (now < until).then_some(until)
    }

    /// A frame has found its buffers, so many.
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
