// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Back end `switch`: a learning switch between the devices of one bus. It copies each frame once,
//! from the sender's memory to the receiver's.
//!
//! The switch has neither a thread nor a queue. The task of the sending pair carries each frame
//! into the receiver's buffers. If there are no buffers, the frame stays in the sender's transmit
//! ring while the receiver's backpressure budget lasts. A frame to several receivers never waits
//! for any of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vbus_core::shm::signal::Armed;
use vbus_core::{ErrorCode, TaskHandle, lock};
use vbus_tap::{Mac, Offloads, is_group, show_mac};

use crate::backend::{Backend, Plug, Port, Queue, Sent};
use crate::frame::Packet;
use crate::link::Link;
use crate::offload::Plain;
use crate::sink::{Delivery, OnFull, RxDrop, SharedSink, Waiter};

/// The most learned addresses. When the table is full, the switch learns no more. Frames to unknown
/// addresses go to every port whose filter passes them.
const LEARNED_MAX: usize = 4096;
/// The most addresses learned from one port, so that one driver cannot fill the table for all.
const LEARNED_PER_PORT: usize = 512;
/// How long the switch remembers an address after its last frame.
const AGE: Duration = Duration::from_secs(300);
/// How often a sender refreshes its addresses in the table.
const REFRESH: Duration = Duration::from_secs(1);

/// The switches of a bus, by name. All network classes of the bus share them.
#[derive(Default)]
pub struct Switches(Mutex<HashMap<String, Weak<Switch>>>);

impl Switches {
    /// Returns the switch called `name`. It lives as long as a device is on it.
    pub fn get(&self, name: &str) -> Arc<Switch> {
        let mut switches = lock(&self.0);
        switches.retain(|_, switch| switch.strong_count() != 0);
        if let Some(switch) = switches.get(name).and_then(Weak::upgrade) {
            return switch;
        }
        let switch = Arc::new(Switch::new(name));
        switches.insert(name.into(), Arc::downgrade(&switch));
        switch
    }
}

/// A switch. Devices that name it share it.
pub struct Switch {
    name: String,
    table: RwLock<Table>,
    /// The generation. It changes whenever a route that a sender has cached may be wrong.
    generation: AtomicU64,
    flooded: AtomicU64,
}

#[derive(Default)]
struct Table {
    ports: Vec<Arc<Port>>,
    learned: HashMap<Mac, Learned>,
    /// The addresses that devices have by their settings, whether or not a driver is there.
    reserved: Vec<Mac>,
}

struct Learned {
    port: u64,
    at: Instant,
}

impl Table {
    /// The port whose own address is `mac`.
    fn owner(&self, mac: Mac) -> Option<&Arc<Port>> {
        self.ports.iter().find(|port| port.filter.mac() == mac)
    }
}

impl Switch {
    fn new(name: &str) -> Switch {
        Switch {
            name: name.into(),
            table: RwLock::default(),
            generation: AtomicU64::new(0),
            flooded: AtomicU64::new(0),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(|e| e.into_inner())
    }

    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn add(&self, port: &Arc<Port>) {
        let mac = port.filter.mac();
        let mut table = self.write();
        if table.owner(mac).is_some() {
            let (switch, mac) = (&self.name, show_mac(mac));
            tracing::warn!(
                device = port.name,
                switch,
                mac,
                "another device on the switch has the same address"
            );
        }
        // An address of a device cannot be learned from another port.
        table.learned.remove(&mac);
        table.ports.push(port.clone());
        drop(table);
        self.changed();
    }

    /// Gives `port`, whose address by the settings is `own`, the address `mac`, unless another
    /// port has it, or another device is to have it.
    fn set_mac(&self, port: &Port, own: Option<Mac>, mac: Mac) -> bool {
        let mut table = self.write();
        let is_others = own != Some(mac) && table.reserved.contains(&mac);
        if is_others || table.owner(mac).is_some_and(|owner| owner.id() != port.id()) {
            return false;
        }
        table.learned.remove(&mac);
        port.filter.set_mac(mac);
        drop(table);
        self.changed();
        true
    }

    fn remove(&self, id: u64) {
        let mut table = self.write();
        table.ports.retain(|port| port.id() != id);
        table.learned.retain(|_, learned| learned.port != id);
        drop(table);
        self.changed();
    }

    /// Learns that `mac` is behind port `id`.
    fn learn(&self, mac: Mac, id: u64, now: Instant) {
        let mut table = self.write();
        if is_group(mac) || table.owner(mac).is_some() {
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
                port.filter.mac() == mac || learned.is_some_and(|learned| learned.port == port.id())
            };
            if let Some(port) = table.ports.iter().find(owner) {
                let port = Some(port).filter(|port| port.id() != from && port.filter.accepts(mac));
                return port.cloned().into_iter().collect();
            }
        }
        self.flooded.fetch_add(1, Ordering::Relaxed);
        let wants = |port: &&Arc<Port>| port.id() != from && port.filter.accepts(mac);
        table.ports.iter().filter(wants).cloned().collect()
    }

    fn inspect(&self) -> Value {
        let table = self.read();
        let name =
            |id: u64| table.ports.iter().find(|port| port.id() == id).map(|port| port.name.clone());
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

/// A device on a switch.
pub struct SwitchBackend {
    switch: Arc<Switch>,
    link: Arc<Link>,
    /// The device's address by the settings.
    own: OnceLock<Mac>,
}

impl SwitchBackend {
    /// Puts a device on `switch`. Its link is up while its driver has started.
    pub fn new(switch: Arc<Switch>, link: Arc<Link>) -> SwitchBackend {
        SwitchBackend { switch, link, own: OnceLock::new() }
    }
}

impl Drop for SwitchBackend {
    fn drop(&mut self) {
        let reserved = &mut self.switch.write().reserved;
        let at = self.own.get().and_then(|own| reserved.iter().position(|mac| mac == own));
        at.map(|at| reserved.swap_remove(at));
    }
}

impl Backend for SwitchBackend {
    fn tx_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn rx_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn shares_sinks(&self) -> bool {
        true
    }

    fn steers(&self) -> bool {
        true
    }

    fn reserve(&self, mac: Mac) {
        if self.own.set(mac).is_ok() {
            self.switch.write().reserved.push(mac);
        }
    }

    fn plug(&self, port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode> {
        self.switch.add(&port);
        self.link.set_carrier(true);
        let (switch, link) = (self.switch.clone(), self.link.clone());
        let member = Member { switch, port, own: self.own.get().copied(), link };
        Ok(Arc::new(SwitchPlug(Arc::new(member))))
    }

    fn inspect(&self) -> Value {
        self.switch.inspect()
    }
}

/// A port on the switch. It leaves the switch when its plug and its queues have been dropped.
struct Member {
    switch: Arc<Switch>,
    port: Arc<Port>,
    /// The device's address by the settings.
    own: Option<Mac>,
    link: Arc<Link>,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.switch.remove(self.port.id());
        self.link.set_carrier(false);
    }
}

struct SwitchPlug(Arc<Member>);

impl Plug for SwitchPlug {
    fn queue(&self, index: u16, task: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode> {
        Ok(Box::new(SwitchQueue {
            waiter: Waiter { key: self.0.port.key(index), task: task.clone() },
            member: self.0.clone(),
            index: usize::from(index),
            route: Route { generation: u64::MAX, to: Mac::default(), targets: Vec::new() },
            source: None,
            touched: Vec::new(),
            waiting: None,
            pieces: Pieces::default(),
        }))
    }

    fn set_mac(&self, mac: Mac) -> bool {
        self.0.switch.set_mac(&self.0.port, self.0.own, mac)
    }

    fn filter_changed(&self) {
        self.0.switch.changed();
    }
}

/// A cached route: the ports that frames to one address go to. It is valid for one generation of
/// the switch.
struct Route {
    generation: u64,
    to: Mac,
    targets: Vec<Arc<Port>>,
}

struct SwitchQueue {
    member: Arc<Member>,
    index: usize,
    waiter: Waiter,
    /// The route of the last frame.
    route: Route,
    /// The last source address that is not the port's own, and when the sender last refreshed it in
    /// the table.
    source: Option<(Mac, Instant)>,
    /// Receive queues that got frames since the last flush.
    touched: Vec<SharedSink>,
    /// The receive queue whose buffers the waiting frame lacks.
    waiting: Option<SharedSink>,
    pieces: Pieces,
}

/// The plain frames of the current frame, for a receiver that cannot get it as it is.
#[derive(Default)]
struct Pieces {
    /// The port that the pieces are for; 0: none.
    of: u64,
    next: usize,
    count: usize,
    plain: Plain,
}

impl Pieces {
    /// Cuts the frame for port `of`. Returns false if it cannot be cut.
    fn cut(&mut self, packet: &Packet<'_>, of: u64) -> bool {
        let count = self.plain.load(packet);
        (self.of, self.next, self.count) = (of, 0, count.unwrap_or(0));
        count.is_some()
    }
}

impl SwitchQueue {
    fn learn(&mut self, mac: Mac, now: Instant) {
        let refreshed = |(last, at): (Mac, Instant)| last == mac && now - at < REFRESH;
        if self.source.is_some_and(refreshed) {
            return;
        }
        self.member.switch.learn(mac, self.member.port.id(), now);
        self.source = Some((mac, now));
    }

    fn route(&mut self, mac: Mac) {
        let generation = self.member.switch.generation();
        if self.route.generation != generation || self.route.to != mac {
            let targets = self.member.switch.targets(mac, self.member.port.id(), Instant::now());
            self.route = Route { generation, to: mac, targets };
        }
    }

    /// Delivers the frame to one port, as it is or in pieces.
    fn deliver(&mut self, port: &Port, packet: &Packet<'_>, on_full: OnFull) -> Sent {
        let (lane, hash) = port.steering.choose(packet, self.index);
        let Some(lane) = port.lanes.get(lane) else { return Sent::Done { units: 1 } };
        let packet = Packet { hash, ..*packet };
        if !self.touched.iter().any(|sink| Arc::ptr_eq(sink, lane)) {
            self.touched.push(lane.clone());
        }
        let mut sink = lock(lane);
        if self.pieces.of != port.id() {
            match sink.deliver(&packet, on_full) {
                Delivery::Delivered | Delivery::Dropped => return Sent::Done { units: 1 },
                Delivery::Full { until } => {
                    if on_full != OnFull::Drop {
                        sink.wait(&self.waiter);
                        self.waiting = Some(lane.clone());
                    }
                    return Sent::Wait { until, moved: false };
                }
                Delivery::NeedsCut => {
                    if !self.pieces.cut(&packet, port.id()) {
                        sink.count_drop(RxDrop::BadFrame);
                        return Sent::Done { units: 1 };
                    }
                }
            }
        }
        let first = self.pieces.next;
        while self.pieces.next < self.pieces.count {
            let piece = self.pieces.plain.piece(self.pieces.next);
            let Some(piece) = Packet::plain(piece) else { break };
            let piece = Packet { hash, ..piece };
            if let Delivery::Full { until } = sink.deliver(&piece, on_full) {
                if on_full != OnFull::Drop {
                    sink.wait(&self.waiter);
                    self.waiting = Some(lane.clone());
                }
                return Sent::Wait { until, moved: self.pieces.next != first };
            }
            self.pieces.next += 1;
        }
        Sent::Done { units: u32::try_from(self.pieces.next - first).unwrap_or(u32::MAX) }
    }
}

impl Queue for SwitchQueue {
    fn send(&mut self, packet: &Packet<'_>) -> Sent {
        self.waiting = None;
        let source = packet.source();
        if source != self.member.port.filter.mac() {
            self.learn(source, Instant::now());
        }
        self.route(packet.destination());
        let targets = std::mem::take(&mut self.route.targets);
        let sent = match &targets[..] {
            [] => Sent::Done { units: 1 }, // No port wants it.
            [port] => self.deliver(port, packet, OnFull::WaitBounded),
            many => {
                let mut all = 0_u32;
                for port in many {
                    if let Sent::Done { units } = self.deliver(port, packet, OnFull::Drop) {
                        all = all.saturating_add(units);
                    }
                    self.pieces.of = 0;
                }
                Sent::Done { units: all }
            }
        };
        self.route.targets = targets;
        if matches!(sent, Sent::Done { .. }) {
            self.pieces.of = 0;
        }
        sent
    }

    fn forget(&mut self) {
        self.pieces.of = 0;
        self.waiting = None;
    }

    fn flush(&mut self) {
        for sink in self.touched.drain(..) {
            lock(&sink).post();
        }
    }

    fn arm(&mut self) -> Armed {
        self.waiting.as_ref().map_or(Armed::Waiting, |sink| lock(sink).arm())
    }
}
