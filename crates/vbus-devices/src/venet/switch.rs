//! Back end `switch`: a learning switch between the devices of one bus. One copy, from the sender's
//! memory to the receiver's.
//!
//! It is no thread and no queue: the task of the sending pair carries each frame into the
//! receiver's buffers. If there are none, the frame stays in the sender's transmit ring, for as
//! long as the receiver's patience lasts (see `rx`); a frame for several receivers never waits for
//! any of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vbus_core::ErrorCode;
use vbus_core::shm::abi::venet::{F_CSUM, F_TSO, F_USO};
use vbus_core::shm::signal::Armed;

use super::config::show_mac;
use super::frame::{Mac, Packet, flag, is_group};
use super::offload::Plain;
use super::port::{Backend, Link, Port, Queue, Sent};
use super::rx::{Delivery, RxQueue};
use vbus_core::lock;

/// The most learned addresses. Beyond it nothing is learned, and frames to unknown addresses go to
/// whoever wants everything.
const LEARNED_MAX: usize = 4096;
/// The most addresses learned from one port, so that one driver cannot fill the table for all.
const LEARNED_PER_PORT: usize = 512;
/// How long an address is remembered after its last frame.
const AGE: Duration = Duration::from_secs(300);
/// How often a sender refreshes its addresses in the table.
const REFRESH: Duration = Duration::from_secs(1);

/// A switch. Devices share it by its name.
pub struct Switch {
    name: String,
    table: RwLock<Table>,
    /// Changes whenever what a sender remembers of the table may be wrong.
    generation: AtomicU64,
    flooded: AtomicU64,
}

#[derive(Default)]
struct Table {
    ports: Vec<Arc<Port>>,
    learned: HashMap<Mac, Learned>,
}

struct Learned {
    port: u64,
    at: Instant,
}

impl Switch {
    pub fn new(name: &str) -> Switch {
        Switch {
            name: name.into(),
            table: RwLock::default(),
            generation: AtomicU64::new(0),
            flooded: AtomicU64::new(0),
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(|e| e.into_inner())
    }

    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn add(&self, port: &Arc<Port>) {
        let mut table = self.write();
        if table.ports.iter().any(|p| p.mac == port.mac) {
            let (switch, mac) = (&self.name, show_mac(port.mac));
            tracing::warn!(
                device = port.name,
                switch,
                mac,
                "another device on the switch has the same address"
            );
        }
        // An address that a device has is nobody else's.
        table.learned.remove(&port.mac);
        table.ports.push(port.clone());
        drop(table);
        self.changed();
    }

    fn remove(&self, id: u64) {
        let mut table = self.write();
        table.ports.retain(|port| port.id != id);
        table.learned.retain(|_, learned| learned.port != id);
        drop(table);
        self.changed();
    }

    /// Remembers that `mac` is behind port `id`.
    fn learn(&self, mac: Mac, id: u64, now: Instant) {
        let mut table = self.write();
        if is_group(mac) || table.ports.iter().any(|port| port.mac == mac) {
            return;
        }
        if let Some(learned) = table.learned.get_mut(&mac) {
            let moved = learned.port != id;
            *learned = Learned { port: id, at: now };
            drop(table);
            if moved {
                self.changed();
            }
            return;
        }
        let of_port = table.learned.values().filter(|learned| learned.port == id).count();
        if of_port >= LEARNED_PER_PORT || table.learned.len() >= LEARNED_MAX {
            table.learned.retain(|_, learned| now.duration_since(learned.at) < AGE);
            let of_port = table.learned.values().filter(|learned| learned.port == id).count();
            if of_port >= LEARNED_PER_PORT || table.learned.len() >= LEARNED_MAX {
                return;
            }
        }
        table.learned.insert(mac, Learned { port: id, at: now });
        drop(table);
        self.changed();
    }

    /// The ports that a frame from port `from` to `mac` goes to.
    fn targets(&self, mac: Mac, from: u64, now: Instant) -> Vec<Arc<Port>> {
        let table = self.read();
        if !is_group(mac) {
            let learned =
                table.learned.get(&mac).filter(|learned| now.duration_since(learned.at) < AGE);
            let owner = |port: &&Arc<Port>| {
                port.mac == mac || learned.is_some_and(|learned| learned.port == port.id)
            };
            if let Some(port) = table.ports.iter().find(owner) {
                let port = Some(port).filter(|port| port.id != from && port.accepts(mac));
                return port.cloned().into_iter().collect();
            }
        }
        self.flooded.fetch_add(1, Ordering::Relaxed);
        table.ports.iter().filter(|port| port.id != from && port.accepts(mac)).cloned().collect()
    }

    fn inspect(&self) -> Value {
        let table = self.read();
        let name =
            |id: u64| table.ports.iter().find(|port| port.id == id).map(|port| port.name.clone());
        let ports: Vec<_> = table.ports.iter().map(|port| port.name.clone()).collect();
        let learned: Vec<_> = table
            .learned
            .iter()
            .take(64)
            .map(|(mac, learned)| json!({ "mac": show_mac(*mac), "port": name(learned.port) }))
            .collect();
        json!({
            "switch": self.name,
            "ports": ports,
            "learned": learned,
            "flooded": self.flooded.load(Ordering::Relaxed),
        })
    }
}

/// The settings of a device on a switch.
pub struct SwitchBackend {
    pub switch: Arc<Switch>,
    pub link: Arc<Link>,
}

impl Backend for SwitchBackend {
    fn features(&self) -> u64 {
        F_CSUM | F_TSO | F_USO
    }

    fn connect(&self, port: &Arc<Port>) -> Result<Vec<Box<dyn Queue>>, ErrorCode> {
        self.switch.add(port);
        self.link.set(true);
        let membership =
            Membership { switch: self.switch.clone(), port: port.clone(), link: self.link.clone() };
        let membership = Arc::new(membership);
        let queue = |index: usize| {
            let route = Route { generation: u64::MAX, to: Mac::default(), targets: Vec::new() };
            let membership = membership.clone();
            let waiting = Waiting { port: port.clone(), index };
            let pieces = Pieces { of: NO_PORT, next: 0, count: 0, plain: Plain::default() };
            let queue = SwitchQueue {
                membership,
                index,
                route,
                source: None,
                touched: Vec::new(),
                waiting,
                pieces,
            };
            Box::new(queue) as Box<dyn Queue>
        };
        Ok((0..port.lanes.len()).map(queue).collect())
    }

    fn filter_changed(&self, _port: &Arc<Port>) {
        self.switch.changed();
    }

    fn inspect(&self) -> Value {
        self.switch.inspect()
    }
}

/// A port's place on its switch, until the last of its queues is gone.
struct Membership {
    switch: Arc<Switch>,
    port: Arc<Port>,
    link: Arc<Link>,
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.link.set(false);
        self.switch.remove(self.port.id);
    }
}

/// Where the last frame went: the next one most likely goes there too.
struct Route {
    generation: u64,
    to: Mac,
    targets: Vec<Arc<Port>>,
}

struct SwitchQueue {
    membership: Arc<Membership>,
    index: usize,
    route: Route,
    /// The last source address, and when it was learned.
    source: Option<(Mac, Instant)>,
    /// Ports with frames that are not yet posted.
    touched: Vec<Arc<Port>>,
    waiting: Waiting,
    pieces: Pieces,
}

impl SwitchQueue {
    fn learn(&mut self, mac: Mac, now: Instant) {
        let port = &self.membership.port;
        if mac == port.mac
            || self.source.is_some_and(|(last, at)| last == mac && now.duration_since(at) < REFRESH)
        {
            return;
        }
        self.membership.switch.learn(mac, port.id, now);
        self.source = Some((mac, now));
    }

    fn route(&mut self, mac: Mac) {
        let generation = self.membership.switch.generation();
        if self.route.generation != generation || self.route.to != mac {
            let targets =
                self.membership.switch.targets(mac, self.membership.port.id, Instant::now());
            self.route = Route { generation, to: mac, targets };
        }
    }

    /// Carries the frame to one port, as it is or in pieces. `patient`: wait for its buffers if
    /// need be.
    fn deliver(&mut self, port: &Arc<Port>, packet: &Packet<'_>, patient: bool) -> Sent {
        let lane = &port.lanes[self.index % port.lanes.len()];
        let mut guard = lock(&lane.rx);
        let Some(rx) = guard.as_mut() else { return Sent::Done { units: 1 } }; // Its driver has just gone.
        let drops = &lane.counters.rx.drops;
        let mut sent = Sent::Done { units: 1 };
        let mut whole = self.pieces.of != port.id && packet.header.fits(port.features);
        if whole {
            match self.waiting.deliver(rx, packet, patient) {
                Delivery::Done => {}
                Delivery::Wait(until) => sent = Sent::Wait { until: Some(until), moved: false },
                Delivery::TooLong if packet.header.gso() == flag::GSO_NONE => drops.too_long.one(),
                Delivery::TooLong => whole = false,
            }
        }
        if !whole {
            if self.pieces.of != port.id {
                let count = self.pieces.plain.load(packet);
                if count.is_none() {
                    drops.bad_frame.one();
                }
                self.pieces = Pieces {
                    of: port.id,
                    next: 0,
                    count: count.unwrap_or(0),
                    plain: std::mem::take(&mut self.pieces.plain),
                };
            }
            let first = self.pieces.next;
            while self.pieces.next < self.pieces.count {
                let Some(piece) = Packet::plain(self.pieces.plain.piece(self.pieces.next)) else {
                    break;
                };
                match self.waiting.deliver(rx, &piece, patient) {
                    Delivery::Done => {}
                    Delivery::TooLong => drops.too_long.one(),
                    Delivery::Wait(until) => {
                        sent = Sent::Wait { until: Some(until), moved: self.pieces.next != first };
                        break;
                    }
                }
                self.pieces.next += 1;
            }
            if let Sent::Done { units } = &mut sent {
                *units = u32::try_from(self.pieces.next - first).unwrap_or(u32::MAX);
            }
        }
        let faulty = rx.is_faulty();
        drop(guard);
        if faulty {
            if let Some(task) = lane.task.get() {
                task.wake();
            }
        }
        if !self.touched.iter().any(|p| Arc::ptr_eq(p, port)) {
            self.touched.push(port.clone());
        }
        sent
    }
}

/// Stands for no port.
const NO_PORT: u64 = 0;

/// The pieces of the frame that is being sent, where its receiver cannot take it as it is.
struct Pieces {
    /// The port that they are for.
    of: u64,
    next: usize,
    count: usize,
    plain: Plain,
}

/// The pair that sends, as one that waits for buffers.
struct Waiting {
    port: Arc<Port>,
    index: usize,
}

impl Waiting {
    fn deliver(&self, rx: &mut RxQueue, packet: &Packet<'_>, patient: bool) -> Delivery {
        let delivery = rx.deliver(packet, patient);
        if !matches!(delivery, Delivery::Wait(_)) {
            return delivery;
        }
        let lane = &self.port.lanes[self.index];
        // Not yet set in a task's very first poll; it is woken once it is.
        if let Some(task) = lane.task.get() {
            rx.wait(self.port.key(lane.index), task);
        }
        delivery
    }
}

impl Queue for SwitchQueue {
    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        let source = packet.source();
        if source != self.membership.port.mac {
            self.learn(source, Instant::now());
        }
        self.route(packet.destination());
        let targets = std::mem::take(&mut self.route.targets);
        let sent = match &targets[..] {
            [] => Sent::Done { units: 1 }, // Nobody wants it.
            [port] => self.deliver(port, packet, true),
            many => {
                let mut all = 0_u32;
                for port in many {
                    if let Sent::Done { units } = self.deliver(port, packet, false) {
                        all = all.saturating_add(units);
                    }
                    self.pieces.of = NO_PORT;
                }
                Sent::Done { units: all }
            }
        };
        self.route.targets = targets;
        if matches!(sent, Sent::Done { .. }) {
            self.pieces.of = NO_PORT;
        }
        sent
    }

    fn arm(&mut self) -> Armed {
        let [port] = &self.route.targets[..] else { return Armed::Waiting };
        lock(&port.lanes[self.index % port.lanes.len()].rx)
            .as_mut()
            .map_or(Armed::Waiting, RxQueue::arm)
    }

    fn flush(&mut self) {
        for port in self.touched.drain(..) {
            if let Some(rx) = &mut *lock(&port.lanes[self.index % port.lanes.len()].rx) {
                rx.post();
            }
            port.status.moved();
        }
    }
}
