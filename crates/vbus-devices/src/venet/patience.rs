//! How long others wait for a driver that posts no buffers.

use std::time::{Duration, Instant};

/// What a driver gains in patience with each buffer that it posts.
const PATIENCE_PER_BUFFER: Duration = Duration::from_millis(1);

/// How long senders wait for a driver's buffers before its frames are dropped instead. Waiting uses
/// it up, posting buffers restores it, so that a driver that posts hardly any holds a sender for no
/// longer than `max` and a little per buffer.
#[derive(Debug)]
pub struct Patience {
    left: Duration,
    max: Duration,
    since: Option<Instant>,
}

impl Patience {
    /// All of it.
    pub fn new(max: Duration) -> Patience {
        Patience { left: max, max, since: None }
    }

    /// Somebody waits for buffers, until the moment returned at most; `None`: that is over.
    pub fn starve(&mut self, now: Instant) -> Option<Instant> {
        let until = *self.since.get_or_insert(now) + self.left;
        (now < until).then_some(until)
    }

    /// So many buffers were there.
    pub fn fed(&mut self, buffers: usize) {
        if let Some(since) = self.since.take() {
            self.left = self.left.saturating_sub(since.elapsed());
        }
        if self.left < self.max {
            let gain =
                PATIENCE_PER_BUFFER.saturating_mul(u32::try_from(buffers).unwrap_or(u32::MAX));
            self.left = (self.left + gain).min(self.max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_ends_and_comes_back_with_buffers() {
        let now = Instant::now();
        let max = Duration::from_millis(50);
        let mut patience = Patience { left: max, max, since: None };
        assert_eq!(patience.starve(now), Some(now + max));
        assert_eq!(patience.starve(now + max / 2), Some(now + max), "waiting does not prolong it");
        assert_eq!(patience.starve(now + max), None);
        patience = Patience { left: Duration::ZERO, max, since: Some(now) };
        patience.fed(1);
        assert_eq!(patience.left, PATIENCE_PER_BUFFER);
        patience.fed(1000);
        assert_eq!(patience.left, max);
    }
}
