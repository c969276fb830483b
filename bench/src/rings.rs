// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rings: entries of 16 bytes out and back, both ends polling.

mod crates;
mod oneway;
mod packed;
mod slots;
mod split;
mod vbus;

use crate::duel::{Wait, duel, hand_over};
use crate::region::Region;
use crate::samples::{Round, Samples};

/// Entries of every ring.
pub const ENTRIES: usize = 256;
/// Batches that are measured.
const BATCHES: [usize; 4] = [1, 4, 16, 64];

/// The end that submits.
pub trait Driver: Send {
    /// Submits `n` entries with the numbers that follow, made visible together. There is room for
    /// them. Returns the sum of what comes back.
    fn submit(&mut self, n: usize) -> u64;
    /// Takes up to `max` returned entries: (how many, sum of what the device made of their
    /// numbers).
    fn reap(&mut self, max: usize) -> (usize, u64);
}

/// The end that returns.
pub trait Device: Send {
    /// Takes up to `max` entries and returns each with the low half of its address as length, made
    /// visible together.
    fn serve(&mut self, max: usize) -> usize;
}

/// Nanoseconds for one entry, there and back, in batches of `batch` with at most `window` in
/// flight. The driver looks for returns after each batch.
fn run<A: Driver, B: Device>(
    ends: (A, B),
    batch: usize,
    window: usize,
    total: usize,
    wait: Wait,
) -> f64 {
    exchange::<A, B, false>(ends, batch, window, total, wait)
}

/// The same with a driver that looks for returns when it has no room left.
fn run_lazy<A: Driver, B: Device>(
    ends: (A, B),
    batch: usize,
    window: usize,
    total: usize,
    wait: Wait,
) -> f64 {
    exchange::<A, B, true>(ends, batch, window, total, wait)
}

fn exchange<A: Driver, B: Device, const LAZY: bool>(
    (mut driver, mut device): (A, B),
    batch: usize,
    window: usize,
    total: usize,
    wait: Wait,
) -> f64 {
    // Each end moves to the stack of its own thread: side by side they would share a cache line.
    let near = move || {
        let (mut submitted, mut reaped, mut expected, mut sum) = (0, 0, 0_u64, 0_u64);
        while reaped < total {
            let room = submitted < total && submitted - reaped + batch <= window;
            if room {
                expected = expected.wrapping_add(driver.submit(batch));
                submitted += batch;
                if LAZY {
                    continue;
                }
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
const CONTENDERS: [(&str, Run); 34] = [
    ("vbus", |batch, window, total, wait| {
        run(vbus::real::pair::<{ vbus::ENTRIES_ALL }>(), batch, window, total, wait)
    }),
    ("vbus_singly", |batch, window, total, wait| {
        run(vbus::real::pair::<{ vbus::ENTRIES_EACH }>(), batch, window, total, wait)
    }),
    // A sender of packets counts what came back when it needs room. So does its peer.
    ("vbus_counted", |batch, window, total, wait| {
        run_lazy(vbus::real::pair::<{ vbus::COUNTED }>(), batch, window, total, wait)
    }),
    ("packed_each_events_lazy", |batch, window, total, wait| {
        run_lazy(packed::pair::<{ packed::EACH }, true, false>(), batch, window, total, wait)
    }),
    ("packed_batch_events_lazy", |batch, window, total, wait| {
        run_lazy(packed::pair::<{ packed::BATCH }, true, false>(), batch, window, total, wait)
    }),
    ("vbus_nofence", |batch, window, total, wait| {
        run(vbus::nofence::pair::<{ vbus::ENTRIES_ALL }>(), batch, window, total, wait)
    }),
    ("vbus_nofence_singly", |batch, window, total, wait| {
        run(vbus::nofence::pair::<{ vbus::ENTRIES_EACH }>(), batch, window, total, wait)
    }),
    ("vbus_nofence_counted", |batch, window, total, wait| {
        run_lazy(vbus::nofence::pair::<{ vbus::COUNTED }>(), batch, window, total, wait)
    }),
    ("packed_each_lazy", |batch, window, total, wait| {
        run_lazy(packed::pair::<{ packed::EACH }, false, false>(), batch, window, total, wait)
    }),
    ("packed_batch_lazy", |batch, window, total, wait| {
        run_lazy(packed::pair::<{ packed::BATCH }, false, false>(), batch, window, total, wait)
    }),
    ("virtio_hand", |batch, window, total, wait| run(split::pair(), batch, window, total, wait)),
    ("packed_each", |batch, window, total, wait| {
        run(packed::pair::<{ packed::EACH }, false, false>(), batch, window, total, wait)
    }),
    ("packed_each_events", |batch, window, total, wait| {
        run(packed::pair::<{ packed::EACH }, true, false>(), batch, window, total, wait)
    }),
    ("packed_batch", |batch, window, total, wait| {
        run(packed::pair::<{ packed::BATCH }, false, false>(), batch, window, total, wait)
    }),
    ("packed_batch_events", |batch, window, total, wait| {
        run(packed::pair::<{ packed::BATCH }, true, false>(), batch, window, total, wait)
    }),
    ("virtio_crates", |batch, window, total, wait| run(crates::pair(), batch, window, total, wait)),
    ("virtio_engine", |batch, window, total, wait| {
        run(crates::pair_with_engine(), batch, window, total, wait)
    }),
    ("slots_two_arrays", |batch, window, total, wait| {
        run(slots::pair::<{ slots::TWO_ARRAYS }>(), batch, window, total, wait)
    }),
    ("slots_in_place", |batch, window, total, wait| {
        run(slots::pair::<{ slots::IN_PLACE }>(), batch, window, total, wait)
    }),
    ("slots_fenced", |batch, window, total, wait| {
        run(slots::pair::<{ slots::FENCED }>(), batch, window, total, wait)
    }),
    ("slots_oldest_last", |batch, window, total, wait| {
        run(slots::pair::<{ slots::OLDEST_LAST }>(), batch, window, total, wait)
    }),
    ("slots_runs", |batch, window, total, wait| {
        run(slots::pair::<{ slots::RUNS }>(), batch, window, total, wait)
    }),
    ("packed_each_events_lazy_ahead", |batch, window, total, wait| {
        run_lazy(packed::pair::<{ packed::EACH }, true, true>(), batch, window, total, wait)
    }),
    ("packed_batch_events_lazy_ahead", |batch, window, total, wait| {
        run_lazy(packed::pair::<{ packed::BATCH }, true, true>(), batch, window, total, wait)
    }),
    ("packed_each_lazy_ahead", |batch, window, total, wait| {
        run_lazy(packed::pair::<{ packed::EACH }, false, true>(), batch, window, total, wait)
    }),
    ("packed_batch_lazy_ahead", |batch, window, total, wait| {
        run_lazy(packed::pair::<{ packed::BATCH }, false, true>(), batch, window, total, wait)
    }),
    ("packed_each_ahead", |batch, window, total, wait| {
        run(packed::pair::<{ packed::EACH }, false, true>(), batch, window, total, wait)
    }),
    ("packed_each_events_ahead", |batch, window, total, wait| {
        run(packed::pair::<{ packed::EACH }, true, true>(), batch, window, total, wait)
    }),
    ("packed_batch_ahead", |batch, window, total, wait| {
        run(packed::pair::<{ packed::BATCH }, false, true>(), batch, window, total, wait)
    }),
    ("packed_batch_events_ahead", |batch, window, total, wait| {
        run(packed::pair::<{ packed::BATCH }, true, true>(), batch, window, total, wait)
    }),
    ("vbus_runs", |batch, window, total, wait| {
        run(vbus::real::pair::<{ vbus::RUNS }>(), batch, window, total, wait)
    }),
    ("vbus_runs_singly", |batch, window, total, wait| {
        run(vbus::real::pair::<{ vbus::RUNS_EACH }>(), batch, window, total, wait)
    }),
    ("vbus_nofence_runs", |batch, window, total, wait| {
        run(vbus::nofence::pair::<{ vbus::RUNS }>(), batch, window, total, wait)
    }),
    ("slots_lengths", |batch, window, total, wait| {
        run(slots::pair::<{ slots::LENGTHS }>(), batch, window, total, wait)
    }),
];

/// Rounds of everything about rings: "ring/b16/NAME" and the like, in nanoseconds, each with the
/// best of three ways to wait.
pub fn sample(samples: &mut Samples) {
    for batch in BATCHES {
        samples.rounds(|round| {
            contenders(round, &format!("b{batch}"), |run, wait| run(batch, ENTRIES, 1 << 17, wait));
            round.add(
                format!("ring/b{batch}/rtrb_one_way"),
                best(|wait| oneway::rtrb(batch, 1 << 16, wait)),
            );
        });
    }
    samples.rounds(|round| {
        contenders(round, "pingpong", |run, wait| run(1, 1, 1 << 12, wait));
        round.add("ring/pingpong/line".into(), 2.0 * hand_over(1 << 12));
    });
}

/// The device ends of a split queue with one driver's end: `virtio-queue`, `vbus-virtio`, and what
/// is left of the latter if the view is taken, and the areas are looked up, once for ever.
const ENGINES: [(&str, Run); 4] = [
    ("virtio_queue", |batch, window, total, wait| run(crates::pair(), batch, window, total, wait)),
    ("vbus_virtio", |batch, window, total, wait| {
        run(crates::pair_with_engine(), batch, window, total, wait)
    }),
    ("view_kept", |batch, window, total, wait| {
        run(crates::pair_with_view(), batch, window, total, wait)
    }),
    ("view_and_areas_kept", |batch, window, total, wait| {
        run(crates::pair_in_turn(), batch, window, total, wait)
    }),
];

/// What a poll of a virtqueue's device end costs, and which part of it: "engine/b1/NAME" and the
/// like, in nanoseconds for an entry; "engine/alone/NAME", for a poll that finds nothing.
pub fn by_engine(samples: &mut Samples) {
    for batch in BATCHES {
        samples.rounds(|round| {
            let mut figures = ENGINES;
            figures.rotate_left(round.number() % ENGINES.len());
            let _ = best(|wait| figures[0].1(batch, ENTRIES, 1 << 17, wait));
            for (name, run) in figures {
                let figure = best(|wait| run(batch, ENTRIES, 1 << 17, wait));
                round.add(format!("engine/b{batch}/{name}"), figure);
            }
        });
    }
    samples.rounds(|round| {
        for (name, figure) in crates::poll_costs() {
            round.add(format!("engine/alone/{name}"), figure);
        }
    });
}

/// What is the best of some contenders.
const BEST: [(&str, &[&str]); 9] = [
    ("floor", &["slots_two_arrays", "slots_in_place"]),
    ("vbus_either", &["vbus", "vbus_singly", "vbus_runs"]),
    ("vbus_nofence_either", &["vbus_nofence", "vbus_nofence_singly", "vbus_nofence_runs"]),
    ("packed_hand_lengths", &["packed_each_events", "packed_each_events_ahead"]),
    ("packed_hand_lengths_polling", &["packed_each", "packed_each_ahead"]),
    (
        "packed_hand_polling",
        &["packed_each", "packed_batch", "packed_each_ahead", "packed_batch_ahead"],
    ),
    (
        "packed_hand",
        &[
            "packed_each_events",
            "packed_batch_events",
            "packed_each_events_ahead",
            "packed_batch_events_ahead",
        ],
    ),
    (
        "packed_hand_lazy",
        &[
            "packed_each_events_lazy",
            "packed_batch_events_lazy",
            "packed_each_events_lazy_ahead",
            "packed_batch_events_lazy_ahead",
        ],
    ),
    (
        "packed_hand_polling_lazy",
        &[
            "packed_each_lazy",
            "packed_batch_lazy",
            "packed_each_lazy_ahead",
            "packed_batch_lazy_ahead",
        ],
    ),
];

/// A round of all contenders.
fn contenders(round: &mut Round<'_>, column: &str, one: impl Fn(Run, Wait) -> f64) {
    // The first run of a round is the slowest by far, whosever it is. So it does not count, and
    // each round begins with another contender.
    let first = round.number() % CONTENDERS.len();
    let _ = best(|wait| one(CONTENDERS[first].1, wait));
    let mut figures = CONTENDERS;
    figures.rotate_left(first);
    let figures = figures.map(|(name, run)| (name, best(|wait| one(run, wait))));
    let better = BEST.map(|(name, of)| {
        let of = figures.iter().filter(|(name, _)| of.contains(name));
        (name, of.map(|(_, figure)| *figure).fold(f64::INFINITY, f64::min))
    });
    for (name, figure) in figures.into_iter().chain(better) {
        round.add(format!("ring/{column}/{name}"), figure);
    }
}

/// What a round of many devices costs: "devices/N".
pub fn by_devices(samples: &mut Samples) {
    for devices in [1, 2, 4, 8, 16, 32, 64] {
        samples.rounds(|round| round.add(format!("devices/{devices}/vbus"), many(devices)));
    }
}

fn best(run: impl FnMut(Wait) -> f64) -> f64 {
    Wait::ALL.into_iter().map(run).fold(f64::INFINITY, f64::min)
}

/// Nanoseconds per entry in batches of 16 when one pair of threads serves `devices` rings in turn.
fn many(devices: usize) -> f64 {
    /// All of one end, with whose turn it is: batches of 16 are submitted to one after the other,
    /// and reaped so.
    struct All<T> {
        ends: Vec<T>,
        submitted: usize,
        reaped: usize,
    }
    impl<T: Driver> Driver for All<T> {
        fn submit(&mut self, n: usize) -> u64 {
            let ring = self.submitted / 16 % self.ends.len();
            self.submitted += n;
            self.ends[ring].submit(n)
        }
        fn reap(&mut self, max: usize) -> (usize, u64) {
            let ring = self.reaped / 16 % self.ends.len();
            let (n, sum) = self.ends[ring].reap(max.min(16 - self.reaped % 16));
            self.reaped += n;
            (n, sum)
        }
    }
    impl<T: Device> Device for All<T> {
        fn serve(&mut self, max: usize) -> usize {
            // It looks at all of them in turn, as it cannot know where something is.
            self.submitted = (self.submitted + 1) % self.ends.len();
            self.ends[self.submitted].serve(max)
        }
    }
    fn all<T>(ends: Vec<T>) -> All<T> {
        All { ends, submitted: 0, reaped: 0 }
    }
    best(|wait| {
        let (drivers, served): (Vec<_>, Vec<_>) =
            (0..devices).map(|_| vbus::real::pair::<{ vbus::ENTRIES_ALL }>()).unzip();
        // Each ring gets its turn with one batch in flight, and a single one as many as it holds.
        let window = if devices == 1 { ENTRIES } else { 16 * devices };
        run(
            (all(drivers), all(served)),
            16,
            window,
            (1 << 15) / (16 * devices) * (16 * devices),
            wait,
        )
    })
}

/// Pages for a ring's memory.
fn pages() -> Region {
    Region::new(16384)
}
