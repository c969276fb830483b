// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lines of an interrupt page: what one costs from raising to its end, and a round trip of two over
//! that of bare flags.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use vbus_shm::pic::{DeviceEnd, DriverEnd, Nesting, PAGE_BYTES};
use vbus_shm::sync::Word;

use crate::duel::{duel, time};
use crate::region::Region;
use crate::samples::Samples;

const GROUP: u16 = 16;
const TRIPS: u64 = 100_000;

type Page = (DriverEnd<&'static [Word]>, DeviceEnd<&'static [Word]>);

pub fn sample(samples: &mut Samples) {
    samples.rounds(|round| {
        for (name, nesting) in [("flat", Nesting::Flat), ("nested", Nesting::Nested)] {
            let (mut driver, device) = page(nesting);
            let one = time(200_000, || {
                let _ = black_box(device.raise(3));
                drain(&mut driver);
            });
            round.add(format!("lines/one/{name}"), one);
            let group = time(20_000, || {
                for line in 0..GROUP {
                    let _ = black_box(device.raise(line));
                }
                drain(&mut driver);
            });
            round.add(format!("lines/of_{GROUP}/{name}"), group / f64::from(GROUP));
        }
        let (_, device) = page(Nesting::Flat);
        let _ = device.raise(3);
        round.add(
            "lines/pending".into(),
            time(200_000, || {
                let _ = black_box(device.raise(3));
            }),
        );
        round.add("lines/pingpong/flag".into(), pingpong(false));
        round.add("lines/pingpong/vbus".into(), pingpong(true));
    });
}

fn page(nesting: Nesting) -> Page {
    let memory = Region::new(PAGE_BYTES).words();
    let mut driver = DriverEnd::create(memory, 32, nesting).expect("a page");
    let _ = driver.arm();
    (driver, DeviceEnd::attach(memory).expect("a page"))
}

/// The handler of a message.
#[inline(always)]
fn drain(driver: &mut DriverEnd<&'static [Word]>) {
    while let Some(line) = driver.take() {
        black_box(line);
        driver.end(line);
    }
}

/// A device raises a line and waits until its handler has run, on another core, which looks at
/// nothing but its message. Both are flags; with `lines` there is a page behind them. Nanoseconds a
/// trip.
fn pingpong(lines: bool) -> f64 {
    let (mut driver, device) = page(Nesting::Flat);
    let (message, handled) = &(Line(AtomicU64::new(0)), Line(AtomicU64::new(0)));
    let near = move || {
        for trip in 1..=TRIPS {
            if !lines || device.raise(3).is_wanted() {
                message.0.store(trip, Ordering::Release);
            }
            while handled.0.load(Ordering::Acquire) != trip {}
        }
    };
    let far = move || {
        for trip in 1..=TRIPS {
            while message.0.load(Ordering::Acquire) != trip {}
            if lines {
                drain(&mut driver);
            }
            handled.0.store(trip, Ordering::Release);
        }
    };
    duel(near, far) / TRIPS as f64
}

/// A cache line of its own.
#[repr(align(128))]
struct Line(AtomicU64);
