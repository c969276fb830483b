// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The queue pairs of a driver that has started.

use std::sync::{Arc, Mutex};

use vbus_core::{ConnectionCounters, ErrorCode, Executor, MemoryContext, Task, TaskHandle, lock};
use vbus_tap::Offloads;

use super::coalesce::Setting;
use super::nic::Nic;
use super::pair::{Pair, PairTask, Rx};
use super::ring::{RxRing, TxRing};
use super::rx::{Receiver, RxQueue, RxSlot};
use super::tx::TxQueue;
use crate::backend::{Plug, Port};
use crate::sink::SharedSink;

/// What the queue pairs of a driver are made from.
pub struct Setup<'a> {
    /// The device.
    pub nic: &'a Nic,
    /// The frames that the driver accepts.
    pub receiver: &'a Arc<Receiver>,
    /// Whether the driver may choose receive queues by a hash.
    pub by_hash: bool,
    /// The offloads that the driver may leave to the device.
    pub tx_offloads: Offloads,
    /// The driver's memory.
    pub memory: &'a Arc<MemoryContext>,
    /// The event loop, the worker on which the first pair does best, and the counters of the tasks.
    pub place: (&'a Arc<Executor>, usize, &'a Arc<ConnectionCounters>),
    /// Called when a task has failed.
    pub fail: Arc<dyn Fn(ErrorCode) + Send + Sync>,
}

/// The queue pairs of a driver, plugged into the back end, each with its task. They have no rings
/// at first.
pub struct Pairs<T: TxRing, R: RxRing> {
    plug: Arc<dyn Plug>,
    pairs: Vec<Running<T, R>>,
    receiver: Arc<Receiver>,
    memory: Arc<MemoryContext>,
}

struct Running<T: TxRing, R: RxRing> {
    pair: Arc<Mutex<Pair<T, R>>>,
    task: TaskHandle,
    number: u16,
    counters: Arc<super::counters::PairCounters>,
}

impl<T: TxRing + 'static, R: RxRing + 'static> Pairs<T, R> {
    /// Plugs the driver in, and makes as many pairs as the device can have.
    ///
    /// # Errors
    /// The back end or the event loop refuses. Nothing is left behind.
    pub fn start(setup: &Setup<'_>) -> Result<Pairs<T, R>, ErrorCode> {
        let Setup { nic, receiver, memory, .. } = setup;
        let slots = nic.pairs.iter().map(|counters| RxSlot::new(counters.clone()));
        let shares = nic.backend.shares_sinks(setup.by_hash);
        let rx: Vec<Rx<R>> = slots
            .map(|slot| match shares {
                true => Rx::Shared(Arc::new(Mutex::new(slot))),
                false => Rx::Own(slot),
            })
            .collect();
        let lanes = rx.iter().filter_map(|rx| match rx {
            Rx::Shared(slot) => Some(slot.clone() as SharedSink),
            Rx::Own(_) => None,
        });
        let shared = (receiver.filter.clone(), receiver.steering.clone());
        let (mtu, queues) = (nic.config.mtu, nic.config.queue_pairs);
        let port = Port::new(&nic.name, mtu, queues, shared, lanes.collect());
        let plug = nic.backend.plug(Arc::new(port))?;
        let (receiver, memory) = ((*receiver).clone(), (*memory).clone());
        // Dropping it stops the tasks that were made before an error.
        let mut pairs = Pairs { plug, pairs: Vec::new(), receiver, memory };
        for (number, rx) in (0..).zip(rx) {
            pairs.spawn(setup, number, rx)?;
        }
        Ok(pairs)
    }

    /// Makes pair `number`, without rings, and its task.
    fn spawn(&mut self, setup: &Setup<'_>, number: u16, rx: Rx<R>) -> Result<(), ErrorCode> {
        let (executor, worker, counters) = setup.place;
        let (fail, mut made) = (setup.fail.clone(), None);
        let of_pair = setup.nic.pairs.get(usize::from(number)).ok_or(ErrorCode::BAD_ARGUMENT)?;
        let task = executor.spawn_with(
            worker.wrapping_add(usize::from(number)),
            counters.clone(),
            move |error| fail(error),
            |task| {
                let queue = self.plug.queue(number, task)?;
                let (memory, receiver) = (self.memory.clone(), self.receiver.clone());
                let (tx_offloads, counters) = (setup.tx_offloads, of_pair.clone());
                let pair = Pair::new(rx, queue, memory, receiver, tx_offloads, counters);
                let pair = Arc::new(Mutex::new(pair));
                made = Some(pair.clone());
                Ok::<_, ErrorCode>(Box::new(PairTask { pair, number }) as Box<dyn Task>)
            },
        )?;
        let counters = of_pair.clone();
        self.pairs.extend(made.map(|pair| Running { pair, task, number, counters }));
        Ok(())
    }

    /// The driver's connection to the back end.
    pub fn plug(&self) -> &Arc<dyn Plug> {
        &self.plug
    }

    /// The task of pair `number`. The doorbells of its rings wake it.
    pub fn task(&self, number: usize) -> Option<&TaskHandle> {
        self.pairs.get(number).map(|running| &running.task)
    }

    /// The tasks of all pairs.
    pub fn tasks(&self) -> impl Iterator<Item = &TaskHandle> {
        self.pairs.iter().map(|running| &running.task)
    }

    /// Gives pair `number` its transmit ring; `None`: it has none from now on, and nothing touches
    /// the former one any more. A header of `header_bytes` bytes precedes each frame. `coalesce`
    /// may hold its interrupts back.
    pub fn set_tx(&self, number: usize, tx: Option<(T, usize, Arc<Setting>)>) {
        let Some(running) = self.pairs.get(number) else { return };
        let tx = tx.map(|(ring, header, coalesce)| TxQueue::new(ring, header, coalesce));
        lock(&running.pair).set_tx(tx);
    }

    /// Gives pair `number` its receive ring, as [`set_tx`](Self::set_tx).
    pub fn set_rx(&self, number: usize, rx: Option<(R, Arc<Setting>)>) {
        let Some(running) = self.pairs.get(number) else { return };
        let rx = rx.map(|(ring, coalesce)| {
            RxQueue::new(
                ring,
                self.memory.clone(),
                self.receiver.clone(),
                running.counters.clone(),
                (running.number, running.task.clone(), coalesce),
            )
        });
        lock(&running.pair).set_rx(rx);
    }

    /// The driver has changed which pairs are in use.
    pub fn queues_changed(&self) {
        for running in &self.pairs {
            lock(&running.pair).queues_changed();
        }
    }

    /// Waits until running deliveries have ended. Later ones see what the driver has changed.
    pub fn settle(&self) {
        for running in &self.pairs {
            lock(&running.pair).settle();
        }
    }
}

impl<T: TxRing, R: RxRing> Pairs<T, R> {
    /// Ends the tasks. Afterwards nothing touches the driver's memory: neither they, nor other
    /// devices that deliver to the receive rings.
    pub fn stop(&self) {
        for running in &self.pairs {
            running.task.stop();
            let mut pair = lock(&running.pair);
            pair.set_tx(None);
            pair.set_rx(None);
        }
    }
}

impl<T: TxRing, R: RxRing> Drop for Pairs<T, R> {
    fn drop(&mut self) {
        self.stop();
    }
}
