// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the numbers of a device mean: the table from which `vbus stats`, `vbus top`, the metrics
//! for Prometheus and the documentation take names, units and texts.

/// A number in the JSON of a device ([`Device::inspect`](crate::Device::inspect)), for tools that
/// show it.
///
/// ```
/// use vbus_core::{Metric, Role};
///
/// // For { "requests": 17, "queues": [{ "depth": 3 }] }.
/// const METRICS: &[Metric] = &[
///     Metric::counter("requests", "block_requests", "Requests of the driver that were answered"),
///     Metric::gauge("queues.{queue}.depth", "block_queue_depth", "Requests that wait"),
///     Metric::counter("failed", "block_failed", "Requests that failed")
///         .role(Role::OutDrop)
///         .advice("look at the file behind the disk"),
/// ];
/// assert_eq!(METRICS[1].help, "Requests that wait");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metric {
    /// Where the number is: the keys on the way to it, joined by dots. `{queue}` stands for every
    /// member of a list or of an object; its index or its key is the label `queue` of the number.
    /// With `{page=name}` the label `page` is the member `name` of the member.
    pub path: &'static str,
    /// The name for Prometheus, without the prefix `vbus_` and the suffix `_total`: lower case,
    /// beginning with the class or with another subject. Rows with one name must differ in
    /// [`reason`](Self::reason).
    pub name: &'static str,
    /// Whether the number only grows.
    pub kind: Kind,
    /// What is counted, in the plural: "frames", "bytes". Empty for yes and no.
    pub unit: &'static str,
    /// What the number means, as a sentence without its full stop.
    pub help: &'static str,
    /// What to do if the number is high, as part of a sentence. Empty if there is nothing to do.
    pub advice: &'static str,
    /// The label `reason` of the number, if several reasons share the name.
    pub reason: Option<Reason>,
    /// The part that the number has in the summary of `vbus stats`.
    pub role: Role,
}

/// How a number changes, and how it is written in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A number that only grows while its device exists.
    Counter,
    /// A number, or true (1) or false (0). It goes up and down.
    Gauge,
    /// A text. The number is 1 while it is this one, and 0 otherwise.
    Is(&'static str),
}

/// One of several reasons for the same event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason {
    /// The reason, as a label: `no_buffers`.
    pub label: &'static str,
    /// What the event is, for all reasons, as a sentence without its full stop.
    pub event: &'static str,
}

/// The part of a number in a summary. `Out` is from the driver, `In` is to the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// None.
    #[default]
    Detail,
    /// Frames that went on from the driver.
    OutFrames,
    /// Their bytes.
    OutBytes,
    /// Frames that went to the driver.
    InFrames,
    /// Their bytes.
    InBytes,
    /// Something from the driver that was lost.
    OutDrop,
    /// Something to the driver that was lost.
    InDrop,
    /// Doorbells.
    Doorbells,
    /// Interrupts.
    Interrupts,
    /// Interrupts that were not needed.
    InterruptsSaved,
    /// Entries in a ring from the driver.
    OutFill,
    /// Entries in a ring to the driver.
    InFill,
    /// A fault. A number above 0 is worth a line in a summary.
    Fault,
}

impl Metric {
    const fn new(kind: Kind, path: &'static str, name: &'static str, help: &'static str) -> Metric {
        let (unit, advice, reason, role) = ("times", "", None, Role::Detail);
        Metric { path, name, kind, unit, help, advice, reason, role }
    }

    /// A number of times that only grows while the device exists.
    pub const fn counter(path: &'static str, name: &'static str, help: &'static str) -> Metric {
        Self::new(Kind::Counter, path, name, help)
    }

    /// A number that goes up and down.
    pub const fn gauge(path: &'static str, name: &'static str, help: &'static str) -> Metric {
        Self::new(Kind::Gauge, path, name, help)
    }

    /// Whether something is true.
    pub const fn flag(path: &'static str, name: &'static str, help: &'static str) -> Metric {
        Self::new(Kind::Gauge, path, name, help).unit("")
    }

    /// Whether the text at `path` is `text`.
    pub const fn is(
        path: &'static str,
        text: &'static str,
        name: &'static str,
        help: &'static str,
    ) -> Metric {
        Self::new(Kind::Is(text), path, name, help).unit("")
    }

    /// Sets the [`unit`](Self::unit). The default is "times".
    #[must_use]
    pub const fn unit(self, unit: &'static str) -> Metric {
        Metric { unit, ..self }
    }

    /// Sets the [`advice`](Self::advice).
    #[must_use]
    pub const fn advice(self, advice: &'static str) -> Metric {
        Metric { advice, ..self }
    }

    /// Sets the [`reason`](Self::reason).
    #[must_use]
    pub const fn reason(self, label: &'static str, event: &'static str) -> Metric {
        Metric { reason: Some(Reason { label, event }), ..self }
    }

    /// Sets the [`role`](Self::role).
    #[must_use]
    pub const fn role(self, role: Role) -> Metric {
        Metric { role, ..self }
    }
}
