//! vbus, with the signals of both directions.

use super::{Device, Driver, ENTRIES, pages};

/// By the calls for a batch.
macro_rules! batches {
    () => {
        impl Driver for Near {
            #[inline]
            fn submit(&mut self, n: usize) -> u64 {
                let mut sum = 0;
                let entries = (0..n).map(|_| {
                    self.1 += 1;
                    sum += self.1 & 0xffff_ffff;
                    Entry { addr: self.1, len: 64, id: 0, flags: 0 }
                });
                assert_eq!(self.0.submit_all(entries), n as u32, "there is room");
                assert!(!self.0.post(), "the device polls");
                sum
            }

            #[inline]
            fn reap(&mut self, max: usize) -> (usize, u64) {
                let mut sum = 0;
                let n = self
                    .0
                    .reap_all(max as u32, |entry| sum += u64::from(entry.len))
                    .expect("an honest device");
                (n as usize, sum)
            }
        }

        impl Device for Far {
            #[inline]
            fn serve(&mut self, max: usize) -> usize {
                let answer = |entry: Entry| Entry { len: entry.addr as u32, ..entry };
                let n = self.0.serve(max as u32, answer).expect("an honest driver");
                assert!(!self.0.post(), "the driver polls");
                n as usize
            }
        }
    };
}

/// By the calls for single entries.
macro_rules! singly {
    () => {
        impl Driver for Near {
            #[inline]
            fn submit(&mut self, n: usize) -> u64 {
                let mut sum = 0;
                for _ in 0..n {
                    self.1 += 1;
                    sum += self.1 & 0xffff_ffff;
                    self.0
                        .submit(Entry { addr: self.1, len: 64, id: 0, flags: 0 })
                        .expect("there is room");
                }
                assert!(!self.0.post(), "the device polls");
                sum
            }

            #[inline]
            fn reap(&mut self, max: usize) -> (usize, u64) {
                let mut sum = 0;
                for n in 0..max {
                    let Some(entry) = self.0.reap().expect("an honest device") else {
                        return (n, sum);
                    };
                    sum += u64::from(entry.len);
                }
                (max, sum)
            }
        }

        impl Device for Far {
            #[inline]
            fn serve(&mut self, max: usize) -> usize {
                let mut n = 0;
                while n < max {
                    let Some(entry) = self.0.take().expect("an honest driver") else { break };
                    self.0.give_back(Entry { len: entry.addr as u32, ..entry });
                    n += 1;
                }
                assert!(!self.0.post(), "the driver polls");
                n
            }
        }
    };
}

/// The ends over `$shm`: the crate, or its sources compiled with something changed.
macro_rules! ends {
    ($shm:path, $calls:ident) => {
        use super::*;
        use shm::ring::{DeviceEnd, DriverEnd, Entry, Layout, Returns};
        use shm::sync::Word;
        use $shm as shm;

        type Memory = &'static [Word];

        pub struct Near(DriverEnd<Memory>, u64);
        pub struct Far(DeviceEnd<Memory>);

        pub fn pair() -> (Near, Far) {
            let layout = Layout::new(ENTRIES as u32, Returns::Entries).expect("a valid layout");
            let memory = pages().words();
            let driver = DriverEnd::create(memory, layout, 0).expect("it fits");
            (Near(driver, 0), Far(DeviceEnd::attach(memory).expect("it is formatted")))
        }

        $calls!();
    };
}

pub mod real {
    ends!(vbus_shm, batches);
}
pub mod single {
    ends!(vbus_shm, singly);
}
pub mod nofence {
    ends!(crate::ablation::nofence, batches);
}

pub mod counted {
    //! Returns are only counted.

    use vbus_shm::ring::{DeviceEnd, DriverEnd, Entry, Layout, Returns};
    use vbus_shm::sync::Word;

    use super::*;

    type Memory = &'static [Word];

    pub struct Near(DriverEnd<Memory>, u64);
    pub struct Far(DeviceEnd<Memory>, u64);

    pub fn pair() -> (Near, Far) {
        let layout = Layout::new(ENTRIES as u32, Returns::Counted).expect("a valid layout");
        let memory = pages().words();
        let driver = DriverEnd::create(memory, layout, 0).expect("it fits");
        (Near(driver, 0), Far(DeviceEnd::attach(memory).expect("it is formatted"), 0))
    }

    impl Driver for Near {
        #[inline]
        fn submit(&mut self, n: usize) -> u64 {
            let entries = (0..n).map(|_| {
                self.1 += 1;
                Entry { addr: self.1, len: 64, id: 0, flags: 0 }
            });
            assert_eq!(self.0.submit_all(entries), n as u32, "there is room");
            assert!(!self.0.post(), "the device polls");
            n as u64
        }

        #[inline]
        fn reap(&mut self, _max: usize) -> (usize, u64) {
            let n = self.0.reap_count().expect("an honest device");
            (n as usize, u64::from(n))
        }
    }

    impl Device for Far {
        #[inline]
        fn serve(&mut self, max: usize) -> usize {
            let in_order = |entry: Entry| {
                self.1 += 1;
                assert_eq!(entry.addr, self.1, "in order");
                entry
            };
            let n = self.0.serve(max as u32, in_order).expect("an honest driver");
            assert!(!self.0.post(), "the driver polls");
            n as usize
        }
    }
}
