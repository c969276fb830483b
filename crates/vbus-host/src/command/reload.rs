// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus reload`.

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::client::{BusDir, Client, text};
use vbus_cli::output::{emit, emit_json};

const HELP: &str = "\
Devices that are new in the file are added, and those that are gone are removed. A device whose
settings differ is changed while it runs (rates: rate, tx-rate, rx-rate, burst), or else made anew.
A device that is in use is neither removed nor made anew: the command says so, and the next reload
tries again. The level of the log, [allow], and the groups of [control] change at once.

If the file is wrong, nothing changes. SIGHUP does the same, and the log of the bus has the report.
The exit code is 1 if the file is wrong, or if something could not be changed by an error.";

/// Arguments.
#[derive(clap::Args, Debug)]
#[command(after_help = HELP)]
pub struct Args {
    #[command(flatten)]
    bus: BusDir,
    /// Print JSON: an object with the lists `changed`, `kept` and `failed`
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<()> {
    let report = Client::connect(args.bus.dir.as_deref())?.order(&json!({ "op": "reload" }))?;
    let lines = |key: &str| report[key].as_array().cloned().unwrap_or_default();
    let failed = lines("failed");
    if args.json {
        emit_json(&report);
    } else {
        let all =
            [("", lines("changed")), ("not yet: ", lines("kept")), ("failed: ", failed.clone())];
        let line = |kind: &str, line: &Value| {
            format!("{kind}{}: {}\n", text(line, "subject"), text(line, "text"))
        };
        let print = |(kind, lines): &(&str, Vec<Value>)| -> String {
            lines.iter().map(|entry| line(kind, entry)).collect()
        };
        let output: String = all.iter().map(print).collect();
        emit(if output.is_empty() { "nothing has changed\n" } else { &output });
    }
    if !failed.is_empty() {
        bail!("{} of the changes failed", failed.len());
    }
    Ok(())
}
