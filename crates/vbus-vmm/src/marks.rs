//! Marks: a guest says where a measurement begins and ends, and what was counted until then is told (`--marks`).

use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock, Weak};

use serde_json::{Value, json};

use crate::bus::BusDevice;
use crate::machine::{Ask, Parts};

/// A port of 4 bytes. What is written there is the mark's number; it is told with the counters of all virtual CPUs as they are in this exit.
pub struct Marks {
    asks: Sender<Ask>,
    parts: OnceLock<Weak<Parts>>,
}

impl Marks {
    /// Tells through `asks`.
    pub fn new(asks: Sender<Ask>) -> Arc<Marks> {
        Arc::new(Marks { asks, parts: OnceLock::new() })
    }

    /// Whose counters these are. Before the machine runs.
    pub fn of(&self, parts: &Arc<Parts>) {
        let _ = self.parts.set(Arc::downgrade(parts));
    }
}

impl BusDevice for Marks {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, data: &[u8]) {
        let (Ok(number), Some(parts)) = (data.try_into().map(u32::from_le_bytes), self.parts.get()) else { return };
        if let Some(parts) = parts.upgrade() {
            let _ = self.asks.send(Ask::Mark(json!({ "number": number, "cpus": counters(&parts) })));
        }
    }
}

/// The counters of all virtual CPUs: this program's, and KVM's if it has statistics (Linux 5.14).
pub fn counters(parts: &Parts) -> Vec<Value> {
    let one = |(cpu, exits, kvm): (usize, Value, Option<_>)| json!({ "cpu": cpu, "user_exits": exits, "kvm": kvm });
    let list = parts.cpus.list();
    let each = list.map(|(cpu, _, exits, stats)| {
        let kvm = stats.and_then(|stats| stats.read().ok());
        one((cpu, exits.to_json().into(), kvm))
    });
    each.collect()
}
