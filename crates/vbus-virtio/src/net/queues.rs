// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The queues of the pairs that the driver has enabled. Either this process serves them, by the
//! tasks of [`Pairs`](vbus_net::front::Pairs), or the kernel does, by [`vhost`](super::vhost). They
//! move between the two while the driver works. A queue that moves is still for a moment. Its
//! position is all that moves with it: what was taken from it and not returned is available again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use vbus_core::memory::Follower;
use vbus_core::{BlockingQueue, Doorbell, ErrorCode, TaskHandle, lock, state};
use vbus_net::Done;
use vbus_net::front::{Choices, Setting};

use super::abi::feature;
use super::ring::{RxFrames, TxFrames};
use super::vhost::{self, AtWork, Ends, Fault, Signals, SignalsTask};
use super::work::Work;
use crate::device::{Again, Call, Enabled, Unsaved, feature as common};
use crate::queue::{Chain, Format, Layout, Position, Queue, RingFeatures, State as RingState};

/// The queues of a session.
pub struct Queues {
    this: Weak<Queues>,
    work: Arc<Work>,
    /// Locked while the back end is told what to set itself up for, before the state: what was
    /// chosen last is told last.
    turn: Mutex<()>,
    state: Mutex<State>,
    /// Moves that a task or a change of the memory has begun.
    jobs: BlockingQueue,
}

struct State {
    /// The enabled queues, by their numbers.
    slots: Vec<Option<Slot>>,
    kernel: Option<Kernel>,
    /// The device is quiesced: the kernel has none of the queues.
    paused: bool,
    /// The back end has to be set up when the device goes on.
    anew: bool,
    /// The kernel begins when the log of what is written has ended.
    logged: bool,
    /// The session has ended.
    ended: bool,
}

/// The kernel at work for the session.
struct Kernel {
    at_work: AtWork,
    /// The task of its signals.
    task: TaskHandle,
    /// So many pairs have their queues of the interface in use.
    ready: u16,
}

/// A queue that the driver has enabled.
struct Slot {
    layout: Layout,
    doorbell: Doorbell,
    call: Call,
    coalesce: Arc<Setting>,
    served: Served,
}

/// Who serves a queue.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Served {
    /// The task of its pair.
    Here,
    /// The kernel.
    InKernel,
    /// Nobody for now. The next available buffer has this index.
    Nobody(u16),
}

impl Queues {
    /// The queues of a session, in which no queue is enabled yet. This process serves them.
    pub fn new(work: Arc<Work>) -> Arc<Queues> {
        let slots = (0..work.queue_pairs() * 2).map(|_| None).collect();
        let (paused, anew, logged, ended) = Default::default();
        let state = State { slots, kernel: None, paused, anew, logged, ended };
        let (state, jobs) = (Mutex::new(state), BlockingQueue::default());
        let turn = Mutex::default();
        let queues = Arc::new_cyclic(|this| Queues { this: this.clone(), work, turn, state, jobs });
        queues.work.driver.memory.follow(&queues);
        // From now on a change of the setting finds the queues, and who quiesces the device.
        queues.work.nic.has_started(&queues);
        queues
    }

    /// Begins: before a queue is enabled, or with the queues that another session had. The kernel
    /// serves the queues if the device's setting says so and it can.
    ///
    /// # Errors
    /// The back end cannot be set up.
    pub fn start(&self) -> Result<(), ErrorCode> {
        let mut state = lock(&self.state);
        if state.kernel.is_none() {
            if let Some(ends) = self.ends() {
                self.enter_kernel(&mut state, ends);
            }
        }
        drop(state);
        self.configure_since(self.work.receiver.choices()).inspect_err(|_| self.end())
    }

    /// The device is quiesced, or goes on. Meanwhile the kernel has none of the queues. It says
    /// where it was, and has nothing in flight.
    pub fn pause(&self, paused: bool) {
        let mut state = lock(&self.state);
        if std::mem::replace(&mut state.paused, paused) == paused || state.ended {
            return;
        }
        let result = if paused { self.park(&mut state, 0) } else { self.give_ready(&mut state) };
        let anew = !paused && std::mem::take(&mut state.anew);
        drop(state);
        if let Err(code) = result {
            self.fail_later(code);
        }
        if anew {
            self.configure_later();
        }
    }

    /// The state of each queue. The device is quiesced.
    ///
    /// # Errors
    /// The driver broke the protocol, or the kernel has not let go of a queue.
    pub fn save(&self) -> Result<BTreeMap<u16, RingState>, Unsaved> {
        // While it is locked, no queue moves.
        let state = lock(&self.state);
        let mut queues = BTreeMap::new();
        let rings = self.work.pairs.rings().map_err(Unsaved::Broken)?;
        for (pair, [tx, rx]) in (0..).zip(rings) {
            for (index, ring) in [(pair * 2, rx), (pair * 2 + 1, tx)] {
                if let Some(ring) = ring {
                    queues.insert(index, state::read_part(&ring).map_err(Unsaved::Not)?);
                }
            }
        }
        for (index, slot) in (0..).zip(&state.slots) {
            match slot.as_ref().map(|slot| slot.served) {
                Some(Served::Nobody(next)) => {
                    queues.insert(index, RingState::at(split_position(next)));
                }
                Some(Served::InKernel) => {
                    let why = "the kernel (vhost = true) has not let go of its queues";
                    return Err(Unsaved::Not(why.into()));
                }
                Some(Served::Here) | None => {}
            }
        }
        Ok(queues)
    }

    /// As [`configure`](Self::configure). An error that comes later ends the session.
    pub fn configure_since(&self, before: Choices) -> Result<(), ErrorCode> {
        let fail = self.work.driver.fail.clone();
        let done: Done = Box::new(move |done| {
            if let Err(code) = done {
                fail(code);
            }
        });
        self.configure(before, done)
    }

    /// What the parts of the session share.
    pub fn work(&self) -> &Arc<Work> {
        &self.work
    }

    /// Whether the kernel serves the queues, or does when the device goes on.
    pub fn are_in_kernel(&self) -> bool {
        lock(&self.state).kernel.is_some()
    }

    fn ends(&self) -> Option<Arc<Ends>> {
        self.work.nic.vhost().ends_for(self.work.driver.features)
    }

    fn ring_features(&self) -> RingFeatures {
        RingFeatures::of(self.work.driver.features)
    }

    /// As [`Pairs::configure`](vbus_net::front::Pairs::configure). The kernel serves the queues of
    /// the pairs in use: it begins when the interface has their queues in use, and ends before it
    /// has not.
    pub fn configure(&self, before: Choices, done: Done) -> Result<(), ErrorCode> {
        let _turn = lock(&self.turn);
        let queues = self.work.receiver.steering.queues();
        {
            let mut state = lock(&self.state);
            self.park(&mut state, queues)?;
            if let Some(kernel) = &mut state.kernel {
                kernel.ready = kernel.ready.min(queues);
                self.serve_unused(&mut state, queues)?;
            }
        }
        let this = self.this.clone();
        let ended = move |result: Result<(), ErrorCode>| {
            // After an error the pairs are in use that were before.
            let ready = this.upgrade().map_or(Ok(()), |this| this.ready(queues, result.is_err()));
            done(result.and(ready));
        };
        let begun = self.work.pairs.configure(before, Box::new(ended));
        if begun.is_err() {
            self.ready(queues, true)?;
        }
        begun
    }

    /// So many pairs have their queues of the interface in use; `again`: those that the driver uses
    /// now.
    fn ready(&self, queues: u16, again: bool) -> Result<(), ErrorCode> {
        let mut state = lock(&self.state);
        let Some(kernel) = &mut state.kernel else { return Ok(()) };
        let now = self.work.receiver.steering.queues();
        // The driver may have changed the number since then.
        kernel.ready = if again { now } else { queues.min(now) };
        self.give_ready(&mut state)
    }

    /// Gives the kernel the queues of the pairs that are ready.
    fn give_ready(&self, state: &mut State) -> Result<(), ErrorCode> {
        let ready = state.kernel.as_ref().map_or(0, |kernel| kernel.ready);
        (0..ready * 2).try_for_each(|index| self.give_to_kernel(state, index))
    }

    /// The driver has enabled queue `index`. `taken` are chains that another session has taken from
    /// it and not returned; only this process can go on with them.
    pub fn enable_again(
        &self,
        index: u16,
        enabled: Enabled,
        taken: Vec<Chain>,
    ) -> Result<(), ErrorCode> {
        let mut state = lock(&self.state);
        let Some(coalesce) = self.work.coalesce_new(index) else { return Ok(()) };
        let Enabled { queue, doorbell, call } = enabled;
        let position = queue.position();
        let is_used = index / 2 < self.work.receiver.steering.queues();
        let slot = Slot {
            layout: *queue.layout(),
            doorbell,
            call,
            coalesce,
            served: Served::Nobody(position.available),
        };
        let State { slots, kernel, .. } = &mut *state;
        let Some(place) = slots.get_mut(usize::from(index)) else { return Ok(()) };
        let slot = place.insert(slot);
        match kernel {
            Some(_) if taken.is_empty() && !is_used && is_tx(index) => {
                self.serve_here(index, slot, queue, taken)
            }
            Some(_) if taken.is_empty() => self.give_to_kernel(&mut state, index),
            Some(_) => Err(ErrorCode::DENIED),
            None => self.serve_here(index, slot, queue, taken),
        }
    }

    /// The driver resets or stops queue `index`. Returns where somebody can go on with it; `None`:
    /// it was not enabled, or nobody can say.
    pub fn disable(&self, index: u16) -> Option<Position> {
        let mut state = lock(&self.state);
        let slot = state.slots.get_mut(usize::from(index)).and_then(Option::take);
        let left = slot.and_then(|slot| match slot.served {
            Served::InKernel => {
                let kernel = state.kernel.as_mut();
                match kernel.map(|kernel| kernel.at_work.remove(index, &slot.doorbell)) {
                    Some(Ok(next)) => Some(split_position(next)),
                    Some(Err(fault)) => {
                        // The end of it all ends the queue too.
                        self.leave_kernel(&mut state, fault.to_string());
                        None
                    }
                    None => None,
                }
            }
            // A fault of the driver's ends with the queue.
            Served::Here => self.end_here(index, &slot).map(|(position, _)| position),
            Served::Nobody(next) => Some(split_position(next)),
        });
        self.work.forget_coalesce(index);
        left
    }

    /// Replaces each queue that this process serves by one that `again` makes
    /// ([`Session::retake`](crate::device::Session::retake)).
    pub fn retake(&self, again: &mut Again<'_>) {
        let mut state = lock(&self.state);
        for (index, slot) in (0..).zip(&mut state.slots) {
            let Some(slot) = slot.as_mut().filter(|slot| slot.served == Served::Here) else {
                continue;
            };
            slot.doorbell.unbind();
            let served = match self.end_here(index, slot) {
                Some((position, None)) => again(index, slot.layout, position)
                    .and_then(|queue| self.serve_here(index, slot, queue, Vec::new())),
                Some((_, Some(code))) => Err(code),
                None => Err(ErrorCode::FAILED),
            };
            if let Err(code) = served {
                self.fail_later(code);
            }
        }
    }

    /// The eventfds of the interrupts may have changed.
    pub fn calls_changed(&self) {
        let mut state = lock(&self.state);
        let changed = state.kernel.as_ref().map(|kernel| kernel.at_work.calls_changed());
        if let Some(Err(fault)) = changed {
            self.leave_kernel(&mut state, fault.to_string());
        }
    }

    /// The setting `vhost` has changed: the queues move.
    pub fn move_as_wanted(&self) {
        let mut state = lock(&self.state);
        if state.ended {
            return;
        }
        let ends = self.ends();
        match (ends, state.kernel.is_some()) {
            (Some(ends), false) => self.enter_kernel(&mut state, ends),
            (None, true) => {
                self.return_here(&mut state);
                self.work.nic.vhost().carries(false);
            }
            _ => return,
        }
        drop(state);
        self.configure_anew();
    }

    /// The session ends. Afterwards the kernel touches nothing of the driver's.
    pub fn end(&self) {
        let mut state = lock(&self.state);
        state.ended = true;
        if let Some(Kernel { at_work, task, .. }) = state.kernel.take() {
            task.stop();
            drop(at_work);
            self.work.nic.vhost().carries(false);
        }
        state.slots.clear();
    }

    /// Sets the back end up after a move. The driver's session ends if that fails.
    fn configure_anew(&self) {
        {
            let mut state = lock(&self.state);
            if state.paused {
                state.anew = true;
                return;
            }
        }
        let fail = self.work.driver.fail.clone();
        let done = move |result: Result<(), ErrorCode>| {
            if let Err(code) = result {
                fail(code);
            }
        };
        let choices = self.work.receiver.choices();
        if let Err(code) = self.configure(choices, Box::new(done)) {
            (self.work.driver.fail)(code);
        }
    }

    /// Lets the kernel begin, without queues. If it cannot, the log says why.
    fn begin(&self, state: &mut State, ends: Arc<Ends>) {
        let driver = &self.work.driver;
        let begun = Signals::new().map_err(Fault::from).and_then(|signals| {
            let (this, of_task) = (self.this.clone(), signals.clone());
            let bad = move || {
                let why = "vhost-net found a queue that is bad";
                this.upgrade().is_none_or(|this| this.move_later(why.into()))
            };
            let (worker, counters) = (driver.worker, driver.counters.clone());
            let task = driver.executor.spawn_with(
                worker,
                counters,
                |_| {},
                |task| {
                    of_task.watched_by(task)?;
                    let task = SignalsTask { signals: of_task, bad: Box::new(bad), told: false };
                    Ok::<_, std::io::Error>(Box::new(task) as _)
                },
            )?;
            AtWork::begin(ends, driver.features, &driver.memory, signals)
                .inspect_err(|_| task.stop())
                .map(|at_work| Kernel { at_work, task, ready: 0 })
        });
        match begun {
            Ok(kernel) => {
                state.kernel = Some(kernel);
                self.work.pairs.plug().leave_to_kernel(true);
                self.work.nic.vhost().carries(true);
            }
            Err(fault) => {
                state.logged = fault.is_of_log();
                self.work.nic.vhost().fell_back(fault.to_string());
            }
        }
    }

    /// Moves all queues to the kernel, which begins to serve them when the interface is set up.
    fn enter_kernel(&self, state: &mut State, ends: Arc<Ends>) {
        self.begin(state, ends);
        if state.kernel.is_none() {
            return;
        }
        for (index, slot) in (0..).zip(&mut state.slots) {
            let Some(slot) = slot.as_mut().filter(|slot| slot.served == Served::Here) else {
                continue;
            };
            self.leave_to_nobody(index, slot);
        }
    }

    /// Ends the service of queue `index` in this process, for the kernel, which has split queues.
    fn leave_to_nobody(&self, index: u16, slot: &mut Slot) {
        slot.doorbell.unbind();
        match self.end_here(index, slot) {
            Some((position, None)) => slot.served = Served::Nobody(position.available),
            Some((_, Some(code))) => self.fail_later(code),
            None => self.fail_later(ErrorCode::FAILED),
        }
    }

    /// Moves all queues back to this process. The back end has to be configured anew.
    fn return_here(&self, state: &mut State) {
        // An error ends the session by the queues' own fault, or by that of the setting up.
        let parked = self.park(state, 0);
        if let Some(Kernel { at_work, task, .. }) = state.kernel.take() {
            task.stop();
            drop(at_work);
        }
        self.work.pairs.plug().leave_to_kernel(false);
        let mut result = parked;
        for (index, slot) in (0..).zip(&mut state.slots) {
            let Some(slot) = slot else { continue };
            result = result.and(self.serve_parked(index, slot));
        }
        if let Err(code) = result {
            self.fail_later(code);
        }
    }

    /// Lets this process serve queue `index`, if nobody does.
    fn serve_parked(&self, index: u16, slot: &mut Slot) -> Result<(), ErrorCode> {
        let Served::Nobody(next) = slot.served else { return Ok(()) };
        let position = RingState::at(split_position(next));
        let resumed = Queue::resume(slot.layout, self.ring_features(), &position);
        let (queue, _) = resumed.map_err(|_| ErrorCode::CORRUPT)?;
        self.serve_here(index, slot, queue, Vec::new())
    }

    /// Lets this process serve the transmit queues of the pairs from `queues` on. The driver uses
    /// them no longer, but may have left frames there, and waits for them. The kernel cannot have
    /// them: their queues of the interface are not in use.
    fn serve_unused(&self, state: &mut State, queues: u16) -> Result<(), ErrorCode> {
        let unused = (0..).zip(&mut state.slots).skip(usize::from(queues) * 2);
        for (index, slot) in unused.filter(|(index, _)| is_tx(*index)) {
            if let Some(slot) = slot {
                self.serve_parked(index, slot)?;
            }
        }
        Ok(())
    }

    /// Ends the session from within a method of it.
    pub fn fail_later(&self, code: ErrorCode) {
        let fail = self.work.driver.fail.clone();
        if !self.jobs.run(move || fail(code)) {
            tracing::error!(%code, "a session cannot be ended: there is no thread");
        }
    }

    /// The kernel cannot go on: this process does.
    fn leave_kernel(&self, state: &mut State, why: String) {
        if state.kernel.is_none() || state.ended {
            return;
        }
        self.return_here(state);
        self.work.nic.vhost().fell_back(why);
        // Not here: whoever called has the lock.
        self.configure_later();
    }

    /// Runs `job` on another thread, if the session is there then. Whoever calls may have the lock.
    /// If there is no thread, logs `lost` and returns false.
    fn run_later(&self, lost: &str, job: impl FnOnce(&Queues) + Send + 'static) -> bool {
        let this = self.this.clone();
        let runs = self.jobs.run(move || {
            if let Some(this) = this.upgrade() {
                job(&this);
            }
        });
        if !runs {
            tracing::error!("{lost}: there is no thread");
        }
        runs
    }

    fn configure_later(&self) {
        self.run_later("the interface keeps its filter", Queues::configure_anew);
    }

    /// Moves the queues to this process, on another thread. Returns whether there is one.
    fn move_later(&self, why: String) -> bool {
        self.run_later("queues cannot leave vhost-net", move |this| {
            let mut state = lock(&this.state);
            if state.kernel.is_none() || state.ended {
                return;
            }
            this.return_here(&mut state);
            drop(state);
            // If the queue is bad, the session ends now, and the log says that.
            tracing::debug!(device = this.work.nic.nic().name, why);
            this.work.nic.vhost().note(why);
            this.configure_anew();
        })
    }

    /// Lets the kernel have the queues again, on another thread: here the memory changes.
    fn move_back_later(&self) {
        self.run_later("queues do not go back to vhost-net", Queues::move_as_wanted);
    }

    /// Takes the queues of the pairs from `queues` on away from the kernel.
    fn park(&self, state: &mut State, queues: u16) -> Result<(), ErrorCode> {
        let State { slots, kernel, .. } = state;
        let Some(kernel) = kernel else { return Ok(()) };
        let mut result = Ok(());
        for (index, slot) in (0..).zip(slots).skip(usize::from(queues) * 2) {
            let Some(slot) = slot.as_mut().filter(|slot| slot.served == Served::InKernel) else {
                continue;
            };
            match kernel.at_work.remove(index, &slot.doorbell) {
                Ok(next) => slot.served = Served::Nobody(next),
                Err(fault) => {
                    tracing::error!(queue = index, %fault, "a queue cannot be taken back");
                    result = Err(ErrorCode::FAILED);
                }
            }
        }
        result
    }

    /// Gives the kernel queue `index`, if its pair is ready. If the kernel cannot have it, this
    /// process serves all queues.
    fn give_to_kernel(&self, state: &mut State, index: u16) -> Result<(), ErrorCode> {
        let State { slots, kernel, paused, .. } = &mut *state;
        let slot = slots.get_mut(usize::from(index)).and_then(Option::as_mut);
        let (Some(slot), Some(kernel)) = (slot, kernel) else { return Ok(()) };
        if *paused || index / 2 >= kernel.ready {
            return Ok(());
        }
        if slot.served == Served::Here {
            // Its pair was not in use.
            self.leave_to_nobody(index, slot);
        }
        let Served::Nobody(next) = slot.served else { return Ok(()) };
        let tap = self.work.nic.nic().backend.kernel_queue(index / 2);
        let tap = tap.ok_or(ErrorCode::FAILED)?;
        let signals = (&slot.doorbell, &slot.call);
        match kernel.at_work.add(index, (slot.layout, next), signals, tap) {
            Ok(()) => slot.served = Served::InKernel,
            Err(fault) => self.leave_kernel(state, fault.to_string()),
        }
        Ok(())
    }

    /// Lets this process serve queue `index`, from which the chains `taken` have been taken.
    fn serve_here(
        &self,
        index: u16,
        slot: &mut Slot,
        queue: Queue,
        taken: Vec<Chain>,
    ) -> Result<(), ErrorCode> {
        let work = &self.work;
        let pair = usize::from(index / 2);
        let Some(task) = work.pairs.task(pair) else { return Ok(()) };
        let (doorbell, call) = (slot.doorbell.clone(), slot.call.clone());
        let enabled = Enabled { queue, doorbell, call };
        let features = work.driver.features;
        let (memory, coalesce) = (work.driver.memory.clone(), slot.coalesce.clone());
        let header_bytes = work.receiver.header_bytes();
        if index % 2 == 0 {
            let mergeable = features & feature::MRG_RXBUF != 0;
            let indirect = features & common::INDIRECT_DESC != 0;
            let ring = RxFrames::new(enabled, memory, header_bytes, (mergeable, indirect), taken);
            work.pairs.set_rx(pair, Some((ring, coalesce)));
        } else {
            let ring = TxFrames::new(enabled, memory, taken);
            work.pairs.set_tx(pair, Some((ring, header_bytes, coalesce)));
        }
        slot.served = Served::Here;
        slot.doorbell.bind(task)
    }

    /// Ends the service of queue `index` in this process. Returns where the next end goes on, and
    /// what the driver did wrong.
    fn end_here(&self, index: u16, slot: &Slot) -> Option<(Position, Option<ErrorCode>)> {
        let (pairs, pair) = (&self.work.pairs, usize::from(index / 2));
        let left = match index % 2 {
            0 => pairs.end_rx(pair, RxFrames::leave),
            _ => pairs.end_tx(pair, TxFrames::leave),
        };
        // An interrupt may have been held back.
        slot.call.notify(true);
        left
    }
}

/// Whether queue `index` is one with frames from the driver.
fn is_tx(index: u16) -> bool {
    index % 2 == 1
}

/// Where an end of a split queue goes on that takes the buffer with index `next` first.
fn split_position(next: u16) -> Position {
    Position::of_vring_base(Format::Split, next.into())
}

impl Follower for Queues {
    fn memory_changed(&self) {
        let mut state = lock(&self.state);
        let memory = &self.work.driver.memory;
        let Some(kernel) = &mut state.kernel else {
            if state.logged && vhost::can_have(memory) {
                state.logged = false;
                drop(state);
                self.move_back_later();
            }
            return;
        };
        if let Err(fault) = kernel.at_work.memory_changed(memory) {
            state.logged = fault.is_of_log();
            self.leave_kernel(&mut state, fault.to_string());
        }
    }
}

#[cfg(test)]
mod tests;
