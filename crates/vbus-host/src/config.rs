// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The configuration of a bus: the file `bus.toml`, and the settings of one device from the file or
//! the command line.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value};
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use vbus_core::settings::{changed, meant};
use vbus_core::{BusError, CreateError, DeviceClass, Tuning};
use vbus_pci::Options;

use crate::access::{Accounts, SocketSpec};
use crate::metrics::MetricsSpec;
use crate::rights::ControlSpec;
use crate::supervisor::AllowSpec;
use vbus_cli::rundir;

/// The largest configuration file, in bytes.
const FILE_MAX: u64 = 1 << 20;
/// The most worker threads.
const WORKERS_MAX: u64 = 64;
/// The longest polling window, in microseconds.
const POLL_US_MAX: u64 = 10_000;
/// The largest budget.
const BUDGET_MAX: u64 = 4096;
/// The most memory of guests, in MiB: all that a process can map.
const GUEST_MEMORY_MIB_MAX: u64 = 1 << 27;

/// The configuration of a bus.
#[derive(Debug, Default)]
pub struct Config {
    /// How the bus runs its tasks.
    pub tuning: Tuning,
    /// The level of the log.
    pub log: Option<String>,
    /// How many bytes of memory that can be charged to the bus all clients may map. `None`: only
    /// the limits of the process hold.
    pub guest_memory: Option<u64>,
    /// Who may control the bus.
    pub control: ControlSpec,
    /// Where the metrics are.
    pub metrics: MetricsSpec,
    /// What devices may use that come while the bus runs.
    pub allow: AllowSpec,
    /// The devices that the bus makes at its start.
    pub devices: Vec<DeviceSpec>,
}

impl Config {
    /// The settings of the table `[bus]` for the bus's tasks that differ from those of `old`. One
    /// that is not in the file has its default.
    pub fn changed_tuning(&self, old: &Config) -> impl Iterator<Item = &'static str> + use<> {
        let (new, old) = (&self.tuning, &old.tuning);
        [
            ("workers", new.workers != old.workers),
            ("poll-us", new.poll_max != old.poll_max),
            ("budget", new.budget != old.budget),
        ]
        .into_iter()
        .filter_map(|(key, differs)| differs.then_some(key))
    }

    /// Whether some socket in the bus's directory is for other users too.
    pub fn is_shared(&self) -> bool {
        let mut in_directory = self.devices.iter().filter(|spec| spec.socket.path.is_none());
        self.control.access().is_shared()
            || self.metrics.is_shared()
            || in_directory.any(|spec| spec.socket.access.is_shared())
    }
}

/// The configuration of a device.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceSpec {
    /// Its name on the bus.
    pub name: String,
    /// Its class.
    pub class: String,
    /// The options of its PCI function.
    pub options: Options,
    /// The device of class pic that may carry its interrupts.
    pub pic: Option<String>,
    /// Its socket.
    pub socket: SocketSpec,
    /// The class's own settings, a JSON object.
    pub settings: Value,
}

impl DeviceSpec {
    /// The keys that every device has. A device takes them when it is made.
    pub const KEYS: [&str; 6] = ["name", "class", "msix", "express", "pic", "socket"];

    /// Removes the keys that every device has from `settings`. The others are the class's own.
    pub fn new(
        name: String,
        class: String,
        mut settings: Map<String, Value>,
    ) -> Result<DeviceSpec, String> {
        // Its socket would be one of the bus's own.
        if rundir::OWN.iter().any(|own| own.strip_suffix(".sock") == Some(name.as_str())) {
            return Err(format!(
                "\"name\" is {name:?}, but the bus itself uses the socket of that name; use \
                 another name"
            ));
        }
        let mut flag = |key: &str| match settings.remove(key) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(value),
            Some(other) => Err(format!("{key:?} must be true or false, not {other}")),
        };
        let options = Options { msix: flag("msix")?, express: flag("express")? };
        let pic = match settings.remove("pic") {
            None => None,
            Some(Value::String(name)) => Some(name),
            Some(other) => {
                return Err(format!(
                    "\"pic\" must be the name of a device of class pic, not {other}"
                ));
            }
        };
        let of_function = [("msix", options.msix), ("express", options.express)];
        let first = of_function.into_iter().chain([("pic", pic.is_some())]).find(|(_, set)| *set);
        if let Some((key, _)) =
            first.filter(|_| settings.get("transport") == Some(&"vhost-user".into()))
        {
            return Err(format!(
                "{key:?} is for the PCI function that the bus serves; with transport = \
                 \"vhost-user\" the VMM has the function, so leave it out"
            ));
        }
        let socket = match settings.remove("socket") {
            None => SocketSpec::default(),
            Some(value) => SocketSpec::parse(&value).map_err(|error| error.to_string())?,
        };
        let is_own = |path: &PathBuf| rundir::OWN.iter().any(|own| path == Path::new(own));
        if let Some(path) = socket.path.as_ref().filter(|path| is_own(path)) {
            return Err(format!(
                "\"socket\" is {path:?}, but the bus itself uses that socket; use another path"
            ));
        }
        Ok(DeviceSpec { name, class, options, pic, socket, settings: Value::Object(settings) })
    }

    /// Checks the settings that every device has against the class, which one of `classes` is. A
    /// class that is not there is not this method's business.
    ///
    /// # Errors
    /// A device of the class cannot have such a setting. The text begins with the key.
    pub fn check_class<'a>(
        &self,
        mut classes: impl Iterator<Item = &'a dyn DeviceClass>,
    ) -> Result<(), BusError> {
        let class = classes.find(|class| class.name() == self.class);
        if self.pic.is_none() || class.is_none_or(DeviceClass::has_vbus_drivers) {
            return Ok(());
        }
        let class = &self.class;
        let text = format!("\"pic\" is for drivers of vbus; a device of class {class} has others");
        Err(BusError::Create(self.name.clone(), CreateError(text)))
    }

    /// The keys in which this differs from `old`, and whether the class's own settings are all of
    /// them.
    pub fn changed_keys(&self, old: &DeviceSpec) -> (Vec<String>, bool) {
        let mut keys = Vec::new();
        for (key, differs) in [
            ("class", self.class != old.class),
            ("msix", self.options.msix != old.options.msix),
            ("express", self.options.express != old.options.express),
            ("pic", self.pic != old.pic),
            ("socket", self.socket != old.socket),
        ] {
            if differs {
                keys.push(key.to_owned());
            }
        }
        let is_own = keys.is_empty();
        keys.extend(changed(&old.settings, &self.settings));
        (keys, is_own)
    }

    /// The path of its socket. A relative path begins in the directory of the bus.
    pub fn socket_path(&self) -> PathBuf {
        self.socket.path.clone().unwrap_or_else(|| format!("{}.sock", self.name).into())
    }
}

/// The text of a configuration file. Errors point to places in it.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    text: String,
    /// The places of each device in the text.
    devices: Vec<DevicePlaces>,
}

/// Where the parts of a device's configuration are in the text.
#[derive(Debug)]
struct DevicePlaces {
    /// The device's name.
    text: String,
    /// Where the name is.
    name: Range<usize>,
    /// Where the class is.
    class: Range<usize>,
    /// Its keys and the place of each. A key within a list of tables is written as
    /// `pages[2].owner`.
    keys: Vec<(String, Range<usize>)>,
}

/// Adds the places of everything within `value`, the value of `key`, to `keys`.
fn note(key: &str, value: &Spanned<DeValue<'_>>, keys: &mut Vec<(String, Range<usize>)>) {
    match value.get_ref() {
        DeValue::Array(list) => {
            for (at, item) in list.iter().enumerate() {
                let key = format!("{key}[{at}]");
                keys.push((key.clone(), item.span()));
                note(&key, item, keys);
            }
        }
        DeValue::Table(table) => {
            for (name, value) in table {
                let key = format!("{key}.{}", name.get_ref());
                keys.push((key.clone(), name.span()));
                note(&key, value, keys);
            }
        }
        _ => {}
    }
}

/// A fault of a configuration. Its text has the place and shows the line.
#[derive(Debug)]
pub struct ConfigError(String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// A fault: the bytes of the text that it is about, and a description.
type Fault = (Range<usize>, String);

/// Reads a configuration file.
pub fn read(path: &Path) -> Result<(Config, Source), ConfigError> {
    let file = File::open(path).map_err(|error| fault(path, &error))?;
    parse(path, text_of(path, &file)?, Accounts::Check)
}

/// Reads the text of the configuration file `path`, which is open as `file`.
pub fn text_of(path: &Path, file: &File) -> Result<String, ConfigError> {
    // A file may grow, and what is no file has no length.
    let mut text = String::new();
    file.take(FILE_MAX + 1).read_to_string(&mut text).map_err(|error| fault(path, &error))?;
    if text.len() as u64 > FILE_MAX {
        return Err(fault(path, &format_args!("larger than {FILE_MAX} bytes")));
    }
    Ok(text)
}

fn fault(path: &Path, what: &dyn fmt::Display) -> ConfigError {
    ConfigError(format!("{}: {what}", path.display()))
}

/// Reads the text of the configuration file `path`.
pub fn parse(
    path: &Path,
    text: String,
    accounts: Accounts,
) -> Result<(Config, Source), ConfigError> {
    let mut source = Source { path: path.to_owned(), text, devices: Vec::new() };
    let (mut config, mut places) = (Config::default(), Vec::new());
    match fill(&source.text, accounts, &mut config, &mut places) {
        Ok(()) => {
            source.devices = places;
            Ok((config, source))
        }
        Err((span, text)) => Err(source.point(&span, &text)),
    }
}

impl Source {
    /// Makes an error about the bytes `span` of the text. It has the file, the line number, the
    /// column, the line itself, and a mark under the bytes.
    fn point(&self, span: &Range<usize>, message: &str) -> ConfigError {
        let mut start = span.start.min(self.text.len());
        while !self.text.is_char_boundary(start) {
            start -= 1;
        }
        let before = &self.text[..start];
        let number = before.matches('\n').count() + 1;
        let begin = before.rfind('\n').map_or(0, |at| at + 1);
        let line = self.text[begin..].lines().next().unwrap_or("");
        let column = before[begin..].chars().count();
        let room = line.chars().count().saturating_sub(column).max(1);
        let carets = self.text.get(start..span.end).map_or(1, |s| s.chars().count()).clamp(1, room);
        let gutter = number.to_string();
        let indent: String =
            line.chars().take(column).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        ConfigError(format!(
            "{path}:{number}:{column}: {message}\n {gutter} | {line}\n {blank} | {indent}{carets}",
            path = self.path.display(),
            column = column + 1,
            blank = " ".repeat(gutter.len()),
            carets = "^".repeat(carets),
        ))
    }

    /// Makes an error from `message`, which says why device number `device` of the configuration
    /// could not be made. If `message` begins with a key in quotes, the error points to that
    /// setting. Otherwise it points to the device's class or name.
    pub fn device_error(&self, device: usize, message: &str) -> ConfigError {
        let Some(places) = self.devices.get(device) else { return ConfigError(message.into()) };
        let begins = |words: &str, place: &Range<usize>| {
            let of_device = message.strip_prefix(words).unwrap_or(message);
            let key = of_device.strip_prefix('"').and_then(|rest| rest.split_once('"'))?.0;
            let known = places.keys.iter().find(|(known, _)| known == key);
            Some(known.map_or(place, |(_, place)| place).clone())
        };
        let about =
            if message.starts_with("no device class") { &places.class } else { &places.name };
        let place = begins(&format!("device {:?}: ", places.text), about);
        self.point(&place.unwrap_or_else(|| about.clone()), message)
    }
}

fn fill(
    text: &str,
    accounts: Accounts,
    config: &mut Config,
    places: &mut Vec<DevicePlaces>,
) -> Result<(), Fault> {
    let root = DeTable::parse(text)
        .map_err(|e| (e.span().unwrap_or(0..0), e.message().trim_end().to_owned()))?;
    for (key, value) in root.get_ref() {
        match &**key.get_ref() {
            "bus" => bus(table(value, "\"bus\"")?, config)?,
            "device" => {
                let DeValue::Array(devices) = value.get_ref() else {
                    return Err((
                        key.span(),
                        "a device begins with [[device]], with double brackets".into(),
                    ));
                };
                for entry in devices.iter() {
                    let (spec, place) = device(table(entry, "a device")?, entry.span(), accounts)?;
                    if config.devices.iter().any(|d| d.name == spec.name) {
                        return Err((
                            place.name,
                            format!("there are two devices called {:?}", spec.name),
                        ));
                    }
                    let path = spec.socket_path();
                    if let Some(other) = config.devices.iter().find(|d| d.socket_path() == path) {
                        let key = place.keys.iter().find(|(key, _)| key == "socket");
                        let text = format!("device {:?} has the same socket", other.name);
                        return Err((key.map_or(place.name, |(_, place)| place.clone()), text));
                    }
                    config.devices.push(spec);
                    places.push(place);
                }
            }
            "control" => {
                let parse = |table: &Value| ControlSpec::parse(table, accounts);
                config.control = settings(value, "control", parse)?;
            }
            "allow" => config.allow = settings(value, "allow", AllowSpec::parse)?,
            "metrics" => {
                let parse = |table: &Value| MetricsSpec::parse(table, accounts);
                config.metrics = settings(value, "metrics", parse)?;
            }
            other => {
                let known = ["bus", "control", "metrics", "allow", "device"];
                return Err((key.span(), unknown(other, "here", &known)));
            }
        }
    }
    Ok(())
}

/// Reads the table `value`, which is called `name`, by `parse`. An error of `parse` begins with a
/// key in quotes, and points to it.
fn settings<T>(
    value: &Spanned<DeValue<'_>>,
    name: &str,
    parse: impl FnOnce(&Value) -> Result<T, CreateError>,
) -> Result<T, Fault> {
    table(value, &format!("{name:?}"))?;
    let mut keys = Vec::new();
    note(name, value, &mut keys);
    let table = json(value.get_ref()).map_err(|text| (value.span(), text))?;
    parse(&table).map_err(|error| {
        let text = error.to_string();
        let key = text.strip_prefix('"').and_then(|rest| rest.split_once('"'));
        let key = key.map(|(key, _)| format!("{name}.{key}"));
        let place = keys.iter().find(|(known, _)| Some(known) == key.as_ref());
        (place.map_or(value.span(), |(_, place)| place.clone()), text)
    })
}

fn bus(table: &DeTable<'_>, config: &mut Config) -> Result<(), Fault> {
    const KEYS: [&str; 5] = ["workers", "poll-us", "budget", "guest-memory-mib", "log"];
    for (key, value) in table {
        match &**key.get_ref() {
            "workers" => {
                config.tuning.workers =
                    usize::try_from(number(value, 1, WORKERS_MAX)?).unwrap_or(1);
            }
            "poll-us" => {
                config.tuning.poll_max = Duration::from_micros(number(value, 0, POLL_US_MAX)?)
            }
            "budget" => {
                config.tuning.budget = u32::try_from(number(value, 1, BUDGET_MAX)?).unwrap_or(1)
            }
            "guest-memory-mib" => {
                config.guest_memory = Some(number(value, 1, GUEST_MEMORY_MIB_MAX)? << 20);
            }
            "log" => {
                let level = string(value)?;
                vbus_cli::log::check_level(&level).map_err(|e| (value.span(), e.to_string()))?;
                config.log = Some(level);
            }
            "trust-memory" => {
                let gone = "there is no setting \"trust-memory\" any more: the bus takes memory files \
                            that can shrink, and is safe with them; remove this line";
                return Err((key.span(), gone.into()));
            }
            other => return Err((key.span(), unknown(other, "for the bus", &KEYS))),
        }
    }
    Ok(())
}

fn device(
    table: &DeTable<'_>,
    whole: Range<usize>,
    accounts: Accounts,
) -> Result<(DeviceSpec, DevicePlaces), Fault> {
    let (mut name, mut class, mut settings, mut keys) = (None, None, Map::new(), Vec::new());
    let (mut name_place, mut class_place) = (whole.clone(), whole.clone());
    for (key, value) in table {
        keys.push((key.get_ref().to_string(), key.span()));
        note(key.get_ref(), value, &mut keys);
        match &**key.get_ref() {
            "name" => {
                name = Some(string(value)?);
                name_place = value.span();
            }
            "class" => {
                class = Some(string(value)?);
                class_place = value.span();
            }
            other => {
                settings.insert(
                    other.to_owned(),
                    json(value.get_ref()).map_err(|e| (value.span(), e))?,
                );
            }
        }
    }
    let missing = |key: &str| (whole.clone(), format!("this device has no {key:?}"));
    let (name, class) =
        (name.ok_or_else(|| missing("name"))?, class.ok_or_else(|| missing("class"))?);
    let places = DevicePlaces { text: name.clone(), name: name_place, class: class_place, keys };
    let spec = DeviceSpec::new(name, class, settings).and_then(|spec| {
        if accounts == Accounts::Check {
            spec.socket.check().map_err(|error| error.to_string())?;
        }
        Ok(spec)
    });
    let spec = spec.map_err(|e| {
        let place = places
            .keys
            .iter()
            .find(|(key, _)| e.starts_with(&format!("{key:?}")))
            .map(|(_, place)| place.clone());
        (place.unwrap_or(whole), e)
    })?;
    Ok((spec, places))
}

fn table<'a, 'i>(value: &'a Spanned<DeValue<'i>>, what: &str) -> Result<&'a DeTable<'i>, Fault> {
    value.get_ref().as_table().ok_or_else(|| (value.span(), format!("{what} must be a table")))
}

fn string(value: &Spanned<DeValue<'_>>) -> Result<String, Fault> {
    value
        .get_ref()
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| (value.span(), "must be a string in quotes".into()))
}

fn number(value: &Spanned<DeValue<'_>>, least: u64, most: u64) -> Result<u64, Fault> {
    let number =
        json(value.get_ref()).ok().and_then(|v| v.as_u64()).filter(|n| (least..=most).contains(n));
    number.ok_or_else(|| (value.span(), format!("must be a number from {least} to {most}")))
}

/// Parses a value of the command line as in the configuration file. A text that is no value there
/// is a string.
pub fn setting(text: &str) -> Value {
    let parsed = DeValue::parse(text).ok().and_then(|value| json(value.get_ref()).ok());
    parsed.unwrap_or_else(|| Value::String(text.into()))
}

fn json(value: &DeValue<'_>) -> Result<Value, String> {
    Ok(match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Boolean(value) => Value::Bool(*value),
        DeValue::Integer(digits) => i64::from_str_radix(digits.as_str(), digits.radix())
            .map(Value::from)
            .map_err(|_| format!("{digits} is too large for a number"))?,
        DeValue::Float(digits) => {
            let float: f64 =
                digits.as_str().parse().map_err(|_| format!("{digits} is not a number"))?;
            Value::from(float)
        }
        DeValue::Datetime(time) => return Err(format!("{time}: put dates and times in quotes")),
        DeValue::Array(list) => {
            Value::Array(list.iter().map(|item| json(item.get_ref())).collect::<Result<_, _>>()?)
        }
        DeValue::Table(table) => {
            let mut map = Map::new();
            for (key, value) in table {
                map.insert(key.get_ref().to_string(), json(value.get_ref())?);
            }
            Value::Object(map)
        }
    })
}

/// The message for an unknown key. It names the known key that is most like it, or else all known
/// keys.
fn unknown(key: &str, place: &str, known: &[&str]) -> String {
    match meant(key, known) {
        Some(meant) => format!("unknown key {key:?} {place}; did you mean {meant:?}?"),
        None => format!("unknown key {key:?} {place}; the known keys are: {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(text: &str) -> Result<(Config, Source), String> {
        parse(Path::new("bus.toml"), text.into(), Accounts::Check).map_err(|e| e.to_string())
    }

    #[test]
    fn what_has_no_end_is_too_large() {
        let error = read(Path::new("/dev/zero")).unwrap_err().to_string();
        assert_eq!(error, "/dev/zero: larger than 1048576 bytes");
    }

    #[test]
    fn a_few_lines_are_enough() {
        let (config, source) = of("[bus]\nworkers = 3\npoll-us = 0\n\n\
            [[device]]\nname = \"n\"\nclass = \"venet\"\nmsix = true\npic = \"pic0\"\nmtu = 9_000\nlist = [{ a = 0x10 }]\n")
        .unwrap();
        assert_eq!((config.tuning.workers, config.tuning.poll_max), (3, Duration::ZERO));
        let device = &config.devices[0];
        assert_eq!((device.name.as_str(), device.class.as_str()), ("n", "venet"));
        assert_eq!(device.options, Options { msix: true, express: false });
        assert_eq!(device.pic.as_deref(), Some("pic0"));
        assert_eq!(device.settings, json!({ "mtu": 9000, "list": [{ "a": 16 }] }));
        let error = |text: &str| source.device_error(0, text).to_string();
        let mtu = error("device \"n\": \"mtu\" is 9000; use less");
        assert_eq!(
            mtu,
            "bus.toml:10:1: device \"n\": \"mtu\" is 9000; use less\n 10 | mtu = 9_000\n    | ^^^"
        );
        let nested = error("\"list[0].a\" is 16; use less");
        assert!(nested.contains("\n 11 | list = [{ a = 0x10 }]\n    |           ^"), "{nested}");
        let class = error("no device class \"venet\"; there are: mtu");
        assert!(class.starts_with("bus.toml:7:9: no device class"), "{class}");
        let error = source.device_error(0, "no luck").to_string();
        assert!(error.starts_with("bus.toml:6:8: no luck\n"), "{error}");
        assert!(of("").unwrap().0.devices.is_empty());
    }

    #[test]
    fn a_default_that_is_written_out_is_no_change() {
        let none = of("").unwrap().0;
        let Tuning { workers, budget, poll_max } = none.tuning;
        let poll = poll_max.as_micros();
        let text = format!("[bus]\nworkers = {workers}\nbudget = {budget}\npoll-us = {poll}\n");
        let written = of(&text).unwrap().0;
        assert_eq!(written.changed_tuning(&none).count(), 0);
        let other = of("[bus]\nworkers = 64\nbudget = 65\n").unwrap().0;
        assert_eq!(other.changed_tuning(&none).collect::<Vec<_>>(), ["workers", "budget"]);
        assert_eq!(none.changed_tuning(&other).collect::<Vec<_>>(), ["workers", "budget"]);
    }

    #[test]
    fn errors_show_the_line() {
        for (text, expect) in [
            (
                "[buss]\n",
                "bus.toml:1:2: unknown key \"buss\" here; did you mean \"bus\"?\n 1 | [buss]\n   |  ^^^^",
            ),
            (
                "\n\n[bus]\nworker = 1\n",
                "bus.toml:4:1: unknown key \"worker\" for the bus; did you mean \"workers\"?\n 4 | worker = 1\n   | ^^^^^^",
            ),
            (
                "[bus]\nzzz = 1\n",
                "bus.toml:2:1: unknown key \"zzz\" for the bus; the known keys are: workers, poll-us, budget, guest-memory-mib, log",
            ),
            (
                "[bus]\ntrust-memory = true\n",
                "bus.toml:2:1: there is no setting \"trust-memory\" any more: the bus takes memory files that can shrink, and is safe with them; remove this line\n 2 | trust-memory = true\n   | ^^^^^^^^^^^^",
            ),
            (
                "[bus]\nworkers = 0\n",
                "bus.toml:2:11: must be a number from 1 to 64\n 2 | workers = 0\n   |           ^",
            ),
            (
                "[bus]\nlog = \"loud\"\n",
                "bus.toml:2:7: \"loud\" is no level of the log; use one of off, error, warn",
            ),
            (
                "[[device]]\nname=\"metrics\"\nclass=\"c\"\n",
                "bus.toml:2:1: \"name\" is \"metrics\", but the bus itself uses",
            ),
            (
                "[[device]]\nname=\"x\"\nclass=\"c\"\nsocket=\"y.sock\"\n[[device]]\nname=\"y\"\nclass=\"c\"\n",
                "bus.toml:6:6: device \"x\" has the same socket",
            ),
            ("[bus]\nworkers = \"2\"\n", "bus.toml:2:11: must be a number"),
            ("[device]\nname = \"x\"\n", "bus.toml:1:2: a device begins with [[device]]"),
            ("[[device]]\nname = \"x\"\n", "bus.toml:1:1: this device has no \"class\""),
            ("[[device]]\nname = 1\n", "bus.toml:2:8: must be a string"),
            (
                "[[device]]\nname=\"x\"\nclass=\"c\"\ntransport=\"vhost-user\"\nmsix=true\n",
                "bus.toml:5:1: \"msix\" is for the PCI function that the bus serves; with",
            ),
            (
                "[[device]]\nname=\"x\"\nclass=\"c\"\nmsix=1\n",
                "bus.toml:4:1: \"msix\" must be true or false",
            ),
            (
                "[[device]]\nname=\"x\"\nclass=\"c\"\npic=1\n",
                "bus.toml:4:1: \"pic\" must be the name of a device",
            ),
            (
                "[[device]]\nname=\"x\"\nclass=\"c\"\n[[device]]\nname=\"x\"\nclass=\"c\"\n",
                "bus.toml:5:6: there are two",
            ),
            ("[[device]]\nname = \"x\n", "bus.toml:2:"),
            (
                "[control]\nread-acess = []\n",
                "bus.toml:2:1: \"read-acess\" is no setting here; did you mean \"read-access\"?",
            ),
            (
                "[control]\nread-access = [\"0\", \"no one\"]\n",
                "bus.toml:2:21: \"read-access[1]\" is \"no one\": there is no group \"no one\" here",
            ),
            (
                "[[device]]\nname=\"x\"\nclass=\"c\"\nsocket={ mode=\"9\" }\n",
                "bus.toml:4:10: \"socket.mode\" is \"9\"; use an octal number such as \"0660\"",
            ),
            (
                "[[device]]\nname=\"x\"\nclass=\"c\"\nsocket={ group=\"no one\" }\n",
                "bus.toml:4:10: \"socket.group\" is \"no one\": there is no group",
            ),
            ("x = 99999999999999999999\n", "bus.toml:1:1: unknown key"),
            (
                "[[device]]\nname=\"x\"\nclass=\"c\"\nn=99999999999999999999\n",
                "bus.toml:4:3: 99999999999999999999 is too large",
            ),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.starts_with(expect), "{text:?} gave\n{error}");
        }
    }

    #[test]
    fn settings_of_the_command_line_are_values_or_else_strings() {
        assert_eq!(setting("9000"), json!(9000));
        assert_eq!(setting("true"), json!(true));
        assert_eq!(setting("switch"), json!("switch"));
        assert_eq!(setting("52:54:00:00:00:01"), json!("52:54:00:00:00:01"));
        assert_eq!(setting("\"7\""), json!("7"));
        assert_eq!(setting("[{name=\"a\", bytes=8}]"), json!([{ "name": "a", "bytes": 8 }]));
        assert_eq!(setting(""), json!(""));
    }
}
