// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Newest-value pages: what a write and a read cost, idle and against a peer that never pauses.

mod peers;
mod vbus;

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::duel::{nanoseconds, pin, time};
use crate::samples::Samples;

/// A page for values of `N` words. Its ends are made on the threads that use them.
trait Page<const N: usize>: Sync {
    fn new() -> Self;
    fn writer(&self) -> impl FnMut(&[u64; N]);
    /// The function returns false if there was no whole value to be had.
    fn reader(&self) -> impl FnMut(&mut [u64; N]) -> bool;
}

/// Rounds of everything about pages: "state/64/idle_write/NAME" and the like, in nanoseconds, and
/// "state/64/overruns/NAME", reads that gave up in a thousand.
pub fn sample(samples: &mut Samples) {
    sizes::<8, 64>(samples);
    sizes::<128, 1024>(samples);
}

/// What a write and a read of vbus cost idle, by the size of the value.
pub fn by_size(samples: &mut Samples) {
    fn one<const N: usize>(samples: &mut Samples) {
        samples.rounds(|round| {
            let (write, read) = idle::<N, vbus::Page>();
            round.add(format!("state_size/{}/write", N * 8), write);
            round.add(format!("state_size/{}/read", N * 8), read);
        });
    }
    one::<1>(samples);
    one::<2>(samples);
    one::<8>(samples);
    one::<32>(samples);
    one::<128>(samples);
    one::<512>(samples);
    one::<2048>(samples);
    one::<8192>(samples);
}

/// What a read of 1 KiB costs with several readers on one core against a writer that never pauses.
pub fn by_readers(samples: &mut Samples) {
    for readers in [1, 2, 4, 8] {
        samples.rounds(|round| {
            let mut one =
                |name: &str, read: f64| round.add(format!("state_readers/{readers}/{name}"), read);
            one("vbus", busy::<128, vbus::Page>(readers).read);
            one("seqlock", busy::<128, peers::SeqLock<128>>(readers).read);
            one("iceoryx2", busy::<128, peers::Blackboard<128>>(readers).read);
        });
    }
}

fn sizes<const N: usize, const BYTES: usize>(samples: &mut Samples) {
    samples.rounds(|round| {
        let mut one = |name: &str, (write, read): (f64, f64), busy: Busy| {
            round.add(format!("state/{}/idle_write/{name}", N * 8), write);
            round.add(format!("state/{}/idle_read/{name}", N * 8), read);
            round.add(format!("state/{}/busy_write/{name}", N * 8), busy.write);
            round.add(format!("state/{}/busy_read/{name}", N * 8), busy.read);
            round.add(format!("state/{}/overruns/{name}", N * 8), busy.overruns);
        };
        one("vbus", idle::<N, vbus::Page>(), busy::<N, vbus::Page>(1));
        one("vbus_latest", idle::<N, vbus::Latest<BYTES>>(), busy::<N, vbus::Latest<BYTES>>(1));
        one("seqlock", idle::<N, peers::SeqLock<N>>(), busy::<N, peers::SeqLock<N>>(1));
        one(
            "triple_buffer",
            idle::<N, peers::TripleBuffer<N>>(),
            busy::<N, peers::TripleBuffer<N>>(1),
        );
        one("iceoryx2", idle::<N, peers::Blackboard<N>>(), busy::<N, peers::Blackboard<N>>(1));
    });
}

/// Nanoseconds of a write and of a read while nobody else touches the page.
fn idle<const N: usize, P: Page<N>>() -> (f64, f64) {
    pin(0);
    let page = P::new();
    let (mut write, mut read) = (page.writer(), page.reader());
    let (mut value, mut out) = ([0; N], [0; N]);
    let count = (40_000 / N).clamp(100, 4000) as u32;
    let writing = time(count, || {
        value[0] += 1;
        write(black_box(&value));
    });
    write(&value);
    let reading = time(count, || {
        assert!(read(&mut out), "nobody writes");
        black_box(&out);
    });
    assert_eq!(out, value);
    (writing, reading)
}

struct Busy {
    write: f64,
    read: f64,
    overruns: f64,
}

/// The same while a writer on core 0 and readers on core 1 never pause. The time of a read is that
/// of its core.
fn busy<const N: usize, P: Page<N>>(readers: usize) -> Busy {
    let page = &P::new();
    let (start, stop) = (&Barrier::new(readers + 1), &AtomicBool::new(false));
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            pin(0);
            let mut write = page.writer();
            start.wait();
            let (begun, mut count) = (Instant::now(), 0_u64);
            while begun.elapsed() < Duration::from_millis(4 * readers as u64) {
                for _ in 0..64 {
                    count += 1;
                    write(black_box(&[count; N]));
                }
            }
            stop.store(true, Ordering::Relaxed);
            nanoseconds(begun) / count as f64
        });
        let all: Vec<_> = (0..readers)
            .map(|_| {
                scope.spawn(move || {
                    pin(1);
                    let mut read = page.reader();
                    let mut out = [0; N];
                    start.wait();
                    let (begun, mut good, mut bad) = (Instant::now(), 0_u64, 0_u64);
                    while !stop.load(Ordering::Relaxed) {
                        for _ in 0..16 {
                            if read(&mut out) {
                                good += 1;
                            } else {
                                bad += 1;
                            }
                            black_box(&out);
                        }
                        assert!(out.iter().all(|&word| word == out[0]) || bad != 0, "a torn value");
                    }
                    (nanoseconds(begun), good, bad)
                })
            })
            .collect();
        let write = writer.join().expect("the writer does not panic");
        let all: Vec<_> =
            all.into_iter().map(|reader| reader.join().expect("a reader does not panic")).collect();
        let good: u64 = all.iter().map(|(_, good, _)| good).sum();
        let bad: u64 = all.iter().map(|(_, _, bad)| bad).sum();
        let spent = all.iter().map(|(spent, ..)| spent).fold(0.0, |a: f64, &b| a.max(b));
        Busy {
            write,
            read: spent / good.max(1) as f64,
            overruns: bad as f64 * 1000.0 / (good + bad).max(1) as f64,
        }
    })
}
