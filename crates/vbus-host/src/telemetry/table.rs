// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What each number in the JSON of a device means.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;
use vbus_core::memory;
use vbus_core::{ConnectionCounters, DeviceClass, Kind, Metric, Role};

/// What a device's JSON says outside of its parts.
const DEVICE: &[Metric] = &[
    Metric::is("state", "open", "device_open", "Whether a driver has the device open"),
    Metric::is(
        "state",
        "broken",
        "device_fault",
        "Whether the last connection ended by a fault, and no driver has opened the device since",
    ),
    Metric::flag(
        "connected",
        "device_connected",
        "Whether a VMM or a process is connected to the device's socket",
    ),
];

/// What the server of a device's socket counts: the part `connector`.
const CONNECTOR: &[Metric] = &[
    Metric::counter(
        "clients",
        "connector_clients",
        "VMMs and processes that connected to the device's socket",
    )
    .unit("clients"),
    Metric::counter(
        "refused",
        "connector_refused",
        "Clients that were refused because another was connected",
    )
    .unit("clients"),
    Metric::counter("messages", "connector_messages", "vfio-user messages that they sent")
        .unit("messages"),
    Metric::counter("failures", "connector_failures", "Requests that were answered with an errno")
        .unit("requests"),
    Metric::counter(
        "violations",
        "connector_violations",
        "Clients that were cut off because they broke the protocol",
    )
    .unit("clients")
    .role(Role::Fault)
    .advice("the log of the bus has one line for each"),
];

/// A metric, and the part of the JSON that has it.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The key of the part: `counters`, `memory`, `connector`, `device`. Empty for the device
    /// itself.
    pub part: &'static str,
    /// What it means.
    pub metric: Metric,
}

/// A number that a device has.
#[derive(Clone, Debug)]
pub struct Reading<'t> {
    /// What it means.
    pub row: &'t Row,
    /// Its place in the part, without placeholders: `pairs.0.tx.frames`.
    pub path: String,
    /// Its labels, by the names in [`Metric::path`].
    pub labels: Vec<(&'static str, String)>,
    /// The number.
    pub value: u64,
}

impl Reading<'_> {
    /// The path without the members that became labels: `tx.frames`.
    pub fn short_path(&self) -> &'static str {
        let path = self.row.metric.path;
        path.rfind("}.").map_or(path, |at| &path[at + 2..])
    }

    /// The labels for people: `queue 0`, or nothing.
    pub fn place(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.labels {
            let _ = write!(text, "{}{name} {value}", if text.is_empty() { "" } else { ", " });
        }
        text
    }
}

/// What the numbers of all devices of a program mean.
#[derive(Clone, Debug)]
pub struct Table {
    /// The rows of every device, in the order of the JSON.
    every: Vec<Row>,
    /// The further rows of each class.
    classes: BTreeMap<String, Vec<Row>>,
}

impl Table {
    /// The table of a program that has `classes`.
    pub fn new<'a>(classes: impl IntoIterator<Item = &'a dyn DeviceClass>) -> Table {
        let parts: [(&str, &[Metric]); 4] = [
            ("", DEVICE),
            ("counters", ConnectionCounters::METRICS),
            ("memory", memory::METRICS),
            ("connector", CONNECTOR),
        ];
        let rows = parts
            .into_iter()
            .flat_map(|(part, metrics)| metrics.iter().map(move |m| Row { part, metric: *m }));
        let every = rows.collect();
        let class = |class: &dyn DeviceClass| {
            let rows = class.metrics().into_iter().map(|metric| Row { part: "device", metric });
            (class.name().to_owned(), rows.collect())
        };
        Table { every, classes: classes.into_iter().map(class).collect() }
    }

    /// The numbers of `device` that the table knows, in the order of the table. `device` is an
    /// element of the answer to `list`. A number that is not there, or is no number, is left out.
    pub fn read(&self, device: &Value) -> Vec<Reading<'_>> {
        let class = device["class"].as_str().and_then(|class| self.classes.get(class));
        let mut readings = Vec::new();
        for row in self.every.iter().chain(class.into_iter().flatten()) {
            let part = if row.part.is_empty() { Some(device) } else { device.get(row.part) };
            if let Some(part) = part {
                find(row, row.metric.path, part, &mut (String::new(), Vec::new()), &mut readings);
            }
        }
        readings
    }
}

/// Adds the numbers that `rest` of the path of `row` leads to from `value`. `so_far` has the path
/// up to `value` and its labels.
fn find<'t>(
    row: &'t Row,
    rest: &'static str,
    value: &Value,
    so_far: &mut (String, Vec<(&'static str, String)>),
    readings: &mut Vec<Reading<'t>>,
) {
    let (step, rest) = rest.split_once('.').unwrap_or((rest, ""));
    let mut enter = |key: &str, label: Option<(&'static str, String)>, value: &Value| {
        let length = so_far.0.len();
        if length > 0 {
            so_far.0.push('.');
        }
        so_far.0.push_str(key);
        let labelled = label.is_some();
        so_far.1.extend(label);
        if rest.is_empty() {
            if let Some(value) = number(row.metric.kind, value) {
                let (path, labels) = so_far.clone();
                readings.push(Reading { row, path, labels, value });
            }
        } else {
            find(row, rest, value, so_far, readings);
        }
        if labelled {
            so_far.1.pop();
        }
        so_far.0.truncate(length);
    };
    let Some(label) = step.strip_prefix('{').and_then(|label| label.strip_suffix('}')) else {
        if let Some(value) = value.get(step) {
            enter(step, None, value);
        }
        return;
    };
    let (label, member) = label.split_once('=').unwrap_or((label, ""));
    let named = |key: &str, value: &Value| match value.get(member) {
        _ if member.is_empty() => Some(key.to_owned()),
        Some(Value::String(name)) => Some(name.clone()),
        Some(Value::Number(number)) => Some(number.to_string()),
        _ => None,
    };
    match value {
        Value::Array(list) => {
            for (at, value) in list.iter().enumerate() {
                let key = at.to_string();
                if let Some(name) = named(&key, value) {
                    enter(&key, Some((label, name)), value);
                }
            }
        }
        Value::Object(map) => {
            for (key, value) in map {
                if let Some(name) = named(key, value) {
                    enter(key, Some((label, name)), value);
                }
            }
        }
        _ => {}
    }
}

fn number(kind: Kind, value: &Value) -> Option<u64> {
    match kind {
        Kind::Is(text) => value.as_str().map(|value| u64::from(value == text)),
        _ => value.as_u64().or_else(|| value.as_bool().map(u64::from)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;

    use serde_json::json;
    use vbus_cli::output::flatten;
    use vbus_core::{Bus, Executor, Tuning};

    use super::*;
    use crate::classes;

    fn table() -> Table {
        Table::new(classes::unserved(Vec::new()).unwrap().iter().map(|class| &**class))
    }

    /// The rows of every device, under an empty name, and those of each class.
    fn groups(table: &Table) -> Vec<(&str, &[Row])> {
        let classes = table.classes.iter().filter(|(_, rows)| !rows.is_empty());
        std::iter::once(("", &table.every[..]))
            .chain(classes.map(|(name, rows)| (name.as_str(), &rows[..])))
            .collect()
    }

    /// One device of each class, as `list` shows it.
    fn devices() -> Vec<Value> {
        let dir = tempfile::tempdir().unwrap();
        let pcap = dir.path().join("pcap").to_str().unwrap().to_owned();
        let stream = dir.path().join("stream").to_str().unwrap().to_owned();
        let bus = Bus::new(
            Executor::start(Tuning::default()).unwrap(),
            classes::unserved(Vec::new()).unwrap(),
        );
        let pages = json!([{ "name": "set.point", "bytes": 8, "owner": "device" }]);
        let mut devices = Vec::new();
        for (class, settings) in [
            ("venet", json!({ "backend": "switch", "queue-pairs": 2, "pcap": pcap })),
            ("venet", json!({ "backend": "stream", "listen": stream })),
            (
                "virtio-net",
                json!({ "backend": "stream", "listen": format!("{stream}3"), "pcap": pcap }),
            ),
            ("virtio-net", json!({ "backend": "switch" })),
            (
                "uplink",
                json!({ "backend": "stream", "listen": format!("{stream}2"), "pcap": pcap }),
            ),
            ("state", json!({ "pages": pages })),
            ("pic", json!({})),
            ("sched", json!({ "qmp": "/nowhere" })),
        ] {
            let name = format!("{class}{}", devices.len());
            let mut device = bus.create(&name, class, &settings).unwrap().inspect();
            let (clients, refused, messages, failures, violations) = (1, 2, 3, 4, 5);
            device["connected"] = json!(true);
            device["connector"] = json!({
                "clients": clients, "refused": refused, "messages": messages,
                "failures": failures, "violations": violations,
            });
            // The kernel has the TAP interface of a card only where a test may make one.
            if class == "virtio-net" {
                device["device"]["backend"]["vhost"] = json!(true);
            }
            // A driver that no test has here.
            if class == "pic" {
                device["device"]["pages"] =
                    json!([{ "cpu": 3, "lines": 64, "raised": 1, "messages": 2 }]);
            }
            if class == "sched" {
                device["device"]["cpus"] = json!([{
                    "cpu": 1, "thread": 17, "priority": 3, "updates": 1, "changes": 1,
                    "clamped": 1, "refused": 1, "limited": 1, "expired": 1, "overruns": 1,
                }]);
            }
            devices.push(device);
        }
        devices
    }

    #[test]
    fn every_number_of_every_class_has_its_meaning() {
        // Settings and places, which count nothing.
        let settings = [
            "mtu",
            "queue-pairs",
            "bytes",
            "cpus",
            "cpu",
            "lines",
            "thread",
            "native-vlan",
            "broadcast-rate",
            "priority-max",
            "nice-min",
            "changes",
            "boost-ms",
            "boost-share",
            "queues",
            "all_used",
            "all_of",
            "process",
        ];
        let table = table();
        let mut unused: BTreeSet<_> = groups(&table)
            .into_iter()
            .flat_map(|(_, rows)| rows)
            .map(|row| (row.part, row.metric.path))
            .collect();
        for device in devices() {
            let readings = table.read(&device);
            let known: BTreeMap<_, _> = readings
                .iter()
                .map(|reading| ((reading.row.part, reading.path.clone()), reading.value))
                .collect();
            for reading in &readings {
                unused.remove(&(reading.row.part, reading.row.metric.path));
            }
            for part in ["counters", "memory", "connector", "device"] {
                for (path, value) in flatten(&device[part]) {
                    let key = path.rsplit('.').next().unwrap().to_owned();
                    let meant = known.get(&(part, path.clone()));
                    if value.is_number() {
                        assert!(
                            meant == value.as_u64().as_ref() || settings.contains(&&*key),
                            "{part} {path} of {}: {value}, {meant:?}",
                            device["name"]
                        );
                    }
                }
            }
        }
        assert!(unused.is_empty(), "no device has {unused:?}");
    }

    #[test]
    fn numbers_are_found_with_their_labels() {
        let table = table();
        let device = json!({
            "class": "state",
            "state": "broken",
            "counters": { "opens": u64::MAX, "broken": "no number" },
            "device": { "pages": [
                { "name": "a.b", "version": 7, "shown": true },
                { "version": 8 },
                9,
            ] },
        });
        let readings: Vec<_> = table
            .read(&device)
            .iter()
            .map(|r| (r.path.clone(), r.short_path(), r.place(), r.value))
            .collect();
        let text =
            |path: &str, short, place: &str, value| (path.into(), short, place.into(), value);
        let expected = [
            text("state", "state", "", 0),
            text("state", "state", "", 1),
            text("opens", "opens", "", u64::MAX),
            text("pages.0.version", "version", "page a.b", 7),
            text("pages.0.shown", "shown", "page a.b", 1),
        ];
        assert_eq!(readings, expected);
        for strange in [json!(null), json!([]), json!({ "class": 7, "counters": [1] })] {
            assert!(table.read(&strange).is_empty(), "{strange}");
        }
    }

    #[test]
    fn names_follow_the_rules_of_prometheus() {
        let table = table();
        let mut families = BTreeMap::new();
        for (class, rows) in groups(&table) {
            for Row { metric, .. } in rows {
                let name = metric.name;
                assert!(
                    name.starts_with(|c: char| c.is_ascii_lowercase())
                        && name.chars().all(|c| c.is_ascii_lowercase() || "_".contains(c)),
                    "{name}"
                );
                assert!(!name.ends_with("_total") && !name.starts_with("vbus_"), "{name}");
                assert!(!metric.help.ends_with('.') && !metric.help.is_empty(), "{name}");
                if metric.unit == "bytes" {
                    assert!(name.ends_with("bytes"), "{name}");
                }
                // A family has one text and one kind. Its rows differ in their reasons.
                let event = metric.reason.map_or(metric.help, |reason| reason.event);
                let (is_gauge, text, reasons) = families.entry((name, class)).or_insert((
                    metric.kind != Kind::Counter,
                    event,
                    BTreeSet::new(),
                ));
                assert_eq!((*is_gauge, *text), (metric.kind != Kind::Counter, event), "{name}");
                assert!(reasons.insert(metric.reason.map(|reason| reason.label)), "{name}");
            }
        }
    }

    /// The tables of counters in `docs/operating.md`.
    fn document(table: &Table) -> String {
        let mut text = String::new();
        let same = |a: &[Row], b: &[Row]| a.iter().map(|r| r.metric).eq(b.iter().map(|r| r.metric));
        let all = groups(table);
        for (at, (class, rows)) in all.iter().enumerate() {
            if all[..at].iter().any(|(_, before)| same(before, rows)) {
                continue; // Under the title of an earlier class.
            }
            let classes: Vec<_> = all[at..].iter().filter(|(_, more)| same(more, rows)).collect();
            let title = match &classes[..] {
                _ if class.is_empty() => "### Every device".to_owned(),
                [(one, _)] => format!("### Class `{one}`"),
                more => {
                    let names: Vec<_> = more.iter().map(|(name, _)| format!("`{name}`")).collect();
                    format!("### Classes {}", names.join(" and "))
                }
            };
            let _ = write!(
                text,
                "{title}\n| counter | in Prometheus | unit | meaning | if it is high |\n|---|---|---|---|---|\n"
            );
            for Row { part, metric } in *rows {
                let part = if part.is_empty() { String::new() } else { format!("{part}.") };
                let path = match (metric.path.find('='), metric.path.find('}')) {
                    (Some(from), Some(to)) => {
                        format!("{}{}", &metric.path[..from], &metric.path[to..])
                    }
                    _ => metric.path.to_owned(),
                };
                let path = if class.is_empty() { format!("{part}{path}") } else { path };
                let total = if metric.kind == Kind::Counter { "_total" } else { "" };
                let reason = metric.reason.map_or(String::new(), |r| format!(", {}", r.label));
                let unit = if metric.unit.is_empty() { "0 or 1" } else { metric.unit };
                let _ = writeln!(
                    text,
                    "| `{path}` | `vbus_{name}{total}`{reason} | {unit} | {help} | {advice} |",
                    name = metric.name,
                    help = metric.help,
                    advice = metric.advice
                );
            }
            text.push('\n');
        }
        text
    }

    /// The document says what the table says. `VBUS_WRITE_DOCS=1 cargo test -p vbus-host` writes
    /// the table into it.
    #[test]
    fn the_document_has_the_table() {
        const BEGIN: &str = "<!-- counters: written by a test of vbus-host -->\n";
        const END: &str = "<!-- end of counters -->\n";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/operating.md");
        let Ok(text) = std::fs::read_to_string(&path) else {
            eprintln!("skipped: {} is not here", path.display());
            return;
        };
        let (before, rest) = text.split_once(BEGIN).expect("the begin of the table");
        let (old, after) = rest.split_once(END).expect("the end of the table");
        let new = document(&table());
        if std::env::var_os("VBUS_WRITE_DOCS").is_some() {
            std::fs::write(&path, format!("{before}{BEGIN}{new}{END}{after}")).unwrap();
            return;
        }
        for (old, new) in old.lines().zip(new.lines()) {
            assert_eq!(old, new, "run VBUS_WRITE_DOCS=1 cargo test -p vbus-host");
        }
        assert_eq!(old.lines().count(), new.lines().count());
    }
}
