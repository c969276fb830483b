//! Interrupts: from the device to the driver.

use std::fmt;
use std::sync::Arc;

use crate::counter::ConnectionCounters;

/// Where interrupts go: what the connector makes of a vector.
pub trait InterruptSink: Send + Sync {
    /// Delivers an interrupt on `vector`. Never blocks.
    fn trigger(&self, vector: u16);
}

/// A device's handle to interrupt its driver on one vector.
#[derive(Clone)]
pub struct Interrupt {
    sink: Arc<dyn InterruptSink>,
    vector: u16,
    counters: Arc<ConnectionCounters>,
}

impl Interrupt {
    pub(crate) fn new(sink: Arc<dyn InterruptSink>, vector: u16, counters: Arc<ConnectionCounters>) -> Interrupt {
        Interrupt { sink, vector, counters }
    }

    /// Takes the answer of a `post`: interrupts the driver if it asked for a kick, and counts either way.
    pub fn kick(&self, wanted: bool) {
        if wanted {
            self.counters.interrupts.one();
            self.sink.trigger(self.vector);
        } else {
            self.counters.interrupts_suppressed.one();
        }
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupt").field("vector", &self.vector).finish_non_exhaustive()
    }
}
