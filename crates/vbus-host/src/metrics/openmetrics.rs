// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The text for Prometheus, in the format OpenMetrics 1.0.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use serde_json::Value;
use vbus_core::Kind;

use crate::telemetry::{Reading, Table};

/// The type of the text in HTTP.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// How old a text may be. However many scrapers ask, the devices are read no more often.
const AGE_MAX: Duration = Duration::from_millis(100);

/// Returns the devices of the bus, as `list` shows them.
pub type Read = Box<dyn Fn() -> Vec<Value> + Send + Sync>;

/// What a bus has of a keeper.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kept {
    /// The keeper is there.
    pub present: bool,
    /// How often it has started the bus because that had died.
    pub restarts: u32,
}

/// Returns whether the bus has a keeper.
pub type ReadKept = Box<dyn Fn() -> Kept + Send + Sync>;

/// Writes the numbers of all devices.
#[derive(Debug)]
pub struct Exporter {
    registry: Registry,
    last: Option<(Instant, Arc<str>)>,
}

impl Exporter {
    /// Writes the numbers that `table` knows. `read` returns the devices, and `kept` what the bus
    /// has of a keeper.
    pub fn new(table: Table, read: Read, kept: ReadKept) -> Exporter {
        let mut registry = Registry::with_prefix("vbus");
        registry.register_collector(Box::new(Devices { table, read, kept }));
        Exporter { registry, last: None }
    }

    /// The text, which is at most 0.1 s old.
    pub fn text(&mut self) -> Arc<str> {
        if let Some((at, text)) = &self.last {
            if at.elapsed() < AGE_MAX {
                return text.clone();
            }
        }
        let mut text = String::new();
        // Writing to a string does not fail, and the collector gives no errors of its own.
        let _ = encode(&mut text, &self.registry);
        let text: Arc<str> = text.into();
        self.last = Some((Instant::now(), text.clone()));
        text
    }
}

/// Reads the devices when a scraper asks.
struct Devices {
    table: Table,
    read: Read,
    kept: ReadKept,
}

impl fmt::Debug for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Devices").finish_non_exhaustive()
    }
}

/// The readings of all devices that have one name, and their labels.
struct Family {
    kind: Kind,
    help: &'static str,
    numbers: Vec<(Vec<(&'static str, String)>, u64)>,
    /// Keeps the order of the table.
    place: usize,
}

impl Devices {
    fn families(&self, devices: &[Value]) -> Vec<(&'static str, Family)> {
        let mut families: BTreeMap<&'static str, Family> = BTreeMap::new();
        for device in devices {
            let own = ["device", "class"].map(|label| {
                let key = if label == "device" { "name" } else { label };
                (label, escaped(device[key].as_str().unwrap_or_default()))
            });
            for Reading { row, labels, value, .. } in self.table.read(device) {
                let metric = &row.metric;
                let place = families.len();
                let family = families.entry(metric.name).or_insert_with(|| Family {
                    kind: metric.kind,
                    help: metric.reason.map_or(metric.help, |reason| reason.event),
                    numbers: Vec::new(),
                    place,
                });
                let mut all = own.to_vec();
                all.extend(labels.into_iter().map(|(name, value)| (name, escaped(&value))));
                all.extend(metric.reason.map(|reason| ("reason", reason.label.to_owned())));
                family.numbers.push((all, value));
            }
        }
        let mut families: Vec<_> = families.into_iter().collect();
        families.sort_by_key(|(_, family)| family.place);
        families
    }
}

impl Collector for Devices {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let devices = (self.read)();
        let build = [("version", env!("CARGO_PKG_VERSION"))];
        encoder
            .encode_descriptor("build", "The program", None, MetricType::Info)?
            .encode_info(&build)?;
        let count = i64::try_from(devices.len()).unwrap_or(i64::MAX);
        encoder
            .encode_descriptor("devices", "Devices on the bus", None, MetricType::Gauge)?
            .encode_gauge(&count)?;
        let Kept { present, restarts } = (self.kept)();
        encoder
            .encode_descriptor("keeper", "Whether the bus has a keeper", None, MetricType::Gauge)?
            .encode_gauge(&i64::from(present))?;
        let help = "How often the keeper has started the bus because it had died";
        encoder
            .encode_descriptor("restarts", help, None, MetricType::Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&u64::from(restarts), None)?;
        for (name, family) in self.families(&devices) {
            let kind = match family.kind {
                Kind::Counter => MetricType::Counter,
                _ => MetricType::Gauge,
            };
            let mut encoder = encoder.encode_descriptor(name, family.help, None, kind)?;
            for (labels, value) in family.numbers {
                let mut encoder = encoder.encode_family(&labels)?;
                match family.kind {
                    Kind::Counter => encoder.encode_counter::<NoLabelSet, _, u64>(&value, None)?,
                    _ => encoder.encode_gauge(&i64::try_from(value).unwrap_or(i64::MAX))?,
                }
            }
        }
        Ok(())
    }
}

/// The value of a label. The library writes it as it is.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use serde_json::json;

    use super::*;
    use crate::classes;

    fn exporter(devices: Vec<Value>) -> (Exporter, Arc<AtomicUsize>) {
        let classes = classes::unserved(Vec::new()).unwrap();
        let table = Table::new(classes.iter().map(|class| &**class));
        let reads = Arc::new(AtomicUsize::new(0));
        let counted = reads.clone();
        let read = move || {
            counted.fetch_add(1, Ordering::Relaxed);
            devices.clone()
        };
        let kept = || Kept { present: true, restarts: 3 };
        (Exporter::new(table, Box::new(read), Box::new(kept)), reads)
    }

    #[test]
    fn the_text_is_openmetrics() {
        let pair =
            json!({ "tx": { "frames": 7, "ring_fill": 3, "drops": { "short": 1, "storm": 2 } } });
        let devices = vec![
            json!({
                "name": "net0", "class": "venet", "state": "open", "connected": true,
                "counters": { "doorbells": 5, "opens": 1 },
                "device": { "link": true, "pairs": [pair, pair] },
            }),
            json!({
                "name": "values", "class": "state", "state": "closed", "connected": false,
                "counters": { "doorbells": 0 },
                "device": { "pages": [{ "name": "a \"b\\\n", "version": u64::MAX }] },
            }),
        ];
        let (mut exporter, _) = exporter(devices);
        let text = exporter.text();
        for line in [
            "# HELP vbus_device_doorbells Doorbells that the driver rang, also when `vbus-guest \
             list` measures them.",
            "# TYPE vbus_device_doorbells counter",
            "vbus_device_doorbells_total{device=\"net0\",class=\"venet\"} 5",
            "vbus_device_doorbells_total{device=\"values\",class=\"state\"} 0",
            "# TYPE vbus_device_open gauge",
            "vbus_device_open{device=\"net0\",class=\"venet\"} 1",
            "vbus_device_open{device=\"values\",class=\"state\"} 0",
            "vbus_devices 2",
            "vbus_nic_tx_frames_total{device=\"net0\",class=\"venet\",queue=\"1\"} 7",
            "vbus_nic_tx_ring_fill{device=\"net0\",class=\"venet\",queue=\"0\"} 3",
            "# HELP vbus_nic_tx_drops Frames from the driver that were dropped.",
            "vbus_nic_tx_drops_total{device=\"net0\",class=\"venet\",queue=\"0\",reason=\"short\"} 1",
            "vbus_nic_tx_drops_total{device=\"net0\",class=\"venet\",queue=\"1\",reason=\"storm\"} 2",
            "vbus_state_page_version{device=\"values\",class=\"state\",page=\"a \\\"b\\\\\\n\"} \
             9223372036854775807",
            "# EOF",
        ] {
            let found =
                text.lines().any(|have| have.trim_end_matches('.') == line.trim_end_matches('.'));
            assert!(found, "{line}\nis not in\n{text}");
        }
        assert!(text.contains("vbus_build_info{version="), "{text}");
        assert!(text.contains("vbus_keeper 1\n"), "{text}");
        assert!(text.contains("vbus_restarts_total 3\n"), "{text}");
        assert!(text.ends_with("# EOF\n"));
        // One description for each family.
        let described: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE ")).collect();
        let mut once = described.clone();
        once.sort();
        once.dedup();
        assert_eq!(once.len(), described.len());
    }

    #[test]
    fn however_many_ask_the_devices_are_read_seldom() {
        let (mut exporter, reads) = exporter(Vec::new());
        let begin = Instant::now();
        for _ in 0..1000 {
            exporter.text();
        }
        let most = begin.elapsed().as_millis() / AGE_MAX.as_millis() + 1;
        assert!(reads.load(Ordering::Relaxed) as u128 <= most);
    }
}
