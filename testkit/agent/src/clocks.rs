// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Watches the clocks of a guest that is stopped and goes on: none may run backwards.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// What has been seen so far. Its threads only add.
#[derive(Default)]
struct Seen {
    looks: AtomicU64,
    backwards: AtomicU64,
    longest_ms: AtomicU64,
}

/// Looks at both clocks without end, in two threads. Ten times a second it writes to `file` how
/// often it has looked, how often a clock was behind its former value, the longest time between two
/// looks in milliseconds, and by how many milliseconds the time of day has gone further than the
/// monotonic clock.
pub fn clocks(file: &str) -> io::Result<()> {
    let seen = Arc::<Seen>::default();
    let (began, day) = (Instant::now(), SystemTime::now());
    for _ in 0..2 {
        let seen = seen.clone();
        thread::spawn(move || look(&seen));
    }
    let get = |number: &AtomicU64| number.load(Ordering::Relaxed);
    loop {
        // The two clocks are read one after the other, and the thread may sleep between them.
        let apart = || {
            let day = SystemTime::now().duration_since(day).unwrap_or_default();
            let monotonic = began.elapsed();
            i64::try_from(day.as_millis()).unwrap_or(0)
                - i64::try_from(monotonic.as_millis()).unwrap_or(0)
        };
        let apart = (0..5).map(|_| apart()).max().unwrap_or(0);
        let (looks, backwards) = (get(&seen.looks), get(&seen.backwards));
        let text = format!("{looks} {backwards} {} {apart}\n", get(&seen.longest_ms));
        let new = format!("{file}.new");
        fs::write(&new, text)?;
        fs::rename(&new, file)?;
        thread::sleep(Duration::from_millis(100));
    }
}

fn look(seen: &Seen) {
    let (mut last, mut last_day) = (Instant::now(), SystemTime::now());
    loop {
        thread::sleep(Duration::from_millis(5));
        let (now, day) = (Instant::now(), SystemTime::now());
        if now.checked_duration_since(last).is_none() || day < last_day {
            seen.backwards.fetch_add(1, Ordering::Relaxed);
        }
        let gap = now.saturating_duration_since(last).as_millis();
        seen.longest_ms.fetch_max(u64::try_from(gap).unwrap_or(u64::MAX), Ordering::Relaxed);
        seen.looks.fetch_add(1, Ordering::Relaxed);
        (last, last_day) = (now, day);
    }
}
