// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus-guest state`: reads, writes and watches the pages of a state device at the driver's end.
//!
//! Where the Linux driver has the device, its files are used ([`nodes`]). Otherwise this program is
//! the driver ([`session`]).

mod nodes;
mod session;

use std::io::Read;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vbus_driver::state::Owner;
use vbus_shm::abi::class;

use nodes::Nodes;
use session::Session;
use vbus_cli::output::{columns, emit, emit_bytes, emit_json, plain};
use vbus_guest::{Source, claim, keep_open};

/// The arguments of `vbus-guest state`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The name, PCI address or socket of the state device [default: the first free one]
    #[arg(long, value_name = "DEVICE", global = true)]
    device: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// List the pages
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the value of a page that the device writes
    Get {
        /// The page
        page: String,
        #[command(flatten)]
        form: Form,
    },
    /// Write a page that the driver writes
    Set {
        /// The page
        page: String,
        /// The value; - reads it from standard input
        value: String,
        /// The value is given in hexadecimal digits
        #[arg(long)]
        hex: bool,
    },
    /// Print the value of a page, and each later value; goes on when the bus starts again
    Watch {
        /// The page
        page: String,
        /// End after this many values
        #[arg(long, value_name = "N")]
        count: Option<u64>,
        #[command(flatten)]
        form: Form,
    },
}

/// The form of a printed value. Without options it is text up to the last byte that is not zero, or
/// hexadecimal if it is no text.
#[derive(clap::Args, Clone, Copy, Debug)]
#[group(multiple = false)]
struct Form {
    /// Print all bytes, in hexadecimal
    #[arg(long)]
    hex: bool,
    /// Print all bytes, unchanged
    #[arg(long)]
    raw: bool,
}

impl Args {
    /// Whether the Linux driver of this machine has the device. The command runs if it has.
    pub fn run_on_nodes(&self) -> Result<bool> {
        let Some(nodes) = Nodes::find(self.device.as_deref())? else { return Ok(false) };
        match &self.command {
            Command::List { json } => list(&nodes.list(), *json),
            Command::Get { page, form } => print(&nodes.page(page)?.get()?, *form),
            Command::Set { page, value, hex } => {
                let (node, value) = (nodes.page(page)?, parse(value, *hex)?);
                check_length(page, &value, node.value_bytes())?;
                node.set(value)?;
            }
            Command::Watch { page, count, form } => {
                let mut printer = Printer { form: *form, left: *count, last: None };
                nodes.page(page)?.watch(&mut printer)?;
            }
        }
        Ok(true)
    }
}

/// Runs the command as the driver of a device of `source`.
pub fn run<S: Source>(source: &S, args: &Args) -> Result<()> {
    let (found, claimed) = claim(source, class::STATE, "state", args.device.as_deref())?;
    let open = |claimed| Session::open(claimed).with_context(|| found.id.clone());
    match &args.command {
        Command::List { json } => open(claimed)?.list().map(|pages| list(&pages, *json)),
        Command::Get { page, form } => open(claimed)?.get(page, *form),
        Command::Set { page, value, hex } => open(claimed)?.set(page, &parse(value, *hex)?),
        Command::Watch { page, count, form } => {
            let mut printer = Printer { form: *form, left: *count, last: None };
            let watch = |claimed| open(claimed)?.watch(page, &mut printer);
            keep_open(source, &found.id, claimed, None, watch).map(drop)
        }
    }
}

/// A page, for a list.
struct Listed {
    name: String,
    owner: Owner,
    bytes: u32,
}

fn list(pages: &[Listed], as_json: bool) {
    let row = |page: &Listed| {
        let owner = if page.owner == Owner::Device { "device" } else { "driver" };
        json!({ "name": page.name, "owner": owner, "bytes": page.bytes })
    };
    let rows: Vec<Value> = pages.iter().map(row).collect();
    if as_json {
        emit_json(&Value::Array(rows));
        return;
    }
    let keys = ["name", "owner", "bytes"];
    let mut table = vec![keys.map(str::to_uppercase).to_vec()];
    table.extend(rows.iter().map(|row| keys.map(|key| plain(&row[key])).to_vec()));
    emit(&columns(&table));
}

fn check_length(page: &str, value: &[u8], bytes: usize) -> Result<()> {
    let length = value.len();
    ensure!(length <= bytes, "a value of {page} has {bytes} bytes, this one has {length}");
    Ok(())
}

fn no_page(name: &str) -> String {
    format!("there is no page {name:?}; `vbus-guest state list` shows what there is")
}

/// Prints the values of a watch, across all connections that the watch makes.
struct Printer {
    form: Form,
    /// How many values are still to be printed; `None`: no limit.
    left: Option<u64>,
    /// The value that was printed last.
    last: Option<Vec<u8>>,
}

impl Printer {
    fn is_done(&self) -> bool {
        self.left == Some(0)
    }

    fn print(&mut self, value: &[u8]) {
        print(value, self.form);
        self.left = self.left.map(|left| left.saturating_sub(1));
        self.last = Some(value.to_vec());
    }
}

/// The bytes of a value from the command line.
fn parse(value: &str, hex: bool) -> Result<Vec<u8>> {
    let bytes = if value == "-" {
        let mut bytes = Vec::new();
        std::io::stdin()
            .lock()
            .take(u64::from(vbus_shm::state::MAX_VALUE) + 1)
            .read_to_end(&mut bytes)?;
        bytes
    } else {
        value.as_bytes().to_vec()
    };
    if !hex {
        return Ok(bytes);
    }
    let digits: Vec<u8> = bytes.into_iter().filter(|b| !b.is_ascii_whitespace()).collect();
    ensure!(digits.len() % 2 == 0, "an odd number of hexadecimal digits");
    let byte = |pair: &[u8]| {
        let text = std::str::from_utf8(pair)
            .ok()
            .filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()));
        text.and_then(|text| u8::from_str_radix(text, 16).ok()).context("not a hexadecimal number")
    };
    digits.chunks(2).map(byte).collect()
}

fn print(value: &[u8], form: Form) {
    if form.raw {
        emit_bytes(value);
    } else {
        emit(&format!("{}\n", text(value, form.hex)));
    }
}

/// Formats a value for people.
fn text(value: &[u8], hex: bool) -> String {
    let len = value.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
    match std::str::from_utf8(&value[..len]) {
        Ok(text) if !hex && !text.chars().any(|c| c.is_control() && c != '\n' && c != '\t') => {
            text.to_owned()
        }
        _ => value.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_and_printed() {
        assert_eq!(parse("ab", false).unwrap(), b"ab");
        assert_eq!(parse("00 fF", true).unwrap(), [0, 255]);
        assert!(
            parse("0", true).is_err() && parse("+1", true).is_err() && parse("zz", true).is_err()
        );
        assert_eq!(text(b"abc\0\0", false), "abc");
        assert_eq!(text(b"abc\0\0", true), "6162630000");
        assert_eq!(text(&[0xff, 0], false), "ff00");
        assert_eq!(text(&[0, 0], false), "");
    }
}
