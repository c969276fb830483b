//! Marks: a guest that measures says where it begins and ends, and what was counted until then is
//! kept (`--marks`).

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use serde_json::{Value, json};

use crate::bus::{Bus, BusDevice};
use crate::layout;
use crate::machine::Parts;

/// The most marks that are kept.
const MARKS_MAX: usize = 4096;

/// The marks that a guest has set since it was started: writes of 4 bytes to [`layout::MARK_PORT`].
/// What is written is the mark's number.
#[derive(Default)]
pub struct Marks {
    set: Mutex<Vec<Value>>,
    parts: OnceLock<Weak<Parts>>,
}

impl Marks {
    /// Puts the port onto `pio`.
    pub fn attach(self: &Arc<Self>, pio: &mut Bus) {
        pio.add(layout::MARK_PORT.into(), 4, Arc::new(Port(self.clone())));
    }

    /// Whose counters are kept. Once, before the machine runs.
    pub fn set_parts(&self, parts: &Arc<Parts>) {
        let _ = self.parts.set(Arc::downgrade(parts));
    }

    /// As after a reset: there are none.
    pub fn reset(&self) {
        self.lock().clear();
    }

    /// All of them in the order in which they were set, with the counters of all virtual CPUs as
    /// they were in the exit of that write.
    pub fn list(&self) -> Vec<Value> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Value>> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self, number: u32) {
        let Some(parts) = self.parts.get().and_then(Weak::upgrade) else { return };
        let mark = json!({ "mark": number, "cpus": parts.counters() });
        let mut set = self.lock();
        if set.len() < MARKS_MAX {
            set.push(mark);
        }
    }
}

/// The port.
struct Port(Arc<Marks>);

impl BusDevice for Port {
    fn read(&self, _: u64, _: &mut [u8]) {}

    fn write(&self, _: u64, data: &[u8]) {
        if let Ok(number) = data.try_into() {
            self.0.mark(u32::from_le_bytes(number));
        }
    }
}
