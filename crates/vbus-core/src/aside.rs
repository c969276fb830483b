// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Threads for work that takes longer than a worker may take.
//!
//! A worker serves many devices, so no single piece of its work may be long. Some pieces are: to
//! map and unmap memory, to open and close a connection, to end one after a fault. They run here,
//! on at most [`THREADS`] threads, in the order in which they came. A device has one piece at a
//! time here, so it delays another device by one piece of each thread at most.
//!
//! Work that may block for as long as somebody else likes does not belong here: see
//! [`BlockingQueue`](crate::BlockingQueue).

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use crate::alarm::Alarm;
use crate::counter::ConnectionCounters;
use crate::lock::lock;

/// The most threads. The first is started with the executor, the others when they are needed first.
/// Then they stay.
pub(crate) const THREADS: usize = 4;

/// A piece of work.
struct Job {
    counters: Arc<ConnectionCounters>,
    work: &'static str,
    run: Box<dyn FnOnce() + Send>,
}

/// What a thread is at.
#[derive(Clone)]
pub(crate) struct AtWork {
    /// Tells this piece of work from all others.
    pub number: u64,
    pub counters: Arc<ConnectionCounters>,
    pub work: String,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    /// Threads that wait for work.
    idle: usize,
    /// What each thread that was started is at.
    threads: Vec<Option<AtWork>>,
    /// Pieces of work begun so far.
    begun: u64,
    stop: bool,
}

/// The threads and their queue. The last user calls [`stop`](Self::stop).
pub(crate) struct Aside {
    alarm: Arc<Alarm>,
    state: Mutex<State>,
    more: Condvar,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

impl Aside {
    pub(crate) fn new(alarm: Arc<Alarm>) -> Aside {
        Aside { alarm, state: Mutex::default(), more: Condvar::new(), handles: Mutex::default() }
    }

    /// Starts the first thread, so that [`run`](Self::run) always has one.
    pub(crate) fn start(self: &Arc<Self>) -> std::io::Result<()> {
        self.add_thread(&mut lock(&self.state))
    }

    fn add_thread(self: &Arc<Self>, state: &mut State) -> std::io::Result<()> {
        let (this, number) = (self.clone(), state.threads.len());
        let thread = std::thread::Builder::new().name(format!("vbus-aside-{number}"));
        let handle = thread.spawn(move || this.serve(number))?;
        state.threads.push(None);
        lock(&self.handles).push(handle);
        Ok(())
    }

    /// Runs `run` on one of the threads, for the device that `counters` names. Never on the thread
    /// of the caller, who may hold locks, except after [`stop`](Self::stop).
    pub(crate) fn run(
        self: &Arc<Self>,
        counters: Arc<ConnectionCounters>,
        work: &'static str,
        run: Box<dyn FnOnce() + Send>,
    ) {
        let mut state = lock(&self.state);
        if state.stop {
            drop(state);
            return run();
        }
        state.queue.push_back(Job { counters, work, run });
        if state.idle >= state.queue.len() {
            self.more.notify_one();
            return;
        }
        if state.threads.len() == THREADS {
            return;
        }
        if let Err(error) = self.add_thread(&mut state) {
            // The threads that there are do it.
            tracing::error!(%error, "cannot start another thread for long work");
        }
    }

    fn serve(&self, number: usize) {
        let mut state = lock(&self.state);
        loop {
            let Some(job) = state.queue.pop_front() else {
                if state.stop {
                    return;
                }
                state.idle += 1;
                state = self.more.wait(state).unwrap_or_else(|e| e.into_inner());
                state.idle -= 1;
                continue;
            };
            state.begun += 1;
            let work = job.work.to_owned();
            let at = AtWork { number: state.begun, counters: job.counters, work };
            self.at_work(&mut state, number, Some(at));
            drop(state);
            self.alarm.ring();
            let run = std::panic::AssertUnwindSafe(job.run);
            if std::panic::catch_unwind(run).is_err() {
                tracing::error!("a piece of long work panicked");
            }
            state = lock(&self.state);
            self.at_work(&mut state, number, None);
        }
    }

    fn at_work(&self, state: &mut MutexGuard<'_, State>, number: usize, at: Option<AtWork>) {
        if let Some(thread) = state.threads.get_mut(number) {
            *thread = at;
        }
    }

    /// What each of [`THREADS`] threads is at.
    pub(crate) fn all_at_work(&self) -> impl Iterator<Item = Option<AtWork>> {
        let mut threads = lock(&self.state).threads.clone();
        threads.resize(THREADS, None);
        threads.into_iter()
    }

    /// Ends the threads, when the queue is empty.
    pub(crate) fn stop(&self) {
        lock(&self.state).stop = true;
        self.more.notify_all();
        let me = std::thread::current().id();
        for handle in std::mem::take(&mut *lock(&self.handles)) {
            // A piece of work may drop the last handle of the executor.
            if handle.thread().id() != me {
                let _ = handle.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_thread_is_there_before_there_is_work() {
        let aside = Arc::new(Aside::new(Arc::new(Alarm::new().unwrap())));
        aside.start().unwrap();
        assert_eq!(lock(&aside.state).threads.len(), 1);
        let (sender, receiver) = std::sync::mpsc::channel();
        // Work never runs on the thread that brings it.
        let run = move || sender.send(std::thread::current().id()).unwrap();
        aside.run(Arc::default(), "a test", Box::new(run));
        assert_ne!(receiver.recv().unwrap(), std::thread::current().id());
        aside.stop();
    }
}
