//! The guest without an operating system (guests/flat), seen from outside: what it reports, line by
//! line.

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

fn device(name: &str, class: &str, settings: &str) -> String {
    format!("[[device]]\nname = \"{name}\"\nclass = \"{class}\"\n{settings}\n")
}

/// The devices that its tests look for, as a bus's configuration. `more` are lines for all of them.
pub fn devices(more: &str) -> String {
    let device = |name: &str, class: &str, settings: &str| {
        device(name, class, &format!("{settings}\n{more}"))
    };
    let pages = r#"pages = [{ name = "setpoint", bytes = 64, owner = "device", initial = "value-0" },
        { name = "heartbeat", bytes = 64, owner = "driver" }]"#;
    [
        device("net-a", "venet", "backend = \"switch\""),
        device("net-b", "venet", "backend = \"switch\"\npic = \"pic\""),
        device("net-c", "venet", "backend = \"switch\"\npic = \"pic\""),
        device("pic", "pic", ""),
        device("source", "venet", "backend = \"null\"\nsource-bytes = 128"),
        device("values", "state", &pages.replace('\n', "")),
    ]
    .concat()
}

/// A NIC that sends and so many that receive, whose interrupts can be routed.
pub fn with_receivers(receivers: u32) -> String {
    let routed = "backend = \"switch\"\npic = \"pic\"";
    let mut config = device("sender", "venet", "backend = \"switch\"") + &device("pic", "pic", "");
    (0..receivers).for_each(|n| config.push_str(&device(&format!("net{n}"), "venet", routed)));
    config
}

/// The same, with a message of the interrupt controller for each of so many processors.
pub fn with_processors(processors: u32, receivers: u32) -> String {
    let alone = device("pic", "pic", "");
    let each = device("pic", "pic", &format!("cpus = {processors}\nmsix = true"));
    with_receivers(receivers).replace(&alone, &each)
}

/// The names of the devices of a configuration that was made here, in its order.
pub fn device_names(config: &str) -> Vec<&str> {
    // The pages of a state device have their names within a line.
    config
        .lines()
        .filter_map(|line| line.strip_prefix("name = \"").and_then(|rest| rest.strip_suffix('"')))
        .collect()
}

/// The objects of a report.
#[derive(Default)]
pub struct Report(Vec<Value>);

impl Report {
    /// Takes lines until the last one, which says that all went well. `waiting` is called whenever
    /// the guest waits for something.
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

    /// Takes one line; whether it was the last.
    pub fn take(
        &mut self,
        line: &str,
        mut waiting: impl FnMut(&Value) -> Result<()>,
    ) -> Result<bool> {
        // Firmware has its say on the same port.
        let Ok(object) = serde_json::from_str::<Value>(line.trim()) else { return Ok(false) };
        let done = object["test"] == "done";
        self.0.push(object);
        let object = self.0.last().context("just pushed")?;
        ensure!(object["ok"] != false, "the guest reports a failure:\n{self}");
        if !object["waiting"].is_null() {
            waiting(object)?;
        }
        if done {
            // Whatever was opened has been closed, and has given its memory back.
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
