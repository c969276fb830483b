// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A minimal front. The test is its driver, and its rings are queues in this process.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vbus_core::shm::signal::Armed;
use vbus_core::{ConnectionCounters, ErrorCode, Executor, Progress, Task, TaskHandle, lock};
use vbus_net::{
    Backend, Delivery, Filter, Mac, Offloads, OnFull, Packet, Plug, Port, Queue, Read, Reserved,
    RxDrop, RxSink, Sent, SharedSink, Steering, Waiter,
};

/// How long a test waits for a frame that must come.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A receive queue without offloads, with room for a number of frames.
struct Sink {
    filter: Arc<Filter>,
    frames: Sender<Vec<u8>>,
    room: usize,
    waiters: Vec<Waiter>,
}

impl RxSink for Sink {
    fn deliver(&mut self, packet: &Packet<'_>, on_full: OnFull) -> Delivery {
        if !self.filter.wants(packet) {
            return Delivery::Dropped;
        }
        if !packet.header.fits(Offloads::NONE) {
            return Delivery::NeedsCut;
        }
        if self.room == 0 {
            return match on_full {
                OnFull::Drop => Delivery::Dropped,
                OnFull::Wait | OnFull::WaitBounded => Delivery::Full { until: None },
            };
        }
        self.room -= 1;
        let mut bytes = Vec::new();
        packet.append_to(&mut bytes, usize::MAX);
        self.frames.send(bytes).unwrap();
        Delivery::Delivered { units: 1 }
    }

    fn has_room(&mut self, _bytes: usize) -> bool {
        self.room != 0
    }

    fn reserve(&mut self, _read: &mut Read<'_>) -> Reserved {
        Reserved::Nothing // No test here uses a TAP interface.
    }

    fn longest(&self) -> usize {
        1522
    }

    fn post(&mut self) {}

    fn wait(&mut self, waiter: &Waiter) {
        self.waiters.push(waiter.clone());
    }

    fn arm(&mut self) -> Armed {
        Armed::Waiting
    }

    fn count_drop(&mut self, _reason: RxDrop) {}
}

/// The state of the task of the only queue pair.
struct Pair {
    queue: Box<dyn Queue>,
    /// The receive queue, if the back end does not share it.
    sink: Option<Sink>,
    sending: Arc<Mutex<VecDeque<Vec<u8>>>>,
    waits: Arc<AtomicU64>,
    /// The time at which the waiting frame is sent again.
    until: Option<Instant>,
}

impl Task for Pair {
    fn poll(&mut self, budget: u32) -> Result<Progress, ErrorCode> {
        let mut progress = Progress::Idle;
        self.until = None;
        loop {
            let Some(frame) = lock(&self.sending).front().cloned() else { break };
            match self.queue.send(&Packet::plain(&frame).unwrap()) {
                Sent::Wait { until, .. } => {
                    self.until = until;
                    // Relaxed: a test reads the count alone.
                    self.waits.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Sent::Part => {
                    progress = Progress::Busy;
                    break;
                }
                Sent::Done { .. } | Sent::Dropped(_) => {}
            }
            lock(&self.sending).pop_front();
            progress = Progress::Busy;
        }
        self.queue.flush();
        if let Some(sink) = &mut self.sink {
            if self.queue.receive(sink, budget)? != 0 {
                progress = Progress::Busy;
            }
        }
        Ok(progress)
    }

    fn arm(&mut self) -> Result<Armed, ErrorCode> {
        let waits = !lock(&self.sending).is_empty();
        Ok(if waits { self.queue.arm() } else { Armed::Waiting })
    }

    fn deadline(&self) -> Option<Instant> {
        [self.until, self.queue.deadline()].into_iter().flatten().min()
    }
}

/// A device with one queue pair, plugged into a back end.
pub struct Front {
    pub plug: Arc<dyn Plug>,
    task: TaskHandle,
    sending: Arc<Mutex<VecDeque<Vec<u8>>>>,
    waits: Arc<AtomicU64>,
    frames: Receiver<Vec<u8>>,
    shared: Option<Arc<Mutex<Sink>>>,
}

impl Front {
    /// Plugs in a device with address `mac` and a driver with room for `room` frames.
    pub fn plug(executor: &Executor, backend: &dyn Backend, mac: Mac, room: usize) -> Front {
        let (filter, steering) = (Arc::new(Filter::new(mac)), Arc::new(Steering::new(1)));
        let (tell, frames) = channel();
        let sink = Sink { filter: filter.clone(), frames: tell, room, waiters: Vec::new() };
        let (mut own, mut shared, mut lanes) = (Some(sink), None, Vec::new());
        if backend.shares_sinks(false) {
            shared = own.take().map(|sink| Arc::new(Mutex::new(sink)));
            lanes.extend(shared.clone().map(|sink| sink as SharedSink));
        }
        let port = Port::new("front", 1500, 1, (filter, steering), lanes);
        let plug = backend.plug(Arc::new(port)).unwrap();
        plug.configure(1, Offloads::NONE, Box::new(|done| done.unwrap())).unwrap();
        let sending = Arc::new(Mutex::new(VecDeque::new()));
        let waits = Arc::<AtomicU64>::default();
        let counters = Arc::new(ConnectionCounters::default());
        let fail = |error| panic!("{error}");
        let make = |task: &TaskHandle| {
            let queue = plug.queue(0, task)?;
            let (sending, waits) = (sending.clone(), waits.clone());
            let pair = Pair { queue, sink: own.take(), sending, waits, until: None };
            Ok::<_, ErrorCode>(Box::new(pair) as Box<dyn Task>)
        };
        let task = executor.spawn_with(executor.next_worker(), counters, fail, make).unwrap();
        Front { plug, task, sending, waits, frames, shared }
    }

    pub fn send(&self, frame: &[u8]) {
        lock(&self.sending).push_back(frame.to_vec());
        self.task.wake();
    }

    /// Waits for the next frame.
    pub fn receive(&self) -> Vec<u8> {
        self.frames.recv_timeout(TIMEOUT).expect("a frame")
    }

    /// How often a frame of the driver had to wait.
    pub fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    /// Whether no frame has come.
    pub fn has_none(&self) -> bool {
        self.frames.try_recv().is_err()
    }

    /// Adds room for `room` frames to the driver of a device on a switch.
    pub fn add_room(&self, room: usize) {
        let mut sink = lock(self.shared.as_ref().unwrap());
        sink.room += room;
        sink.waiters.drain(..).for_each(|waiter| waiter.task.wake());
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.task.stop();
    }
}
