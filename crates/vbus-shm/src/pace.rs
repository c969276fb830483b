// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long to poll before sleeping.

/// What to do after a poll that found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Poll again at once.
    Poll,
    /// Poll again after so many nanoseconds, and stay disarmed until then: the peer need not kick.
    Nap(u64),
    /// Arm, and sleep until kicked.
    Sleep,
}

/// The pace of an adaptive poller. Times are nanoseconds since any fixed moment. Both ends use it:
/// the device's tasks and the driver's queues, each in their event loop.
///
/// - First it polls for a *window*. This keeps the latency of a fast exchange low. The window grows
///   while wake-ups come soon after the poller went to sleep: polling would have saved a kick. It
///   shrinks to nothing while wake-ups come later.
/// - Then it naps, if it carried much data lately. More of a stream comes soon, and a nap costs
///   neither a kick nor a processor. The longer nothing comes, the longer the naps are.
/// - Then it arms and sleeps.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    max: u64,
    nap: u64,
    window: u64,
    idle_since: Option<u64>,
    slept_at: Option<u64>,
    /// The time of the last measurement of the load, and the bytes carried until then.
    measured: (u64, u64),
    loaded_until: u64,
}

/// The shortest time over which the load is measured.
const MEASURE_NS: u64 = 1_000_000;
/// The lowest load for which the poller naps, in bytes per [`MEASURE_NS`] (130 Mb/s). An exchange
/// of small messages would suffer from naps. Its load is below this.
const LOAD_BYTES: u64 = 16 << 10;
/// How long the poller naps after such a load.
const LOAD_HOLDS_NS: u64 = 30_000_000;
/// The longest nap.
const NAP_MAX_NS: u64 = 1_000_000;

/// The shortest window. The poller does not poll for less.
const MIN_NS: u64 = 4_000;

impl Pace {
    /// A poller whose window is at most `max_ns` (0: it always sleeps at once) and whose shortest
    /// nap is `nap_ns`, at most 1 ms. There has to be room for what arrives during a nap, and its
    /// sender waits for the end of the nap.
    pub fn new(max_ns: u64, nap_ns: u64) -> Pace {
        Pace {
            max: max_ns,
            nap: nap_ns.min(NAP_MAX_NS),
            window: 0,
            idle_since: None,
            slept_at: None,
            measured: (0, 0),
            loaded_until: 0,
        }
    }

    /// The poller found something to do.
    #[inline]
    pub fn busy(&mut self) {
        self.idle_since = None;
    }

    /// The poller found nothing to do. `carried` is the number of bytes that it has carried since
    /// it began. A small message counts as some hundred bytes. 0: the poller never naps.
    pub fn rest(&mut self, now: u64, carried: u64) -> Rest {
        let vain = now.saturating_sub(*self.idle_since.get_or_insert(now));
        if vain < self.window {
            return Rest::Poll;
        }
        let (at, before) = self.measured;
        let time = now.saturating_sub(at);
        if time >= MEASURE_NS {
            let bytes = carried.saturating_sub(before);
            if bytes / (time / MEASURE_NS) >= LOAD_BYTES {
                self.loaded_until = now + LOAD_HOLDS_NS;
            }
            self.measured = (now, carried);
        }
        if now < self.loaded_until && self.max > 0 {
            Rest::Nap((vain / 2).clamp(self.nap, NAP_MAX_NS))
        } else {
            Rest::Sleep
        }
    }

    /// The poller goes to sleep.
    pub fn sleep(&mut self, now: u64) {
        self.idle_since = None;
        self.slept_at = Some(now);
    }

    /// Work woke the poller.
    pub fn woken(&mut self, now: u64) {
        let Some(slept) = self.slept_at.take() else { return };
        self.window = if now.saturating_sub(slept) <= self.max {
            (self.window * 2).clamp(MIN_NS.min(self.max), self.max)
        } else {
            Some(self.window / 2).filter(|window| *window >= MIN_NS).unwrap_or(0)
        };
    }

    /// The window, in nanoseconds.
    pub fn window(&self) -> u64 {
        self.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn the_window_follows_the_wake_ups() {
        let mut pace = Pace::new(50_000, 100_000);
        assert_eq!(pace.rest(1, 0), Rest::Sleep);
        let mut now = MS;
        for _ in 0..8 {
            pace.sleep(now);
            now += 10_000;
            pace.woken(now);
        }
        assert_eq!(pace.window(), 50_000);
        assert_eq!(
            [0, 49_999, 50_000].map(|after| pace.rest(now + after, 0)),
            [Rest::Poll, Rest::Poll, Rest::Sleep]
        );
        pace.busy();
        assert_eq!(pace.rest(now + 60_000, 0), Rest::Poll);
        for _ in 0..8 {
            pace.sleep(now);
            now += 50_001;
            pace.woken(now);
        }
        assert_eq!(pace.window(), 0);
    }

    #[test]
    fn the_poller_naps_during_a_stream_and_sleeps_after_it() {
        let mut pace = Pace::new(50_000, 100_000);
        let (mut now, mut carried) = (MS, 0);
        assert_eq!(pace.rest(now, carried), Rest::Sleep);
        // A segment of 64 KiB every 300 us.
        let mut naps = 0;
        for _ in 0..100 {
            (now, carried) = (now + 300_000, carried + 65_536);
            pace.busy();
            naps += u32::from(matches!(pace.rest(now, carried), Rest::Nap(_)));
        }
        assert!(naps > 90, "{naps}");
        // The stream ends: the naps get longer, and then the poller sleeps.
        let (end, mut count, mut last) = (now, 0, 0);
        pace.busy();
        while let Rest::Nap(nap) = pace.rest(now, carried) {
            assert!(nap >= last && nap <= MS, "{nap} after {last}");
            (now, count, last) = (now + nap, count + 1, nap);
        }
        assert!(
            now - end >= 29 * MS && now - end <= 32 * MS && count < 50,
            "{} ns in {count} naps",
            now - end
        );
    }

    #[test]
    fn the_poller_does_not_nap_during_an_exchange_of_small_messages() {
        let mut pace = Pace::new(50_000, 100_000);
        let (mut now, mut carried) = (MS, 0);
        for _ in 0..1000 {
            // A round trip in 300 us, of two messages that count as 512 bytes each.
            (now, carried) = (now + 300_000, carried + 1024);
            pace.busy();
            assert_eq!(pace.rest(now, carried), Rest::Sleep);
            pace.sleep(now);
            pace.woken(now + 200_000);
        }
    }

    #[test]
    fn without_a_window_there_is_neither_polling_nor_napping() {
        let mut never = Pace::new(0, 100_000);
        never.sleep(1);
        never.woken(1);
        assert_eq!(never.rest(1, 0), Rest::Sleep);
        assert_eq!(never.rest(2 * MS, 1 << 30), Rest::Sleep);
        assert_eq!(never.rest(4 * MS, 1 << 31), Rest::Sleep);
    }
}
