// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The event loop: a few worker threads that run many tasks.
//!
//! A task belongs to one worker. If two devices are busy on one worker while another worker sleeps,
//! a task of one of them moves there. A task sleeps until a [`TaskHandle`] (a doorbell), a file
//! descriptor that it watches, or its deadline wakes it. The worker polls its awake tasks in turn,
//! each with a budget. When a poll finds nothing, the task goes on being polled for a *window*
//! before it arms its signals and sleeps again. The window adapts ([`Pace`]): a busy device costs
//! its driver no doorbell, and an idle device costs no time. Between polls that find nothing the
//! worker yields its processor to other threads.
#![allow(unsafe_code)] // Epoll takes raw event buffers.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use vbus_shm::signal::Armed;
use vbus_shm::{ErrorCode, Pace, Rest};

use crate::alarm::Alarm;
use crate::aside::{Aside, AtWork};
use crate::counter::ConnectionCounters;
use crate::hand_over::{HandOver, Next};
use crate::lock::lock;
use crate::wake::WakeFlag;

/// The result of a poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The poll did some work. There may be more.
    Busy,
    /// The poll found no work.
    Idle,
}

/// Work that a worker polls.
pub trait Task: Send {
    /// Does at most `budget` units of work (packets, messages) without blocking. An error ends the
    /// task and, by `on_error`, what the task belongs to.
    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode>;

    /// Asks the peer for a kick with the next work. The worker calls it before the task sleeps.
    /// [`Armed::Missed`]: there is work already.
    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        Ok(Armed::Waiting)
    }

    /// Asks the peer for no kick. The worker calls it when the task is woken, before the first
    /// poll.
    fn disarm(&mut self) {}

    /// When the worker must poll the task even if nobody wakes it. The worker asks before the task
    /// sleeps.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// How many bytes the task has carried since it began. A small message counts as some hundred
    /// bytes. Under load the worker polls the task by a timer instead of arming it (see [`Pace`]).
    /// A task that always returns 0 is never polled by a timer.
    fn carried(&self) -> u64 {
        0
    }

    /// What the task does, for the log: for example `queue pair 3`. Asked once, when it begins.
    fn work(&self) -> String {
        "a task".into()
    }

    /// Whether it is useful to poll again after an empty poll. A task that only waits for
    /// descriptors returns false.
    fn adaptive(&self) -> bool {
        true
    }
}

/// Which readiness of a watched descriptor wakes the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Readable, or closed by the peer.
    Read,
    /// Readable, writable, or closed by the peer.
    ReadWrite,
}

/// How an executor runs its tasks.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Number of worker threads. They exist from the start, and sleep when there is nothing to do.
    pub workers: usize,
    /// Units of work that a task may do before it is another task's turn.
    pub budget: u32,
    /// How long a task is polled without finding work before it sleeps, at most. Zero: it sleeps at
    /// once.
    pub poll_max: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Tuning { workers: cores.clamp(1, 4), budget: 64, poll_max: Duration::from_micros(50) }
    }
}

/// For how many rounds in a row two devices have work on one worker before one of them moves to a
/// worker that sleeps.
const CROWDED: u32 = 64;

/// The shortest time between two polls by a timer, in nanoseconds.
const NAP_NS: u64 = 100_000;

/// Called when a task's poll has failed and the task has been dropped, on a thread of
/// [`Executor::aside`].
type OnError = Box<dyn Fn(ErrorCode) + Send + Sync>;

struct Body {
    task: Box<dyn Task>,
    pace: Pace,
    asleep: bool,
    /// The earliest timer that runs for the task.
    timer: Option<Instant>,
}

struct Cell {
    id: u64,
    workers: Weak<Workers>,
    /// The index of the worker that runs the task. It changes under the lock of `watches`. A thread
    /// that reads an old one gives the task to a worker that passes it on.
    home: AtomicUsize,
    watches: Mutex<Watches>,
    queued: WakeFlag,
    body: Mutex<Option<Body>>,
    on_error: OnError,
    counters: Arc<ConnectionCounters>,
    /// [`Task::work`].
    work: OnceLock<String>,
}

/// The descriptors that wake a task.
#[derive(Default)]
struct Watches {
    list: Vec<(RawFd, EventFlags)>,
    /// The task has been stopped, and stays where it is.
    stopped: bool,
}

impl Cell {
    fn home(&self) -> usize {
        // Acquire: pairs with the store in `move_to`. Whoever pushes the task to its new worker
        // finds it among the tasks there.
        self.home.load(Ordering::Acquire)
    }

    fn worker(&self) -> Option<Arc<Worker>> {
        self.workers.upgrade()?.get(self.home()).cloned()
    }
}

/// A handle to a task. Clones are handles to the same task. The task ends by [`stop`](Self::stop)
/// or by its own error, not when handles are dropped.
#[derive(Clone)]
pub struct TaskHandle(Arc<Cell>);

impl TaskHandle {
    /// Wakes the task if it sleeps. Any thread may call it. It does not block.
    pub fn wake(&self) {
        if self.0.queued.raise() {
            if let Some(workers) = self.0.workers.upgrade() {
                workers[self.0.home()].push(self.0.clone());
            }
        }
    }

    /// Wakes the task whenever `fd` becomes ready. The watch is edge-triggered: a task must read
    /// (or write) until the descriptor would block before it reports [`Progress::Idle`]. It need
    /// not read an eventfd at all. Call [`unwatch`](Self::unwatch) before the descriptor is closed:
    /// a copy of the descriptor in another process would keep the watch alive.
    pub fn watch(&self, fd: impl AsFd, interest: Interest) -> rustix::io::Result<()> {
        let mut watches = lock(&self.0.watches);
        let worker = self.0.worker().ok_or(rustix::io::Errno::SHUTDOWN)?;
        let flags = match interest {
            Interest::Read => EventFlags::IN | EventFlags::RDHUP | EventFlags::ET,
            Interest::ReadWrite => {
                EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET
            }
        };
        epoll::add(&worker.epoll, &fd, EventData::new_u64(self.0.id), flags)?;
        watches.list.push((fd.as_fd().as_raw_fd(), flags));
        Ok(())
    }

    /// Ends a watch before its descriptor is closed.
    pub fn unwatch(&self, fd: impl AsFd) {
        let mut watches = lock(&self.0.watches);
        watches.list.retain(|(watched, _)| *watched != fd.as_fd().as_raw_fd());
        if let Some(worker) = self.0.worker() {
            let _ = epoll::delete(&worker.epoll, fd); // Not watched: nothing to end.
        }
    }

    /// Ends the task: waits until a running poll has returned, then drops the task. The task itself
    /// must not call it.
    pub fn stop(&self) {
        let body = lock(&self.0.body).take();
        let mut watches = lock(&self.0.watches);
        watches.stopped = true;
        if let Some(worker) = self.0.worker() {
            lock(&worker.tasks).remove(&self.0.id);
        }
        drop(watches);
        drop(body);
    }
}

impl std::fmt::Debug for TaskHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("TaskHandle").field(&self.0.id).finish()
    }
}

type Workers = Vec<Arc<Worker>>;

struct Worker {
    index: usize,
    /// All workers, this one too.
    workers: Weak<Workers>,
    epoll: OwnedFd,
    /// A write to it wakes the worker from `epoll_wait`.
    kick: OwnedFd,
    queue: HandOver<Arc<Cell>>,
    tasks: Mutex<HashMap<u64, Arc<Cell>>>,
    timers: Mutex<BinaryHeap<Reverse<(Instant, u64)>>>,
    tuning: Tuning,
    aside: Arc<Aside>,
    alarm: Arc<Alarm>,
    /// Whether the worker does not sleep.
    awake: AtomicBool,
    /// Rounds begun.
    rounds: AtomicU64,
    /// The id of the task that has its turn, [`KICK`] between two turns.
    turn: AtomicU64,
}

/// The id of the worker's own eventfd in epoll events.
const KICK: u64 = 0;

impl Worker {
    fn push(&self, cell: Arc<Cell>) {
        if self.queue.push(cell) {
            self.kick();
        }
    }

    fn kick(&self) {
        // It fails only if the counter is full: the worker has been woken already.
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }

    fn run(&self) {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        let mut round = Vec::new();
        let mut crowded = 0;
        loop {
            // Read by `at_work` alone, which draws no conclusion from the order of these stores.
            self.rounds.fetch_add(1, Ordering::Relaxed);
            let sleep = match self.queue.take(&mut round) {
                Next::Work => false,
                Next::Sleep => true,
                Next::End => return,
            };
            let (mut busy, mut surplus): (Option<Arc<Cell>>, Option<Arc<Cell>>) = (None, None);
            for cell in round.drain(..) {
                if cell.home() != self.index {
                    // It has moved since it was queued here, and its flag is still raised.
                    if let Some(worker) = cell.worker() {
                        worker.push(cell);
                    }
                    continue;
                }
                self.turn.store(cell.id, Ordering::Relaxed);
                if self.slice(&cell) == Progress::Idle {
                    continue;
                }
                match &busy {
                    None => busy = Some(cell),
                    Some(other) if other.counters.device() != cell.counters.device() => {
                        surplus = Some(cell);
                    }
                    Some(_) => {}
                }
            }
            self.turn.store(KICK, Ordering::Relaxed);
            if !sleep && busy.is_none() {
                std::thread::yield_now();
            }
            crowded = if surplus.is_some() { crowded + 1 } else { 0 };
            if let Some(cell) = surplus.filter(|_| crowded >= CROWDED) {
                crowded = 0;
                self.give_away(&cell);
            }
            self.wait(&mut events, sleep);
        }
    }

    /// Collects events. If `sleep`, waits for them until the next deadline.
    fn wait(&self, events: &mut Vec<epoll::Event>, sleep: bool) {
        let timeout = match sleep {
            false => Some(Duration::ZERO),
            true => lock(&self.timers)
                .peek()
                .map(|Reverse((at, _))| at.saturating_duration_since(Instant::now())),
        };
        let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
        events.clear();
        if sleep {
            self.awake.store(false, Ordering::Relaxed);
        }
        // The only error here is EINTR. The next round waits again.
        let _ = epoll::wait(&self.epoll, spare_capacity(events), timeout.as_ref());
        if sleep {
            self.awake.store(true, Ordering::Relaxed);
            self.alarm.ring();
            self.queue.wakes();
        }
        for event in &*events {
            match event.data.u64() {
                KICK => {
                    let _ = rustix::io::read(&self.kick, &mut [0; 8]);
                }
                id => self.wake_id(id),
            }
        }
        let now = Instant::now();
        loop {
            let mut timers = lock(&self.timers);
            match timers.peek() {
                Some(Reverse((at, _))) if *at <= now => {}
                _ => break,
            }
            if let Some(Reverse((_, id))) = timers.pop() {
                drop(timers);
                self.wake_id(id);
            }
        }
    }

    /// What the worker is at.
    fn at_work(&self) -> Option<AtWork> {
        let id = self.turn.load(Ordering::Relaxed);
        let cell = lock(&self.tasks).get(&id).cloned()?;
        let work = cell.work.get().cloned().unwrap_or_default();
        let number = self.rounds.load(Ordering::Relaxed);
        Some(AtWork { number, counters: cell.counters.clone(), work })
    }

    fn wake_id(&self, id: u64) {
        // The task may have been stopped since its event.
        let cell = lock(&self.tasks).get(&id).cloned();
        if let Some(cell) = cell {
            TaskHandle(cell).wake();
        }
    }

    /// Gives a task to a worker that sleeps, if there is one. Only the task's worker calls this,
    /// while the task does not have its turn.
    fn give_away(&self, cell: &Arc<Cell>) {
        let Some(workers) = self.workers.upgrade() else { return };
        let sleeps = |worker: &&Arc<Worker>| !worker.awake.load(Ordering::Relaxed);
        let Some(to) = workers.iter().find(sleeps) else { return };
        if !self.move_to(cell, to) {
            return;
        }
        cell.counters.moves.one();
        tracing::debug!(
            device = cell.counters.device(),
            work = cell.work.get(),
            from = self.index,
            to = to.index,
            "moved to a worker that slept"
        );
        TaskHandle(cell.clone()).wake();
    }

    /// Moves a task with its watches. Returns false if it stays, because it has been stopped or the
    /// kernel refuses a watch.
    fn move_to(&self, cell: &Arc<Cell>, to: &Worker) -> bool {
        let mut watches = lock(&cell.watches);
        if watches.stopped {
            return false;
        }
        // SAFETY: A descriptor is open until `unwatch`, which takes it off the list under the lock.
        let fd = |raw: RawFd| unsafe { BorrowedFd::borrow_raw(raw) };
        // The task is watched by both workers for a moment. The one that does not have the task
        // ignores the event; the other has seen it too, or sees it when the watch begins.
        for (number, &(raw, flags)) in watches.list.iter().enumerate() {
            if let Err(error) = epoll::add(&to.epoll, fd(raw), EventData::new_u64(cell.id), flags) {
                tracing::warn!(%error, "a task cannot be moved to another worker");
                for &(raw, _) in &watches.list[..number] {
                    let _ = epoll::delete(&to.epoll, fd(raw));
                }
                return false;
            }
        }
        watches.list.retain(|&(raw, _)| {
            let watched = epoll::delete(&self.epoll, fd(raw)).is_ok();
            if !watched {
                let _ = epoll::delete(&to.epoll, fd(raw));
            }
            watched
        });
        if let Some(body) = lock(&cell.body).as_mut() {
            // Its timer is this worker's. The task is woken after the move, and asks for another.
            body.timer = None;
        }
        // In this order: `Executor::cells_of` finds it among the tasks of one of them at least.
        lock(&to.tasks).insert(cell.id, cell.clone());
        lock(&self.tasks).remove(&cell.id);
        // Release: pairs with the load in `Cell::home`.
        cell.home.store(to.index, Ordering::Release);
        true
    }

    /// One task's turn.
    fn slice(&self, cell: &Arc<Cell>) -> Progress {
        // From here on a wake-up queues the task again. So none is lost between the task's poll and
        // its sleep.
        cell.queued.lower();
        let mut guard = lock(&cell.body);
        let Some(body) = guard.as_mut() else { return Progress::Idle };
        if cell.counters.is_halted() {
            return Progress::Idle; // `Executor::go_on` wakes it.
        }
        // A panic is a fault of the device. The worker's other tasks must go on.
        let slice = std::panic::AssertUnwindSafe(|| body.slice(&self.tuning, &cell.counters));
        let result = std::panic::catch_unwind(slice).unwrap_or_else(|_| {
            tracing::error!(device = cell.counters.device(), "a task panicked; it ends");
            Err(ErrorCode::FAILED)
        });
        match result {
            Ok(Turn { again, busy, deadline }) => {
                if let Some(at) = deadline {
                    // A timer that fires early costs one empty poll. A timer for each sleep would
                    // cost memory without bound.
                    if body.timer.is_none_or(|set| at < set || set <= Instant::now()) {
                        body.timer = Some(at);
                        lock(&self.timers).push(Reverse((at, cell.id)));
                    }
                }
                drop(guard);
                if again {
                    TaskHandle(cell.clone()).wake();
                }
                if busy { Progress::Busy } else { Progress::Idle }
            }
            Err(code) => {
                // Under the lock: a thread that stops the task now waits until the task holds
                // nothing any more.
                *guard = None;
                drop(guard);
                lock(&self.tasks).remove(&cell.id);
                let (counters, cell) = (cell.counters.clone(), cell.clone());
                let end = Box::new(move || (cell.on_error)(code));
                self.aside.run(counters, "the end of a connection, after a fault", end);
                Progress::Busy
            }
        }
    }
}

struct Turn {
    again: bool,
    busy: bool,
    deadline: Option<Instant>,
}

impl Body {
    fn slice(&mut self, tuning: &Tuning, counters: &ConnectionCounters) -> Result<Turn, ErrorCode> {
        if std::mem::take(&mut self.asleep) {
            counters.wakeups.one();
            self.task.disarm();
            self.pace.woken(now());
        }
        if self.task.poll(tuning.budget)? == Progress::Busy {
            counters.polls.one();
            self.pace.busy();
            return Ok(Turn { again: true, busy: true, deadline: None });
        }
        counters.polls_empty.one();
        if self.task.adaptive() {
            let now = now();
            match self.pace.rest(now, self.task.carried()) {
                Rest::Poll => return Ok(Turn { again: true, busy: false, deadline: None }),
                Rest::Nap(nanoseconds) => {
                    let end = Instant::now() + Duration::from_nanos(nanoseconds);
                    let deadline = self.task.deadline().map_or(end, |deadline| deadline.min(end));
                    return Ok(Turn { again: false, busy: false, deadline: Some(deadline) });
                }
                Rest::Sleep => {}
            }
        }
        if self.task.arm()? == Armed::Missed {
            // A hostile peer can cause this again and again. The task gets one more poll. If that
            // finds nothing either, the task sleeps.
            if self.task.poll(tuning.budget)? == Progress::Busy {
                self.task.disarm();
                self.pace.busy();
                return Ok(Turn { again: true, busy: true, deadline: None });
            }
        }
        self.pace.sleep(now());
        self.asleep = true;
        Ok(Turn { again: false, busy: false, deadline: self.task.deadline() })
    }
}

/// Nanoseconds of the monotonic clock.
fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs().wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec.unsigned_abs())
}

/// The event loop: a set of workers. Dropping it stops the workers.
pub struct Executor {
    workers: Arc<Workers>,
    threads: Vec<JoinHandle<()>>,
    next_id: AtomicU64,
    next_index: AtomicUsize,
    aside: Arc<Aside>,
    alarm: Arc<Alarm>,
}

impl Executor {
    /// Starts the threads.
    pub fn start(tuning: Tuning) -> std::io::Result<Arc<Executor>> {
        let alarm = Arc::new(Alarm::new()?);
        let mut executor = Executor {
            workers: Arc::default(),
            threads: Vec::new(),
            next_id: AtomicU64::new(KICK + 1),
            next_index: AtomicUsize::new(0),
            aside: Arc::new(Aside::new(alarm.clone())),
            alarm,
        };
        let mut made = Vec::new();
        for _ in 0..tuning.workers.max(1) {
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            epoll::add(&epoll, &kick, EventData::new_u64(KICK), EventFlags::IN)?;
            made.push((epoll, kick));
        }
        executor.workers = Arc::new_cyclic(|workers| {
            let new = |(index, (epoll, kick))| {
                Arc::new(Worker {
                    index,
                    workers: workers.clone(),
                    epoll,
                    kick,
                    queue: HandOver::new(),
                    tasks: Mutex::default(),
                    timers: Mutex::default(),
                    tuning,
                    aside: executor.aside.clone(),
                    alarm: executor.alarm.clone(),
                    awake: AtomicBool::new(true),
                    rounds: AtomicU64::new(0),
                    turn: AtomicU64::new(KICK),
                })
            };
            made.into_iter().enumerate().map(new).collect()
        });
        for (i, worker) in executor.workers.iter().enumerate() {
            let run = worker.clone();
            // 256 KiB are enough: tasks keep their buffers on the heap.
            let thread =
                std::thread::Builder::new().name(format!("vbus-{i}")).stack_size(256 << 10);
            executor.threads.push(thread.spawn(move || run.run())?);
        }
        executor.aside.start()?;
        Ok(Arc::new(executor))
    }

    /// How the tasks are run.
    pub fn tuning(&self) -> Tuning {
        self.workers[0].tuning
    }

    /// A worker index for tasks that belong together. Successive calls go round the workers.
    pub fn next_worker(&self) -> usize {
        self.next_index.fetch_add(1, Ordering::Relaxed)
    }

    /// Hands `task` to a worker and wakes it for the first time. The worker index may be any
    /// number: it is taken modulo the number of workers. A task that wakes another task of its own
    /// worker costs no switch of threads. `on_error` is called when a poll of the task fails, on a
    /// thread of [`aside`](Self::aside).
    pub fn spawn(
        &self,
        worker: usize,
        task: Box<dyn Task>,
        counters: Arc<ConnectionCounters>,
        on_error: impl Fn(ErrorCode) + Send + Sync + 'static,
    ) -> TaskHandle {
        let cell = self.cell(worker, counters, on_error);
        self.begin(worker, cell, task)
    }

    /// Runs the task that `make` returns, like [`spawn`](Self::spawn). `make` gets the task's own
    /// handle and can watch descriptors with it. If `make` fails, its error is returned and nothing
    /// runs.
    pub fn spawn_with<E>(
        &self,
        worker: usize,
        counters: Arc<ConnectionCounters>,
        on_error: impl Fn(ErrorCode) + Send + Sync + 'static,
        make: impl FnOnce(&TaskHandle) -> Result<Box<dyn Task>, E>,
    ) -> Result<TaskHandle, E> {
        let cell = self.cell(worker, counters, on_error);
        let task = make(&TaskHandle(cell.clone()))?;
        Ok(self.begin(worker, cell, task))
    }

    /// Runs work that may take longer than a few hundred microseconds on another thread: to map
    /// and unmap memory, to open and close. `counters` are those of the device, and `work` says
    /// what it is, both for the log. A few threads do such work for all devices, in order.
    pub fn aside(
        &self,
        counters: Arc<ConnectionCounters>,
        work: &'static str,
        run: impl FnOnce() + Send + 'static,
    ) {
        self.aside.run(counters, work, Box::new(run));
    }

    /// Lets all tasks that run with `counters` stand still, those too that begin later. When this
    /// returns, none of them is in a poll. Their wake-ups and timers wait. No such task may call
    /// it.
    pub(crate) fn halt(&self, counters: &Arc<ConnectionCounters>) {
        counters.set_halted(true);
        for cell in self.cells_of(counters) {
            // A poll that began before has ended then. The next one sees that the task is halted.
            drop(lock(&cell.body));
        }
    }

    /// Undoes [`halt`](Self::halt): polls each of the tasks.
    pub(crate) fn go_on(&self, counters: &Arc<ConnectionCounters>) {
        counters.set_halted(false);
        for cell in self.cells_of(counters) {
            // Its timer may have passed meanwhile without a poll.
            if let Some(body) = lock(&cell.body).as_mut() {
                body.timer = None;
            }
            TaskHandle(cell).wake();
        }
    }

    fn cells_of(&self, counters: &Arc<ConnectionCounters>) -> Vec<Arc<Cell>> {
        let mut cells = Vec::new();
        // All locks at once: a task that moves meanwhile is in one of the lists, or in two.
        let all: Vec<_> = self.workers.iter().map(|worker| lock(&worker.tasks)).collect();
        for tasks in &all {
            let of = tasks.values().filter(|cell| Arc::ptr_eq(&cell.counters, counters));
            cells.extend(of.cloned());
        }
        cells
    }

    /// What each thread is at: the workers, and then the threads of [`aside`](Self::aside). The
    /// number of a worker is that of its round. `None`: the thread sleeps.
    pub(crate) fn at_work(&self) -> impl Iterator<Item = Option<AtWork>> {
        self.workers.iter().map(|worker| worker.at_work()).chain(self.aside.all_at_work())
    }

    /// Rung when a thread wakes.
    pub(crate) fn alarm(&self) -> &Alarm {
        &self.alarm
    }

    /// Whether all threads sleep.
    pub(crate) fn sleeps(&self) -> bool {
        let awake = |worker: &Arc<Worker>| worker.awake.load(Ordering::Relaxed);
        !self.workers.iter().any(awake) && self.aside.all_at_work().all(|at| at.is_none())
    }

    fn worker(&self, worker: usize) -> &Arc<Worker> {
        &self.workers[worker % self.workers.len()]
    }

    /// The cell of a task that does not run yet.
    fn cell(
        &self,
        worker: usize,
        counters: Arc<ConnectionCounters>,
        on_error: impl Fn(ErrorCode) + Send + Sync + 'static,
    ) -> Arc<Cell> {
        Arc::new(Cell {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            workers: Arc::downgrade(&self.workers),
            home: AtomicUsize::new(worker % self.workers.len()),
            watches: Mutex::default(),
            queued: WakeFlag::new(),
            body: Mutex::new(None),
            on_error: Box::new(on_error),
            counters,
            work: OnceLock::new(),
        })
    }

    fn begin(&self, worker: usize, cell: Arc<Cell>, task: Box<dyn Task>) -> TaskHandle {
        let pace =
            Pace::new(u64::try_from(self.tuning().poll_max.as_nanos()).unwrap_or(u64::MAX), NAP_NS);
        let _ = cell.work.set(task.work());
        *lock(&cell.body) = Some(Body { task, pace, asleep: false, timer: None });
        // A wake-up before this moment found no task. The wake-up below makes up for it.
        lock(&self.worker(worker).tasks).insert(cell.id, cell.clone());
        let handle = TaskHandle(cell);
        handle.wake();
        handle
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        for worker in self.workers.iter() {
            worker.queue.stop();
            worker.kick();
        }
        self.aside.stop();
        let me = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // A task may drop the last handle of the executor: a worker does not wait for itself.
            if thread.thread().id() != me {
                let _ = thread.join();
            }
        }
    }
}
