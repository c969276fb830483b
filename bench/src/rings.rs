//! Rings: entries of 16 bytes out and back, both ends polling.

mod crates;
mod oneway;
mod slots;
mod split;
mod vbus;

use crate::duel::{Wait, duel};
use crate::region::Region;
use crate::samples::Samples;

/// Entries of every ring.
pub const ENTRIES: usize = 256;
/// Batches that are measured.
pub const BATCHES: [usize; 4] = [1, 4, 16, 64];

/// The end that submits.
pub trait Driver: Send {
    /// Submits `n` entries with the numbers that follow, made visible together. There is room for them. Returns the sum of what comes back.
    fn submit(&mut self, n: usize) -> u64;
    /// Takes up to `max` returned entries: (how many, sum of what the device made of their numbers).
    fn reap(&mut self, max: usize) -> (usize, u64);
}

/// The end that returns.
pub trait Device: Send {
    /// Takes up to `max` entries and returns each with the low half of its address as length, made visible together.
    fn serve(&mut self, max: usize) -> usize;
}

/// Nanoseconds for one entry, there and back, in batches of `batch` with at most `window` in flight.
fn run<A: Driver, B: Device>((mut driver, mut device): (A, B), batch: usize, window: usize, total: usize, wait: Wait) -> f64 {
    // Each end moves to the stack of its own thread: side by side they would share a cache line.
    let near = move || {
        let (mut submitted, mut reaped, mut expected, mut sum) = (0, 0, 0_u64, 0_u64);
        while reaped < total {
            let room = submitted < total && submitted - reaped + batch <= window;
            if room {
                expected = expected.wrapping_add(driver.submit(batch));
                submitted += batch;
            }
            let (n, part) = driver.reap(batch);
            reaped += n;
            sum = sum.wrapping_add(part);
            if n == 0 && !room {
                wait.relax();
            }
        }
        assert_eq!(sum, expected, "an entry was lost or changed");
    };
    let far = move || {
        let mut served = 0;
        while served < total {
            let n = device.serve(batch);
            served += n;
            if n == 0 {
                wait.relax();
            }
        }
    };
    duel(near, far) / total as f64
}

/// One run of a contender: (batch, window, entries, how to wait) to nanoseconds per entry.
type Run = fn(usize, usize, usize, Wait) -> f64;

/// What is measured: its name, and a run with a fresh pair of ends.
const CONTENDERS: [(&str, Run); 8] = [
    ("vbus", |batch, window, total, wait| run(vbus::real::pair(), batch, window, total, wait)),
    ("vbus_counted", |batch, window, total, wait| run(vbus::real::counted_pair(), batch, window, total, wait)),
    ("vbus_two_arrays", |batch, window, total, wait| run(vbus::two_arrays::pair(), batch, window, total, wait)),
    ("vbus_nofence", |batch, window, total, wait| run(vbus::nofence::pair(), batch, window, total, wait)),
    ("virtio_hand", |batch, window, total, wait| run(split::pair(), batch, window, total, wait)),
    ("virtio_crates", |batch, window, total, wait| run(crates::pair(), batch, window, total, wait)),
    ("slots_two_arrays", |batch, window, total, wait| run(slots::two_arrays(), batch, window, total, wait)),
    ("slots_in_place", |batch, window, total, wait| run(slots::in_place(), batch, window, total, wait)),
];

/// Rounds of everything about rings: "ring/b16/NAME" and the like, in nanoseconds, each with the better of two ways to wait.
pub fn sample(samples: &mut Samples) {
    for batch in BATCHES {
        samples.rounds(|round| {
            for (name, run) in CONTENDERS {
                round.add(format!("ring/b{batch}/{name}"), best(|wait| run(batch, ENTRIES, 1 << 15, wait)));
            }
            round.add(format!("ring/b{batch}/rtrb_one_way"), best(|wait| oneway::rtrb(batch, 1 << 16, wait)));
        });
    }
    samples.rounds(|round| {
        for (name, run) in CONTENDERS {
            round.add(format!("ring/pingpong/{name}"), best(|wait| run(1, 1, 1 << 12, wait)));
        }
        round.add("ring/pingpong/line".into(), best(|wait| oneway::line(1 << 12, wait)));
    });
}

fn best(mut run: impl FnMut(Wait) -> f64) -> f64 {
    Wait::BOTH.into_iter().map(|wait| run(wait)).fold(f64::INFINITY, f64::min)
}

/// Nanoseconds per entry in batches of 16 when one pair of threads serves `devices` rings in turn.
pub fn many(devices: usize) -> f64 {
    struct All<T>(Vec<T>, usize);
    impl<T: Driver> Driver for All<T> {
        fn submit(&mut self, n: usize) -> u64 {
            self.1 = (self.1 + 1) % self.0.len();
            self.0[self.1].submit(n)
        }
        fn reap(&mut self, max: usize) -> (usize, u64) {
            // The ring whose turn is next holds the oldest entries.
            let next = (self.1 + 1) % self.0.len();
            self.0[next].reap(max)
        }
    }
    impl<T: Device> Device for All<T> {
        fn serve(&mut self, max: usize) -> usize {
            self.1 = (self.1 + 1) % self.0.len();
            self.0[self.1].serve(max)
        }
    }
    best(|wait| {
        let (drivers, served) = (0..devices).map(|_| vbus::real::pair()).unzip();
        // Each ring gets its turn with one batch in flight, and a single one as many as it holds.
        let window = if devices == 1 { ENTRIES } else { 16 * devices };
        run((All(drivers, 0), All(served, 0)), 16, window, (1 << 15) / (16 * devices) * (16 * devices), wait)
    })
}

/// Pages for a ring's memory.
fn pages() -> Region {
    Region::new(16384)
}
