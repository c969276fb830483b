//! vbus, by the calls that the drivers and devices of the project use.

use super::{Device, Driver, ENTRIES, pages};

/// Entries come back in any order.
pub const ENTRIES_EACH: u8 = 0;
/// Entries come back in order, each with a length.
pub const IN_ORDER: u8 = 1;
/// Entries come back in order, and are only counted.
pub const COUNTED: u8 = 2;

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
                ENTRIES_EACH => Returns::Entries,
                IN_ORDER => Returns::InOrder,
                _ => Returns::Counted,
            };
            let layout = Layout::new(ENTRIES as u32, returns).expect("a valid layout");
            let memory = pages().words();
            let ring = DriverEnd::create(memory, layout, 0).expect("it fits");
            let served = DeviceEnd::attach(memory).expect("it is formatted");
            (Near { ring, number: 0 }, Far { ring: served, number: 0 })
        }

        impl<const BACK: u8> Driver for Near<BACK> {
            #[inline]
            fn submit(&mut self, n: usize) -> u64 {
                let mut sum = 0;
                for _ in 0..n {
                    self.number += 1;
                    sum += if BACK == COUNTED { 1 } else { self.number & 0x7fff_ffff };
                    let entry = Entry { addr: self.number, len: 64, id: 0, flags: 0 };
                    self.ring.submit(entry).expect("there is room");
                }
                assert!(!self.ring.post().is_wanted(), "the device polls");
                sum
            }

            #[inline]
            fn reap(&mut self, max: usize) -> (usize, u64) {
                if BACK == COUNTED {
                    let n = self.ring.reap_count().expect("an honest device");
                    return (n as usize, u64::from(n));
                }
                let mut sum = 0;
                for n in 0..max {
                    let Some(back) = self.ring.reap().expect("an honest device") else {
                        return (n, sum);
                    };
                    sum += u64::from(back.len);
                }
                (max, sum)
            }
        }

        impl<const BACK: u8> Device for Far<BACK> {
            #[inline]
            fn serve(&mut self, max: usize) -> usize {
                let mut n = 0;
                while n < max {
                    let Some(entry) = self.ring.take().expect("an honest driver") else { break };
                    if BACK != ENTRIES_EACH {
                        self.number += 1;
                        assert_eq!(entry.addr, self.number, "in order");
                    }
                    let len = (entry.addr & 0x7fff_ffff) as u32;
                    self.ring.give_back(Return { len, ..entry.into() });
                    n += 1;
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
