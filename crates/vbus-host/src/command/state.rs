// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus state`: reads, writes and watches the pages of a state device at the device's end.

use std::io::Read;

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use crate::client::{BusDir, Client, text};
use vbus_cli::output::{columns, emit, emit_json, plain};

/// Which bus, and how to print.
#[derive(clap::Args, Debug)]
pub struct Common {
    #[command(flatten)]
    bus: BusDir,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Commands.
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// List the pages
    List {
        /// The device
        device: String,
        #[command(flatten)]
        common: Common,
    },
    /// Print the value of a page
    Get {
        /// The device
        device: String,
        /// The page
        page: String,
        /// Print all bytes in hexadecimal, even if they are text
        #[arg(long)]
        hex: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Write a page that the device owns
    Set {
        /// The device
        device: String,
        /// The page
        page: String,
        /// The value; - reads it from standard input
        value: String,
        /// The value is given in hexadecimal digits
        #[arg(long)]
        hex: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Print the value of a page, and each later value
    Watch {
        /// The device
        device: String,
        /// The page
        page: String,
        /// End after this many values
        #[arg(long, value_name = "N")]
        count: Option<u64>,
        /// Print all bytes in hexadecimal, even if they are text
        #[arg(long)]
        hex: bool,
        #[command(flatten)]
        common: Common,
    },
}

/// Runs a command.
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::List { device, common } => {
            let mut pages = Value::Null;
            let mut item = |mut value: Value| {
                pages = value.get_mut("pages").map(Value::take).unwrap_or_default()
            };
            ask(common, device, &json!({ "op": "list" }), &mut item)?;
            if common.json {
                emit_json(&pages);
                return Ok(());
            }
            let keys = ["name", "owner", "bytes", "version"];
            let mut rows = vec![keys.map(str::to_uppercase).to_vec()];
            for page in pages.as_array().into_iter().flatten() {
                rows.push(keys.map(|key| plain(page.get(key).unwrap_or(&Value::Null))).to_vec());
            }
            emit(&columns(&rows));
            Ok(())
        }
        Command::Get { device, page, hex, common } => {
            ask(common, device, &json!({ "op": "get", "page": page }), &mut |value| {
                print(&value, *hex, common.json)
            })
        }
        Command::Set { device, page, value, hex, common } => {
            let value = match value.as_str() {
                "-" => {
                    let mut text = String::new();
                    std::io::stdin().read_to_string(&mut text).context("standard input")?;
                    text
                }
                value => value.to_owned(),
            };
            let form = if *hex { "hex" } else { "text" };
            let value = if *hex { value.split_whitespace().collect() } else { value };
            let request = json!({ "op": "set", "page": page, form: value });
            ask(common, device, &request, &mut |value| {
                if common.json {
                    emit_json(&value);
                }
            })
        }
        Command::Watch { device, page, count, hex, common } => {
            let mut left = *count;
            if left == Some(0) {
                return Ok(());
            }
            ask(common, device, &json!({ "op": "watch", "page": page }), &mut |value| {
                print(&value, *hex, common.json);
                left = left.map(|n| n - 1);
                if left == Some(0) {
                    std::process::exit(0);
                }
            })
        }
    }
}

fn ask(common: &Common, device: &str, request: &Value, item: &mut dyn FnMut(Value)) -> Result<()> {
    let client = Client::connect(common.bus.dir.as_deref())?;
    client.device(device, request, item).map(drop).map_err(|error| {
        // A device of another class answers with its own requests, which are of no use here.
        let shown = client.ask(&json!({ "op": "show", "name": device })).unwrap_or_default();
        match text(&shown, "class") {
            "state" | "-" => error,
            class => anyhow!(
                "{device} is a device of class {class} and has no pages; `vbus device list` shows \
                 the devices of class state"
            ),
        }
    })
}

/// Prints the value as text if it is text and `hex` is false, otherwise in hexadecimal.
fn print(value: &Value, hex: bool, json: bool) {
    match value.get("text").and_then(Value::as_str).filter(|_| !hex) {
        _ if json => emit_json(value),
        Some(text) => emit(&format!("{text}\n")),
        None => emit(&format!("{}\n", text(value, "hex"))),
    }
}
