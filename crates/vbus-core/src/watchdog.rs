// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Notices a worker that does not come round.
//!
//! No task may hold its worker for long: the other tasks of that worker wait meanwhile. A task that
//! does so has a fault, or a class blocks, or the machine has no processor to give. The watchdog
//! says which task it was.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use crate::executor::Executor;

/// How long a worker may take for one round.
const BOUND: Duration = Duration::from_secs(1);

/// Watches the workers of an executor, and its threads for long work. Whoever has it calls
/// [`look`](Self::look) again and again, several times a second, except while all threads
/// [sleep](Self::rest).
pub struct Watchdog {
    executor: Arc<Executor>,
    seen: Vec<Seen>,
}

/// A thread, as it was seen last.
#[derive(Default)]
struct Seen {
    /// The round that it was in. `None`: it slept.
    round: Option<u64>,
    /// How long it has been seen in this round.
    stuck: Duration,
    reported: bool,
}

impl Watchdog {
    /// Watches the threads of `executor`.
    pub fn new(executor: Arc<Executor>) -> Watchdog {
        let seen = executor.at_work().map(|_| Seen::default()).collect();
        Watchdog { executor, seen }
    }

    /// Whether all threads sleep. If they do, the descriptor ([`AsFd`]) becomes readable when one
    /// wakes, and no look is needed before. Call [`woken`](Self::woken) then: until that call the
    /// descriptor stays readable.
    pub fn rest(&mut self) -> bool {
        self.executor.alarm().set();
        let rests = self.executor.sleeps() && !self.seen.iter().any(|seen| seen.reported);
        if !rests {
            self.executor.alarm().unset();
        }
        rests
    }

    /// The descriptor was readable. It becomes unreadable, also for the threads that wake from now
    /// on, until the next [`rest`](Self::rest).
    pub fn woken(&mut self) {
        self.executor.alarm().unset();
    }

    /// Looks at all threads. `since` is the time since the last look, or the time that the caller
    /// meant to wait if that is less: a process that was stopped stalls no worker. Returns whether
    /// every thread has come round within the last second. A thread that has not is logged once,
    /// with its device and its work, and counted in the device's
    /// [`stalls`](crate::ConnectionCounters::stalls).
    pub fn look(&mut self, since: Duration) -> bool {
        let mut all = true;
        for (number, (seen, at)) in self.seen.iter_mut().zip(self.executor.at_work()).enumerate() {
            let round = at.as_ref().map(|at| at.number);
            let Some(at) = at.filter(|_| round == seen.round) else {
                if seen.reported {
                    tracing::warn!(thread = number, "goes on, after {:.1?}", seen.stuck);
                }
                *seen = Seen { round, ..Seen::default() };
                continue;
            };
            seen.stuck += since;
            if seen.stuck < BOUND {
                continue;
            }
            all = false;
            if std::mem::replace(&mut seen.reported, true) {
                continue;
            }
            at.counters.stalls.one();
            tracing::error!(
                thread = number,
                device = at.counters.device(),
                work = at.work,
                "a worker has not come round for {BOUND:?}; other devices wait"
            );
        }
        all
    }
}

impl AsFd for Watchdog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.executor.alarm().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Instant;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::io::retry_on_intr;

    use super::*;
    use crate::counter::ConnectionCounters;
    use crate::executor::{Progress, Task, Tuning};
    use vbus_shm::ErrorCode;

    const STEP: Duration = Duration::from_millis(600);
    const TIMEOUT: Duration = Duration::from_secs(60);
    const TIMEOUT_SPEC: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

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
    fn long_work_is_noticed_too() {
        let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
        let mut watchdog = Watchdog::new(executor.clone());
        let begin = Instant::now();
        while !watchdog.rest() {
            assert!(begin.elapsed() < TIMEOUT, "the new worker does not fall asleep");
            std::thread::yield_now();
        }
        let ((tell, told), (go, may_go)) = (channel(), channel::<()>());
        let counters = Arc::new(ConnectionCounters::of("slow0"));
        executor.aside(counters.clone(), "a wait", move || {
            tell.send(()).unwrap();
            let _ = may_go.recv();
        });
        told.recv_timeout(TIMEOUT).unwrap();
        // Nothing else wakes whoever looks.
        let mut fds = [PollFd::new(&watchdog, PollFlags::IN)];
        assert_eq!(retry_on_intr(|| poll(&mut fds, Some(&TIMEOUT_SPEC))), Ok(1));
        // Whoever looks waits for the time of the next look, and not for threads that wake.
        watchdog.woken();
        let (sender, receiver) = channel();
        executor.aside(Arc::default(), "another", move || sender.send(()).unwrap());
        receiver.recv_timeout(TIMEOUT).expect("another thread does it");
        let mut fds = [PollFd::new(&watchdog, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(retry_on_intr(|| poll(&mut fds, Some(&now))), Ok(0));
        assert!(!watchdog.rest());
        let (sender, receiver) = channel();
        executor.aside(Arc::default(), "another", move || sender.send(()).unwrap());
        receiver.recv_timeout(TIMEOUT).expect("another thread does it");
        assert!(watchdog.look(STEP) && watchdog.look(STEP) && !watchdog.look(STEP));
        assert_eq!(counters.stalls.get(), 1);
        drop(go);
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
        told.recv_timeout(TIMEOUT).unwrap();
        assert!(watchdog.look(STEP), "seen for the first time");
        assert!(watchdog.look(STEP), "not for a second yet");
        assert_eq!(counters.stalls.get(), 0);
        assert!(!watchdog.look(STEP) && !watchdog.look(STEP));
        assert_eq!(counters.stalls.get(), 1, "once");
        assert_eq!(serde_json::to_value(&*counters).unwrap()["stalls"], 1);
        go.send(()).unwrap();
        // It is polled again, and then held again.
        task.wake();
        told.recv_timeout(TIMEOUT).unwrap();
        assert!(watchdog.look(STEP), "it came round");
        assert!(watchdog.look(STEP));
        assert!(!watchdog.look(STEP));
        assert_eq!(counters.stalls.get(), 2);
        go.send(()).unwrap();
        drop(go);
        task.stop();
    }
}
