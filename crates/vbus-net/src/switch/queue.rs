// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The sending end of a queue pair on a switch.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::memory::DriverSlice;
use vbus_core::shm::signal::Armed;
use vbus_core::{lock, state};
use vbus_tap::{Mac, is_group, show_mac};

use super::Member;
use super::table::{Route, Seat, Source};
use super::vlan::Class;
use super::wait_budget::{Verdict, WaitBudget};
use crate::backend::{Queue, Sent, TxDrop};
use crate::frame::{ETH_BYTES, Packet, TAG_BYTES};
use crate::offload::Plain;
use crate::sink::{Delivery, OnFull, RxDrop, RxSink, SharedSink, Waiter};

/// How often a sender refreshes its addresses in the table.
const REFRESH: Duration = Duration::from_secs(1);
/// The most deliveries of one frame before it is another task's turn.
const DELIVERIES: u32 = 64;

/// See the module. The frame that the front sends may take several calls of
/// [`send`](Queue::send).
pub struct SwitchQueue {
    member: Arc<Member>,
    waiter: Waiter,
    /// The route of the last frame: a route is valid for one VLAN and destination, and one
    /// generation of the switch.
    route: Route,
    route_of: (u64, u16, Mac),
    /// What the table said of the last source address that is not the port's own.
    source: Option<Learned>,
    /// Receive queues that got frames since the last flush.
    touched: Vec<SharedSink>,
    /// The receive queue whose buffers the waiting frame lacks.
    waiting: Option<SharedSink>,
    wait_budget: WaitBudget,
    /// The class of a frame that has been admitted, and is sent again. The driver cannot change it
    /// any more.
    admitted: Option<Class>,
    /// The next receiver of a frame that goes to several.
    next: usize,
    pieces: Pieces,
    /// How far the next frame has come already, in a queue that this one goes on for.
    begun: Option<BegunState>,
}

/// How far a frame has come, as plain data (spec/state-format.md, "Back ends").
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BegunState {
    /// The devices whose queues have counted the frame.
    done: Vec<String>,
    /// The device that has a part of it.
    current: Option<PartState>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PartState {
    device: String,
    /// The number of the next plain frame.
    next: usize,
}

/// A queue as plain data.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueState {
    begun: Option<BegunState>,
}

/// An answer of the table, for the frames that follow.
struct Learned {
    of: (u16, Mac),
    generation: u64,
    at: Instant,
    allowed: Result<(), TxDrop>,
}

/// The first bytes of a frame. A switch port changes no others.
type Front = [u8; ETH_BYTES + TAG_BYTES];

/// The plain frames of the current frame, for a receiver that cannot get it as it is.
#[derive(Default)]
struct Pieces {
    /// The port that the pieces are for; 0: none.
    of: u64,
    next: usize,
    /// The form of the frame that `plain` holds, and the number of its pieces. `None`: it cannot be
    /// cut.
    loaded: Option<(Front, Option<usize>)>,
    plain: Plain,
}

impl Pieces {
    /// Cuts the frame for port `of`. Returns the number of pieces; `None`: it cannot be cut. A
    /// frame that was cut for another port in the same form is not cut again.
    fn cut(&mut self, packet: &Packet<'_>, of: u64) -> Option<usize> {
        if self.of != of {
            (self.of, self.next) = (of, 0);
        }
        let front = packet.front();
        match self.loaded {
            Some((loaded, count)) if loaded == front => count,
            _ => {
                let count = self.plain.load(packet);
                self.loaded = Some((front, count));
                count
            }
        }
    }
}

/// How far a delivery to one port has come.
enum Step {
    /// The receiver's queue has counted the frame, or each of its pieces.
    Done,
    /// It is the turn of others.
    Part,
    /// The frame waits for buffers. `until` and `moved` are those of [`Sent::Wait`].
    Wait { until: Option<Instant>, moved: bool },
}

impl SwitchQueue {
    pub(super) fn new(member: Arc<Member>, waiter: Waiter) -> SwitchQueue {
        SwitchQueue {
            member,
            waiter,
            route: Route::default(),
            route_of: (u64::MAX, 0, Mac::default()),
            source: None,
            touched: Vec::new(),
            waiting: None,
            wait_budget: WaitBudget::new(Instant::now()),
            admitted: None,
            next: 0,
            pieces: Pieces::default(),
            begun: None,
        }
    }

    /// Goes on with a frame that another queue has begun. Its receivers are sorted, those that have
    /// it first.
    fn go_on(
        &mut self,
        class: Class,
        packet: &Packet<'_>,
        begun: BegunState,
    ) -> Result<(), TxDrop> {
        self.find_route(class.id, packet.destination())?;
        let BegunState { done, current } = begun;
        let has_it = |seat: &Arc<Seat>| done.contains(&seat.port.name);
        let has_part = |seat: &Arc<Seat>| {
            current.as_ref().is_some_and(|current| current.device == seat.port.name)
        };
        self.route.to.sort_by_key(|seat| (!has_it(seat), !has_part(seat)));
        self.next = self.route.to.iter().take_while(|seat| has_it(seat)).count();
        if let (Some(seat), Some(part)) = (self.route.to.get(self.next), &current) {
            if has_part(seat) {
                (self.pieces.of, self.pieces.next) = (seat.port.id(), part.next);
            }
        }
        Ok(())
    }

    /// Checks the source address, and learns it if the port may have others than its own.
    fn check_source(&mut self, vlan: u16, mac: Mac) -> Result<(), TxDrop> {
        let member = &self.member;
        if mac == member.seat.port.filter.mac() {
            return Ok(());
        }
        if is_group(mac) || !member.seat.rules.learn {
            return Err(TxDrop::Spoofed);
        }
        let (of, now) = ((vlan, mac), Instant::now());
        let generation = member.switch.generation();
        let is_known = |last: &&Learned| {
            last.of == of && last.generation == generation && now - last.at < REFRESH
        };
        if let Some(last) = self.source.as_ref().filter(is_known) {
            return last.allowed;
        }
        let (switch, port) = (&member.switch, &member.seat.port);
        let source = switch.write().learn(of, port.id(), member.seat.own, now);
        let allowed = match source {
            Source::Known => Ok(()),
            Source::Changed => {
                switch.changed();
                Ok(())
            }
            Source::Owned => Err(TxDrop::Spoofed),
            Source::Held { tell } => {
                if tell {
                    let (switch, mac, device) = (&switch.name, show_mac(mac), &port.name);
                    tracing::warn!(
                        device,
                        switch,
                        mac,
                        "an address comes from several ports: is there a loop? frames from this \
                         port are dropped"
                    );
                }
                Err(TxDrop::Storm)
            }
        };
        self.source = Some(Learned { of, generation: switch.generation(), at: now, allowed });
        allowed
    }

    /// Finds the receivers of the frame, unless they are known.
    fn find_route(&mut self, vlan: u16, mac: Mac) -> Result<(), TxDrop> {
        let switch = &self.member.switch;
        let of = (switch.generation(), vlan, mac);
        if self.route_of != of {
            self.route = switch.read().route(&self.member.seat, (vlan, mac), Instant::now());
            self.route_of = of;
        }
        if self.route.is_denied { Err(TxDrop::Denied) } else { Ok(()) }
    }

    /// Decides whether the frame may go its way. Each frame passes this once.
    fn admit(&mut self, packet: &Packet<'_>, class: Class) -> Result<(), TxDrop> {
        self.check_source(class.id, packet.source())?;
        self.find_route(class.id, packet.destination())?;
        if self.route.is_flood {
            let limit = self.member.seat.broadcasts.as_ref();
            if let Some(broadcasts) = limit.filter(|_| self.route.to.len() > 1) {
                // A segment counts as the frames that it becomes.
                let size = usize::from(packet.header.gso_size).max(1);
                let frames = match packet.header.leaves_segmentation() {
                    true => packet.body.bytes().div_ceil(size),
                    false => 1,
                };
                if broadcasts.take(frames as u64, Instant::now()).is_err() {
                    return Err(TxDrop::Storm);
                }
            }
            self.member.switch.count_flooded();
        }
        Ok(())
    }

    /// The frame waits for buffers of `sink`.
    fn wait_for(&mut self, lane: &SharedSink, sink: &mut dyn RxSink) {
        sink.wait(&self.waiter);
        self.waiting = Some(lane.clone());
    }

    /// Delivers the frame to one port, as it is or in pieces. Each delivery adds its units of work
    /// to `spent`.
    fn deliver(
        &mut self,
        seat: &Seat,
        packet: &Packet<'_>,
        on_full: OnFull,
        spent: &mut u32,
    ) -> Step {
        let port = &seat.port;
        let (lane, hash) = port.steering.choose(packet);
        let Some(lane) = port.lanes.get(lane) else { return Step::Done };
        let packet = Packet { hash, ..*packet };
        if !self.touched.iter().any(|sink| Arc::ptr_eq(sink, lane)) {
            self.touched.push(lane.clone());
        }
        let mut sink = lock(lane);
        if self.pieces.of != port.id() {
            *spent += 1;
            match sink.deliver(&packet, on_full) {
                Delivery::Delivered { units } => {
                    *spent = spent.saturating_add(units - 1);
                    return Step::Done;
                }
                Delivery::Dropped => return Step::Done,
                Delivery::Full { until } => {
                    return match self.be_patient(port.id(), until) {
                        Some(until) => {
                            self.wait_for(lane, &mut *sink);
                            Step::Wait { until, moved: false }
                        }
                        None => {
                            sink.count_drop(RxDrop::TooSlow);
                            Step::Done
                        }
                    };
                }
                Delivery::NeedsCut => {}
            }
        }
        let Some(count) = self.pieces.cut(&packet, port.id()) else {
            sink.count_drop(RxDrop::BadFrame);
            return Step::Done;
        };
        let first = self.pieces.next;
        while self.pieces.next < count {
            if *spent >= DELIVERIES {
                return Step::Part;
            }
            *spent += 1;
            let Some(piece) = Packet::plain(self.pieces.plain.piece(self.pieces.next)) else {
                sink.count_drop(RxDrop::BadFrame);
                break;
            };
            let piece = Packet { hash, ..piece };
            match sink.deliver(&piece, on_full) {
                Delivery::Full { until } => match self.be_patient(port.id(), until) {
                    Some(until) => {
                        let moved = self.pieces.next != first;
                        self.wait_for(lane, &mut *sink);
                        return Step::Wait { until, moved };
                    }
                    None => sink.count_drop(RxDrop::TooSlow),
                },
                Delivery::Delivered { units } => *spent = spent.saturating_add(units - 1),
                _ => {}
            }
            self.pieces.next += 1;
        }
        Step::Done
    }

    /// Decides whether to wait for the buffers of `receiver`, which would let it wait until
    /// `until`. Returns the end of the wait; `None`: the queue does not wait.
    fn be_patient(&mut self, receiver: u64, until: Option<Instant>) -> Option<Option<Instant>> {
        match self.wait_budget.blocked(receiver, Instant::now()) {
            Verdict::Drop => None,
            Verdict::Wait(limit) => Some(until.into_iter().chain(limit).min()),
        }
    }

    /// Delivers the frame to the ports of the route, from number [`next`](Self::next) on.
    fn forward(&mut self, packet: &Packet<'_>, class: Class, to: &[Arc<Seat>]) -> Sent {
        let mut spent = 0;
        let on_full = if to.len() == 1 { OnFull::WaitBounded } else { OnFull::Drop };
        while let Some(seat) = to.get(self.next) {
            if spent >= DELIVERIES {
                return Sent::Part;
            }
            match seat.rules.vlan.leave(packet, class) {
                None => self.count_bad(seat),
                Some(out) => match self.deliver(seat, &out, on_full, &mut spent) {
                    Step::Done => {}
                    Step::Part => return Sent::Part,
                    Step::Wait { until, moved } => return Sent::Wait { until, moved },
                },
            }
            self.pieces.of = 0;
            self.next += 1;
        }
        self.wait_budget.went(match to {
            [only] => Some(only.port.id()),
            _ => None,
        });
        Sent::Done { units: spent.max(1) }
    }

    /// Counts a frame that could not get its tag.
    fn count_bad(&self, seat: &Seat) {
        if let Some(lane) = seat.port.lanes.first() {
            lock(lane).count_drop(RxDrop::BadFrame);
        }
    }

    /// The next frame is another one.
    fn begin(&mut self) {
        (self.admitted, self.next, self.begun) = (None, 0, None);
        (self.pieces.of, self.pieces.loaded) = (0, None);
    }
}

impl Queue for SwitchQueue {
    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        self.waiting = None;
        let was_admitted = self.admitted;
        let class = was_admitted.or_else(|| self.member.seat.rules.vlan.classify(packet));
        let Some(class) = class else {
            self.begin();
            return Sent::Dropped(TxDrop::Denied);
        };
        let mut parts: Vec<DriverSlice<'_>> = Vec::new();
        let Some(packet) = class.enter(packet, &mut parts) else {
            self.begin();
            return Sent::Dropped(TxDrop::BadFrame);
        };
        let begun = self.begun.take();
        let admitted = if let Some(begun) = begun {
            self.go_on(class, &packet, begun)
        } else if was_admitted.is_none() {
            self.admit(&packet, class)
        } else if self.next == 0 && self.pieces.of == 0 {
            // No port has a part of the frame yet. The one that it waits for may have gone.
            self.find_route(class.id, packet.destination())
        } else {
            Ok(())
        };
        if let Err(reason) = admitted {
            self.begin();
            return Sent::Dropped(reason);
        }
        self.admitted = Some(class);
        if self.route.to.is_empty() {
            self.member.switch.count_unwanted();
        }
        let to = std::mem::take(&mut self.route.to);
        let sent = self.forward(&packet, class, &to);
        self.route.to = to;
        if matches!(sent, Sent::Done { .. }) {
            self.begin();
        }
        sent
    }

    fn forget(&mut self) {
        self.begin();
        self.waiting = None;
        self.wait_budget.forget();
    }

    fn flush(&mut self) {
        for sink in self.touched.drain(..) {
            lock(&sink).post();
        }
    }

    fn arm(&mut self) -> Armed {
        self.waiting.as_ref().map_or(Armed::Waiting, |sink| lock(sink).arm())
    }

    fn save(&mut self) -> Result<Value, String> {
        let to = &self.route.to;
        let current = to.get(self.next).filter(|seat| seat.port.id() == self.pieces.of);
        let current = current.filter(|_| self.pieces.next != 0);
        let current = current
            .map(|seat| PartState { device: seat.port.name.clone(), next: self.pieces.next });
        // A frame that no port has any part of begins anew.
        let is_begun = self.admitted.is_some() && (self.next != 0 || current.is_some());
        let begun = is_begun.then(|| BegunState {
            done: to.iter().take(self.next).map(|seat| seat.port.name.clone()).collect(),
            current,
        });
        state::part(&QueueState { begun: begun.or_else(|| self.begun.clone()) })
    }

    fn restore(&mut self, saved: &Value) -> Result<(), String> {
        self.begun = state::read_part::<QueueState>(saved)?.begun;
        Ok(())
    }
}
