// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A decorator around a back end: limits the rate of each direction.
//!
//! Frames from the driver above the rate wait in its transmit ring. Frames to the driver wait where
//! they are if that delays nobody else (in a TAP interface, in a stream). Those that come through
//! shared receive queues (of a switch, or of a TAP interface for a driver with RSS) are dropped and
//! counted, because others wait behind them.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vbus_core::shm::signal::Armed;
use vbus_core::{ErrorCode, TaskHandle, lock, state};
use vbus_tap::{Mac, Offloads};

use crate::backend::{Backend, Done, Plug, Port, Queue, Sent};
use crate::bucket::Bucket;
use crate::frame::Packet;
use crate::limits::Limits;
use crate::sink::{
    Delivery, OnFull, Read, Reserved, RxDrop, RxSink, SharedFront, SharedSink, Waiter,
};

/// A back end with limits. All queues of a device share them.
pub struct Limited {
    inner: Box<dyn Backend>,
    limits: Mutex<Limits>,
    tx: Option<Arc<Bucket>>,
    rx: Option<Arc<Bucket>>,
    waiting: Arc<Tasks>,
}

/// The tasks of the queues that there are. Other limits wake them: they may wait for a time that
/// the former limits gave.
#[derive(Default)]
struct Tasks(Mutex<Vec<Weak<TaskHandle>>>);

impl Tasks {
    /// Adds the task of a queue. The queue holds what this returns.
    fn add(&self, task: &TaskHandle) -> Arc<TaskHandle> {
        let task = Arc::new(task.clone());
        let mut tasks = lock(&self.0);
        tasks.retain(|other| other.strong_count() != 0);
        tasks.push(Arc::downgrade(&task));
        task
    }

    fn wake(&self) {
        // A handle may be the last one of its task, so none is dropped under the lock.
        let tasks: Vec<_> = lock(&self.0).iter().filter_map(Weak::upgrade).collect();
        tasks.iter().for_each(|task| task.wake());
    }
}

impl Limited {
    /// Puts `limits` around `inner`.
    pub fn new(inner: Box<dyn Backend>, limits: Limits) -> Limited {
        let (tx, rx) = (bucket(&limits, limits.tx_rate), bucket(&limits, limits.rx_rate));
        Limited { inner, limits: Mutex::new(limits), tx, rx, waiting: Arc::default() }
    }
}

/// The bucket of a direction with this rate.
fn bucket(limits: &Limits, rate: Option<u64>) -> Option<Arc<Bucket>> {
    let (bytes, burst) = limits.bytes(rate?);
    Some(Arc::new(Bucket::new(bytes, burst, Instant::now())))
}

impl Backend for Limited {
    fn tx_offloads(&self) -> Offloads {
        self.inner.tx_offloads()
    }

    fn rx_offloads(&self) -> Offloads {
        self.inner.rx_offloads()
    }

    fn shares_sinks(&self, by_hash: bool) -> bool {
        self.inner.shares_sinks(by_hash)
    }

    fn steers(&self) -> bool {
        self.inner.steers()
    }

    fn reserve(&self, mac: Mac) {
        self.inner.reserve(mac);
    }

    fn set_limits(&self, limits: &Limits) -> bool {
        let directions = [(&self.tx, limits.tx_rate), (&self.rx, limits.rx_rate)];
        if directions.iter().any(|(bucket, rate)| bucket.is_none() && rate.is_some()) {
            return false;
        }
        let mut now = lock(&self.limits);
        for (bucket, rate) in directions {
            if let Some(bucket) = bucket {
                // A direction without a limit has one that nothing reaches.
                let (rate, burst) = limits.bytes(rate.unwrap_or(u64::MAX));
                bucket.change(rate, burst, Instant::now());
            }
        }
        *now = limits.clone();
        self.waiting.wake();
        true
    }

    fn plug(&self, port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode> {
        let lane = |sink: &SharedSink| -> SharedSink {
            match &self.rx {
                Some(bucket) => limit_shared(sink, bucket),
                None => sink.clone(),
            }
        };
        let lanes = port.lanes.iter().map(lane).collect();
        let inner = self.inner.plug(Arc::new(port.with_lanes(lanes)))?;
        let (tx, rx, waiting) = (self.tx.clone(), self.rx.clone(), self.waiting.clone());
        Ok(Arc::new(LimitedPlug { inner, tx, rx, waiting }))
    }

    fn inspect(&self) -> Value {
        let mut value = self.inner.inspect();
        let limits = lock(&self.limits);
        value["tx-rate"] = json!(limits.tx_rate);
        value["rx-rate"] = json!(limits.rx_rate);
        value
    }

    fn quiesce(&self) {
        self.inner.quiesce();
    }

    fn resume(&self) {
        self.inner.resume();
    }

    fn save(&self) -> Result<Value, String> {
        self.inner.save()
    }

    fn restore(&self, state: &Value) -> Result<(), String> {
        self.inner.restore(state)
    }

    fn descriptors(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        self.inner.descriptors()
    }
}

struct LimitedPlug {
    inner: Arc<dyn Plug>,
    tx: Option<Arc<Bucket>>,
    rx: Option<Arc<Bucket>>,
    waiting: Arc<Tasks>,
}

impl Plug for LimitedPlug {
    fn queue(&self, index: u16, task: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode> {
        let inner = self.inner.queue(index, task)?;
        let (tx, rx) = (self.tx.clone(), self.rx.clone());
        let task = self.waiting.add(task);
        Ok(Box::new(LimitedQueue { inner, tx, rx, is_paid: false, rx_until: None, _task: task }))
    }

    fn configure(&self, queues: u16, offloads: Offloads, done: Done) -> Result<(), ErrorCode> {
        self.inner.configure(queues, offloads, done)
    }

    fn set_mac(&self, mac: Mac) -> bool {
        self.inner.set_mac(mac)
    }

    fn filter_changed(&self) {
        self.inner.filter_changed();
    }

    fn save(&self) -> Result<Value, String> {
        self.inner.save()
    }

    fn restore(&self, state: &Value) -> Result<(), String> {
        self.inner.restore(state)
    }
}

struct LimitedQueue {
    inner: Box<dyn Queue>,
    tx: Option<Arc<Bucket>>,
    rx: Option<Arc<Bucket>>,
    /// Whether the frame that waits, or that is sent in parts, has taken its tokens.
    is_paid: bool,
    /// When frames to the driver go on.
    rx_until: Option<Instant>,
    /// Other limits wake it as long as the queue is there.
    _task: Arc<TaskHandle>,
}

impl Queue for LimitedQueue {
    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        if let (Some(bucket), false) = (&self.tx, self.is_paid) {
            if let Err(until) = bucket.take(packet.bytes() as u64, Instant::now()) {
                return Sent::Wait { until: Some(until), moved: false };
            }
            self.is_paid = true;
        }
        let sent = self.inner.send(packet);
        self.is_paid &= matches!(sent, Sent::Wait { .. } | Sent::Part);
        sent
    }

    fn forget(&mut self) {
        self.is_paid = false;
        self.inner.forget();
    }

    fn rest(&mut self) {
        self.inner.rest();
    }

    fn flush(&mut self) {
        self.inner.flush();
    }

    fn receive(&mut self, sink: &mut dyn RxSink, budget: u32) -> Result<u32, ErrorCode> {
        let Some(bucket) = &self.rx else { return self.inner.receive(sink, budget) };
        let mut limit = LentLimit { sink, bucket, until: None };
        let received = self.inner.receive(&mut limit, budget);
        self.rx_until = limit.until;
        received
    }

    fn receive_shared(&mut self, budget: u32) -> Result<u32, ErrorCode> {
        self.inner.receive_shared(budget)
    }

    fn arm(&mut self) -> Armed {
        self.inner.arm()
    }

    fn deadline(&self) -> Option<Instant> {
        [self.rx_until, self.inner.deadline()].into_iter().flatten().min()
    }

    fn save(&mut self) -> Result<Value, String> {
        state::part(&LimitedState { is_paid: self.is_paid, inner: self.inner.save()? })
    }

    fn restore(&mut self, saved: &Value) -> Result<(), String> {
        let LimitedState { is_paid, inner } = state::read_part(saved)?;
        self.is_paid = is_paid;
        self.inner.restore(&inner)
    }
}

/// A queue with a limit as plain data (spec/state-format.md, "Back ends").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitedState {
    /// The frame that waits, or that is sent in parts, has taken its tokens.
    is_paid: bool,
    inner: Value,
}

/// A limit in front of a receive queue that the front lends for a poll. Frames above the rate wait.
struct LentLimit<'a> {
    sink: &'a mut dyn RxSink,
    bucket: &'a Bucket,
    /// When frames go on, if one was refused in this poll.
    until: Option<Instant>,
}

impl LentLimit<'_> {
    fn is_open(&mut self) -> bool {
        self.until = self.bucket.empty_until(Instant::now());
        self.until.is_none()
    }
}

impl RxSink for LentLimit<'_> {
    fn deliver(&mut self, packet: &Packet<'_>, on_full: OnFull) -> Delivery {
        if !self.is_open() {
            return Delivery::Full { until: self.until };
        }
        let delivery = self.sink.deliver(packet, on_full);
        if let Delivery::Delivered { .. } = delivery {
            self.bucket.charge(packet.bytes() as u64, Instant::now());
        }
        delivery
    }

    fn has_room(&mut self, bytes: usize) -> bool {
        self.is_open() && self.sink.has_room(bytes)
    }

    fn reserve(&mut self, read: &mut Read<'_>) -> Reserved {
        if !self.is_open() {
            return Reserved::Full;
        }
        let mut bytes = 0;
        let reserved = self.sink.reserve(&mut |vector| {
            let len = read(vector);
            bytes = len.unwrap_or(0);
            len
        });
        if reserved == Reserved::Frame {
            self.bucket.charge(bytes as u64, Instant::now());
        }
        reserved
    }

    fn longest(&self) -> usize {
        self.sink.longest()
    }

    fn post(&mut self) {
        self.sink.post();
    }

    /// A frame that waits for its time does not wait for buffers.
    fn wait(&mut self, waiter: &Waiter) {
        if self.until.is_none() {
            self.sink.wait(waiter);
        }
    }

    fn arm(&mut self) -> Armed {
        self.sink.arm()
    }

    fn count_drop(&mut self, reason: RxDrop) {
        self.sink.count_drop(reason);
    }
}

/// A limit in front of a receive queue that other devices deliver to. Frames above the rate are
/// dropped.
fn limit_shared(sink: &SharedSink, bucket: &Arc<Bucket>) -> SharedSink {
    let bucket = bucket.clone();
    SharedFront::sink(sink, move |sink, packet, on_full| {
        let now = Instant::now();
        if bucket.empty_until(now).is_some() {
            sink.count_drop(RxDrop::Rate);
            return Delivery::Dropped;
        }
        let delivery = sink.deliver(packet, on_full);
        if let Delivery::Delivered { .. } = delivery {
            bucket.charge(packet.bytes() as u64, now);
        }
        delivery
    })
}
