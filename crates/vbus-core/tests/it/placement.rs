// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which worker runs which task. All of this is counted, not timed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use vbus_core::{
    ConnectionCounters, ErrorCode, Executor, Interest, Progress, Task, TaskHandle, Tuning,
};

const BOUND: Duration = Duration::from_secs(60);

/// A task that has work as long as it is told so, and tells in which thread it is polled otherwise.
struct Works {
    busy: Arc<AtomicBool>,
    polls: Arc<AtomicU64>,
    thread: Arc<Mutex<Option<ThreadId>>>,
    idle: Sender<ThreadId>,
}

impl Task for Works {
    fn poll(&mut self, _: u32) -> Result<Progress, ErrorCode> {
        let thread = std::thread::current().id();
        *self.thread.lock().unwrap() = Some(thread);
        self.polls.fetch_add(1, Ordering::Relaxed);
        if self.busy.load(Ordering::Relaxed) {
            return Ok(Progress::Busy);
        }
        let _ = self.idle.send(thread);
        Ok(Progress::Idle)
    }

    fn adaptive(&self) -> bool {
        false
    }
}

/// A [`Works`], from outside.
struct Worked {
    busy: Arc<AtomicBool>,
    polls: Arc<AtomicU64>,
    thread: Arc<Mutex<Option<ThreadId>>>,
    idle: Receiver<ThreadId>,
    counters: Arc<ConnectionCounters>,
    task: TaskHandle,
}

impl Worked {
    /// A busy task of `device`, on worker 0.
    fn start(executor: &Executor, device: &str) -> Worked {
        let (sender, idle) = channel();
        let busy = Arc::new(AtomicBool::new(true));
        let (polls, thread) = (Arc::<AtomicU64>::default(), Arc::default());
        let counters = Arc::new(ConnectionCounters::of(device));
        let works = Works {
            busy: busy.clone(),
            polls: polls.clone(),
            thread: Arc::clone(&thread),
            idle: sender,
        };
        let task = executor.spawn(0, Box::new(works), counters.clone(), |_| {});
        Worked { busy, polls, thread, idle, counters, task }
    }

    fn thread(&self) -> Option<ThreadId> {
        *self.thread.lock().unwrap()
    }

    /// Waits until the task was polled `more` times more.
    fn polled(&self, more: u64) {
        let (before, begin) = (self.polls.load(Ordering::Relaxed), Instant::now());
        while self.polls.load(Ordering::Relaxed) < before + more {
            assert!(begin.elapsed() < BOUND, "the task is not polled");
            std::thread::yield_now();
        }
    }
}

fn executor(workers: usize) -> Arc<Executor> {
    Executor::start(Tuning { workers, poll_max: Duration::ZERO, ..Tuning::default() }).unwrap()
}

#[test]
fn two_busy_devices_do_not_share_a_worker_while_another_sleeps() {
    let executor = executor(2);
    let a = Worked::start(&executor, "a");
    let b = Worked::start(&executor, "b");
    let begin = Instant::now();
    while a.counters.moves.get() + b.counters.moves.get() == 0 {
        assert!(begin.elapsed() < BOUND, "both stay on one worker");
        std::thread::yield_now();
    }
    a.polled(2);
    b.polled(2);
    assert_ne!(a.thread(), b.thread());
    a.polled(1000);
    b.polled(1000);
    assert_eq!(a.counters.moves.get() + b.counters.moves.get(), 1, "there it stays");

    // The one that moved sleeps and is woken there.
    let moved = if a.counters.moves.get() == 1 { &a } else { &b };
    let there = moved.thread().unwrap();
    moved.busy.store(false, Ordering::Relaxed);
    assert_eq!(moved.idle.recv_timeout(BOUND), Ok(there));
    moved.task.wake();
    assert_eq!(moved.idle.recv_timeout(BOUND), Ok(there));
    a.task.stop();
    b.task.stop();
}

#[test]
fn a_task_that_moved_is_woken_by_its_descriptors() {
    let executor = executor(2);
    // Either of them may be the one that moves.
    let all = ["a", "b"].map(|device| Worked::start(&executor, device));
    let events =
        [(); 2].map(|()| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
    for (worked, event) in all.iter().zip(&events) {
        worked.task.watch(event, Interest::Read).unwrap();
    }
    let begin = Instant::now();
    while all.iter().all(|worked| worked.counters.moves.get() == 0) {
        assert!(begin.elapsed() < BOUND, "both stay on one worker");
        std::thread::yield_now();
    }
    for (worked, event) in all.iter().zip(&events) {
        worked.busy.store(false, Ordering::Relaxed);
        let thread = worked.idle.recv_timeout(BOUND).unwrap();
        rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(worked.idle.recv_timeout(BOUND), Ok(thread), "woken by its descriptor");
        worked.task.stop();
    }
}

#[test]
fn tasks_of_one_device_and_tasks_without_a_free_worker_stay() {
    let executor = executor(2);
    let same = ["a", "a"].map(|device| Worked::start(&executor, device));
    same.iter().for_each(|worked| worked.polled(1000));
    assert!(same.iter().all(|worked| worked.counters.moves.get() == 0));
    assert_eq!(same[0].thread(), same[1].thread());
    same.iter().for_each(|worked| worked.task.stop());

    let executor = self::executor(1);
    let all = ["a", "b", "c"].map(|device| Worked::start(&executor, device));
    all.iter().for_each(|worked| worked.polled(1000));
    assert!(all.iter().all(|worked| worked.counters.moves.get() == 0));
    all.iter().for_each(|worked| worked.task.stop());
}
