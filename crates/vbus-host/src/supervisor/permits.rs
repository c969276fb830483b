// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the supervisor may do for the bus: what the configuration's devices need, and what the
//! table `[allow]` adds for devices that come later.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::CreateError;
use vbus_core::settings::Settings;
use vbus_sched::Limits;

use crate::config::{Config, DeviceSpec};

/// The default of `taps`: the default name of an interface, which makes a new one. No interface
/// that is there already has this name, so another bus's is not reached.
const TAPS: &str = "vbus%d";
/// The default of `sched-priority-max`: that of a `sched` device.
const PRIORITY_MAX: i32 = 10;

/// The table `[allow]`: what a device may use that comes while the bus runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowSpec {
    /// The folders of capture files, of the sockets of streams and of those of devices, beside the
    /// directory of the bus.
    pub paths: Vec<PathBuf>,
    /// The folders of the sockets of VMMs (`qmp`, `vmm`), beside the directory of the bus.
    pub vmms: Vec<PathBuf>,
    /// The names of TAP interfaces. A final `*` stands for any characters.
    pub taps: Vec<String>,
    /// Whether a device may let the kernel carry its frames (/dev/vhost-net).
    pub vhost: bool,
    /// The highest real-time priority of a thread.
    pub sched_priority_max: i32,
    /// Whether a `sched` device may name any thread by its id.
    pub sched_threads: bool,
}

impl Default for AllowSpec {
    fn default() -> Self {
        AllowSpec {
            paths: Vec::new(),
            vmms: Vec::new(),
            taps: vec![TAPS.into()],
            vhost: false,
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
        let mut folders = |key: &'static str| {
            let paths = settings.texts(key)?.unwrap_or_default();
            for (at, path) in paths.iter().enumerate() {
                if !Path::new(path).is_absolute() || path.contains('\0') {
                    let text = format!("is {path:?}; use the path of a folder that begins with /");
                    return Err(settings.error(&format!("{key}[{at}]"), text));
                }
            }
            Ok(paths.into_iter().map(PathBuf::from).collect())
        };
        let (paths, vmms) = (folders("paths")?, folders("vmms")?);
        let taps = settings.texts("taps")?.unwrap_or(default.taps);
        let vhost = settings.flag("vhost")?.unwrap_or(default.vhost);
        let sched_priority_max = settings.integer("sched-priority-max", 0..=99)?;
        let sched_threads = settings.flag("sched-threads")?;
        settings.finish()?;
        Ok(AllowSpec {
            paths,
            vmms,
            taps,
            vhost,
            sched_priority_max: sched_priority_max.unwrap_or(default.sched_priority_max),
            sched_threads: sched_threads.unwrap_or(default.sched_threads),
        })
    }
}

/// What a path is for. A path that is for one thing is for nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// A capture file, which is made or emptied.
    Capture,
    /// A socket that the bus listens at.
    Listen,
    /// The socket of a stream's peer.
    Connect,
    /// The socket of a VMM, which the supervisor asks for its threads.
    Vmm,
}

impl Purpose {
    /// What a setting of a class of vbus is for, if it is a path.
    fn of_setting(key: &str) -> Option<Purpose> {
        match key {
            "pcap" => Some(Purpose::Capture),
            "listen" => Some(Purpose::Listen),
            "connect" => Some(Purpose::Connect),
            "qmp" | "vmm" => Some(Purpose::Vmm),
            _ => None,
        }
    }

    /// The key of `[allow]` with the folders for this.
    pub fn key(self) -> &'static str {
        match self {
            Purpose::Capture | Purpose::Listen | Purpose::Connect => "paths",
            Purpose::Vmm => "vmms",
        }
    }
}

/// All that the supervisor may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permits {
    /// The folders in which it may make and use capture files and sockets. The first one is that of
    /// the bus.
    pub folders: Vec<PathBuf>,
    /// The folders with sockets of VMMs. The first one is that of the bus.
    pub vmm_folders: Vec<PathBuf>,
    /// The paths that the configuration's devices name, wherever they are, by what they are for.
    paths: BTreeMap<Purpose, BTreeSet<PathBuf>>,
    /// The names of TAP interfaces. A final `*` stands for any characters.
    taps: Vec<String>,
    /// Whether /dev/vhost-net may be opened.
    vhost: bool,
    /// The threads that the configuration's devices name.
    pub threads: BTreeSet<i32>,
    /// Whether a device may name any thread.
    pub any_thread: bool,
    /// What may be done with threads.
    pub limits: Limits,
    /// The path of the configuration file, which may be read again. It need not be UTF-8.
    pub config: Option<OsString>,
    /// The sockets of the bus whose place this one takes. It may get charge of each once.
    #[serde(default)]
    pub former: BTreeSet<PathBuf>,
}

impl Permits {
    /// What a bus in the directory `dir` needs, with this table and these devices of the
    /// configuration.
    pub fn new(dir: &Path, allow: &AllowSpec, devices: &[DeviceSpec]) -> Permits {
        let with_own = |folders: &[PathBuf]| [&[dir.to_owned()][..], folders].concat();
        let mut permits = Permits {
            folders: with_own(&allow.paths),
            vmm_folders: with_own(&allow.vmms),
            paths: BTreeMap::new(),
            taps: allow.taps.clone(),
            vhost: allow.vhost,
            threads: BTreeSet::new(),
            any_thread: allow.sched_threads,
            limits: match allow.sched_priority_max {
                0 => Limits::NONE,
                priority_max => Limits::up_to(priority_max),
            },
            config: None,
            former: BTreeSet::new(),
        };
        for device in devices {
            permits.add(dir, device);
        }
        permits
    }

    /// The same for a bus with this configuration file. A relative path begins in the folder in
    /// which the bus was started.
    pub fn with_config(mut self, path: Option<&Path>) -> Permits {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
        self.config = path.map(|path| absolute(path).into_os_string());
        self
    }

    /// What the same bus needs with another configuration.
    pub fn with(&self, config: &Config) -> Permits {
        let dir = self.folders.first().map_or_else(PathBuf::new, PathBuf::clone);
        let mut permits = Permits::new(&dir, &config.allow, &config.devices);
        permits.name(Purpose::Listen, config.metrics.named_path(&dir));
        Permits { config: self.config.clone(), ..permits }
    }

    /// What these permits or `other` allow. The folders of these come first.
    #[must_use]
    pub fn or(&self, other: &Permits) -> Permits {
        fn extend<T: Clone + PartialEq>(all: &mut Vec<T>, more: &[T]) {
            let new: Vec<T> = more.iter().filter(|item| !all.contains(item)).cloned().collect();
            all.extend(new);
        }
        let mut all = self.clone();
        extend(&mut all.folders, &other.folders);
        extend(&mut all.vmm_folders, &other.vmm_folders);
        extend(&mut all.taps, &other.taps);
        all.vhost |= other.vhost;
        for (purpose, paths) in &other.paths {
            all.paths.entry(*purpose).or_default().extend(paths.iter().cloned());
        }
        all.threads.extend(&other.threads);
        all.any_thread |= other.any_thread;
        all.limits.widen(&other.limits);
        all
    }

    /// Adds what a device of the configuration names.
    fn add(&mut self, dir: &Path, device: &DeviceSpec) {
        let settings = &device.settings;
        let text = |key: &str| settings.get(key).and_then(Value::as_str);
        for (key, value) in settings.as_object().into_iter().flatten() {
            let Some(purpose) = Purpose::of_setting(key) else { continue };
            self.name(purpose, value.as_str().and_then(|path| std::path::absolute(path).ok()));
        }
        self.name(Purpose::Listen, device.socket.path.as_ref().map(|path| dir.join(path)));
        self.taps.extend(text("tap").map(str::to_owned));
        self.vhost |= settings.get("vhost").and_then(Value::as_bool).unwrap_or(false);
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

    /// Checks that the kernel may carry frames.
    ///
    /// # Errors
    /// It is not allowed.
    pub fn vhost(&self) -> Result<(), String> {
        if self.vhost {
            return Ok(());
        }
        Err("this bus may not use /dev/vhost-net: set \"vhost\" in [allow] to true".into())
    }

    /// Adds a path that the configuration names for `purpose`.
    pub fn name(&mut self, purpose: Purpose, path: Option<PathBuf>) {
        self.paths.entry(purpose).or_default().extend(path);
    }

    /// Whether the configuration names `path` for `purpose`.
    pub fn names(&self, path: &Path, purpose: Purpose) -> bool {
        self.paths.get(&purpose).is_some_and(|paths| paths.contains(path))
    }

    /// Checks the id of a thread that a device names by itself. Whether it is the thread that the
    /// configuration meant, the caller checks.
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
            device("venet", json!({ "backend": "stream", "connect": "/peer" })),
        ];
        let permits = Permits::new(dir, &AllowSpec::default(), &devices);
        let all = [Purpose::Capture, Purpose::Listen, Purpose::Connect, Purpose::Vmm];
        let purposes = |path: &str| {
            let path = Path::new(path);
            all.into_iter().filter(|purpose| permits.names(path, *purpose)).collect::<Vec<_>>()
        };
        assert_eq!(purposes("/a.pcap"), [Purpose::Capture]);
        assert_eq!(purposes("/q"), [Purpose::Vmm]);
        assert_eq!(purposes("/run/bus/x.sock"), [Purpose::Listen]);
        assert_eq!(purposes("/peer"), [Purpose::Connect]);
        assert!(permits.tap("tap7").is_ok() && permits.tap("vbus%d").is_ok());
        for bad in ["tap70", "vbus0", "vbus", "vbus%d0"] {
            assert!(permits.tap(bad).unwrap_err().contains("[allow]"), "{bad}");
        }
        assert!(permits.vhost().unwrap_err().contains("[allow]"));
        let card = device("virtio-net", json!({ "backend": "tap", "vhost": true }));
        let off = device("virtio-net", json!({ "backend": "tap", "vhost": false }));
        let permits_of = |device| Permits::new(dir, &AllowSpec::default(), &[device]);
        assert!(permits_of(off).vhost().is_err());
        assert!(permits.or(&permits_of(card)).vhost().is_ok());
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
            "vmms": ["/run/qmp"],
            "taps": ["a", "b*"],
            "vhost": true,
            "sched-priority-max": 0,
            "sched-threads": true,
        });
        let allow = AllowSpec::parse(&all).unwrap();
        let permits = Permits::new(Path::new("/d"), &allow, &[]);
        assert_eq!(permits.folders, [Path::new("/d"), Path::new("/run/vm")]);
        assert_eq!(permits.vmm_folders, [Path::new("/d"), Path::new("/run/qmp")]);
        assert!(permits.tap("b7").is_ok() && permits.tap("vbus0").is_err());
        assert!(permits.vhost().is_ok());
        assert!(permits.thread(1).is_ok());
        assert_eq!(permits.limits, Limits::NONE);
        for (table, text) in [
            (json!({ "paths": ["vm"] }), "\"paths[0]\" is \"vm\"; use the path of a folder"),
            (json!({ "vmms": [""] }), "\"vmms[0]\" is \"\"; use the path of a folder"),
            (json!({ "sched-priority-max": 100 }), "\"sched-priority-max\" is 100; use a number"),
            (json!({ "path": [] }), "\"path\" is no setting here; did you mean \"paths\""),
        ] {
            let error = AllowSpec::parse(&table).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }
}
