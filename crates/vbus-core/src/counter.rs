// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Counters that any thread may read at any time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::{Serialize, Serializer};

use crate::metric::{Metric, Role};

/// A count of events. All accesses are relaxed: they order nothing, so a reader may see one counter
/// newer than another.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn one(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Serialize for Counter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.get())
    }
}

/// The highest count in a state. No device comes near it, and sums of counts do not overflow.
pub const COUNT_MAX: u64 = 1 << 56;

/// Counts by name.
pub type Counts = BTreeMap<String, u64>;

/// The counts of counters, each with its name.
pub fn counts(counters: &[(&str, &Counter)]) -> Counts {
    counters.iter().map(|(name, counter)| ((*name).to_owned(), counter.get())).collect()
}

/// Adds counts that [`counts`] returned for the counters of another device. A name that is missing
/// counts as 0.
///
/// # Errors
/// There is a name that no counter has, or a count above [`COUNT_MAX`]. Nothing has changed.
pub fn add_counts(counters: &[(&str, &Counter)], counts: &Counts) -> Result<(), String> {
    for (name, count) in counts {
        if counters.iter().all(|(has, _)| has != name) {
            return Err(format!("there is no counter {name:?}"));
        }
        check_count(name, *count)?;
    }
    for (name, counter) in counters {
        counter.add(counts.get(*name).copied().unwrap_or(0));
    }
    Ok(())
}

/// Checks a count of the state called `name`.
///
/// # Errors
/// It is above [`COUNT_MAX`].
pub fn check_count(name: &str, count: u64) -> Result<(), String> {
    if count > COUNT_MAX { Err(format!("{name} is {count}; at most {COUNT_MAX}")) } else { Ok(()) }
}

/// What a device's connections did, over the device's life. Classes add their own counters (see
/// [`Device::inspect`](crate::Device::inspect)).
#[derive(Debug, Default, Serialize)]
pub struct ConnectionCounters {
    #[serde(skip)]
    device: String,
    /// The tasks with these counters stand still. See `Executor::halt`.
    #[serde(skip)]
    halted: AtomicBool,
    /// Connections opened.
    pub opens: Counter,
    /// Connections that ended by a fault of the driver or the device.
    pub broken: Counter,
    /// Times that the machine was set back under an open device: a snapshot was restored, and the
    /// device was only reset.
    pub set_back: Counter,
    /// Commands of the mailbox.
    pub commands: Counter,
    /// Doorbells rung by the driver.
    pub doorbells: Counter,
    /// Interrupts sent to the driver.
    pub interrupts: Counter,
    /// Posts to the driver that needed no interrupt.
    pub interrupts_suppressed: Counter,
    /// Times that a sleeping task of the connection was woken.
    pub wakeups: Counter,
    /// Polls that found work.
    pub polls: Counter,
    /// Polls that found no work.
    pub polls_empty: Counter,
    /// Times that a task of the device moved to a worker that slept, because two devices were busy
    /// on its own.
    pub moves: Counter,
    /// Times that a task of the device held its worker for a second
    /// ([`Watchdog`](crate::Watchdog)).
    #[serde(serialize_with = "inner")]
    pub stalls: Arc<Counter>,
}

fn inner<S: Serializer>(counter: &Arc<Counter>, serializer: S) -> Result<S::Ok, S::Error> {
    counter.serialize(serializer)
}

impl ConnectionCounters {
    /// What the counters mean. The paths are keys of the counters in JSON.
    pub const METRICS: &'static [Metric] = &[
        Metric::counter("opens", "device_opens", "Drivers that opened the device")
            .unit("connections")
            .advice("read the log of a driver that opens again and again"),
        Metric::counter("broken", "device_broken", "Connections that ended by a fault")
            .unit("connections")
            .role(Role::Fault)
            .advice("the log of the bus has one line for each"),
        Metric::counter(
            "set_back",
            "device_set_back",
            "Times that the device was reset under its driver and the guest went on: a snapshot of \
             the machine was restored, and QEMU had saved nothing of the device",
        )
        .role(Role::Fault)
        .advice("use `vbus snapshot`; a driver of vbus opens the device again by itself"),
        Metric::counter(
            "commands",
            "device_commands",
            "Commands in the register block: open, regions, calls",
        )
        .unit("commands")
        .advice("a driver should need them for set-up only"),
        Metric::counter(
            "doorbells",
            "device_doorbells",
            "Doorbells that the driver rang, also when `vbus-guest list` measures them",
        )
        .unit("doorbells")
        .role(Role::Doorbells)
        .advice("compare with the frames: the device sleeps too early; raise `poll-us`"),
        Metric::counter("interrupts", "device_interrupts", "Interrupts sent to the driver")
            .unit("interrupts")
            .role(Role::Interrupts)
            .advice("compare with the frames: the driver sleeps too early"),
        Metric::counter(
            "interrupts_suppressed",
            "device_interrupts_suppressed",
            "Posts to the driver that needed no interrupt",
        )
        .unit("posts")
        .role(Role::InterruptsSaved),
        Metric::counter("wakeups", "device_wakeups", "Times that a sleeping task was woken"),
        Metric::counter("polls", "device_polls", "Polls that found work").unit("polls"),
        Metric::counter("polls_empty", "device_polls_empty", "Polls that found no work")
            .unit("polls")
            .advice("compare with `polls`; lower `poll-us` to save processor time"),
        Metric::counter(
            "moves",
            "device_moves",
            "Times that a task of the device moved to a worker that slept, because two devices \
             were busy on its own",
        ),
        Metric::counter(
            "stalls",
            "device_stalls",
            "Times that a task of the device held its worker for 1 s; all devices of that worker \
             waited",
        )
        .role(Role::Fault)
        .advice(
            "the log names the task: a class that blocks, or a machine without processor time to \
             give",
        ),
    ];

    /// The counters of the device called `device`.
    pub fn of(device: &str) -> ConnectionCounters {
        ConnectionCounters { device: device.to_owned(), ..ConnectionCounters::default() }
    }

    /// Counters for a task of the device that is no part of a connection, for example the task of
    /// its socket. It counts apart, except stalls.
    pub fn beside(&self) -> ConnectionCounters {
        ConnectionCounters { stalls: self.stalls.clone(), ..ConnectionCounters::of(&self.device) }
    }

    /// The device's name. Empty for counters that belong to no device.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Whether the tasks with these counters stand still.
    pub(crate) fn is_halted(&self) -> bool {
        // Relaxed: a worker reads it under the lock of the task, and `Executor::halt` takes each of
        // those locks after the store.
        self.halted.load(Ordering::Relaxed)
    }

    pub(crate) fn set_halted(&self, halted: bool) {
        // Relaxed: see the load.
        self.halted.store(halted, Ordering::Relaxed);
    }

    /// All counters by the names that they have in JSON.
    fn all(&self) -> [(&'static str, &Counter); 12] {
        [
            ("opens", &self.opens),
            ("broken", &self.broken),
            ("set_back", &self.set_back),
            ("commands", &self.commands),
            ("doorbells", &self.doorbells),
            ("interrupts", &self.interrupts),
            ("interrupts_suppressed", &self.interrupts_suppressed),
            ("wakeups", &self.wakeups),
            ("polls", &self.polls),
            ("polls_empty", &self.polls_empty),
            ("moves", &self.moves),
            ("stalls", &self.stalls),
        ]
    }

    /// All counts by name.
    pub(crate) fn save(&self) -> Counts {
        counts(&self.all())
    }

    /// Adds the counts of a device that this one goes on for.
    ///
    /// # Errors
    /// As [`add_counts`]. Nothing has changed.
    pub(crate) fn restore(&self, counts: &Counts) -> Result<(), String> {
        add_counts(&self.all(), counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_counters_are_saved_and_restored_by_their_names() {
        let counters = ConnectionCounters::of("here");
        for (n, (_, counter)) in (1..).zip(counters.all()) {
            counter.add(n);
        }
        let saved = counters.save();
        assert_eq!(serde_json::to_value(&counters).unwrap(), serde_json::to_value(&saved).unwrap());
        let other = ConnectionCounters::of("there");
        other.restore(&saved).unwrap();
        assert_eq!(other.save(), saved);
        let counts = |name: &str, count| Counts::from([("opens".into(), 1), (name.into(), count)]);
        assert!(other.restore(&counts("kicks", 1)).unwrap_err().contains("\"kicks\""));
        assert!(other.restore(&counts("polls", u64::MAX)).unwrap_err().contains("polls is 1844"));
        assert_eq!(other.save(), saved);
    }
}
