// SPDX-License-Identifier: Apache-2.0 OR MIT
//! vbus, by the calls that the drivers and devices of the project use.

use super::{Device, Driver, ENTRIES, pages};

/// Entries come back in any order, by the calls for batches.
pub const ENTRIES_ALL: u8 = 0;
/// Entries come back in any order, by the calls for single entries.
pub const ENTRIES_EACH: u8 = 1;
/// Entries come back in order, and are only counted; by the calls for batches.
pub const COUNTED: u8 = 2;
/// Entries come back in order, with lengths, in runs; by the calls for batches.
pub const RUNS: u8 = 3;
/// The same by the calls for single entries.
pub const RUNS_EACH: u8 = 4;

/// The ends over `$shm`: the crate, or its sources compiled with something changed.
macro_rules! ends {
    ($shm:path) => {
        use super::*;
        use shm::ring::{DeviceEnd, DriverEnd, Entry, Layout, Return, Returns};
        use shm::sync::Word;
        use $shm as shm;

        type Memory = &'static [Word];

        pub struct Near<const BACK: u8> {
            ring: DriverEnd<Memory>,
            number: u64,
        }

        pub struct Far<const BACK: u8> {
            ring: DeviceEnd<Memory>,
            number: u64,
        }

        pub fn pair<const BACK: u8>() -> (Near<BACK>, Far<BACK>) {
            let returns = match BACK {
                COUNTED => Returns::Counted,
                RUNS | RUNS_EACH => Returns::Runs,
                _ => Returns::Entries,
            };
            let layout = Layout::new(ENTRIES as u32, returns).expect("a valid layout");
            let memory = pages().words();
            let ring = DriverEnd::create(memory, layout, 0).expect("it fits");
            let served = DeviceEnd::attach(memory).expect("it is formatted");
            (Near { ring, number: 0 }, Far { ring: served, number: 0 })
        }

        impl<const BACK: u8> Driver for Near<BACK> {
            #[inline(always)]
            fn submit(&mut self, n: usize) -> u64 {
                let first = self.number;
                self.number += n as u64;
                let mut sum = 0;
                let entries = (0..n).map(|i| {
                    let addr = first + i as u64 + 1;
                    sum += if BACK == COUNTED { 1 } else { addr & 0xffff_ffff };
                    Entry { addr, len: 64, id: 0, flags: 0 }
                });
                if matches!(BACK, ENTRIES_EACH | RUNS_EACH) {
                    for entry in entries {
                        self.ring.submit(entry).expect("there is room");
                    }
                } else {
                    self.ring.submit_all(entries).expect("there is room");
                }
                assert!(!self.ring.post().is_wanted(), "the device polls");
                sum
            }

            #[inline(always)]
            fn reap(&mut self, max: usize) -> (usize, u64) {
                let (mut n, mut sum) = (0, 0);
                if BACK == COUNTED {
                    n = self.ring.reap_count(max as u32).expect("an honest device") as usize;
                    sum = n as u64;
                } else if matches!(BACK, ENTRIES_EACH | RUNS_EACH) {
                    while n < max {
                        let Some(back) = self.ring.reap().expect("an honest device") else { break };
                        sum += u64::from(back.len);
                        n += 1;
                    }
                } else {
                    let all = self.ring.reap_all(max as u32, |back| sum += u64::from(back.len));
                    n = all.expect("an honest device") as usize;
                }
                (n, sum)
            }
        }

        impl<const BACK: u8> Device for Far<BACK> {
            #[inline(always)]
            fn serve(&mut self, max: usize) -> usize {
                let answer = |entry: Entry| Return { len: entry.addr as u32, ..entry.into() };
                let mut n = 0;
                if matches!(BACK, ENTRIES_EACH | RUNS_EACH) {
                    while n < max {
                        let Some(entry) = self.ring.take().expect("an honest driver") else {
                            break;
                        };
                        self.ring.give_back(answer(entry));
                        n += 1;
                    }
                } else if BACK != COUNTED {
                    let served = self.ring.serve_all(max as u32, |entry| Some(answer(entry)));
                    n = served.expect("an honest driver") as usize;
                } else {
                    let mut number = self.number;
                    let served = self.ring.serve_all(max as u32, |entry| {
                        number += 1;
                        assert!(entry.addr == number, "in order");
                        Some(Return::default())
                    });
                    self.number = number;
                    n = served.expect("an honest driver") as usize;
                }
                assert!(!self.ring.post().is_wanted(), "the driver polls");
                n
            }
        }
    };
}

pub mod real {
    ends!(vbus_shm);
}
pub mod nofence {
    ends!(crate::ablation::nofence);
}
