// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looks at the workers from time to time, and tells systemd that all is well.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use vbus_core::Watchdog;

use super::systemd::Manager;

/// How often the workers are looked at while one of them is awake.
const LOOK: Duration = Duration::from_millis(250);

/// The times at which the workers are looked at.
pub struct Health {
    watchdog: Watchdog,
    interval: Duration,
    /// systemd wants signs of life, also while the bus does nothing.
    watched: bool,
    looked: Instant,
    /// All workers sleep, and no look is due until one wakes.
    rests: bool,
}

impl Health {
    pub fn new(watchdog: Watchdog, manager: &Manager) -> Health {
        let watched = manager.watchdog_interval();
        let interval = watched.map_or(LOOK, |interval| interval.min(LOOK));
        let looked = Instant::now();
        Health { watchdog, interval, watched: watched.is_some(), looked, rests: false }
    }

    /// How long to wait until [`look`](Self::look) is called again. `None`: until the descriptor
    /// ([`AsFd`]) is readable.
    pub fn timeout(&self) -> Option<Timespec> {
        Timespec::try_from(self.interval).ok().filter(|_| !self.rests)
    }

    /// Looks at the workers, if that is due. `woken`: the descriptor is readable.
    pub fn look(&mut self, woken: bool, manager: &mut Manager) {
        if woken {
            // A descriptor that stays readable would keep this thread from waiting.
            self.watchdog.woken();
        }
        if self.rests {
            if woken {
                self.rests = false;
                self.looked = Instant::now();
            }
            return;
        }
        // A process that was stopped for a while has looked late, and no worker is to blame.
        let since = self.looked.elapsed().min(2 * self.interval);
        if since < self.interval {
            return;
        }
        self.looked = Instant::now();
        if self.watchdog.look(since) {
            manager.alive();
        }
        // Asked here and nowhere else: workers that wake and sleep a thousand times a second must
        // not wake this thread each time.
        self.rests = !self.watched && self.watchdog.rest();
    }
}

impl AsFd for Health {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watchdog.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::io::retry_on_intr;
    use vbus_core::{Executor, Tuning};

    use super::*;

    /// Devices that carry frames wake their workers a thousand times a second.
    #[test]
    fn workers_that_wake_do_not_keep_the_thread_from_waiting() {
        let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
        let mut manager = Manager::of_environment(false);
        let mut health = Health::new(Watchdog::new(executor.clone()), &manager);
        health.watched = false;
        let work = || {
            let (sender, receiver) = channel();
            executor.aside(Arc::default(), "work", move || sender.send(()).unwrap());
            receiver.recv_timeout(Duration::from_secs(60)).unwrap();
        };
        let is_readable = |health: &Health, seconds: i64| {
            let mut fds = [PollFd::new(health, PollFlags::IN)];
            let timeout = Timespec { tv_sec: seconds, tv_nsec: 0 };
            retry_on_intr(|| poll(&mut fds, Some(&timeout))).unwrap() != 0
        };
        for _ in 0..3 {
            let until = Instant::now() + Duration::from_secs(60);
            while health.timeout().is_some() {
                assert!(Instant::now() < until, "the watch does not rest");
                std::thread::sleep(health.interval);
                health.look(false, &mut manager);
            }
            work();
            assert!(is_readable(&health, 60));
            health.look(true, &mut manager);
            work();
            assert!(!is_readable(&health, 0));
        }
    }
}
