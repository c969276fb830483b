// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Marks: a guest that measures marks the beginning and the end of a measurement, and this program
//! keeps the counters of that moment (`--marks`).

use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};

use crate::bus::{Bus, BusDevice};
use crate::counters::VcpuCounters;
use crate::layout;
use crate::lock::lock;

/// The most marks that are kept.
const MARKS_MAX: usize = 4096;

/// The marks that the guest has set since the last reset. The guest sets a mark by a write of 4
/// bytes to [`layout::MARK_PORT`]. The value is the mark's number.
pub struct Marks {
    set: Mutex<Vec<Value>>,
    counters: Arc<[VcpuCounters]>,
}

impl Marks {
    /// Keeps `counters` at each mark.
    pub fn new(counters: Arc<[VcpuCounters]>) -> Arc<Marks> {
        Arc::new(Marks { set: Mutex::default(), counters })
    }

    /// Puts the port onto `pio`.
    pub fn attach(self: &Arc<Self>, pio: &mut Bus) {
        pio.add(layout::MARK_PORT.into(), 4, Arc::new(MarkPort(self.clone())));
    }

    /// Removes all marks, as at a reset.
    pub fn reset(&self) {
        self.lock().clear();
    }

    /// All marks in the order in which the guest set them. Each has the counters of all virtual
    /// CPUs as they were in the exit of the guest's write.
    pub fn list(&self) -> Vec<Value> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Value>> {
        lock(&self.set)
    }

    fn set(&self, number: u32) {
        let counters: Vec<_> = self.counters.iter().map(VcpuCounters::to_json).collect();
        let mark = json!({ "mark": number, "cpus": counters });
        let mut set = self.lock();
        if set.len() < MARKS_MAX {
            set.push(mark);
        }
    }
}

/// The port.
struct MarkPort(Arc<Marks>);

impl BusDevice for MarkPort {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, data: &[u8]) {
        if let Ok(number) = data.try_into() {
            self.0.set(u32::from_le_bytes(number));
        }
    }
}
