// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Notices a worker that does not come round.
//!
//! No task may hold its worker for long: the other tasks of that worker wait meanwhile. A task that
//! does so has a fault, or a class blocks, or the machine has no processor to give. The watchdog
//! says which task it was.

use std::sync::Arc;
use std::time::Duration;

use crate::executor::{Executor, Pulse};

/// How long a worker may take for one round.
const BOUND: Duration = Duration::from_secs(1);

/// Watches the workers of an executor. Whoever has it calls [`look`](Self::look) again and again,
/// several times a second.
pub struct Watchdog {
    executor: Arc<Executor>,
    seen: Vec<Seen>,
}

/// A worker, as it was seen last.
struct Seen {
    pulse: Pulse,
    /// How long it has been seen in the same round.
    stuck: Duration,
    reported: bool,
}

impl Watchdog {
    /// Watches the workers of `executor`.
    pub fn new(executor: Arc<Executor>) -> Watchdog {
        let new = |pulse| Seen { pulse, stuck: Duration::ZERO, reported: false };
        let seen = executor.pulses().map(new).collect();
        Watchdog { executor, seen }
    }

    /// Looks at all workers. `since` is the time since the last look, or the time that the caller
    /// meant to wait if that is less: a process that was stopped stalls no worker. Returns whether
    /// every worker has come round within the last second. A worker that has not is logged once,
    /// with the task that has its turn, and counted in the task's
    /// [`stalls`](crate::ConnectionCounters::stalls).
    pub fn look(&mut self, since: Duration) -> bool {
        let mut all = true;
        for (number, (seen, pulse)) in self.seen.iter_mut().zip(self.executor.pulses()).enumerate()
        {
            if seen.pulse.rounds != pulse.rounds || pulse.turn.is_none() {
                if seen.reported {
                    tracing::warn!(worker = number, "goes on, after {:.1?}", seen.stuck);
                }
                *seen = Seen { pulse, stuck: Duration::ZERO, reported: false };
                continue;
            }
            seen.stuck += since;
            if seen.stuck < BOUND {
                continue;
            }
            all = false;
            let task = pulse.turn.and_then(|id| self.executor.about(number, id));
            let Some((counters, work)) = task.filter(|_| !seen.reported) else { continue };
            seen.reported = true;
            counters.stalls.one();
            tracing::error!(
                worker = number,
                device = counters.device(),
                work,
                "a worker has not come round for {BOUND:?}; its other devices wait"
            );
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;
    use crate::counter::ConnectionCounters;
    use crate::executor::{Progress, Task, Tuning};
    use vbus_shm::ErrorCode;

    const STEP: Duration = Duration::from_millis(600);
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Holds its worker until it is told to let go.
    struct Holds(Sender<()>, Receiver<()>);

    impl Task for Holds {
        fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
            self.0.send(()).unwrap();
            self.1.recv().unwrap();
            Ok(Progress::Idle)
        }

        fn work(&self) -> String {
            "a wait".into()
        }

        fn adaptive(&self) -> bool {
            false
        }
    }

    #[test]
    fn a_worker_that_a_task_holds_is_noticed_once() {
        let executor = Executor::start(Tuning { workers: 2, ..Tuning::default() }).unwrap();
        let mut watchdog = Watchdog::new(executor.clone());
        assert!(watchdog.look(STEP) && watchdog.look(STEP) && watchdog.look(STEP), "all sleep");
        let ((tell, told), (go, may_go)) = (channel(), channel());
        let counters = Arc::new(ConnectionCounters::of("slow0"));
        let task = Box::new(Holds(tell, may_go));
        let task = executor.spawn(1, task, Arc::new(counters.beside()), |_| {});
        told.recv_timeout(PATIENCE).unwrap();
        assert!(watchdog.look(STEP) && watchdog.look(STEP), "not for a second yet");
        assert_eq!(counters.stalls.get(), 0);
        assert!(!watchdog.look(STEP) && !watchdog.look(STEP));
        assert_eq!(counters.stalls.get(), 1, "once");
        assert_eq!(serde_json::to_value(&*counters).unwrap()["stalls"], 1);
        go.send(()).unwrap();
        // It is polled again, and then held again.
        task.wake();
        told.recv_timeout(PATIENCE).unwrap();
        assert!(watchdog.look(STEP), "it came round");
        assert!(watchdog.look(STEP));
        assert!(!watchdog.look(STEP));
        assert_eq!(counters.stalls.get(), 2);
        go.send(()).unwrap();
        drop(go);
        task.stop();
    }
}
