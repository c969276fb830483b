// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus stats`.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use vbus_core::DeviceClass;

use crate::classes;
use crate::client::{BusDir, Client, text};
use crate::telemetry::{DeviceSample, Flow, Reading, Sample, State, Table, short};
use vbus_cli::output::{bold, columns, emit, emit_json, flatten, plain, table as aligned};

/// How long the rates of one summary are measured.
const MEASURE: Duration = Duration::from_millis(500);
/// How often `--watch` reads, unless the user says something else.
const WATCH: Duration = Duration::from_secs(1);

const HELP: &str = "\
The summary has a line for each device:
  STATE             open: a driver uses the device; connected, not open: a VMM or a process is
                    there, and no driver uses the device; broken: a fault ended the connection
  TASKS             asleep; polling: they ran and never slept; or how often they were woken
  OUT, IN           frames and bytes from the driver, and to the driver, each second
  DOORBELLS SAVED   the share of frames for which the driver rang no doorbell
  INTERRUPTS SAVED  the share of posts to the driver that needed no interrupt
  DROPPED           frames that were dropped since the device was made; the reasons stand below
Shares are those of the interval, or since the start if nothing went in the interval.

A second table has a line for each client, a process that uses devices: what its memory takes of the
bus's own means, for all its devices, and the most that it may take now.

docs/operating.md says what each counter means. `vbus top` shows the same on a full screen.";

/// Arguments.
#[derive(clap::Args, Debug)]
#[command(after_help = HELP)]
pub struct Args {
    /// The devices to show, with every counter [default: a summary of all]
    devices: Vec<String>,
    #[command(flatten)]
    bus: BusDir,
    /// Show every counter of every device below the summary
    #[arg(long, conflicts_with = "json")]
    all: bool,
    /// Print JSON: one line with an array of the devices; with --watch, one line each time
    #[arg(long)]
    json: bool,
    /// Show the numbers again and again
    #[arg(long)]
    watch: bool,
    /// The seconds between two readings, from which the rates come [default: 0.5; with --watch 1]
    #[arg(long, value_name = "SECONDS")]
    interval: Option<f64>,
}

impl Args {
    fn interval(&self) -> Result<Duration> {
        match self.interval {
            None if self.watch => Ok(WATCH),
            None => Ok(MEASURE),
            Some(seconds) if (0.05..=86400.0).contains(&seconds) => {
                Ok(Duration::from_secs_f64(seconds))
            }
            Some(_) => bail!("--interval must be from 0.05 to 86400 seconds"),
        }
    }

    /// Reads the devices that the user asks for.
    fn read(&self, client: &Client) -> Result<Vec<Value>> {
        let mut devices = client.list()?;
        if let Some(missing) =
            self.devices.iter().find(|n| !devices.iter().any(|d| text(d, "name") == n.as_str()))
        {
            bail!("no device called {missing:?} is on the bus");
        }
        devices.retain(|d| {
            self.devices.is_empty() || self.devices.iter().any(|n| n == text(d, "name"))
        });
        Ok(devices)
    }
}

/// Runs it. `more` are the classes that the program has beside those of vbus.
pub fn run(args: &Args, more: Vec<Box<dyn DeviceClass>>) -> Result<()> {
    let interval = args.interval()?;
    let classes = classes::unserved(more)?;
    let table = Table::new(classes.iter().map(|class| &**class));
    let client = Client::connect(args.bus.dir.as_deref())?;
    let mut before: Option<Sample<'_>> = None;
    if !args.json && !args.watch {
        before = Some(Sample::new(&table, Instant::now(), &args.read(&client)?));
        std::thread::sleep(interval);
    }
    loop {
        let devices = args.read(&client)?;
        if args.json {
            emit_json(&Value::Array(devices));
        } else {
            let now = Sample::new(&table, Instant::now(), &devices);
            let mut screen = String::new();
            if args.watch && std::io::stdout().is_terminal() {
                // Move the cursor to the top, and clear the screen.
                screen.push_str("\x1b[H\x1b[J");
            }
            if args.devices.is_empty() {
                screen.push_str(&heading(&client.ask(&json!({ "op": "info" }))?, &now));
            }
            screen.push_str(&summary(&now, before.as_ref()));
            screen.push_str(&clients(&devices));
            if args.all || !args.devices.is_empty() {
                for (device, sample) in devices.iter().zip(&now.devices) {
                    screen.push('\n');
                    let old = before.as_ref().and_then(|before| before.device(&sample.name));
                    let since = before.as_ref().map_or(Duration::ZERO, |b| now.at - b.at);
                    details(device, sample, old.map(|old| (old, since)), &mut screen);
                }
            }
            emit(&screen);
            before = Some(now);
        }
        if !args.watch {
            return Ok(());
        }
        std::thread::sleep(interval);
    }
}

/// Lines about the bus: what it is, its protections, and its keeper.
fn heading(info: &Value, now: &Sample<'_>) -> String {
    let count = |state: State| now.devices.iter().filter(|device| device.state == state).count();
    let devices = match now.devices.len() {
        1 => "1 device".to_owned(),
        number => format!("{number} devices"),
    };
    format!(
        "vbus {}, process {}, in {}: {devices}, {} open\nsandbox: {}\n{}\n",
        plain(&info["version"]),
        plain(&info["pid"]),
        plain(&info["dir"]),
        count(State::Open),
        sandbox(&info["sandbox"]),
        keeper(&info["keeper"])
    )
}

/// A line about the keeper of the bus, if it has or had one.
fn keeper(keeper: &Value) -> String {
    let restarts = match keeper["restarts"].as_u64() {
        None => return String::new(),
        Some(0) => "the bus has not died".to_owned(),
        Some(1) => "it has started the bus again once".to_owned(),
        Some(times) => format!("it has started the bus again {times} times"),
    };
    match keeper["present"].as_bool() {
        Some(true) => format!("keeper: {restarts}\n"),
        _ => format!("keeper: it has gone, see `vbus serve --keep --adopt`; {restarts}\n"),
    }
}

/// The protections of the bus.
fn sandbox(protections: &Value) -> String {
    let words = |(name, value): (String, &Value)| match value {
        Value::Bool(true) => name,
        Value::Bool(false) | Value::Null => format!("without {name}"),
        value => format!("{name} {value}"),
    };
    flatten(protections).into_iter().map(words).collect::<Vec<_>>().join(", ")
}

/// The lines of the devices, and then what is lost or wrong, with its reason.
fn summary(now: &Sample<'_>, before: Option<&Sample<'_>>) -> String {
    if now.devices.is_empty() {
        return "no devices; `vbus device add` adds one\n".into();
    }
    let heading = [
        "DEVICE",
        "CLASS",
        "STATE",
        "TASKS",
        "OUT",
        "IN",
        "DOORBELLS SAVED",
        "INTERRUPTS SAVED",
        "DROPPED",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(now.devices.iter().map(|device| line(device, now, before)));
    let mut text = columns(&rows);
    let losses: Vec<_> = now
        .devices
        .iter()
        .flat_map(|device| device.losses().map(move |loss| (device, loss)))
        .map(|(device, loss)| {
            let old = before.and_then(|before| before.device(&device.name)?.same(loss));
            let fresh = old.map_or(0, |old| loss.value.saturating_sub(old));
            vec![device.name.clone(), loss.value.to_string(), news(fresh), reason(loss)]
        })
        .collect();
    if !losses.is_empty() {
        let _ = write!(text, "\n{}\n{}", bold("Dropped, or wrong, and why"), aligned(&losses));
    }
    text
}

/// How much was added in the interval.
fn news(fresh: u64) -> String {
    if fresh == 0 { String::new() } else { format!("+{fresh}") }
}

/// What a loss means: its counter, where, the meaning, and what to do.
fn reason(loss: &Reading<'_>) -> String {
    let metric = &loss.row.metric;
    let mut text = loss.short_path().to_owned();
    let place = loss.place();
    if !place.is_empty() {
        let _ = write!(text, " ({place})");
    }
    let _ = write!(text, ": {}", metric.help);
    if !metric.advice.is_empty() {
        let _ = write!(text, "; {}", metric.advice);
    }
    text
}

fn line(device: &DeviceSample<'_>, now: &Sample<'_>, before: Option<&Sample<'_>>) -> Vec<String> {
    let rates = before.and_then(|before| now.rates(device, before));
    let flow = |flow: Option<Flow<f64>>| match flow {
        _ if !device.has_frames => "-".to_owned(),
        None => "...".into(),
        Some(flow) => format!("{}/s, {}B/s", short(flow.frames), unit(flow.bytes)),
    };
    let share = |share: Option<f64>| {
        share.map_or("-".to_owned(), |share| format!("{:.1} %", share * 100.0))
    };
    let [doorbells_saved, interrupts_saved] = device.saved(rates.as_ref()).map(share);
    let state = match &device.state {
        State::Broken(fault) => format!("broken: {fault}"),
        _ => device.words().into(),
    };
    vec![
        device.name.clone(),
        device.class.clone(),
        state,
        rates.as_ref().map_or_else(|| "...".into(), |rates| rates.activity()),
        flow(rates.as_ref().map(|rates| rates.out)),
        flow(rates.as_ref().map(|rates| rates.into)),
        doorbells_saved,
        interrupts_saved,
        if device.has_frames { device.drops().to_string() } else { "-".into() },
    ]
}

/// `short`, with a space before the unit that follows.
fn unit(number: f64) -> String {
    let text = short(number);
    if text.contains(' ') { text } else { text + " " }
}

/// Every number and setting of a device, as they are in its JSON.
fn details(
    device: &Value,
    sample: &DeviceSample<'_>,
    before: Option<(&DeviceSample<'_>, Duration)>,
    out: &mut String,
) {
    let fault = match text(device, "fault") {
        "-" => String::new(),
        fault => format!(": {fault}"),
    };
    let _ = writeln!(
        out,
        "{} ({}, {}{fault})",
        bold(&sample.name),
        sample.class,
        text(device, "state")
    );
    show_memory(device, out);
    let known: HashMap<_, _> = sample
        .readings
        .iter()
        .map(|reading| ((reading.row.part, reading.path.as_str()), reading))
        .collect();
    for part in ["counters", "device", "connector"] {
        for (path, value) in flatten(device.get(part).unwrap_or(&Value::Null)) {
            if path.is_empty() {
                continue;
            }
            let _ = write!(out, "  {path:32} {:>16}", plain(value));
            if let Some(reading) = known.get(&(part, path.as_str())) {
                let rate = before.and_then(|(old, time)| {
                    let change = reading.value as f64 - old.same(reading)? as f64;
                    (change != 0.0).then(|| format!("{:.0}/s", change / time.as_secs_f64()))
                });
                let rate = rate.unwrap_or_default();
                let _ = write!(out, " {rate:>12}  {}", reading.row.metric.help);
            }
            out.push('\n');
        }
    }
}

/// The key that says who the client is, beside the budgets of its memory.
const CLIENT: &str = "client";

/// The clients that are known, and what each uses of its budgets. Nothing, if there are none.
fn clients(devices: &[Value]) -> String {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut seen = HashSet::new();
    for memory in devices.iter().map(|device| &device["memory"]) {
        let Some(process) = memory[CLIENT]["process"].as_i64() else { continue };
        if !seen.insert(process) {
            continue;
        }
        let budgets = memory.as_object().into_iter().flatten().filter(|(name, _)| *name != CLIENT);
        let (names, amounts): (Vec<_>, Vec<_>) = budgets
            .map(|(name, amounts)| {
                let amount = |key: &str| short(amounts[key].as_f64().unwrap_or(0.0));
                let amounts = format!("{} of {}", amount("client_used"), amount("of"));
                (name.to_uppercase().replace('_', " "), amounts)
            })
            .unzip();
        if rows.is_empty() {
            let heading = ["MEMORY OF", "FOR DEVICES"].map(str::to_owned);
            rows.push(heading.into_iter().chain(names).collect());
        }
        let names = memory[CLIENT]["devices"].as_array().into_iter().flatten().map(plain);
        let who = [format!("process {process}"), names.collect::<Vec<_>>().join(", ")];
        rows.push(who.into_iter().chain(amounts).collect());
    }
    if rows.is_empty() { String::new() } else { format!("\n{}", columns(&rows)) }
}

/// Shows what the memory of the device's client uses of each budget.
fn show_memory(device: &Value, out: &mut String) {
    let memory = &device["memory"];
    for (resource, amounts) in memory.as_object().into_iter().flatten() {
        if resource == CLIENT {
            continue;
        }
        let amount = |key: &str| plain(&amounts[key]);
        let _ = writeln!(
            out,
            "  {:32} {:>16}; the client has {} of {} (all clients: {} of {})",
            format!("memory.{resource}"),
            amount("used"),
            amount("client_used"),
            amount("of"),
            amount("all_used"),
            amount("all_of")
        );
    }
    if let Some(process) = memory[CLIENT]["process"].as_i64() {
        let names = memory[CLIENT]["devices"].as_array().into_iter().flatten().map(plain);
        let names = names.collect::<Vec<_>>().join(", ");
        let _ = writeln!(out, "  {:32} process {process}, with {names}", "memory.client");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(frames: u64, lost: u64) -> [Value; 2] {
        let pair = |lost: u64| {
            json!({
                "tx": { "frames": frames, "bytes": frames * 100, "drops": {} },
                "rx": { "frames": frames, "bytes": 0, "drops": { "no_buffers": lost } },
            })
        };
        let counters = json!({
            "doorbells": frames / 100, "interrupts": frames / 50, "interrupts_suppressed": 0,
            "polls": frames, "stalls": 1,
        });
        [
            json!({
                "name": "net0", "class": "venet", "state": "open", "connected": true,
                "counters": counters,
                "device": { "link": true, "pairs": [pair(0), pair(lost)] },
            }),
            json!({
                "name": "values", "class": "state", "state": "broken", "fault": "bad address",
                "connected": true,
            }),
        ]
    }

    #[test]
    fn the_summary_says_rates_and_why_frames_were_dropped() {
        let classes = classes::unserved(Vec::new()).unwrap();
        let table = Table::new(classes.iter().map(|class| &**class));
        let at = Instant::now();
        let before = Sample::new(&table, at, &devices(1000, 3));
        let now = Sample::new(&table, at + Duration::from_secs(1), &devices(21_000, 5));
        let text = summary(&now, Some(&before));
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].starts_with("DEVICE  CLASS  STATE"), "{text}");
        let net: Vec<_> = lines[1].split("  ").map(str::trim).filter(|s| !s.is_empty()).collect();
        let expected = [
            "net0",
            "venet",
            "open",
            "polling",
            "40.0 k/s, 4.00 MB/s",
            "40.0 k/s, 0 B/s",
            "99.8 %",
            "0.0 %",
            "5",
        ];
        assert_eq!(net, expected);
        assert!(lines[2].contains("broken: bad address"), "{text}");
        assert_eq!(lines[4], "Dropped, or wrong, and why");
        assert!(lines[5].starts_with("net0  1      stalls: Times that a task"), "{text}");
        assert_eq!(
            lines[6],
            "net0  5  +2  rx.drops.no_buffers (queue 1): Frames while the driver had no buffers \
             for too long"
        );
        assert_eq!(lines.len(), 7, "{text}");
        // Without an earlier sample there are no rates.
        assert!(summary(&before, None).contains("..."));
        let nothing = Sample::new(&table, at, &[]);
        assert!(summary(&nothing, None).starts_with("no devices"));
    }

    #[test]
    fn a_client_with_several_devices_has_one_line() {
        let device = |name: &str, used: u64, process: u64| {
            let amounts = json!({
                "used": used, "client_used": 5, "of": 1000, "all_used": 7, "all_of": 2000,
            });
            let client = json!({ "process": process, "devices": ["net0", "values"] });
            json!({ "name": name, "memory": { "maps": amounts, "client": client } })
        };
        let mut devices = vec![device("net0", 2, 40), device("values", 3, 40)];
        devices.push(json!({ "name": "free", "memory": { "maps": { "used": 0 } } }));
        let text = clients(&devices);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[1], "MEMORY OF   FOR DEVICES   MAPS");
        assert_eq!(lines[2], "process 40  net0, values  5 of 1.00 k");
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(clients(&devices[2..]), "");
        let mut text = String::new();
        show_memory(&devices[1], &mut text);
        assert!(text.contains("3; the client has 5 of 1000 (all clients: 7 of 2000)"), "{text}");
        assert!(text.contains("process 40, with net0, values"), "{text}");
    }

    #[test]
    fn details_have_rates_and_meanings() {
        let classes = classes::unserved(Vec::new()).unwrap();
        let table = Table::new(classes.iter().map(|class| &**class));
        let at = Instant::now();
        let before = Sample::new(&table, at, &devices(1000, 3));
        let devices = devices(2000, 3);
        let now = Sample::new(&table, at, &devices);
        let mut text = String::new();
        let old = Some((&before.devices[0], Duration::from_secs(2)));
        details(&devices[0], &now.devices[0], old, &mut text);
        let line = text.lines().find(|line| line.contains("pairs.1.tx.frames")).unwrap();
        let words: Vec<_> = line.split_whitespace().take(4).collect();
        assert_eq!(words, ["pairs.1.tx.frames", "2000", "500/s", "Frames"]);
    }
}
