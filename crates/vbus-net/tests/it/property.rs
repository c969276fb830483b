// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any frames on a switch with any ports: no port gets a frame that it must not have, and each
//! frame is counted exactly once wherever it goes. A model of a few lines says which ports these
//! are.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vbus_core::shm::signal::Armed;
use vbus_core::{
    ConnectionCounters, ErrorCode, Executor, Progress, Task, TaskHandle, Tuning, lock,
};
use vbus_net::{
    BROADCAST, Backend, Body, Delivery, Filter, Header, Link, Mac, Medium, Modes, Offloads, OnFull,
    Opener, Packet, Plug, Port, PortRules, Queue, Read, Reserved, RxDrop, RxSink, Sent, SharedSink,
    Steering, SwitchPort, Switches, TxDrop, Vlan, Waiter, flag,
};

/// What a receive queue has done with a frame, and the frame.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    Delivered(Vec<u8>),
    Counted,
}

/// A receive queue with room for a number of frames.
struct Sink {
    filter: Arc<Filter>,
    offloads: Offloads,
    room: usize,
    events: Vec<Event>,
}

impl RxSink for Sink {
    fn deliver(&mut self, packet: &Packet<'_>, on_full: OnFull) -> Delivery {
        if !self.filter.wants(packet) {
            self.events.push(Event::Counted);
            return Delivery::Dropped;
        }
        if !packet.header.fits(self.offloads) {
            return Delivery::NeedsCut;
        }
        if self.room == 0 {
            if on_full == OnFull::Drop {
                self.events.push(Event::Counted);
                return Delivery::Dropped;
            }
            return Delivery::Full { until: None };
        }
        self.room -= 1;
        let mut bytes = Vec::new();
        packet.append_to(&mut bytes, usize::MAX);
        self.events.push(Event::Delivered(bytes));
        Delivery::Delivered { units: 1 }
    }

    fn has_room(&mut self, _bytes: usize) -> bool {
        self.room != 0
    }

    fn reserve(&mut self, _read: &mut Read<'_>) -> Reserved {
        Reserved::Nothing
    }

    fn longest(&self) -> usize {
        FRAME
    }

    fn post(&mut self) {}

    fn wait(&mut self, _waiter: &Waiter) {}

    fn arm(&mut self) -> Armed {
        Armed::Waiting
    }

    fn count_drop(&mut self, _reason: RxDrop) {
        self.events.push(Event::Counted);
    }
}

struct Nothing;

impl Task for Nothing {
    fn poll(&mut self, _budget: u32) -> Result<Progress, ErrorCode> {
        Ok(Progress::Idle)
    }
}

#[derive(Clone, Debug)]
struct PortPlan {
    learn: bool,
    isolated: bool,
    uplink: bool,
    vlan: u8,
    promiscuous: bool,
    offloads: bool,
    room: usize,
}

/// A frame. Addresses are numbers: 0 to 4 those of the ports, then two of nobody, then broadcast.
#[derive(Clone, Debug)]
struct FramePlan {
    from: usize,
    source: usize,
    to: usize,
    tag: Option<u16>,
    /// Whether there is one more tag, of VLAN 20, behind `tag`.
    nested: bool,
    large: bool,
}

const NOBODY: usize = 5;
/// Payload bytes of a large frame, and of each of its segments.
const FRAME: usize = 3000;
const SEGMENT: u16 = 1000;

fn mac(n: usize) -> Mac {
    if n == NOBODY + 2 { BROADCAST } else { [2, 0, 0, 0, 0, n as u8 + 1] }
}

fn vlan(n: u8) -> Vlan {
    match n {
        0 => Vlan::Unaware,
        1 => Vlan::Access(10),
        2 => Vlan::Access(20),
        3 => Vlan::Trunk { ids: vec![10, 20], native: None },
        _ => Vlan::Trunk { ids: vec![10], native: Some(20) },
    }
}

fn port_plan() -> impl Strategy<Value = PortPlan> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (flags, prop::bool::weighted(0.2), 0_u8..5, 0_usize..8).prop_map(
        |((learn, isolated, promiscuous, offloads), uplink, vlan, room)| PortPlan {
            learn: learn || uplink,
            isolated: isolated && !uplink,
            promiscuous: promiscuous || uplink,
            offloads,
            uplink,
            vlan,
            room,
        },
    )
}

fn frame_plan() -> impl Strategy<Value = FramePlan> {
    let tag = prop_oneof![Just(None), prop::sample::select(vec![0, 10, 20, 30]).prop_map(Some)];
    let tags = (tag, prop::bool::weighted(0.3));
    (0_usize..5, any::<bool>(), 0_usize..=NOBODY + 2, 0_usize..=NOBODY + 2, tags, any::<bool>())
        .prop_map(|(from, own, other, to, (tag, nested), large)| FramePlan {
            from,
            source: if own { from } else { other },
            to,
            tag,
            nested: nested && tag.is_some() && !large,
            large,
        })
}

/// The bytes of a frame, after the addresses and the tag: IPv4 and TCP.
fn inner(large: bool) -> Vec<u8> {
    let payload = if large { FRAME } else { 40 };
    let mut bytes = vec![8, 0, 0x45, 0];
    bytes.extend((40 + payload as u16).to_be_bytes());
    bytes.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend([0; 12]);
    bytes.extend([0x50, 0x10, 0, 0, 0, 0, 0, 0]);
    bytes.extend((0..payload).map(|n| n as u8));
    bytes
}

/// The VLAN of a frame from a port; `None`: the port may not send it.
fn class(vlan: &Vlan, tag: Option<u16>) -> Option<u16> {
    match (vlan, tag) {
        (Vlan::Unaware, _) => Some(0),
        (Vlan::Access(id), None | Some(0)) => Some(*id),
        (Vlan::Trunk { native, .. }, None | Some(0)) => *native,
        (Vlan::Trunk { ids, .. }, Some(id)) => ids.contains(&id).then_some(id),
        (Vlan::Access(_), Some(_)) => None,
    }
}

/// The tag that a frame has when it leaves a port.
fn tag_out(to: &Vlan, class: u16, tag: Option<u16>) -> Option<u16> {
    match to {
        Vlan::Unaware => tag,
        Vlan::Access(_) => None,
        Vlan::Trunk { native, .. } => (*native != Some(class)).then_some(class),
    }
}

struct Rig {
    plans: Vec<PortPlan>,
    sinks: Vec<Arc<Mutex<Sink>>>,
    queues: Vec<Box<dyn Queue>>,
    backends: Vec<Box<dyn Backend>>,
    _plugs: Vec<Arc<dyn Plug>>,
}

impl Rig {
    fn new(plans: &[PortPlan], task: &TaskHandle) -> Rig {
        Rig::limited(plans, task, 0)
    }

    fn limited(plans: &[PortPlan], task: &TaskHandle, broadcast_rate: u32) -> Rig {
        let switches = Switches::default();
        let opener: Arc<dyn Opener> = Arc::new(vbus_net::Direct);
        let mut rig = Rig {
            plans: plans.to_vec(),
            sinks: Vec::new(),
            queues: Vec::new(),
            backends: Vec::new(),
            _plugs: Vec::new(),
        };
        for (n, plan) in plans.iter().enumerate() {
            let mut rules = PortRules::default();
            (rules.learn, rules.isolated, rules.uplink) = (plan.learn, plan.isolated, plan.uplink);
            (rules.vlan, rules.broadcast_rate) = (vlan(plan.vlan), broadcast_rate);
            let port = Medium::Switch(SwitchPort { switch: "s".into(), rules });
            let link = Arc::new(Link::default());
            let backend = port.open(&switches, &opener, 1, 9000, link).unwrap();
            let own = if plan.uplink { Mac::default() } else { mac(n) };
            if !plan.uplink {
                backend.reserve(own);
            }
            let filter = Arc::new(Filter::new(own));
            let promiscuous = plan.promiscuous;
            filter.set_addresses(Modes { promiscuous, ..Modes::default() }.into());
            let offloads = if plan.offloads { Offloads::ALL } else { Offloads::NONE };
            let (room, events) = (plan.room, Vec::new());
            let sink =
                Arc::new(Mutex::new(Sink { filter: filter.clone(), offloads, room, events }));
            let shared = (filter, Arc::new(Steering::new(1)));
            let lanes = vec![sink.clone() as SharedSink];
            let port = Arc::new(Port::new(&format!("p{n}"), 9000, 1, shared, lanes));
            let plug = backend.plug(port).unwrap();
            rig.queues.push(plug.queue(0, task).unwrap());
            rig.sinks.push(sink);
            rig.backends.push(backend);
            rig._plugs.push(plug);
        }
        rig
    }

    fn owner(&self, n: usize) -> Option<usize> {
        self.plans.get(n).filter(|plan| !plan.uplink).map(|_| n)
    }

    fn unwanted(&self) -> u64 {
        self.backends[0].inspect()["unwanted"].as_u64().unwrap()
    }

    /// Whether the rules let a frame of VLAN `class` go from one port to another.
    fn may(&self, from: usize, to: usize, class: u16) -> bool {
        let (a, b) = (&self.plans[from], &self.plans[to]);
        from != to
            && vlan(b.vlan).carries(class)
            && (!a.isolated || b.uplink)
            && (!b.isolated || a.uplink)
    }

    /// Sends a frame to its end, and checks where it went.
    fn send(&mut self, frame: &FramePlan) {
        let from = frame.from % self.plans.len();
        let source = if frame.source == frame.from { from } else { frame.source };
        let (tag, mut inner) = (frame.tag, inner(frame.large));
        if frame.nested {
            inner.splice(..0, [0x81, 0, 0, 20]);
        }
        let with_tag = |tag: Option<u16>| {
            let tag = tag.map(|id| [0x8100_u16.to_be_bytes(), id.to_be_bytes()].concat());
            [&mac(frame.to)[..], &mac(source), &tag.unwrap_or_default(), &inner].concat()
        };
        let bytes = with_tag(tag);
        let mut packet = Packet::plain(&bytes).unwrap();
        if frame.large {
            packet.header = Header {
                flags: flag::NEEDS_CSUM,
                gso_type: flag::GSO_TCPV4,
                hdr_len: 0,
                gso_size: SEGMENT,
                csum_start: (bytes.len() - FRAME - 20) as u16,
                csum_offset: 16,
            };
        }
        assert!(matches!(packet.body, Body::Bytes(_)));
        let unwanted = self.unwanted();
        let sent = loop {
            match self.queues[from].send(&packet) {
                Sent::Wait { .. } => self.sinks.iter().for_each(|sink| lock(sink).room += 1),
                Sent::Part => {}
                sent => break sent,
            }
        };
        let unwanted = self.unwanted() - unwanted;
        let events: Vec<Vec<Event>> =
            self.sinks.iter().map(|sink| std::mem::take(&mut lock(sink).events)).collect();
        let reached: Vec<usize> = (0..events.len()).filter(|n| !events[*n].is_empty()).collect();

        // What the model says.
        let plan = &self.plans[from];
        let Some(class) = class(&vlan(plan.vlan), tag) else {
            assert_eq!((sent, &reached[..]), (Sent::Dropped(TxDrop::Denied), &[][..]));
            return;
        };
        let is_own = !plan.uplink && source == from;
        let is_good = is_own || plan.learn && source < NOBODY + 2 && self.owner(source).is_none();
        if !is_good {
            assert_eq!((sent, &reached[..]), (Sent::Dropped(TxDrop::Spoofed), &[][..]));
            return;
        }
        if sent == Sent::Dropped(TxDrop::Storm) {
            // An address of nobody has moved too often.
            assert!(!is_own && reached.is_empty());
            return;
        }
        let accepts = |n: usize| {
            let own = self.owner(n).is_some_and(|own| own == frame.to);
            own || frame.to == NOBODY + 2 || self.plans[n].promiscuous
        };
        let everybody: Vec<usize> =
            (0..self.plans.len()).filter(|n| self.may(from, *n, class) && accepts(*n)).collect();
        let owner = self.owner(frame.to).filter(|n| vlan(self.plans[*n].vlan).carries(class));
        match owner {
            _ if frame.to == NOBODY + 2 => assert_eq!(reached, everybody),
            Some(owner) if owner == from => assert_eq!((&reached[..], unwanted), (&[][..], 1)),
            Some(owner) if self.may(from, owner, class) => assert_eq!(reached, [owner]),
            Some(_) => {
                assert_eq!((sent, &reached[..]), (Sent::Dropped(TxDrop::Denied), &[][..]));
                return;
            }
            // To an address of nobody: everybody, or the one port that it was learned from.
            None if sent == Sent::Dropped(TxDrop::Denied) => {
                assert!(reached.is_empty());
                return;
            }
            None => assert!(
                reached == everybody
                    || reached.len() <= 1 && reached.iter().all(|n| everybody.contains(n)),
                "{reached:?} of {everybody:?}"
            ),
        }
        assert!(matches!(sent, Sent::Done { .. }), "{sent:?}");
        assert_eq!(
            unwanted,
            u64::from(reached.is_empty()),
            "exactly the frames that nobody wanted"
        );
        for n in reached {
            let tag = tag_out(&vlan(self.plans[n].vlan), class, tag);
            if frame.nested && tag.is_none() {
                assert_eq!(events[n], [Event::Counted], "the inner tag would be its VLAN");
                continue;
            }
            let wanted = with_tag(tag);
            let whole = !frame.large || self.plans[n].offloads;
            let count = if whole { 1 } else { FRAME.div_ceil(usize::from(SEGMENT)) };
            assert_eq!(events[n].len(), count, "each frame is counted once");
            for event in &events[n] {
                let Event::Delivered(bytes) = event else { continue };
                if whole {
                    assert_eq!(*bytes, wanted);
                } else {
                    let headers = wanted.len() - FRAME;
                    assert_eq!(bytes[..headers - 40], wanted[..headers - 40]);
                    assert_eq!(bytes.len(), headers + usize::from(SEGMENT));
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn frames_go_where_they_may_and_are_counted_once(
        ports in prop::collection::vec(port_plan(), 2..=5),
        frames in prop::collection::vec(frame_plan(), 1..60),
    ) {
        let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
        let counters = Arc::new(ConnectionCounters::default());
        let task = executor.spawn(0, Box::new(Nothing), counters, |_| ());
        let mut rig = Rig::new(&ports, &task);
        frames.iter().for_each(|frame| rig.send(frame));
        task.stop();
    }
}

/// Runs `test` with a task that does nothing.
fn with_task(test: impl FnOnce(&TaskHandle)) {
    let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
    let task =
        executor.spawn(0, Box::new(Nothing), Arc::new(ConnectionCounters::default()), |_| ());
    test(&task);
    task.stop();
}

fn trunk(room: usize) -> PortPlan {
    let (learn, isolated, uplink, promiscuous, offloads) = (false, false, false, false, false);
    PortPlan { learn, isolated, uplink, vlan: 3, promiscuous, offloads, room }
}

#[test]
fn a_frame_that_waits_keeps_its_vlan() {
    with_task(|task| {
        let mut rig = Rig::new(&[trunk(0), trunk(0)], task);
        let bytes = |id| [&mac(1)[..], &mac(0), &[0x81, 0, 0, id], &inner(false)].concat();
        let (admitted, changed) = (bytes(10), bytes(20));
        let sent = rig.queues[0].send(&Packet::plain(&admitted).unwrap());
        assert!(matches!(sent, Sent::Wait { .. }));
        lock(&rig.sinks[1]).room = 2;
        // The driver changes the tag of the waiting frame, and then sends another frame.
        for expected in [admitted, changed.clone()] {
            let sent = rig.queues[0].send(&Packet::plain(&changed).unwrap());
            assert!(matches!(sent, Sent::Done { .. }));
            let events = std::mem::take(&mut lock(&rig.sinks[1]).events);
            assert_eq!(events, [Event::Delivered(expected)]);
        }
    });
}

#[test]
fn only_frames_to_several_ports_count_as_broadcasts() {
    with_task(|task| {
        let bytes = [&BROADCAST[..], &mac(0), &[0x81, 0, 0, 10], &inner(false)].concat();
        let packet = Packet::plain(&bytes).unwrap();
        for ports in 1..=3 {
            let mut rig = Rig::limited(&vec![trunk(0); ports], task, 1);
            let sent: Vec<Sent> = (0..1000)
                .map(|_| {
                    rig.sinks.iter().for_each(|sink| lock(sink).room = 1);
                    rig.queues[0].send(&packet)
                })
                .collect();
            let is_limited = sent.contains(&Sent::Dropped(TxDrop::Storm));
            assert_eq!(is_limited, ports == 3, "{ports} ports");
        }
    });
}
