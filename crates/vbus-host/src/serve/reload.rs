// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads the configuration file again, and changes the bus to what it says (spec/control.md,
//! "Reading the configuration again"). What cannot change while the bus runs, or while a device is
//! in use, stays as it is and is reported.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, TryLockError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use vbus_cli::log;
use vbus_core::memory::limit_pages;
use vbus_core::{Endpoint, lock};

use super::host::Host;
use super::repeat::Repeat;
use crate::access::Accounts;
use crate::config::{self, Config, DeviceSpec, Source};
use crate::rights::Rights;
use crate::supervisor::{AllowSpec, Permits};

/// How long the end of the bus waits for a reload.
const TIMEOUT: Duration = Duration::from_secs(20);
/// The time between two looks whether a reload has ended.
const PAUSE: Duration = Duration::from_millis(10);
/// The level of the log if the configuration names none.
const LEVEL: &str = "info";

/// Reads the configuration of a bus again.
pub struct Reloader {
    host: Arc<Host>,
    /// The configuration that the bus has now. One thread reloads at a time.
    current: Mutex<Current>,
    rights: Arc<Mutex<Rights>>,
    /// The folders in which the program's own classes may open files, if that cannot change.
    fixed_folders: Option<Vec<PathBuf>>,
    /// What SIGHUP asked for.
    asked: Repeat,
    /// The bus is ending.
    is_ending: Mutex<bool>,
}

struct Current {
    config: Config,
    devices: Vec<Made>,
}

/// A device that the bus has of its configuration.
struct Made {
    spec: DeviceSpec,
    /// Another device may have its name by now, which a control client added.
    endpoint: Weak<Endpoint>,
}

impl Made {
    fn new(spec: DeviceSpec, endpoint: &Arc<Endpoint>) -> Made {
        Made { spec, endpoint: Arc::downgrade(endpoint) }
    }

    fn is(&self, endpoint: &Arc<Endpoint>) -> bool {
        std::ptr::eq(self.endpoint.as_ptr(), Arc::as_ptr(endpoint))
    }
}

/// What a reload did.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// What has changed.
    changed: Vec<Line>,
    /// What stays as it was, and why.
    kept: Vec<Line>,
    /// What went wrong.
    failed: Vec<Line>,
}

/// A line of a report.
#[derive(Debug, Serialize)]
struct Line {
    /// What it is about: `bus`, `control`, `metrics`, `allow`, `log`, or `device NAME`.
    subject: String,
    text: String,
    /// For what is kept: what must happen first, `restart` of the bus or `release` of the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    needs: Option<&'static str>,
}

const RESTART: &str = "restart";
const RELEASE: &str = "release";

impl Report {
    fn changed(&mut self, subject: &str, text: impl Into<String>) {
        self.changed.push(Line { subject: subject.into(), text: text.into(), needs: None });
    }

    fn kept(&mut self, subject: &str, text: impl Into<String>, needs: &'static str) {
        self.kept.push(Line { subject: subject.into(), text: text.into(), needs: Some(needs) });
    }

    fn failed(&mut self, subject: &str, error: &anyhow::Error) {
        let text = format!("{error:#}");
        self.failed.push(Line { subject: subject.into(), text, needs: None });
    }

    /// Puts the report into the log.
    fn log(&self) {
        for Line { subject, text, .. } in &self.changed {
            tracing::info!("reload: {subject}: {text}");
        }
        for Line { subject, text, .. } in &self.kept {
            tracing::warn!("reload: {subject}: {text}");
        }
        for Line { subject, text, .. } in &self.failed {
            tracing::error!("reload: {subject}: {text}");
        }
        if self.changed.is_empty() && self.kept.is_empty() && self.failed.is_empty() {
            tracing::info!("reload: nothing has changed");
        }
    }
}

/// Tells how far a reload is: what comes next, and how many of all steps are done.
pub type Tell<'a> = &'a mut dyn FnMut(&str, usize, usize);

impl Reloader {
    /// `config` is what `host` was started with, without its devices: see [`made`](Self::made).
    /// `rights` are those of control clients. `is_fixed`: the process can open files only where it
    /// could at the start.
    pub fn new(
        host: Arc<Host>,
        config: Config,
        rights: Arc<Mutex<Rights>>,
        is_fixed: bool,
    ) -> Reloader {
        let fixed_folders = is_fixed.then(|| config.allow.paths.clone());
        let current = Mutex::new(Current { config, devices: Vec::new() });
        let (asked, is_ending) = (Repeat::default(), Mutex::new(false));
        Reloader { host, current, rights, fixed_folders, asked, is_ending }
    }

    /// Takes note of a device that was made for the configuration.
    pub fn made(&self, spec: &DeviceSpec, endpoint: &Arc<Endpoint>) {
        lock(&self.current).devices.push(Made::new(spec.clone(), endpoint));
    }

    /// The names of the devices that the bus has of its configuration.
    pub fn names(&self) -> BTreeSet<String> {
        let current = lock(&self.current);
        let is_there = |made: &&Made| self.host.get(&made.spec.name).is_ok_and(|now| made.is(&now));
        current.devices.iter().filter(is_there).map(|made| made.spec.name.clone()).collect()
    }

    /// The bound of the guests' memory that the configuration has, in bytes.
    pub fn guest_memory(&self) -> Option<u64> {
        lock(&self.current).config.guest_memory
    }

    /// Reads the configuration file again. The log gets the report too.
    ///
    /// # Errors
    /// The bus has no configuration file, or the file cannot be read or is wrong. Then nothing has
    /// changed.
    pub fn reload(&self, tell: Tell<'_>) -> Result<Report> {
        let _turn = self.host.change();
        let mut current = lock(&self.current);
        if *lock(&self.is_ending) {
            bail!("the bus is ending");
        }
        let supervisor = self.host.supervisor();
        let (answer, text) = supervisor.configuration()?;
        let (new, source) = config::parse(Path::new(&answer.path), text, Accounts::Known)?;
        self.check(&new, &source)?;
        supervisor.adopt()?;
        let mut report = Report::default();
        self.change_bus(&mut current.config, &new, answer.rights, &mut report);
        current.devices = self.change_devices(&current.devices, new.devices, &mut report, tell);
        // Until now, a device could be made again as it was.
        if let Err(error) = supervisor.settle() {
            report.failed("allow", &error.into());
        }
        drop(current);
        self.host.tell_keeper();
        report.log();
        Ok(report)
    }

    /// Starts a reload on a thread of its own, for SIGHUP. If one is under way, another one follows
    /// it.
    pub fn reload_aside(self: &Arc<Self>) {
        let this = self.clone();
        self.asked.ask("vbus-reload", move || {
            if let Err(error) = this.reload(&mut |_, _, _| {}) {
                tracing::error!("reload: nothing has changed: {error:#}");
            }
        });
    }

    /// Waits for the end of a reload, but not for ever. There will be no other.
    pub fn end(&self) {
        *lock(&self.is_ending) = true;
        let begun = Instant::now();
        while let Err(TryLockError::WouldBlock) = self.current.try_lock() {
            if begun.elapsed() >= TIMEOUT {
                tracing::warn!("a reload does not end; the bus ends without it");
                return;
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Checks the settings of all devices before anything changes.
    fn check(&self, new: &Config, source: &Source) -> Result<()> {
        for (number, spec) in new.devices.iter().enumerate() {
            self.host
                .check(spec)
                .map_err(|error| source.device_error(number, &format!("{error:#}")))?;
        }
        Ok(())
    }

    /// Changes what is not a device.
    fn change_bus(&self, old: &mut Config, new: &Config, rights: Rights, report: &mut Report) {
        if new.log != old.log {
            let level = new.log.as_deref().unwrap_or(LEVEL);
            match log::set_level(level) {
                Ok(true) => {
                    report.changed("log", format!("the level is {level}"));
                    old.log.clone_from(&new.log);
                }
                _ => report.kept("log", "VBUS_LOG has set the level of the log", RESTART),
            }
        }
        if old.guest_memory != new.guest_memory {
            limit_pages(new.guest_memory);
            report.changed("bus", "\"guest-memory-mib\" holds for what is mapped from now on");
            old.guest_memory = new.guest_memory;
        }
        if old.allow != new.allow {
            report.changed("allow", "other devices may be added from now on");
            old.allow = new.allow.clone();
        }
        if self.fixed_folders.as_ref().is_some_and(|folders| *folders != new.allow.paths) {
            let text = "this program's own classes open files only in the folders that \"paths\" \
                        had at the start, until the bus restarts";
            report.kept("allow", text, RESTART);
        }
        if new.is_shared() && !self.host.is_shared() {
            let dir = self.host.dir().display();
            let text =
                format!("other users cannot reach the sockets that are for them: chmod 711 {dir}");
            report.failed("bus", &anyhow::Error::msg(text));
        }
        let mut now = lock(&self.rights);
        if *now != rights {
            *now = rights;
            report.changed("control", "other clients may control the bus from now on");
        }
        drop(now);
        if old.control.access() != new.control.access() {
            let text = "owner, group and mode of the control socket stay until the bus restarts";
            report.kept("control", text, RESTART);
        }
        if old.metrics != new.metrics {
            report.kept("metrics", "the sockets stay until the bus restarts", RESTART);
        }
        for key in new.changed_tuning(old) {
            report.kept("bus", format!("{key:?} stays until the bus restarts"), RESTART);
        }
    }

    /// Changes the devices from `old` to `new`. Returns the devices that the bus then has of its
    /// configuration.
    fn change_devices(
        &self,
        old: &[Made],
        new: Vec<DeviceSpec>,
        report: &mut Report,
        tell: Tell<'_>,
    ) -> Vec<Made> {
        let host = &*self.host;
        let wanted: BTreeMap<_, _> = new.iter().map(|spec| (spec.name.clone(), spec)).collect();
        let total = old.len() + new.len();
        let (mut has, mut waits) = (Vec::new(), Vec::new());
        let stays = |made: &Made| Made { spec: made.spec.clone(), endpoint: made.endpoint.clone() };
        for (done, made) in old.iter().enumerate() {
            let spec = &made.spec;
            let name = &*spec.name;
            let subject = format!("device {name}");
            tell(&subject, done, total);
            if !host.get(name).is_ok_and(|now| made.is(&now)) {
                continue; // Somebody removed it by hand, and perhaps added another one.
            }
            let next = wanted.get(name);
            if next.is_some_and(|next| *next == spec) {
                has.push(stays(made));
                continue;
            }
            let (keys, reason) = match next {
                None => (Vec::new(), String::new()),
                Some(next) => match host.reconfigure(next) {
                    Ok(keys) => {
                        // None, if somebody has set them by hand already.
                        if !keys.is_empty() {
                            report.changed(&subject, format!("changed {}", keys.join(", ")));
                        }
                        has.push(Made { spec: (*next).clone(), ..stays(made) });
                        continue;
                    }
                    Err((keys, reason)) => (keys, reason),
                },
            };
            match host.remove(name, false) {
                Ok(()) if next.is_some() => waits.push((spec, keys)),
                Ok(()) => report.changed(&subject, "removed"),
                Err(_) if host.is_connected(name) => {
                    let keys = keys.join(", ");
                    let text = match next {
                        None => {
                            "it is in use and stays on the bus; unplug it, and reload".to_owned()
                        }
                        Some(_) => format!(
                            "{keys} cannot change while it is in use ({reason}); unplug it, and \
                             reload"
                        ),
                    };
                    let lost = lost_rights(spec, next.copied());
                    report.kept(&subject, format!("{text}{lost}"), RELEASE);
                    has.push(stays(made));
                }
                Err(error) => {
                    report.failed(&subject, &error);
                    has.push(stays(made));
                }
            }
        }
        for (done, spec) in new.into_iter().enumerate() {
            let name = spec.name.clone();
            if has.iter().any(|made| made.spec.name == name) {
                continue;
            }
            let subject = format!("device {name}");
            tell(&subject, old.len() + done, total);
            if host.get(&name).is_ok() {
                let text = "it was added by hand and stays as it is; remove it, and reload";
                report.kept(&subject, text, RELEASE);
                continue;
            }
            let was = waits.iter().find(|(was, _)| was.name == name);
            match (host.add(spec.clone()).context("it cannot be made"), was) {
                (Ok(endpoint), _) => {
                    let text = was.map_or_else(
                        || "added".to_owned(),
                        |(_, keys)| format!("made anew, because {} changed", keys.join(", ")),
                    );
                    report.changed(&subject, text);
                    has.push(Made::new(spec, &endpoint));
                }
                (Err(error), None) => report.failed(&subject, &error),
                (Err(error), Some((was, _))) => match host.add((*was).clone()) {
                    Ok(endpoint) => {
                        report.failed(&subject, &error.context("it is again as it was"));
                        has.push(Made::new((*was).clone(), &endpoint));
                    }
                    Err(again) => {
                        let text = format!("it is gone, and cannot be made as it was ({again:#})");
                        report.failed(&subject, &error.context(text));
                    }
                },
            }
        }
        has
    }
}

/// What the report says of a device that stays as `old` says, while the file says `next`: whether
/// it needs what the file does not name any more.
fn lost_rights(old: &DeviceSpec, next: Option<&DeviceSpec>) -> &'static str {
    let needs = |specs| Permits::new(Path::new("/"), &AllowSpec::default(), specs);
    let next = needs(next.map(std::slice::from_ref).unwrap_or_default());
    if next.or(&needs(std::slice::from_ref(old))) == next {
        ""
    } else {
        "; until then it keeps what it has open, and may open anew only what the file names now"
    }
}
