// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus stats`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::client::{BusDir, Client, text};
use vbus_cli::output::{bold, emit, emit_json, flatten, plain};

/// Arguments.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The devices to show [default: all]
    devices: Vec<String>,
    #[command(flatten)]
    bus: BusDir,
    /// Print JSON: one line with an array of the devices; with --watch, one line each time
    #[arg(long)]
    json: bool,
    /// Show the counters again and again, with rates per second
    #[arg(long)]
    watch: bool,
    /// The seconds between two readings
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, requires = "watch")]
    interval: f64,
}

/// The numbers of the last reading, by device and path.
type Before = HashMap<(String, String), f64>;

/// Runs it.
pub fn run(args: &Args) -> Result<()> {
    let client = Client::connect(args.bus.dir.as_deref())?;
    if !(0.05..=86400.0).contains(&args.interval) {
        bail!("--interval must be from 0.05 to 86400 seconds");
    }
    let mut before: Option<(Instant, Before)> = None;
    loop {
        let now = Instant::now();
        let mut devices = client.list()?;
        if let Some(missing) =
            args.devices.iter().find(|n| !devices.iter().any(|d| text(d, "name") == n.as_str()))
        {
            bail!("no device called {missing:?} is on the bus");
        }
        devices.retain(|d| {
            args.devices.is_empty() || args.devices.iter().any(|n| n == text(d, "name"))
        });
        if args.json {
            emit_json(&Value::Array(devices));
        } else {
            let mut screen = String::new();
            if args.watch && std::io::stdout().is_terminal() {
                // Move the cursor to the top, and clear the screen.
                screen.push_str("\x1b[H\x1b[J");
            }
            if args.devices.is_empty() {
                screen.push_str(&sandbox(&client.ask(&json!({ "op": "info" }))?));
            }
            let mut numbers = Before::new();
            for device in &devices {
                show(
                    device,
                    before.as_ref().map(|(at, old)| (now.duration_since(*at), old)),
                    &mut numbers,
                    &mut screen,
                );
            }
            if devices.is_empty() {
                screen.push_str("no devices\n");
            }
            emit(&screen);
            before = Some((now, numbers));
        }
        if !args.watch {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs_f64(args.interval));
    }
}

/// A line about the protections of the bus.
fn sandbox(info: &Value) -> String {
    let protections = flatten(&info["sandbox"]);
    let line: Vec<_> = protections
        .iter()
        .map(|(name, value)| match value {
            Value::Bool(true) => name.clone(),
            Value::Bool(false) | Value::Null => format!("without {name}"),
            value => format!("{name} {value}"),
        })
        .collect();
    format!("sandbox: {}\n", line.join(", "))
}

fn show(
    device: &Value,
    before: Option<(Duration, &Before)>,
    numbers: &mut Before,
    out: &mut String,
) {
    let name = text(device, "name");
    let fault = match text(device, "fault") {
        "-" => String::new(),
        fault => format!(": {fault}"),
    };
    let _ = writeln!(
        out,
        "{} ({}, {}{fault})",
        bold(name),
        text(device, "class"),
        text(device, "state")
    );
    show_memory(device, out);
    for part in ["counters", "device", "connector"] {
        for (path, value) in flatten(device.get(part).unwrap_or(&Value::Null)) {
            if path.is_empty() {
                continue;
            }
            let _ = write!(out, "  {path:32} {:>16}", plain(value));
            if let Some(number) = value.as_f64() {
                let key = (name.to_owned(), format!("{part}.{path}"));
                if let Some((time, old)) = before {
                    let change = number - old.get(&key).copied().unwrap_or(0.0);
                    if change != 0.0 {
                        let _ = write!(out, " {:>14.0}/s", change / time.as_secs_f64());
                    }
                }
                numbers.insert(key, number);
            }
            out.push('\n');
        }
    }
}

/// Shows what the memory of the device's client uses of each budget.
fn show_memory(device: &Value, out: &mut String) {
    for (resource, amounts) in device["memory"].as_object().into_iter().flatten() {
        let amount = |key: &str| plain(&amounts[key]);
        let _ = writeln!(
            out,
            "  {:32} {:>16} of {} (all clients: {} of {})",
            format!("memory.{resource}"),
            amount("used"),
            amount("of"),
            amount("all_used"),
            amount("all_of")
        );
    }
}
