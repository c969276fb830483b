// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a reset was that came while a driver had the device open. A machine that was reset starts a
//! system, which sizes the BARs anew. A machine that was restored from a snapshot, without the
//! device, has a guest that believes its device to be as it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vbus_core::{ConnectionCounters, ErrorCode, Executor, Progress, Task, TaskHandle};

/// How long nobody may set the function up before the bus says so. A machine that was reset has
/// sized all BARs long before.
const SILENCE: Duration = Duration::from_secs(10);

/// Waits for what tells what a reset was. Dropping it ends that: the peer has gone, or has reset
/// the function once more.
pub(crate) struct AfterReset {
    open: Arc<Question>,
    task: TaskHandle,
}

/// The question, until somebody knows the answer.
struct Question {
    counters: Arc<ConnectionCounters>,
    /// Relaxed: it orders nothing. Whoever takes it away answers.
    is_open: AtomicBool,
}

impl AfterReset {
    /// A reset has come under a driver of the device with these counters. The worker with index
    /// `worker` of the event loop `executor` watches the time.
    pub(crate) fn begin(
        (executor, worker): (&Arc<Executor>, usize),
        counters: Arc<ConnectionCounters>,
    ) -> AfterReset {
        tracing::info!(device = counters.device(), "reset while its driver had it open");
        let beside = Arc::new(counters.beside());
        let open = Arc::new(Question { counters, is_open: AtomicBool::new(true) });
        let due = Instant::now() + SILENCE;
        let task = Box::new(Silence { open: open.clone(), due });
        AfterReset { open, task: executor.spawn(worker, task, beside, |_| {}) }
    }

    /// Somebody has written `value` to a BAR's register. A VMM that resets the function writes
    /// zeros itself.
    pub(crate) fn bar_written(&self, value: u32) {
        if value == 0 {
            return;
        }
        // All ones ask for the size of a BAR. A system that starts does that. A guest that goes on
        // knows the size, and writes the address that the BAR had.
        if value & !BAR_FLAGS == !BAR_FLAGS {
            self.open.is_open.store(false, Ordering::Relaxed);
        } else {
            self.open.answer(
                "its guest goes on after a reset as if none had been: a snapshot of the machine \
                 was restored, of which QEMU saves nothing for this device, or only the function \
                 was reset. A driver of vbus opens the device again; frames on their way are lost",
            );
        }
    }

    /// Somebody uses the function without a BAR: a process, and no machine.
    pub(crate) fn used(&self) {
        self.open.is_open.store(false, Ordering::Relaxed);
    }
}

/// The bits of a BAR's register that are no part of the address.
const BAR_FLAGS: u32 = 0xf;

impl Drop for AfterReset {
    fn drop(&mut self) {
        self.task.stop();
    }
}

impl Question {
    fn answer(&self, text: &str) {
        if self.is_open.swap(false, Ordering::Relaxed) {
            self.counters.set_back.one();
            tracing::warn!(
                device = self.counters.device(),
                "{text}. `vbus snapshot` unplugs devices around a snapshot"
            );
        }
    }
}

/// Answers if nobody else does.
struct Silence {
    open: Arc<Question>,
    due: Instant,
}

impl Task for Silence {
    fn work(&self) -> String {
        "the time since a reset".into()
    }

    fn poll(&mut self, _budget: u32) -> Result<Progress, ErrorCode> {
        if Instant::now() >= self.due {
            self.open.answer(
                "nobody has set it up since it was reset under its driver: if a snapshot of the \
                 machine was restored, its driver has not noticed that QEMU saves nothing for this \
                 device, and the machine must be reset",
            );
        }
        Ok(Progress::Idle)
    }

    fn deadline(&self) -> Option<Instant> {
        // Relaxed: as in `Question`.
        self.open.is_open.load(Ordering::Relaxed).then_some(self.due)
    }

    fn adaptive(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question() -> Arc<Question> {
        let counters = Arc::new(ConnectionCounters::of("net0"));
        Arc::new(Question { counters, is_open: AtomicBool::new(true) })
    }

    #[test]
    fn silence_counts_once_and_only_when_its_time_has_come() {
        let open = question();
        let mut task = Silence { open: open.clone(), due: Instant::now() + SILENCE };
        task.poll(1).unwrap();
        assert_eq!((open.counters.set_back.get(), task.deadline()), (0, Some(task.due)));
        task.due = Instant::now();
        for _ in 0..2 {
            task.poll(1).unwrap();
            assert_eq!((open.counters.set_back.get(), task.deadline()), (1, None));
        }
    }

    #[test]
    fn silence_says_nothing_after_another_answer() {
        let open = question();
        open.answer("the guest goes on");
        let mut task = Silence { open: open.clone(), due: Instant::now() };
        task.poll(1).unwrap();
        assert_eq!(open.counters.set_back.get(), 1);
    }
}
