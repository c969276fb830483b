// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the supervisor may do for the bus: what the configuration's devices need, and what the
//! table `[allow]` adds for devices that come later.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::CreateError;
use vbus_core::settings::Settings;
use vbus_sched::Limits;

use crate::config::DeviceSpec;

/// The default of `taps`. It includes the default name of a new interface.
const TAPS: &str = "vbus*";
/// The default of `sched-priority-max`: that of a `sched` device.
const PRIORITY_MAX: i32 = 10;

/// The table `[allow]`: what a device may use that comes while the bus runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowSpec {
    /// The folders of sockets and files, beside the directory of the bus.
    pub paths: Vec<PathBuf>,
    /// The names of TAP interfaces. A final `*` stands for any characters.
    pub taps: Vec<String>,
    /// The highest real-time priority of a thread.
    pub sched_priority_max: i32,
    /// Whether a `sched` device may name any thread by its id.
    pub sched_threads: bool,
}

impl Default for AllowSpec {
    fn default() -> Self {
        AllowSpec {
            paths: Vec::new(),
            taps: vec![TAPS.into()],
            sched_priority_max: PRIORITY_MAX,
            sched_threads: false,
        }
    }
}

impl AllowSpec {
    /// Reads the table, a JSON object.
    ///
    /// # Errors
    /// A value is wrong. The text begins with the key at fault, without the table's name.
    pub fn parse(table: &Value) -> Result<AllowSpec, CreateError> {
        let mut settings = Settings::new(table)?;
        let default = AllowSpec::default();
        let paths = settings.texts("paths")?.unwrap_or_default();
        for (at, path) in paths.iter().enumerate() {
            if !Path::new(path).is_absolute() || path.contains('\0') {
                let text = format!("is {path:?}; use the path of a folder that begins with /");
                return Err(settings.error(&format!("paths[{at}]"), text));
            }
        }
        let taps = settings.texts("taps")?.unwrap_or(default.taps);
        let sched_priority_max = settings.integer("sched-priority-max", 0..=99)?;
        let sched_threads = settings.flag("sched-threads")?;
        settings.finish()?;
        Ok(AllowSpec {
            paths: paths.into_iter().map(PathBuf::from).collect(),
            taps,
            sched_priority_max: sched_priority_max.unwrap_or(default.sched_priority_max),
            sched_threads: sched_threads.unwrap_or(default.sched_threads),
        })
    }
}

/// All that the supervisor may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permits {
    /// The folders in which it may make and use anything. The first one is that of the bus.
    pub folders: Vec<PathBuf>,
    /// The paths that the configuration's devices name, wherever they are.
    pub paths: BTreeSet<PathBuf>,
    /// The names of TAP interfaces. A final `*` stands for any characters.
    taps: Vec<String>,
    /// The threads that the configuration's devices name.
    threads: BTreeSet<i32>,
    any_thread: bool,
    /// What may be done with threads.
    pub limits: Limits,
}

impl Permits {
    /// What a bus in the directory `dir` needs, with this table and these devices of the
    /// configuration.
    pub fn new(dir: &Path, allow: &AllowSpec, devices: &[DeviceSpec]) -> Permits {
        let mut permits = Permits {
            folders: std::iter::once(dir.to_owned()).chain(allow.paths.clone()).collect(),
            paths: BTreeSet::new(),
            taps: allow.taps.clone(),
            threads: BTreeSet::new(),
            any_thread: allow.sched_threads,
            limits: match allow.sched_priority_max {
                0 => Limits::NONE,
                priority_max => Limits::up_to(priority_max),
            },
        };
        for device in devices {
            permits.add(dir, device);
        }
        permits
    }

    /// Adds what a device of the configuration names.
    fn add(&mut self, dir: &Path, device: &DeviceSpec) {
        let settings = &device.settings;
        let text = |key: &str| settings.get(key).and_then(Value::as_str);
        for key in ["pcap", "connect", "listen", "qmp", "vmm"] {
            self.paths.extend(text(key).and_then(|path| std::path::absolute(path).ok()));
        }
        self.paths.extend(device.socket.path.as_ref().map(|path| dir.join(path)));
        self.taps.extend(text("tap").map(str::to_owned));
        if device.class == "sched" {
            let threads = settings.get("threads").and_then(Value::as_array);
            let ids = threads.into_iter().flatten().filter_map(Value::as_i64);
            self.threads.extend(ids.filter_map(|id| i32::try_from(id).ok()));
            // Wrong settings make no device.
            if let Ok(limits) = Limits::of_settings(settings) {
                self.limits.widen(&limits);
            }
        }
    }

    /// What the program's own classes may open, if the program says that they open files: the
    /// folders, and each file that a setting of `devices` names and that is there.
    pub fn own_paths(&self, devices: &[DeviceSpec]) -> Vec<PathBuf> {
        fn texts<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
            match value {
                Value::String(text) => found.push(text),
                Value::Array(list) => list.iter().for_each(|value| texts(value, found)),
                Value::Object(map) => map.values().for_each(|value| texts(value, found)),
                _ => {}
            }
        }
        let mut found = Vec::new();
        devices.iter().for_each(|device| texts(&device.settings, &mut found));
        let files = found.into_iter().map(PathBuf::from).filter(|path| path.exists());
        self.folders.iter().cloned().chain(files).collect()
    }

    /// Checks the name of a TAP interface.
    ///
    /// # Errors
    /// It is not allowed.
    pub fn tap(&self, name: &str) -> Result<(), String> {
        let fits = |pattern: &String| match pattern.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == pattern,
        };
        if self.taps.iter().any(fits) {
            return Ok(());
        }
        Err(format!(
            "this bus may not use the interface; add its name to \"taps\" in [allow] (now: {})",
            self.taps.join(", ")
        ))
    }

    /// Checks the id of a thread that a device names by itself.
    ///
    /// # Errors
    /// It is not allowed.
    pub fn thread(&self, tid: i32) -> Result<(), String> {
        if self.any_thread || self.threads.contains(&tid) {
            return Ok(());
        }
        Err(format!(
            "this bus may not change thread {tid}: set \"sched-threads\" in [allow] to true, or let \
             the device ask the VMM (qmp or vmm)"
        ))
    }

    /// Checks the limits of a device.
    ///
    /// # Errors
    /// They are wider than what is allowed.
    pub fn check_limits(&self, limits: &Limits) -> Result<(), String> {
        if self.limits.include(limits) {
            return Ok(());
        }
        Err("this bus may not give threads such classes or priorities: lower \"priority-max\", leave \
             \"nice-min\" out, or raise \"sched-priority-max\" in [allow]"
            .into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;

    fn device(class: &str, settings: Value) -> DeviceSpec {
        let Value::Object(settings) = settings else { return device(class, json!(Map::new())) };
        DeviceSpec::new("d".into(), class.into(), settings).unwrap()
    }

    #[test]
    fn the_configuration_permits_what_it_names() {
        let dir = Path::new("/run/bus");
        let devices = [
            device("venet", json!({ "pcap": "/a.pcap", "tap": "tap7", "socket": "x.sock" })),
            device("sched", json!({ "threads": [17], "priority-max": 30 })),
            device("sched", json!({ "qmp": "/q", "nice-min": -3 })),
        ];
        let permits = Permits::new(dir, &AllowSpec::default(), &devices);
        let paths: Vec<_> = permits.paths.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/a.pcap", "/q", "/run/bus/x.sock"]);
        assert!(permits.tap("tap7").is_ok() && permits.tap("vbus%d").is_ok());
        assert!(permits.tap("tap70").unwrap_err().contains("[allow]"));
        assert!(permits.thread(17).is_ok() && permits.thread(18).is_err());
        let limits = |settings: Value| Limits::of_settings(&settings).unwrap();
        let check = |settings: Value| permits.check_limits(&limits(settings));
        assert!(check(json!({ "qmp": "/q", "priority-max": 30, "nice-min": -3 })).is_ok());
        assert!(check(json!({ "qmp": "/q", "priority-max": 31 })).is_err());
    }

    #[test]
    fn the_table_is_checked() {
        let all = json!({
            "paths": ["/run/vm"],
            "taps": ["a", "b*"],
            "sched-priority-max": 0,
            "sched-threads": true,
        });
        let allow = AllowSpec::parse(&all).unwrap();
        let permits = Permits::new(Path::new("/d"), &allow, &[]);
        assert_eq!(permits.folders, [Path::new("/d"), Path::new("/run/vm")]);
        assert!(permits.tap("b7").is_ok() && permits.tap("vbus0").is_err());
        assert!(permits.thread(1).is_ok());
        assert_eq!(permits.limits, Limits::NONE);
        for (table, text) in [
            (json!({ "paths": ["vm"] }), "\"paths[0]\" is \"vm\"; use the path of a folder"),
            (json!({ "sched-priority-max": 100 }), "\"sched-priority-max\" is 100; use a number"),
            (json!({ "path": [] }), "\"path\" is no setting here; did you mean \"paths\""),
        ] {
            let error = AllowSpec::parse(&table).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }
}
