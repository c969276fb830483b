// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Counters of the exits of virtual CPUs to user space, by kind.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value};

/// The reason why a virtual CPU's thread came back from KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// A read of a port.
    PioRead,
    /// A write to a port.
    PioWrite,
    /// A read of a device in memory.
    MmioRead,
    /// A write to a device in memory.
    MmioWrite,
    /// The end of a level-triggered interrupt of the I/O APIC in this process.
    IoapicEoi,
    /// A signal that stops the CPU.
    Interrupted,
    /// Any other reason.
    Other,
}

impl ExitKind {
    const ALL: [(ExitKind, &'static str); 7] = [
        (ExitKind::PioRead, "pio_read"),
        (ExitKind::PioWrite, "pio_write"),
        (ExitKind::MmioRead, "mmio_read"),
        (ExitKind::MmioWrite, "mmio_write"),
        (ExitKind::IoapicEoi, "ioapic_eoi"),
        (ExitKind::Interrupted, "interrupted"),
        (ExitKind::Other, "other"),
    ];
}

/// The counters of one virtual CPU. Only its thread counts. Any thread may read.
#[derive(Default)]
pub struct Exits([AtomicU64; ExitKind::ALL.len()]);

impl Exits {
    /// Counts one exit.
    pub fn count(&self, kind: ExitKind) {
        let counter = &self.0[kind as usize];
        // There is one writer, so no read-modify-write is needed. No store pairs with this one:
        // readers want only the number.
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// All counters by name, and their sum as `total`.
    pub fn to_json(&self) -> Map<String, Value> {
        let counts =
            ExitKind::ALL.map(|(kind, name)| (name, self.0[kind as usize].load(Ordering::Relaxed)));
        let total: u64 = counts.iter().map(|(_, count)| count).sum();
        counts
            .into_iter()
            .chain([("total", total)])
            .map(|(name, count)| (name.to_owned(), count.into()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_kinds_are_in_the_same_order() {
        let exits = Exits::default();
        for (at, (kind, name)) in ExitKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, at, "{name}");
            exits.count(kind);
        }
        exits.count(ExitKind::Interrupted);
        let json = exits.to_json();
        assert_eq!((&json["interrupted"], &json["total"]), (&2.into(), &8.into()));
    }
}
