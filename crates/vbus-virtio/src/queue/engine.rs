// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A queue of either format, its turns, and its state in and out.

use std::sync::atomic::{AtomicU32, Ordering};

use vbus_core::View;
use vbus_core::memory::DriverSlice;
use vbus_core::shm::signal::Armed;

use super::chain::{Chain, Head, Part};
use super::inflight::{Found, InFlightRegion, Tracker, assign};
use super::layout::{BadLayout, Format, Layout, RingFeatures};
use super::memory::{Area, Areas, areas};
use super::order::{Complete, Gone, Order, Run};
use super::packed::Packed;
use super::split::Split;
use super::state::{BadState, InFlight, Position, State, Unsettled};
use super::violation::Violation;

/// The queue objects of this process, counted. A chain of an object that is gone is of no other.
static QUEUES: AtomicU32 = AtomicU32::new(0);

#[derive(Debug)]
enum Ring {
    Split(Split),
    Packed(Packed),
}

/// Calls a method of either format.
macro_rules! either {
    ($ring:expr, $format:ident => $call:expr) => {
        match $ring {
            Ring::Split($format) => $call,
            Ring::Packed($format) => $call,
        }
    };
}

impl Ring {
    /// The driver may use the id again, once it has seen that the buffer is used.
    #[inline]
    fn release(&mut self, id: u16) {
        if let Ring::Split(ring) = self {
            ring.mark(id, false);
        }
    }

    #[inline]
    fn put_used<A: Area>(&mut self, areas: &Areas<A>, run: Run) {
        let Run { id, written, buffers, slots, .. } = run;
        match self {
            Ring::Split(ring) => ring.put_used(areas, id, buffers, written),
            Ring::Packed(ring) => ring.put_used(areas, id, slots, written),
        }
    }
}

/// Whether the driver wants an interrupt for used buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a driver that waits for an interrupt waits for ever without it"]
pub struct Notification {
    wanted: bool,
}

impl Notification {
    /// Whether the driver wants it.
    pub fn is_wanted(self) -> bool {
        self.wanted
    }
}

/// The device end of a queue.
#[derive(Debug)]
pub struct Queue {
    layout: Layout,
    ring: Ring,
    /// The buffers in flight of a queue with IN_ORDER.
    order: Option<Order>,
    number: u32,
    /// The sequence number of the next chain.
    sequence: u16,
    /// How many chains this object gave out, up to 2^16 - 1, without those that were put back. One
    /// that another object gave out cannot be put back: later ones may be complete already.
    given: u16,
    /// Chains that were given out and not returned.
    held: u16,
    retired: Option<Violation>,
    /// Keeps the region of the buffers in flight.
    tracker: Option<Tracker>,
}

impl Queue {
    /// A fresh queue: the driver has just enabled it.
    pub fn new(layout: Layout, features: RingFeatures) -> Result<Queue, BadLayout> {
        layout.check()?;
        Ok(Queue::at(layout, features, Position::start(layout.format), true))
    }

    fn at(layout: Layout, features: RingFeatures, position: Position, is_new: bool) -> Queue {
        let size = layout.size;
        let ring = match layout.format {
            Format::Split => Ring::Split(Split::new(size, features, position, is_new)),
            Format::Packed => Ring::Packed(Packed::new(size, features, position, is_new)),
        };
        Queue {
            layout,
            ring,
            order: features.in_order.then(|| Order::new(size)),
            number: QUEUES.fetch_add(1, Ordering::Relaxed),
            sequence: 0,
            given: 0,
            held: 0,
            retired: None,
            tracker: None,
        }
    }

    /// Takes up a queue where `state` says. Returns the queue, and the chains that are in flight:
    /// the device must return them. The driver may get one interrupt for nothing, because nobody
    /// knows whether the last one was sent.
    ///
    /// `state` may come from a process that died, or from anybody: it is checked.
    pub fn resume(
        layout: Layout,
        features: RingFeatures,
        state: &State,
    ) -> Result<(Queue, Vec<Chain>), BadState> {
        layout.check()?;
        state.check(&layout, features)?;
        let mut queue = Queue::at(layout, features, state.position, false);
        let mut chains = Vec::new();
        for InFlight { id, slots, parts, readable, written } in &state.in_flight {
            let (id, slots, sequence) = (*id, *slots, queue.sequence);
            if let Ring::Split(ring) = &mut queue.ring {
                if ring.mark(id, true) {
                    return Err(Violation::InFlight(id).into());
                }
            }
            let head = Head { queue: queue.number, id, slots, sequence, entry: 0 };
            let chain = Chain::of(head, parts, *readable)?;
            if let Some(order) = &mut queue.order {
                order.take();
                if let Some(written) = *written {
                    // Nobody knows any more how many bytes it could have been.
                    // It is not the oldest, as was checked.
                    let entry = 0;
                    let complete = Complete { id, slots, entry, written, whole: false };
                    _ = order.complete(sequence, complete);
                }
            }
            queue.sequence = sequence.wrapping_add(1);
            if written.is_none() {
                chains.push(chain);
                queue.held += 1;
            }
        }
        Ok((queue, chains))
    }

    /// Takes up a queue whose last user kept `region`, and may have died at any moment. Returns
    /// what [`resume`](Self::resume) does, and keeps the region from now on. If the region was not
    /// in use yet, the queue goes on at `base`, with nothing in flight. `view` is the driver's
    /// memory.
    ///
    /// Region and queue may be forged: they are checked.
    pub fn recover(
        layout: Layout,
        features: RingFeatures,
        region: InFlightRegion,
        base: Position,
        view: &View<'_>,
    ) -> Result<(Queue, Vec<Chain>), BadState> {
        layout.check()?;
        let areas = areas(&layout, view)?;
        State::at(base).check(&layout, features)?;
        let found = Tracker::open(region, &layout, features, base, &areas, view)?;
        let Found { position, in_flight, entries, tracker } = found;
        let state = State { position, in_flight };
        let (mut queue, mut chains) = Queue::resume(layout, features, &state)?;
        assign(&mut chains, &entries);
        if let Ring::Packed(ring) = &mut queue.ring {
            ring.keep_taken();
        }
        queue.tracker = Some(tracker);
        Ok((queue, chains))
    }

    /// The queue's state. `held` are the chains that the device has not returned, all of them, in
    /// any order. All that was returned must be published.
    pub fn state<'c>(&self, held: impl IntoIterator<Item = &'c Chain>) -> Result<State, Unsettled> {
        if let Some(violation) = self.retired {
            return Err(Unsettled::Retired(violation));
        }
        let has_run = self.order.as_ref().is_some_and(Order::has_run);
        if has_run || !either!(&self.ring, ring => ring.is_published()) {
            return Err(Unsettled::Unpublished);
        }
        let age = |head: &Head| self.sequence.wrapping_sub(head.sequence);
        let own = |chain: &'_ &Chain| chain.head.is_some_and(|head| head.queue == self.number);
        let mut others = 0;
        let mut chains = Vec::new();
        for chain in held {
            match chain.head.filter(|_| own(&chain)) {
                Some(head) => chains.push((head, chain)),
                None => others += 1,
            }
        }
        if chains.len() != usize::from(self.held) || others != 0 {
            let held = chains.len();
            return Err(Unsettled::Held { held, in_flight: self.held.into() });
        }
        chains.sort_by_key(|(head, _)| std::cmp::Reverse(age(head)));
        let in_flight = |(head, chain): &(Head, &Chain)| InFlight {
            id: head.id,
            slots: head.slots,
            parts: [chain.readable(), chain.writable()].concat(),
            readable: chain.readable().len(),
            written: None,
        };
        let mut in_flight: Vec<_> = chains.iter().map(in_flight).collect();
        if let Some(order) = &self.order {
            // Those that are complete and wait have their places between the others.
            for (at, &Complete { id, slots, written, .. }) in order.waiting() {
                let (parts, readable, written) = (Vec::new(), 0, Some(written));
                in_flight.insert(at, InFlight { id, slots, parts, readable, written });
            }
        }
        Ok(State { position: self.position(), in_flight })
    }

    /// The queue's place and size.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// How far the queue is.
    pub fn position(&self) -> Position {
        either!(&self.ring, ring => ring.position())
    }

    /// Chains that the device has and must return.
    pub fn held(&self) -> u16 {
        self.held
    }

    /// Why the queue is retired. `None`: it is not.
    pub fn retired(&self) -> Option<Violation> {
        self.retired
    }

    /// Retires the queue, as if it had found `why` itself. A device does this if a chain's part is
    /// not in the driver's memory, or if the chain makes no sense to it. An earlier reason stays.
    pub fn retire(&mut self, why: Violation) {
        self.retired.get_or_insert(why);
    }

    /// The queue with its memory, for one poll. Fails once if the device cannot reach the queue's
    /// areas; the queue is retired then. The turn of a retired queue does nothing.
    pub fn turn<'t>(&'t mut self, view: &'t View<'_>) -> Result<Turn<'t>, Violation> {
        let areas = match self.retired {
            Some(_) => None,
            None => match areas(&self.layout, view) {
                Ok(areas) => Some(areas),
                Err(violation) => {
                    self.retire(violation);
                    return Err(violation);
                }
            },
        };
        Ok(Turn { queue: self, areas, view })
    }
}

/// A queue with its memory at hand, for one poll.
///
/// A turn keeps the view. What was returned and not published stays with the queue, and a later
/// turn publishes it.
pub struct Turn<'t> {
    queue: &'t mut Queue,
    /// `None`: the queue is retired.
    areas: Option<Areas<DriverSlice<'t>>>,
    view: &'t View<'t>,
}

impl Turn<'_> {
    /// Takes the next chain that the driver has made available. False: there is none, and `chain`
    /// is empty. After an error the queue is retired. `chain` must not be taken.
    ///
    /// A chain whose memory was mapped after the turn's view was taken is none yet: a turn with a
    /// newer view takes it, and until then [`arm`](Self::arm) says that one was missed. Of memory
    /// that no view has, the device learns when it looks a part up.
    #[inline]
    pub fn next(&mut self, chain: &mut Chain) -> Result<bool, Violation> {
        let found = self.take(chain)?;
        if found && !self.view.is_current() && !self.has(chain) {
            let back = self.put_back(chain);
            debug_assert!(back, "it was taken last");
            return Ok(false);
        }
        Ok(found)
    }

    /// Whether the view has all of the chain's parts.
    #[cold]
    fn has(&self, chain: &Chain) -> bool {
        let each = |parts: &[Part], write| {
            parts.iter().all(|part| self.view.slice(part.addr, part.len.into(), write).is_ok())
        };
        each(chain.readable(), false) && each(chain.writable(), true)
    }

    #[inline]
    fn take(&mut self, chain: &mut Chain) -> Result<bool, Violation> {
        debug_assert!(!chain.is_taken(), "a taken chain is lost");
        chain.clear();
        let Some(areas) = &self.areas else { return Ok(false) };
        let queue = &mut *self.queue;
        match either!(&mut queue.ring, ring => ring.take(areas, self.view, chain)) {
            Ok(None) => Ok(false),
            Ok(Some((id, slots))) => {
                let sequence = queue.sequence;
                let entry = queue.tracker.as_mut().map_or(0, |tracker| match &queue.ring {
                    Ring::Split(_) => tracker.take(id, &[]),
                    Ring::Packed(ring) => tracker.take(id, ring.taken()),
                });
                chain.head = Some(Head { queue: queue.number, id, slots, sequence, entry });
                if let Some(order) = &mut queue.order {
                    order.take();
                }
                queue.sequence = sequence.wrapping_add(1);
                queue.given = queue.given.saturating_add(1);
                queue.held += 1;
                Ok(true)
            }
            Err(Violation::IndirectUnmapped) if !self.view.is_current() => {
                // Neither format has moved on.
                chain.clear();
                Ok(false)
            }
            Err(violation) => {
                chain.clear();
                self.retire(violation);
                Err(violation)
            }
        }
    }

    /// The head of a chain of this queue, which is not taken from now on.
    fn head(&self, chain: &mut Chain) -> Option<Head> {
        chain.head.take().filter(|head| head.queue == self.queue.number)
    }

    /// Puts the chain back that was taken last: the next one will be this one, read anew. False:
    /// the chain is not the one that was taken last, of those that were not put back, or another
    /// queue object gave it out. It is still taken then.
    pub fn put_back(&mut self, chain: &mut Chain) -> bool {
        let queue = &mut *self.queue;
        let newest = queue.sequence.wrapping_sub(1);
        let is_newest = |h: &Head| h.queue == queue.number && h.sequence == newest;
        let Some(head) = chain.head.filter(|head| queue.given > 0 && is_newest(head)) else {
            return false;
        };
        either!(&mut queue.ring, ring => ring.put_back(head));
        if let Some(tracker) = &mut queue.tracker {
            tracker.put_back(head.entry);
        }
        if let Some(order) = &mut queue.order {
            order.put_back();
        }
        queue.sequence = newest;
        queue.given -= 1;
        queue.held -= 1;
        chain.clear();
        true
    }

    /// Returns a chain to the driver, of whose writable parts the device has written the first
    /// `written` bytes. It goes back with the next [`publish`](Self::publish). Chains may come back
    /// in any order; with IN_ORDER the queue keeps a chain until those before it are complete, and
    /// returns chains of which the device wrote all that it may together, by one element.
    ///
    /// A chain that is not taken, or that is of another queue object, does nothing.
    #[inline]
    pub fn complete(&mut self, chain: &mut Chain, written: u32) {
        let Some(head) = self.head(chain) else { return };
        let queue = &mut *self.queue;
        queue.held -= 1;
        let Some(areas) = &self.areas else { return };
        let Queue { ring, tracker, .. } = queue;
        let Head { id, slots, sequence, entry, .. } = head;
        let mut release = |ring: &mut Ring, gone: Gone| {
            ring.release(gone.id);
            if let Some(tracker) = tracker {
                tracker.complete(gone.entry);
            }
        };
        let Some(order) = &mut queue.order else {
            release(ring, Gone { id, entry });
            ring.put_used(areas, Run { id, written, buffers: 1, slots, open: true });
            return;
        };
        let whole = written == chain.writable_bytes();
        let mut oldest = order.complete(sequence, Complete { id, slots, entry, written, whole });
        while let Some((gone, run)) = oldest {
            release(ring, gone);
            if let Some(run) = run {
                ring.put_used(areas, run);
            }
            oldest = order.advance();
        }
    }

    /// Lets the driver see what was returned, all at once.
    #[inline]
    pub fn publish(&mut self) {
        let Some(areas) = &self.areas else { return };
        let queue = &mut *self.queue;
        if let Some(run) = queue.order.as_mut().and_then(Order::end_run) {
            queue.ring.put_used(areas, run);
        }
        let Some(tracker) = &mut queue.tracker else {
            return either!(&mut queue.ring, ring => ring.publish(areas));
        };
        if either!(&queue.ring, ring => ring.is_published()) {
            return;
        }
        let place = either!(&queue.ring, ring => ring.position());
        tracker.publishing(place);
        either!(&mut queue.ring, ring => ring.publish(areas));
        tracker.published(place);
    }

    /// Whether the driver wants an interrupt for what was published since the last call. A device
    /// that holds interrupts back (NOTF_COAL) publishes at once, and asks later.
    #[inline]
    pub fn notification(&mut self) -> Notification {
        let wanted = match &self.areas {
            Some(areas) => either!(&mut self.queue.ring, ring => ring.notification(areas)),
            None => false,
        };
        Notification { wanted }
    }

    /// [`publish`](Self::publish), then [`notification`](Self::notification).
    #[inline]
    pub fn flush(&mut self) -> Notification {
        self.publish();
        self.notification()
    }

    /// Asks for a kick with the next available chain. [`Armed::Missed`]: there is one already, and
    /// its kick may not come. A retired queue waits for ever.
    pub fn arm(&mut self) -> Armed {
        match &self.areas {
            Some(areas) => either!(&mut self.queue.ring, ring => ring.arm(areas)),
            None => Armed::Waiting,
        }
    }

    /// Asks for no kicks, until the queue is armed again. The driver may still send one.
    pub fn disarm(&mut self) {
        if let Some(areas) = &self.areas {
            either!(&mut self.queue.ring, ring => ring.disarm(areas));
        }
    }

    /// [`Queue::retire`]: the turn does nothing from now on.
    pub fn retire(&mut self, why: Violation) {
        self.queue.retire(why);
        self.areas = None;
    }
}
