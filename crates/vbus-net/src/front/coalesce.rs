// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interrupt coalescing: a ring holds its interrupt back for a time, or until a
//! number of frames have passed.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::ring::Ring;

/// The setting of one ring. The driver may change it at any time. The two words need not fit each
/// other for the moment of a change, and depend on no other memory: all accesses are relaxed.
#[derive(Debug, Default)]
pub struct Setting {
    usecs: AtomicU32,
    frames: AtomicU32,
}

impl Setting {
    /// Holds interrupts back for `usecs` microseconds (0: not at all), or until `frames` frames
    /// have passed (0: any number).
    pub fn set(&self, usecs: u32, frames: u32) {
        self.usecs.store(usecs, Ordering::Relaxed);
        self.frames.store(frames, Ordering::Relaxed);
    }

    /// The microseconds and the number of frames that were set last.
    pub fn get(&self) -> (u32, u32) {
        (self.usecs.load(Ordering::Relaxed), self.frames.load(Ordering::Relaxed))
    }

    fn time(&self) -> Duration {
        Duration::from_micros(self.usecs.load(Ordering::Relaxed).into())
    }

    fn is_enough(&self, frames: u64) -> bool {
        let limit = self.frames.load(Ordering::Relaxed);
        limit != 0 && frames >= u64::from(limit)
    }
}

/// The interrupt that a ring holds back.
#[derive(Debug, Default)]
pub struct Held {
    /// The time at which the interrupt goes at the latest, and the frames that passed since the
    /// post that asked for it, with those of that post.
    held: Option<(Instant, u64)>,
}

impl Held {
    /// The ring has posted `frames` frames. `wanted`: the driver asked for an interrupt. This
    /// interrupts, or holds the interrupt back. Returns true if it holds one back that it did not
    /// hold before: the ring's task must look at [`deadline`](Self::deadline) again.
    pub fn posted(
        &mut self,
        wanted: bool,
        frames: u64,
        setting: &Setting,
        ring: &impl Ring,
    ) -> bool {
        let Some((_, passed)) = &mut self.held else {
            let time = setting.time();
            if !wanted || time.is_zero() || setting.is_enough(frames) {
                ring.interrupt(wanted);
                return false;
            }
            self.held = Some((Instant::now() + time, frames));
            return true;
        };
        *passed += frames;
        let passed = *passed;
        // A second interrupt beside the one that is held would say nothing new.
        if setting.is_enough(passed) {
            self.release(ring);
        }
        false
    }

    /// Interrupts if the time is over, or the driver has switched coalescing off.
    pub fn poll(&mut self, setting: &Setting, ring: &impl Ring) {
        let is_due =
            |(until, _): (Instant, u64)| setting.time().is_zero() || Instant::now() >= until;
        if self.held.is_some_and(is_due) {
            self.release(ring);
        }
    }

    /// Interrupts now, if an interrupt is held back.
    pub fn release(&mut self, ring: &impl Ring) {
        if self.held.take().is_some() {
            ring.interrupt(true);
        }
    }

    /// When [`poll`](Self::poll) must be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.held.map(|(until, _)| until)
    }
}
