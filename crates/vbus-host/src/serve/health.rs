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
