//! How long to poll before sleeping.

/// The window of an adaptive poller: it grows while wake-ups come soon after the poller went to sleep, when polling on would have saved an
/// interrupt, and shrinks to nothing while they do not. Times are nanoseconds from any fixed moment on.
/// Both ends use it: the device's tasks in their event loop, the driver's queues in theirs.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    max: u64,
    window: u64,
    idle_since: Option<u64>,
    slept_at: Option<u64>,
}

/// Below this the poller does not poll at all.
const MIN_NS: u64 = 4_000;

impl Pace {
    /// A poller that polls in vain for at most `max_ns`; 0: never.
    pub fn new(max_ns: u64) -> Pace {
        Pace { max: max_ns, window: 0, idle_since: None, slept_at: None }
    }

    /// There was something to do.
    #[inline]
    pub fn busy(&mut self) {
        self.idle_since = None;
    }

    /// There was nothing to do: whether to poll on.
    pub fn poll_on(&mut self, now: u64) -> bool {
        let since = *self.idle_since.get_or_insert(now);
        now.saturating_sub(since) < self.window
    }

    /// Goes to sleep.
    pub fn sleep(&mut self, now: u64) {
        self.idle_since = None;
        self.slept_at = Some(now);
    }

    /// Was woken by work.
    pub fn woken(&mut self, now: u64) {
        let Some(slept) = self.slept_at.take() else { return };
        self.window = if now.saturating_sub(slept) <= self.max {
            (self.window * 2).clamp(MIN_NS.min(self.max), self.max)
        } else {
            Some(self.window / 2).filter(|window| *window >= MIN_NS).unwrap_or(0)
        };
    }

    /// The window as it is now.
    pub fn window(&self) -> u64 {
        self.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_the_wake_ups() {
        let mut pace = Pace::new(50_000);
        assert!(!pace.poll_on(1));
        let mut now = 1_000_000;
        for _ in 0..8 {
            pace.sleep(now);
            now += 10_000;
            pace.woken(now);
        }
        assert_eq!(pace.window(), 50_000);
        assert!(pace.poll_on(now) && pace.poll_on(now + 49_999) && !pace.poll_on(now + 50_000));
        pace.busy();
        assert!(pace.poll_on(now + 60_000));
        for _ in 0..8 {
            pace.sleep(now);
            now += 50_001;
            pace.woken(now);
        }
        assert_eq!(pace.window(), 0);
        let mut never = Pace::new(0);
        never.sleep(1);
        never.woken(1);
        assert!(!never.poll_on(1));
    }
}
