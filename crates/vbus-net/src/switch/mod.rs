// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Back end `switch`: a learning switch between the devices of one bus. It copies each frame once,
//! from the sender's memory to the receiver's.
//!
//! The switch has neither a thread nor a queue. The task of the sending pair carries each frame
//! into the receiver's buffers. If there are no buffers, the frame stays in the sender's transmit
//! ring while the receiver's backpressure budget and the sender's own wait budget last. A frame to
//! several receivers never waits for any of them.
//!
//! A frame passes these steps, each in its file:
//!
//! 1. `vlan`: which VLAN is it in, and may the port send it?
//! 2. `table`: does the source address belong to the port? Where is the destination? May the two
//!    ports exchange frames?
//! 3. `queue`: deliver it to each port, in the form that the port's VLANs and its driver's offloads
//!    need. `wait_budget` limits how long it waits.

mod queue;
mod rules;
mod table;
mod vlan;
mod wait_budget;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vbus_core::{Counter, ErrorCode, TaskHandle, lock, state};
use vbus_tap::{Mac, Offloads, is_group, show_mac};

pub use self::rules::{PortRules, SwitchPort};
pub use self::vlan::Vlan;

use self::queue::SwitchQueue;
use self::table::{Seat, Table};
use crate::backend::{Backend, Plug, Port, Queue};
use crate::link::Link;
use crate::sink::Waiter;

/// The most learned addresses that `inspect` lists.
const SHOWN_MAX: usize = 64;

/// The switches of a bus, by name. All network classes of the bus share them.
#[derive(Clone, Default)]
pub struct Switches(Arc<Mutex<HashMap<String, Weak<Switch>>>>);

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
    /// Frames that went to every port that wanted them.
    flooded: Counter,
    /// Frames that no port wanted.
    unwanted: Counter,
}

impl Switch {
    fn new(name: &str) -> Switch {
        Switch {
            name: name.into(),
            table: RwLock::default(),
            generation: AtomicU64::new(0),
            flooded: Counter::default(),
            unwanted: Counter::default(),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(|e| e.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(|e| e.into_inner())
    }

    /// Cached routes are wrong. The caller has changed the table. Pairs with the load in
    /// [`generation`](Self::generation): who sees the new generation sees the changed filters too.
    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Pairs with [`changed`](Self::changed).
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn count_flooded(&self) {
        self.flooded.one();
    }

    fn count_unwanted(&self) {
        self.unwanted.one();
    }

    fn add(&self, seat: &Arc<Seat>) {
        let (port, is_uplink) = (&seat.port, seat.rules.uplink);
        let mac = port.filter.mac();
        let mut table = self.write();
        if !is_uplink && table.owner(mac).is_some() {
            let (switch, mac) = (&self.name, show_mac(mac));
            tracing::warn!(
                device = port.name,
                switch,
                mac,
                "another device on the switch has the same address"
            );
        }
        table.add(seat.clone());
        drop(table);
        self.changed();
    }

    fn remove(&self, id: u64) {
        self.write().remove(id);
        self.changed();
    }

    fn inspect(&self) -> Value {
        let table = self.read();
        let seats = table.seats();
        let name = |id: u64| seats.iter().find(|seat| seat.port.id() == id).map(|s| &s.port.name);
        let ports: Vec<_> = seats.iter().map(|seat| &seat.port.name).collect();
        let uplinks = seats.iter().filter(|seat| seat.rules.uplink);
        let learned = table.learned().take(SHOWN_MAX).map(|(vlan, mac, port)| {
            let mut entry = json!({ "mac": show_mac(mac), "port": name(port) });
            if vlan != 0 {
                entry["vlan"] = vlan.into();
            }
            entry
        });
        json!({
            "switch": self.name,
            "ports": ports,
            "uplinks": uplinks.map(|seat| &seat.port.name).collect::<Vec<_>>(),
            "learned": learned.collect::<Vec<_>>(),
            "flooded": self.flooded,
            "unwanted": self.unwanted,
        })
    }
}

/// A device on a switch.
pub struct SwitchBackend {
    switch: Arc<Switch>,
    rules: PortRules,
    link: Arc<Link>,
    /// The device's address by the settings.
    own: OnceLock<Mac>,
}

impl SwitchBackend {
    /// Puts a device on `switch`. Its link is up while its driver has started.
    pub fn new(switch: Arc<Switch>, rules: PortRules, link: Arc<Link>) -> SwitchBackend {
        SwitchBackend { switch, rules, link, own: OnceLock::new() }
    }
}

impl Drop for SwitchBackend {
    fn drop(&mut self) {
        if let Some(own) = self.own.get() {
            self.switch.write().release(*own);
            self.switch.changed();
        }
    }
}

impl Backend for SwitchBackend {
    fn tx_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn rx_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn shares_sinks(&self, _by_hash: bool) -> bool {
        true
    }

    fn steers(&self) -> bool {
        true
    }

    fn reserve(&self, mac: Mac) {
        if self.own.set(mac).is_ok() {
            let taken = self.switch.write().reserve(mac);
            self.switch.changed();
            if let Some(seat) = taken {
                let (device, switch, mac) = (&seat.port.name, &self.switch.name, show_mac(mac));
                tracing::warn!(
                    device,
                    switch,
                    mac,
                    "its driver had taken an address that a new device has by its settings; it has \
                     its own again"
                );
            }
        }
    }

    fn plug(&self, port: Arc<Port>) -> Result<Arc<dyn Plug>, ErrorCode> {
        let seat = Arc::new(Seat::new(port, self.own.get().copied(), self.rules.clone()));
        self.switch.add(&seat);
        self.link.set_carrier(true);
        let (switch, link) = (self.switch.clone(), self.link.clone());
        let member = Member { switch, seat, link };
        Ok(Arc::new(SwitchPlug(Arc::new(member))))
    }

    fn inspect(&self) -> Value {
        let mut value = self.switch.inspect();
        value["port"] = self.rules.inspect();
        value
    }

    fn save(&self) -> Result<Value, String> {
        Ok(state::nothing())
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        state::is_nothing(saved)
    }
}

/// A port on the switch. It leaves the switch when its plug and its queues have been dropped.
struct Member {
    switch: Arc<Switch>,
    seat: Arc<Seat>,
    link: Arc<Link>,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.switch.remove(self.seat.port.id());
        self.link.set_carrier(false);
    }
}

struct SwitchPlug(Arc<Member>);

impl Plug for SwitchPlug {
    fn queue(&self, index: u16, task: &TaskHandle) -> Result<Box<dyn Queue>, ErrorCode> {
        let waiter = Waiter { key: self.0.seat.port.key(index), task: task.clone() };
        Ok(Box::new(SwitchQueue::new(self.0.clone(), waiter)))
    }

    fn set_mac(&self, mac: Mac) -> bool {
        let Member { switch, seat, .. } = &*self.0;
        let done = switch.write().set_mac(seat, mac, Instant::now());
        if done {
            switch.changed();
        }
        done
    }

    fn filter_changed(&self) {
        self.0.switch.changed();
    }

    fn save(&self) -> Result<Value, String> {
        let learned = self.0.switch.read().learned_from(self.0.seat.port.id(), Instant::now());
        let learned = learned.into_iter().map(|(vlan, mac, age)| {
            let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
            LearnedState { vlan, mac, age_ms }
        });
        state::part(&PlugState { learned: learned.collect() })
    }

    fn restore(&self, saved: &Value) -> Result<(), String> {
        let PlugState { learned } = state::read_part(saved)?;
        let Member { switch, seat, .. } = &*self.0;
        if !learned.is_empty() && !seat.rules.learn {
            return Err("addresses are learned, and the settings do not allow that".into());
        }
        if learned.len() > table::LEARNED_PER_PORT {
            return Err(format!("{} addresses are learned", learned.len()));
        }
        let now = Instant::now();
        for LearnedState { vlan, mac, age_ms } in learned {
            // What has aged meanwhile, or belongs to another device now, is not learned.
            let seen = now.checked_sub(Duration::from_millis(age_ms));
            if let (Some(seen), false) = (seen, is_group(mac)) {
                let _ = switch.write().learn((vlan, mac), seat.port.id(), seat.own, seen);
            }
        }
        switch.changed();
        Ok(())
    }
}

/// A port as plain data (spec/state-format.md, "Back ends").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlugState {
    /// The addresses that the switch has learned from the port.
    learned: Vec<LearnedState>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LearnedState {
    vlan: u16,
    #[serde(with = "hex::serde")]
    mac: Mac,
    /// Milliseconds since the last frame from the address.
    age_ms: u64,
}
