//! Two ends on a core each, and the clock.

use std::hint::{black_box, spin_loop};
use std::sync::Barrier;
use std::time::Instant;

use rustix::thread::{CpuSet, sched_setaffinity};

/// Pins the calling thread. A machine with fewer cores gives what it has, and figures that say so.
pub fn pin(core: usize) {
    let mut cores = CpuSet::new();
    cores.set(core);
    if let Err(error) = sched_setaffinity(None, &cores) {
        eprintln!("could not pin a thread to core {core} ({error}): the figures are of little use");
    }
}

/// How an end waits that has found nothing to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// It looks again at once.
    Spin,
    /// It executes a pause instruction first.
    Pause,
}

impl Wait {
    pub const BOTH: [Wait; 2] = [Wait::Spin, Wait::Pause];

    #[inline(always)]
    pub fn relax(self) {
        if self == Wait::Pause {
            spin_loop();
        }
    }
}

/// Runs `near` on core 0 and `far` on core 1, begun together, and returns the nanoseconds that
/// `near` took.
pub fn duel(near: impl FnOnce() + Send, far: impl FnOnce() + Send) -> f64 {
    let start = &Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            pin(1);
            start.wait();
            far();
        });
        let near = scope.spawn(move || {
            pin(0);
            start.wait();
            let begun = Instant::now();
            near();
            nanoseconds(begun)
        });
        near.join().expect("the near end does not panic")
    })
}

pub fn nanoseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e9
}

/// Nanoseconds of one `work`, the least of several rounds of `count` in this process: what disturbs
/// can only add.
pub fn time(count: u32, mut work: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let begun = Instant::now();
        for _ in 0..count {
            work();
            black_box(());
        }
        best = best.min(nanoseconds(begun) / f64::from(count));
    }
    best
}
