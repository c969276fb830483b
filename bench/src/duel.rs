// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two ends on a core each, and the clock.

use std::hint::{black_box, spin_loop};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
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
    /// It executes many pause instructions first, so that a batch gathers meanwhile.
    Rest,
}

impl Wait {
    pub const ALL: [Wait; 3] = [Wait::Spin, Wait::Pause, Wait::Rest];

    /// Pause instructions of a rest: some hundred nanoseconds.
    const REST: u32 = 16;

    #[inline(always)]
    pub fn relax(self) {
        let pauses = match self {
            Wait::Spin => 0,
            Wait::Pause => 1,
            Wait::Rest => Self::REST,
        };
        for _ in 0..pauses {
            spin_loop();
        }
    }
}

/// Runs `near` on core 0 and `far` on core 1, begun together, and returns the nanoseconds that
/// `near` took.
pub fn duel(near: impl FnOnce() + Send, far: impl FnOnce() + Send) -> f64 {
    let (there, ready) = (&Barrier::new(2), &AtomicU32::new(0));
    // The thread that a barrier wakes comes late by as much as a whole run may take. So both look
    // at a word until the other one is there.
    let start = move |core| {
        pin(core);
        there.wait();
        ready.fetch_add(1, Ordering::AcqRel);
        while ready.load(Ordering::Acquire) < 2 {
            spin_loop();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            start(1);
            far();
        });
        let near = scope.spawn(move || {
            start(0);
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

/// Nanoseconds until a word that one core writes is seen by the other: half a round trip. The best
/// of several runs, with both ways to wait; the first also wakes the cores up.
pub fn hand_over(trips: u64) -> f64 {
    let run = |wait: Wait| {
        let word = &Line(AtomicU64::new(0));
        let turn = |first: u64| {
            move || {
                for n in 0..trips {
                    while word.0.load(Ordering::Acquire) != 2 * n + first {
                        wait.relax();
                    }
                    word.0.store(2 * n + first + 1, Ordering::Release);
                }
            }
        };
        duel(turn(0), turn(1)) / (2 * trips) as f64
    };
    (0..6).map(|n| run(Wait::ALL[n % 2])).fold(f64::INFINITY, f64::min)
}

/// A cache line of its own, and the one beside it, which the processor may fetch too.
#[repr(align(128))]
struct Line(AtomicU64);
