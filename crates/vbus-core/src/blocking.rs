// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Helper threads for work that may block.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::lock::lock;

/// The most helper threads of the process.
const THREADS_MAX: usize = 4;
/// The most jobs of a queue that have not begun.
const JOBS_MAX: usize = 16;
/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// Work of a device that may block: a system call that waits for the kernel's locks, a file, a
/// lock. The jobs of one queue run one at a time, in their order, on threads that all queues of the
/// process share. The threads exist only while there is work. Clones are handles to the same queue.
///
/// ```
/// use std::sync::mpsc::channel;
///
/// let (queue, (sender, receiver)) = (vbus_core::BlockingQueue::default(), channel());
/// assert!(queue.run(move || sender.send(std::fs::read("/proc/version")).unwrap()));
/// receiver.recv().unwrap().ok();
/// ```
#[derive(Clone, Default)]
pub struct BlockingQueue(Arc<Mutex<Jobs>>);

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    /// Whether the pool has the queue, or a thread runs one of its jobs.
    scheduled: bool,
}

struct Pool {
    state: Mutex<PoolState>,
    news: Condvar,
}

struct PoolState {
    /// Queues with a waiting job of which none runs.
    ready: VecDeque<BlockingQueue>,
    threads: usize,
    idle: usize,
}

static POOL: Pool = Pool {
    state: Mutex::new(PoolState { ready: VecDeque::new(), threads: 0, idle: 0 }),
    news: Condvar::new(),
};

impl BlockingQueue {
    /// Runs `job` after the earlier jobs of this queue. Never blocks. Returns false, and drops the
    /// job, if 16 jobs wait already or no thread can be made.
    #[must_use = "false: the job does not run"]
    pub fn run(&self, job: impl FnOnce() + Send + 'static) -> bool {
        let mut jobs = lock(&self.0);
        if jobs.waiting.len() >= JOBS_MAX {
            return false;
        }
        jobs.waiting.push_back(Box::new(job));
        if jobs.scheduled {
            return true;
        }
        // The pool's lock comes after that of a queue, here and everywhere.
        jobs.scheduled = POOL.push(self);
        if !jobs.scheduled {
            let refused = jobs.waiting.pop_back();
            drop(jobs);
            drop(refused); // Outside of the lock: what the job holds may use the queue.
            return false;
        }
        true
    }

    /// Runs the next job. Returns whether there is another one.
    fn turn(&self) -> bool {
        let job = lock(&self.0).waiting.pop_front();
        if let Some(job) = job {
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("a job on a helper thread panicked");
            }
        }
        let mut jobs = lock(&self.0);
        jobs.scheduled = !jobs.waiting.is_empty();
        jobs.scheduled
    }
}

impl std::fmt::Debug for BlockingQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("BlockingQueue").finish()
    }
}

impl Pool {
    /// Gives `queue` to a thread. Returns false if there is none and none can be made.
    fn push(&'static self, queue: &BlockingQueue) -> bool {
        let mut state = lock(&self.state);
        state.ready.push_back(queue.clone());
        if state.idle >= state.ready.len() || state.threads == THREADS_MAX {
            self.news.notify_one();
            return true;
        }
        let thread = std::thread::Builder::new().name("vbus-blocking".into());
        match thread.stack_size(256 << 10).spawn(|| self.serve()) {
            Ok(_) => state.threads += 1,
            Err(error) => {
                tracing::warn!(%error, "no helper thread can be made");
                if state.threads == 0 {
                    state.ready.pop_back();
                    return false;
                }
            }
        }
        true
    }

    /// The life of a thread.
    fn serve(&self) {
        let mut state = lock(&self.state);
        loop {
            let Some(queue) = state.ready.pop_front() else {
                state.idle += 1;
                let waited = self.news.wait_timeout(state, IDLE);
                let (next, time) = waited.unwrap_or_else(PoisonError::into_inner);
                state = next;
                state.idle -= 1;
                if time.timed_out() && state.ready.is_empty() {
                    state.threads -= 1;
                    return;
                }
                continue;
            };
            drop(state);
            let more = queue.turn();
            state = lock(&self.state);
            if more {
                // Behind the others: a queue with many jobs delays them by one job each.
                state.ready.push_back(queue);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(60);

    fn next<T>(receiver: &Receiver<T>) -> T {
        receiver.recv_timeout(TIMEOUT).unwrap()
    }

    #[test]
    fn jobs_run_in_order_and_queues_beside_each_other() {
        let (queue, other) = (BlockingQueue::default(), BlockingQueue::default());
        let (sender, receiver) = channel();
        let gate = Arc::new(Barrier::new(2));
        let waits = gate.clone();
        assert!(queue.run(move || _ = waits.wait()));
        for n in 0..JOBS_MAX {
            let sender = sender.clone();
            // The first job may not have begun yet.
            let queued = queue.run(move || sender.send(n).unwrap());
            assert!(queued || n + 1 == JOBS_MAX);
        }
        // The other queue does not wait for this one.
        let theirs = sender.clone();
        assert!(other.run(move || theirs.send(usize::MAX).unwrap()));
        assert_eq!(next(&receiver), usize::MAX);
        gate.wait();
        for n in 0..JOBS_MAX - 1 {
            assert_eq!(next(&receiver), n);
        }
    }

    #[test]
    fn a_full_queue_refuses_and_a_panic_ends_one_job() {
        let queue = BlockingQueue::default();
        let (began, has_begun) = channel();
        let gate = Arc::new(Barrier::new(2));
        let waits = gate.clone();
        assert!(queue.run(move || {
            began.send(()).unwrap();
            waits.wait();
            panic!("as the test wants");
        }));
        next(&has_begun);
        assert!((0..JOBS_MAX).all(|_| queue.run(|| ())));
        let (sender, receiver) = channel::<()>();
        assert!(!queue.run(move || drop(sender)), "16 jobs wait");
        assert!(receiver.recv().is_err(), "a refused job is dropped at once");
        gate.wait();
        let (sender, receiver) = channel();
        loop {
            let sender = sender.clone();
            if queue.run(move || _ = sender.send(())) {
                break;
            }
            std::thread::yield_now();
        }
        next(&receiver);
    }
}
