// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The queue pairs of a driver that has started.

use std::sync::{Arc, Mutex, Weak};

use serde_json::Value;
use vbus_core::{ConnectionCounters, ErrorCode, Executor, MemoryContext, Task, TaskHandle, lock};
use vbus_tap::Offloads;

use super::coalesce::Setting;
use super::nic::Nic;
use super::pair::{Pair, PairTask, Rx};
use super::ring::{RxRing, TxRing};
use super::rx::{Choices, Receiver, RxQueue, RxSlot};
use super::saved::PairsState;
use super::tx::TxQueue;
use crate::backend::{Done, Plug, Port};
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
        let shares = nic.backend.shares_sinks(setup.by_hash);
        let (mut rx, mut lanes): (Vec<Rx<R>>, Vec<SharedSink>) = (Vec::new(), Vec::new());
        nic.lend(|paused| {
            for counters in &*nic.pairs {
                let slot = RxSlot::new(counters.clone(), paused && shares);
                rx.push(match shares {
                    true => Rx::Shared(Arc::new(Mutex::new(slot))),
                    false => Rx::Own(slot),
                });
            }
            lanes.extend(rx.iter().filter_map(|rx| match rx {
                Rx::Shared(slot) => Some(slot.clone() as SharedSink),
                Rx::Own(_) => None,
            }));
            lanes.clone()
        });
        let shared = (receiver.filter.clone(), receiver.steering.clone());
        let (mtu, queues) = (nic.config.mtu, nic.config.queue_pairs);
        let port = Port::new(&nic.name, mtu, queues, shared, lanes);
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

    /// Lets the back end set itself up for the queues and the offloads as they are now. Then it
    /// wakes all tasks and calls `done`, at once or on another thread. If the back end fails, the
    /// driver's choices are `before` again by then, also if nobody waits for `done` any more.
    ///
    /// # Errors
    /// The back end cannot begin. The choices are `before` again, and `done` is dropped.
    pub fn configure(&self, before: Choices, done: Done) -> Result<(), ErrorCode> {
        let pairs = self.pairs.iter().map(|running| Arc::downgrade(&running.pair)).collect();
        let undo = Arc::new(Undo { receiver: self.receiver.clone(), pairs, before });
        let (tasks, later): (Vec<_>, _) = (self.tasks().cloned().collect(), undo.clone());
        let done = move |result: Result<(), ErrorCode>| {
            if result.is_err() {
                later.undo();
            }
            tasks.iter().for_each(TaskHandle::wake); // Each checks whether it is in use now.
            done(result);
        };
        let (queues, offloads) = (self.receiver.steering.queues(), self.receiver.offloads());
        self.plug.configure(queues, offloads, Box::new(done)).inspect_err(|_| undo.undo())
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

    /// Whether the frames of pair `number`'s transmit ring are dropped from now on.
    pub fn set_drops(&self, number: usize, drops: bool) {
        if let Some(running) = self.pairs.get(number) {
            lock(&running.pair).set_drops(drops);
            running.task.wake();
        }
    }

    /// Sends a whole Ethernet frame of the device itself, by the first pair. Of two that follow one
    /// another at once, the second one may take the place of the first.
    pub fn send_own(&self, frame: Vec<u8>) {
        if let Some(running) = self.pairs.first() {
            lock(&running.pair).send_own(frame);
            running.task.wake();
        }
    }

    /// Takes the transmit ring of pair `number` away. Nothing touches it any more but `last`, which
    /// sees it as it is then. The driver may wait for an interrupt that was held back. `None`: the
    /// pair has no such ring.
    pub fn end_tx<O>(&self, number: usize, last: impl FnOnce(&mut T) -> O) -> Option<O> {
        lock(&self.pairs.get(number)?.pair).end_tx(last)
    }

    /// Takes the receive ring of pair `number` away, as [`end_tx`](Self::end_tx).
    pub fn end_rx<O>(&self, number: usize, last: impl FnOnce(&mut R) -> O) -> Option<O> {
        lock(&self.pairs.get(number)?.pair).end_rx(last)
    }

    /// What the back end keeps of the driver, as plain data. The device is quiesced. What the pairs
    /// took from their rings and did not finish is taken again by the ends that resume the rings.
    ///
    /// # Errors
    /// The back end cannot be saved.
    pub fn save(&self) -> Result<PairsState, String> {
        let queues = self.pairs.iter().map(|running| lock(&running.pair).save());
        Ok(PairsState { plug: self.plug.save()?, queues: queues.collect::<Result<_, _>>()? })
    }

    /// How far the rings of each pair are ([`TxRing::save`], [`RxRing::save`]), first the transmit
    /// ring; `None`: the pair has no such ring.
    ///
    /// # Errors
    /// The driver broke the protocol, and the next poll would find it.
    pub fn rings(&self) -> Result<Vec<[Option<Value>; 2]>, ErrorCode> {
        self.pairs.iter().map(|running| lock(&running.pair).rings()).collect()
    }

    /// Goes on from what [`save`](Self::save) returned, when the pairs have their rings and before
    /// their tasks run: another ring would be without what a former one had begun.
    ///
    /// # Errors
    /// The state is wrong.
    pub fn restore(&self, state: &PairsState) -> Result<(), String> {
        if state.queues.len() != self.pairs.len() {
            let (pairs, others) = (self.pairs.len(), state.queues.len());
            return Err(format!("it has {pairs} queue pairs, not {others}"));
        }
        self.plug.restore(&state.plug)?;
        let mut pairs = self.pairs.iter().zip(&state.queues);
        pairs.try_for_each(|(running, saved)| lock(&running.pair).restore(saved))
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

/// How the choices of a driver become what they were. The back end may hold it for longer than the
/// driver is there.
struct Undo<T: TxRing, R: RxRing> {
    receiver: Arc<Receiver>,
    pairs: Vec<Weak<Mutex<Pair<T, R>>>>,
    before: Choices,
}

impl<T: TxRing, R: RxRing> Undo<T, R> {
    fn undo(&self) {
        self.receiver.choose(&self.before);
        for pair in self.pairs.iter().filter_map(Weak::upgrade) {
            // It also waits for deliveries by the choices that do not count any more.
            lock(&pair).queues_changed();
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use serde_json::{Value, json};
    use vbus_core::memory::{DriverSlice, PAGE, View};
    use vbus_core::settings::Settings;
    use vbus_core::shm::signal::Armed;
    use vbus_core::{Access, ConnectionCounters, Progress, Tuning};
    use vbus_tap::{HEADER_BYTES, Mac};

    use super::super::config::Config;
    use super::super::counters::PairCounters;
    use super::*;
    use crate::backend::{Backend, Queue, Sent};
    use crate::filter::Filter;
    use crate::frame::Packet;
    use crate::front::Ring;
    use crate::steering::Steering;

    /// A back end that is slow to set itself up, or cannot.
    #[derive(Clone, Default)]
    struct Slow(Arc<Mutex<SlowState>>);

    #[derive(Default)]
    struct SlowState {
        cannot_begin: bool,
        wanted: Vec<(u16, Offloads)>,
        done: Option<Done>,
    }

    impl Backend for Slow {
        fn tx_offloads(&self) -> Offloads {
            Offloads::ALL
        }

        fn rx_offloads(&self) -> Offloads {
            Offloads::ALL
        }

        fn steers(&self) -> bool {
            true
        }

        fn plug(&self, _port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode> {
            Ok(Arc::new(self.clone()))
        }

        fn inspect(&self) -> Value {
            Value::Null
        }
    }

    impl Plug for Slow {
        fn queue(&self, _index: u16, _task: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode> {
            Ok(Box::new(NoQueue))
        }

        fn configure(&self, queues: u16, offloads: Offloads, done: Done) -> Result<(), ErrorCode> {
            let mut state = lock(&self.0);
            if state.cannot_begin {
                return Err(ErrorCode::FAILED);
            }
            state.wanted.push((queues, offloads));
            state.done = Some(done);
            Ok(())
        }

        fn set_mac(&self, _mac: Mac) -> bool {
            true
        }
    }

    struct NoQueue;

    impl Queue for NoQueue {
        fn send(&mut self, _packet: &Packet<'_>) -> Sent {
            Sent::Done { units: 1 }
        }
    }

    /// A ring that no pair here has.
    enum NoRing {}

    impl Ring for NoRing {
        fn post(&mut self) -> bool {
            match *self {}
        }

        fn interrupt(&self, _wanted: bool) {
            match *self {}
        }

        fn arm(&mut self, _after: u32) -> Armed {
            match *self {}
        }

        fn disarm(&mut self) {
            match *self {}
        }

        fn pending(&self) -> u32 {
            match *self {}
        }
    }

    impl TxRing for NoRing {
        fn take(&mut self, _view: &View<'_>) -> Result<Option<usize>, ErrorCode> {
            match *self {}
        }

        fn slices<'v>(
            &self,
            _view: &'v View<'_>,
            _each: impl FnMut(DriverSlice<'v>),
        ) -> Result<(), ErrorCode> {
            match *self {}
        }

        fn took(&mut self) -> bool {
            match *self {}
        }

        fn done(&mut self, _view: &View<'_>) -> Result<(), ErrorCode> {
            match *self {}
        }
    }

    impl RxRing for NoRing {
        type Buffer = NoRing;

        fn buffers_max(&self) -> usize {
            match *self {}
        }

        fn take(&mut self, _view: &View<'_>) -> Result<Option<NoRing>, ErrorCode> {
            match *self {}
        }

        fn bytes(buffer: &NoRing) -> usize {
            match *buffer {}
        }

        fn parts(buffer: &NoRing) -> usize {
            match *buffer {}
        }

        fn slices<'v>(
            buffer: &NoRing,
            _view: &'v View<'_>,
            _len: usize,
            _each: impl FnMut(DriverSlice<'v>),
        ) -> Result<(), ErrorCode> {
            match *buffer {}
        }

        fn give_back(
            &mut self,
            _view: &View<'_>,
            buffer: NoRing,
            _len: usize,
            _more: bool,
        ) -> Result<(), ErrorCode> {
            match buffer {}
        }

        fn holds_all(&self) -> bool {
            match *self {}
        }
    }

    fn receiver() -> Arc<Receiver> {
        Arc::new(Receiver {
            mtu: 1500,
            filter: Arc::new(Filter::new([2, 0, 0, 0, 0, 1])),
            offloads: AtomicU64::new(Offloads::CSUM.bits()),
            steering: Arc::new(Steering::new(2)),
            hash: false,
            backpressure: Duration::ZERO,
            moved: Box::new(|| {}),
        })
    }

    /// A ring with so many frames of 60 bytes, all zero.
    struct Frames(u32);

    impl Ring for Frames {
        fn post(&mut self) -> bool {
            false
        }

        fn interrupt(&self, _wanted: bool) {}

        fn arm(&mut self, _after: u32) -> Armed {
            if self.0 > 0 { Armed::Missed } else { Armed::Waiting }
        }

        fn disarm(&mut self) {}

        fn pending(&self) -> u32 {
            self.0
        }
    }

    impl TxRing for Frames {
        fn take(&mut self, _view: &View<'_>) -> Result<Option<usize>, ErrorCode> {
            Ok((self.0 > 0).then_some(HEADER_BYTES + 60))
        }

        fn slices<'v>(
            &self,
            view: &'v View<'_>,
            mut each: impl FnMut(DriverSlice<'v>),
        ) -> Result<(), ErrorCode> {
            each(view.slice(0, HEADER_BYTES as u64 + 60, false)?);
            Ok(())
        }

        fn took(&mut self) -> bool {
            false
        }

        fn done(&mut self, _view: &View<'_>) -> Result<(), ErrorCode> {
            self.0 -= 1;
            Ok(())
        }
    }

    /// A back end's queue that answers as it is told, and [`Sent::Done`] afterwards.
    #[derive(Clone, Default)]
    struct Told(Arc<Mutex<ToldState>>);

    #[derive(Default)]
    struct ToldState {
        answers: VecDeque<Sent>,
        /// The first byte of each frame that was sent.
        sent: Vec<u8>,
        armed: u32,
    }

    impl Queue for Told {
        fn send(&mut self, packet: &Packet<'_>) -> Sent {
            let mut state = lock(&self.0);
            state.sent.push(packet.front()[0]);
            state.answers.pop_front().unwrap_or(Sent::Done { units: 1 })
        }

        fn arm(&mut self) -> Armed {
            lock(&self.0).armed += 1;
            Armed::Waiting
        }
    }

    /// A pair with a ring of `frames` frames, before this queue.
    fn pair(told: &Told, frames: u32) -> PairTask<Frames, NoRing> {
        let memory = Arc::new(MemoryContext::new());
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, PAGE).unwrap();
        memory.map(0, PAGE, Some((file, 0)), Access::BOTH).unwrap();
        let counters = Arc::<PairCounters>::default();
        let rx = Rx::Own(RxSlot::new(counters.clone(), false));
        let (receiver, offloads) = (receiver(), Offloads::NONE);
        let mut pair = Pair::new(rx, Box::new(told.clone()), memory, receiver, offloads, counters);
        pair.set_tx(Some(TxQueue::new(Frames(frames), HEADER_BYTES, Arc::default())));
        PairTask { pair: Arc::new(Mutex::new(pair)), number: 0 }
    }

    const WAIT: Sent = Sent::Wait { until: None, moved: false };

    /// A frame of the device itself for which there is no room goes as soon as there is, and before
    /// the driver's next one.
    #[test]
    fn a_frame_of_the_device_itself_waits_for_room() {
        for frames in [0, 1] {
            let told = Told::default();
            let mut task = pair(&told, frames);
            lock(&told.0).answers.extend([WAIT, WAIT]);
            lock(&task.pair).send_own(vec![7; 60]);
            for armed in 1..=2 {
                assert_eq!(task.poll(8), Ok(Progress::Idle));
                assert_eq!(task.arm(), Ok(Armed::Waiting));
                assert_eq!(lock(&told.0).armed, armed, "the end of the wait wakes the task");
            }
            task.poll(8).unwrap();
            task.poll(8).unwrap();
            let ring = vec![0; frames as usize];
            assert_eq!(lock(&told.0).sent, [vec![7; 3], ring].concat());
        }
        // While a frame of the ring is on its way.
        let told = Told::default();
        let mut task = pair(&told, 1);
        lock(&told.0).answers.push_back(WAIT);
        task.poll(8).unwrap();
        lock(&task.pair).send_own(vec![7; 60]);
        while task.poll(8) == Ok(Progress::Busy) {}
        assert_eq!(lock(&told.0).sent, [0, 0, 7]);
    }

    /// A driver disables a ring whose frame waits for room: that and all others are dropped, though
    /// there is no room, and though a frame of the device itself waits for some.
    #[test]
    fn a_ring_that_is_disabled_waits_for_no_room() {
        for own in [false, true] {
            let told = Told::default();
            let mut task = pair(&told, 3);
            lock(&told.0).answers.extend([WAIT; 8]);
            if own {
                lock(&task.pair).send_own(vec![7; 60]);
            }
            task.poll(8).unwrap();
            assert_eq!(task.arm(), Ok(Armed::Waiting));
            lock(&task.pair).set_drops(true);
            task.poll(8).unwrap();
            assert_eq!(task.arm(), Ok(Armed::Waiting), "no frame is left in the ring");
            assert_eq!(lock(&told.0).sent.len(), if own { 2 } else { 1 });
        }
    }

    #[test]
    fn what_the_back_end_cannot_do_is_taken_back() {
        let slow = Slow::default();
        let mut settings = Settings::new(&json!({ "backend": "null", "queue-pairs": 2 })).unwrap();
        let config = Config::take(&mut settings).unwrap();
        let nic = Nic::new("n", config, Arc::default(), Box::new(slow.clone()));
        let receiver = receiver();
        let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
        let counters = Arc::new(ConnectionCounters::of("n"));
        let pairs: Pairs<NoRing, NoRing> = Pairs::start(&Setup {
            nic: &nic,
            receiver: &receiver,
            by_hash: false,
            tx_offloads: Offloads::NONE,
            memory: &Arc::new(MemoryContext::new()),
            place: (&executor, 0, &counters),
            fail: Arc::new(|_| {}),
        })
        .unwrap();
        let results = Arc::new(Mutex::new(Vec::new()));
        let change = || {
            let before = receiver.choices();
            assert!(receiver.steering.set_queues(1));
            receiver.set_offloads(Offloads::ALL);
            let results = results.clone();
            pairs.configure(before, Box::new(move |result| lock(&results).push(result)))
        };
        let now = || (receiver.steering.queues(), receiver.offloads());
        let (old, new) = ((2, Offloads::CSUM), (1, Offloads::ALL));

        lock(&slow.0).cannot_begin = true;
        assert_eq!((change(), now()), (Err(ErrorCode::FAILED), old));
        assert!(lock(&results).is_empty());
        lock(&slow.0).cannot_begin = false;
        for (result, after) in [(Err(ErrorCode::FAILED), old), (Ok(()), new)] {
            assert_eq!((change(), now()), (Ok(()), new));
            let done = lock(&slow.0).done.take().unwrap();
            done(result);
            assert_eq!((lock(&results).pop(), now()), (Some(result), after));
        }
        // The driver has left before the end.
        assert_eq!(change(), Ok(()));
        let done = lock(&slow.0).done.take().unwrap();
        drop(pairs);
        done(Err(ErrorCode::FAILED));
        assert_eq!(lock(&slow.0).wanted, [new; 3]);
    }
}
