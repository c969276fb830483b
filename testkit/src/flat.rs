// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest without an operating system (guests/flat): its devices, and the lines that it reports.

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

fn device(name: &str, class: &str, settings: &str) -> String {
    format!("[[device]]\nname = \"{name}\"\nclass = \"{class}\"\n{settings}\n")
}

/// A bus's configuration with the devices that the guest's tests look for. Each device gets
/// the lines `more` too.
pub fn devices(more: &str) -> String {
    let device = |name: &str, class: &str, settings: &str| {
        device(name, class, &format!("{settings}\n{more}"))
    };
    let pages = r#"pages = [{ name = "setpoint", bytes = 64, owner = "device", initial = "value-0" },
        { name = "heartbeat", bytes = 64, owner = "driver" }]"#;
    [
        device("net-a", "venet", "backend = \"switch\"\nbroadcast-rate = 0"),
        device("net-b", "venet", "backend = \"switch\"\nbroadcast-rate = 0\npic = \"pic\""),
        device("net-c", "venet", "backend = \"switch\"\nbroadcast-rate = 0\npic = \"pic\""),
        device("pic", "pic", ""),
        device("source", "venet", "backend = \"null\"\nsource-bytes = 128"),
        device("values", "state", &pages.replace('\n', "")),
    ]
    .concat()
}

/// A configuration with one NIC that sends and `receivers` NICs that receive. The interrupt
/// controller can route the receivers' interrupts.
pub fn with_receivers(receivers: u32) -> String {
    let routed = "backend = \"switch\"\nbroadcast-rate = 0\npic = \"pic\"";
    let mut config = device("sender", "venet", "backend = \"switch\"\nbroadcast-rate = 0")
        + &device("pic", "pic", "");
    (0..receivers).for_each(|n| config.push_str(&device(&format!("net{n}"), "venet", routed)));
    config
}

/// The same, and the interrupt controller has one message for each of `processors` processors.
pub fn with_processors(processors: u32, receivers: u32) -> String {
    let alone = device("pic", "pic", "");
    let each = device("pic", "pic", &format!("cpus = {processors}\nmsix = true"));
    with_receivers(receivers).replace(&alone, &each)
}

/// The names of the devices of a configuration from this module, in its order.
pub fn device_names(config: &str) -> Vec<&str> {
    // A page's name is never at the beginning of a line.
    config
        .lines()
        .filter_map(|line| line.strip_prefix("name = \"").and_then(|rest| rest.strip_suffix('"')))
        .collect()
}

/// The JSON objects that the guest has reported.
#[derive(Default)]
pub struct Report(Vec<Value>);

impl Report {
    /// Reads lines until the one that says that all tests passed. Calls `waiting` whenever the
    /// guest waits for something.
    pub fn read(
        lines: &Receiver<String>,
        limit: Duration,
        mut waiting: impl FnMut(&Value) -> Result<()>,
    ) -> Result<Self> {
        let until = Instant::now() + limit;
        let mut report = Report::default();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(line) = lines.recv_timeout(left) else {
                bail!("the guest said no more after\n{report}")
            };
            if report.take(&line, &mut waiting)? {
                return Ok(report);
            }
        }
    }

    /// Takes one line. Returns whether it was the last.
    pub fn take(
        &mut self,
        line: &str,
        mut waiting: impl FnMut(&Value) -> Result<()>,
    ) -> Result<bool> {
        // The firmware prints to the same port.
        let Ok(object) = serde_json::from_str::<Value>(line.trim()) else { return Ok(false) };
        let done = object["test"] == "done";
        self.0.push(object);
        let object = self.0.last().context("just pushed")?;
        ensure!(object["ok"] != false, "the guest reports a failure:\n{self}");
        if !object["waiting"].is_null() {
            waiting(object)?;
        }
        if done {
            // The guest has closed all that it opened, so it must have all memory back.
            ensure!(object["pages"] == 0, "the guest did not get all of its memory back: {object}");
        }
        Ok(done)
    }

    /// What one test reported.
    pub fn of<'a>(&'a self, test: &'a str) -> impl Iterator<Item = &'a Value> + 'a {
        self.0.iter().filter(move |object| object["test"] == test)
    }

    /// The first report of a test in which `key` has this value.
    pub fn find<'a>(&'a self, test: &'a str, key: &str, value: &str) -> Result<&'a Value> {
        let found = self.of(test).find(|object| object[key] == value);
        found
            .with_context(|| format!("the guest did not report {test} with {key} {value}:\n{self}"))
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|object| writeln!(f, "{object}"))
    }
}
