// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The numbers of a bus at one time, and the rates between two times.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;
use vbus_core::Role;

use super::table::{Reading, Table};
use crate::client::text;

/// All devices at one time.
#[derive(Clone, Debug)]
pub struct Sample<'t> {
    /// When they were read.
    pub at: Instant,
    /// The devices, in the order of the bus.
    pub devices: Vec<DeviceSample<'t>>,
}

impl<'t> Sample<'t> {
    /// Reads `devices`, the answer to `list`.
    pub fn new(table: &'t Table, at: Instant, devices: &[Value]) -> Sample<'t> {
        let devices = devices.iter().map(|device| DeviceSample::new(table, device)).collect();
        Sample { at, devices }
    }

    /// The device called `name`.
    pub fn device(&self, name: &str) -> Option<&DeviceSample<'t>> {
        self.devices.iter().find(|device| device.name == name)
    }

    /// The rates of `device` of this sample since `before`. `None`: it was not there.
    pub fn rates(&self, device: &DeviceSample<'t>, before: &Sample<'t>) -> Option<Rates> {
        let old = before.device(&device.name)?;
        Some(Rates::new(old, device, self.at.duration_since(before.at)))
    }
}

/// Whether a device is used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// The last connection ended by this fault.
    Broken(String),
    /// A driver has it open.
    Open,
    /// A VMM or a process is connected, and no driver has it open.
    Connected,
    /// Nobody is connected.
    Unused,
    /// It takes no drivers.
    Driverless,
}

impl State {
    fn of(device: &Value) -> State {
        match (text(device, "state"), device.get("connected").and_then(Value::as_bool)) {
            ("broken", _) => State::Broken(text(device, "fault").to_owned()),
            ("open", _) => State::Open,
            (_, Some(true)) => State::Connected,
            (_, Some(false)) => State::Unused,
            (_, None) => State::Driverless,
        }
    }

    /// For people.
    pub fn words(&self) -> &'static str {
        match self {
            State::Broken(_) => "broken",
            State::Open => "open",
            State::Connected => "connected, not open",
            State::Unused => "not connected",
            State::Driverless => "no driver needed",
        }
    }
}

/// What goes in one direction: a sum, or a rate.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Flow<N> {
    /// Frames.
    pub frames: N,
    /// Bytes of frames.
    pub bytes: N,
    /// Frames that were dropped.
    pub drops: N,
    /// Entries in the ring, which is no sum and no rate.
    pub fill: N,
}

/// The numbers of both directions. `out` is from the driver, `into` is to the driver.
type Both<N> = (Flow<N>, Flow<N>);

/// A device at one time.
#[derive(Clone, Debug)]
pub struct DeviceSample<'t> {
    /// Its name.
    pub name: String,
    /// Its class.
    pub class: String,
    /// Whether it is used.
    pub state: State,
    /// Whether it has a link. `None`: it is no network device.
    pub link: Option<bool>,
    /// From the driver, since the start.
    pub out: Flow<u64>,
    /// To the driver, since the start.
    pub into: Flow<u64>,
    /// The same for each queue, by its number.
    pub queues: BTreeMap<u64, Both<u64>>,
    /// Whether the device counts frames.
    pub has_frames: bool,
    /// All its numbers.
    pub readings: Vec<Reading<'t>>,
}

impl<'t> DeviceSample<'t> {
    fn new(table: &'t Table, device: &Value) -> DeviceSample<'t> {
        let mut sample = DeviceSample {
            name: text(device, "name").to_owned(),
            class: text(device, "class").to_owned(),
            state: State::of(device),
            link: device["device"]["link"].as_bool(),
            out: Flow::default(),
            into: Flow::default(),
            queues: BTreeMap::new(),
            has_frames: false,
            readings: table.read(device),
        };
        for reading in &sample.readings {
            let queue = reading.labels.iter().find(|(name, _)| *name == "queue");
            let queue = queue.and_then(|(_, number)| number.parse().ok());
            let both = queue.map(|number| sample.queues.entry(number).or_default());
            let (mut spare_out, mut spare_into) = Default::default();
            let (out, into) = match both {
                Some((out, into)) => (out, into),
                None => (&mut spare_out, &mut spare_into),
            };
            for (out, into) in [(out, into), (&mut sample.out, &mut sample.into)] {
                let sum = match reading.row.metric.role {
                    Role::OutFrames => &mut out.frames,
                    Role::OutBytes => &mut out.bytes,
                    Role::OutDrop => &mut out.drops,
                    Role::OutFill => &mut out.fill,
                    Role::InFrames => &mut into.frames,
                    Role::InBytes => &mut into.bytes,
                    Role::InDrop => &mut into.drops,
                    Role::InFill => &mut into.fill,
                    _ => break,
                };
                *sum = sum.saturating_add(reading.value);
                sample.has_frames = true;
            }
        }
        sample
    }

    /// The sum of the numbers with this role.
    pub fn sum(&self, role: Role) -> u64 {
        let readings = self.readings.iter().filter(|reading| reading.row.metric.role == role);
        readings.fold(0, |sum, reading| sum.saturating_add(reading.value))
    }

    /// The number at `path` in the part `counters`.
    fn counter(&self, path: &str) -> u64 {
        let found = self.readings.iter().find(|r| r.row.part == "counters" && r.path == path);
        found.map_or(0, |reading| reading.value)
    }

    /// The numbers above 0 that say that something is lost or wrong.
    pub fn losses(&self) -> impl Iterator<Item = &Reading<'t>> {
        self.readings.iter().filter(|reading| {
            let role = reading.row.metric.role;
            reading.value > 0 && matches!(role, Role::OutDrop | Role::InDrop | Role::Fault)
        })
    }

    /// Frames that were dropped, in both directions.
    pub fn drops(&self) -> u64 {
        self.out.drops.saturating_add(self.into.drops)
    }

    /// The number called `path` with the labels of `reading`, which may be of another time.
    pub fn same(&self, reading: &Reading<'_>) -> Option<u64> {
        let (part, path) = (reading.row.part, &reading.path);
        let found = self.readings.iter().find(|r| r.row.part == part && r.path == *path);
        found.map(|reading| reading.value)
    }
}

/// How fast the numbers of a device grew between two samples, for each second.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rates {
    /// From the driver.
    pub out: Flow<f64>,
    /// To the driver.
    pub into: Flow<f64>,
    /// The same for each queue.
    pub queues: BTreeMap<u64, Both<f64>>,
    /// Doorbells.
    pub doorbells: f64,
    /// Interrupts.
    pub interrupts: f64,
    /// Posts to the driver that needed no interrupt.
    pub interrupts_saved: f64,
    /// Polls of the device's tasks, with work and without.
    pub polls: f64,
    /// Times that a task of the device was woken.
    pub wakeups: f64,
}

impl Rates {
    fn new(before: &DeviceSample<'_>, now: &DeviceSample<'_>, time: Duration) -> Rates {
        // A clock may be coarse. A device that was removed and added again began at 0.
        let seconds = time.as_secs_f64().max(1e-3);
        let rate = |old: u64, new: u64| new.saturating_sub(old) as f64 / seconds;
        let flow = |old: &Flow<u64>, new: &Flow<u64>| Flow {
            frames: rate(old.frames, new.frames),
            bytes: rate(old.bytes, new.bytes),
            drops: rate(old.drops, new.drops),
            fill: new.fill as f64,
        };
        let queues = now.queues.iter().map(|(number, (out, into))| {
            let (old_out, old_into) = before.queues.get(number).copied().unwrap_or_default();
            (*number, (flow(&old_out, out), flow(&old_into, into)))
        });
        let role = |role| rate(before.sum(role), now.sum(role));
        let counter = |path| rate(before.counter(path), now.counter(path));
        Rates {
            out: flow(&before.out, &now.out),
            into: flow(&before.into, &now.into),
            queues: queues.collect(),
            doorbells: role(Role::Doorbells),
            interrupts: role(Role::Interrupts),
            interrupts_saved: role(Role::InterruptsSaved),
            polls: counter("polls") + counter("polls_empty"),
            wakeups: counter("wakeups"),
        }
    }

    /// The share of frames for which the driver rang no doorbell, from 0 to 1. `None`: no frames.
    pub fn doorbells_saved(&self) -> Option<f64> {
        saved(self.doorbells, self.out.frames + self.into.frames)
    }

    /// The share of posts to the driver that needed no interrupt, from 0 to 1. `None`: no posts.
    pub fn interrupts_saved(&self) -> Option<f64> {
        saved(self.interrupts, self.interrupts + self.interrupts_saved)
    }

    /// What the device's tasks do, for people.
    pub fn activity(&self) -> String {
        match (self.polls, self.wakeups) {
            (0.0, _) => "asleep".into(),
            (_, 0.0) => "polling".into(),
            (_, wakeups) => format!("wakes {}/s", super::short(wakeups)),
        }
    }
}

impl DeviceSample<'_> {
    /// As [`Rates::doorbells_saved`], since the start.
    pub fn doorbells_saved(&self) -> Option<f64> {
        let frames = self.out.frames.saturating_add(self.into.frames);
        saved(self.sum(Role::Doorbells) as f64, frames as f64)
    }

    /// As [`Rates::interrupts_saved`], since the start.
    pub fn interrupts_saved(&self) -> Option<f64> {
        let sent = self.sum(Role::Interrupts) as f64;
        saved(sent, sent + self.sum(Role::InterruptsSaved) as f64)
    }

    /// The shares of doorbells and of interrupts that were saved, at `rates` if there was traffic
    /// then, otherwise since the start.
    pub fn saved(&self, rates: Option<&Rates>) -> [Option<f64>; 2] {
        let ever = self.doorbells_saved().filter(|_| self.has_frames);
        [
            rates.and_then(Rates::doorbells_saved).or(ever),
            rates.and_then(Rates::interrupts_saved).or(self.interrupts_saved()),
        ]
    }

    /// The state, or the link of a device for which that says more, for people.
    pub fn words(&self) -> &'static str {
        match (&self.state, self.link) {
            (State::Open | State::Driverless, Some(false)) => "no link",
            (State::Driverless, Some(true)) => "link",
            (state, _) => state.words(),
        }
    }
}

fn saved(kicks: f64, of: f64) -> Option<f64> {
    (of > 0.0).then(|| (1.0 - kicks / of).max(0.0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::classes;

    fn device(frames: u64, doorbells: u64, suppressed: u64, starved: u64) -> Value {
        let pair = json!({
            "tx": { "frames": frames, "bytes": frames * 100, "ring_fill": 5, "drops": {} },
            "rx": { "frames": 0, "bytes": 0, "drops": { "no_buffers": starved } },
        });
        json!({
            "name": "net0", "class": "venet", "state": "open", "connected": true,
            "counters": {
                "doorbells": doorbells, "interrupts": 10, "interrupts_suppressed": suppressed,
                "polls": frames, "wakeups": 3, "broken": 1,
            },
            "device": { "link": true, "pairs": [pair, pair] },
        })
    }

    #[test]
    fn rates_are_differences_for_each_second() {
        let table = Table::new(classes::unserved(Vec::new()).unwrap().iter().map(|class| &**class));
        let at = Instant::now();
        let before = Sample::new(&table, at, &[device(100, 40, 90, 0)]);
        let later = at + Duration::from_secs(2);
        let now = Sample::new(&table, later, &[device(1100, 60, 90, 7)]);
        let net = now.device("net0").unwrap();
        assert_eq!((net.state.clone(), net.link, net.has_frames), (State::Open, Some(true), true));
        assert_eq!((net.out.frames, net.out.fill, net.into.drops, net.drops()), (2200, 10, 14, 14));
        let rates = now.rates(net, &before).unwrap();
        assert_eq!((rates.out.frames, rates.out.bytes, rates.into.drops), (1000.0, 1e5, 7.0));
        assert_eq!((rates.queues[&1].0.frames, rates.queues[&1].0.fill), (500.0, 5.0));
        assert_eq!(rates.doorbells_saved(), Some(0.99));
        assert_eq!((rates.interrupts_saved(), net.interrupts_saved()), (None, Some(0.9)));
        assert_eq!(rates.activity(), "polling");
        let losses: Vec<_> = net.losses().map(|loss| (loss.path.as_str(), loss.value)).collect();
        let expected =
            [("broken", 1), ("pairs.0.rx.drops.no_buffers", 7), ("pairs.1.rx.drops.no_buffers", 7)];
        assert_eq!(losses, expected);
        assert_eq!(before.device("net0").unwrap().same(net.losses().nth(1).unwrap()), Some(0));
        // A device that came anew counts from 0.
        let anew = Sample::new(&table, later, &[device(10, 1, 0, 0)]);
        let rates = anew.rates(&anew.devices[0], &now).unwrap();
        assert_eq!((rates.out.frames, rates.doorbells), (0.0, 0.0));
        assert!(anew.rates(&anew.devices[0], &Sample { at, devices: Vec::new() }).is_none());
    }

    #[test]
    fn states_are_told_apart() {
        for (state, connected, expected) in [
            ("open", json!(true), State::Open),
            ("closed", json!(true), State::Connected),
            ("closed", json!(false), State::Unused),
            ("closed", json!(null), State::Driverless),
            ("broken", json!(false), State::Broken("bad address".into())),
        ] {
            let device = json!({ "state": state, "connected": connected, "fault": "bad address" });
            assert_eq!(State::of(&device), expected);
        }
    }
}
