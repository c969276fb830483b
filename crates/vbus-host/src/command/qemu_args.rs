// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus qemu-args`.

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::client::{BusDir, Client, text};
use crate::plug;
use vbus_cli::ExitWith;
use vbus_cli::output::{emit, emit_json};

/// The exit code if every device is in use.
const IN_USE: u8 = 3;

/// Arguments.
#[derive(clap::Args, Debug)]
#[command(after_help = "The exit code is 3 if every device of the bus is in use.")]
pub struct Args {
    /// The devices that the machine gets [default: all devices that nobody uses]
    devices: Vec<String>,
    /// The size of the machine's memory, as for QEMU's -m
    #[arg(long, default_value = "1G")]
    memory: String,
    /// The number of further, empty root ports, for devices that are plugged later
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = clap::value_parser!(u16).range(0..=64))]
    spare_ports: u16,
    #[command(flatten)]
    bus: BusDir,
    /// Print JSON: an array of arguments
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub fn run(args: &Args) -> Result<()> {
    let client = Client::connect(args.bus.dir.as_deref())?;
    let devices = client.list()?;
    // A device without a socket takes no drivers.
    let has_socket = |d: &Value| d.get("socket").is_some();
    let is_free = |d: &&Value| has_socket(d) && d["connected"].as_bool() != Some(true);
    let chosen: Vec<&Value> = if args.devices.is_empty() {
        devices.iter().filter(is_free).collect()
    } else {
        let mut chosen = Vec::new();
        for name in &args.devices {
            match devices.iter().find(|d| text(d, "name") == name) {
                Some(device) if has_socket(device) => chosen.push(device),
                Some(device) => bail!(
                    "{name:?} is of class {:?}, which works for other devices and for no machine",
                    text(device, "class")
                ),
                None => bail!("no device called {name:?} is on the bus"),
            }
        }
        chosen
    };
    if chosen.is_empty() {
        let advice = "add one with `vbus device add`, or stop the user of one (`vbus device list` \
                      shows which are in use)";
        if !devices.iter().any(has_socket) {
            bail!("no device is on the bus; {advice}");
        }
        let text =
            format!("every device of the bus is in use by another machine or driver; {advice}");
        return Err(ExitWith { code: IN_USE, text }.into());
    }
    if !is_size(&args.memory) {
        bail!(
            "--memory is {:?}; use a number followed by K, M, G or T, such as 512M or 1.5G (a \
             number alone is in MiB)",
            args.memory
        );
    }
    let ports = chosen.len() + usize::from(args.spare_ports);
    if ports > plug::ROOT_PORTS_MAX {
        bail!(
            "a machine has room for {} root ports, not {ports}; name fewer devices, or lower \
             --spare-ports",
            plug::ROOT_PORTS_MAX
        );
    }
    let mut options: Vec<[String; 2]> = vec![
        [
            "-object".into(),
            format!("memory-backend-memfd,id=vbus-memory,size={},share=on", args.memory),
        ],
        ["-machine".into(), "q35,memory-backend=vbus-memory".into()],
        ["-m".into(), args.memory.clone()],
    ];
    for port in 0..ports {
        options.push(["-device".into(), plug::root_port(port)]);
    }
    for (port, device) in chosen.iter().enumerate() {
        let port = plug::root_port_id(port);
        if plug::is_vhost_user(device) {
            options.extend(plug::vhost_user_options(device, &port));
            continue;
        }
        let socket = text(device, "socket");
        let device = plug::device(text(device, "name"), socket.as_ref(), &port);
        options.push(["-device".into(), device.to_string()]);
    }
    if args.json {
        emit_json(&json!(options.concat()));
    } else {
        let lines: Vec<String> =
            options.iter().map(|[option, value]| format!("{option} {}", quoted(value))).collect();
        emit(&format!("{}\n", lines.join(" \\\n")));
    }
    Ok(())
}

/// Whether QEMU accepts the text as a size of memory: a number above 0, with an optional fraction
/// and an optional unit.
fn is_size(text: &str) -> bool {
    let number = text.strip_suffix(['k', 'K', 'm', 'M', 'g', 'G', 't', 'T']).unwrap_or(text);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    digits(whole) && digits(fraction) && number.bytes().any(|b| (b'1'..=b'9').contains(&b))
}

/// Quotes a word for the shell if it needs quotes.
fn quoted(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_=.,:/".contains(&b);
    if word.bytes().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked_as_qemu_does() {
        assert!(["512", "512M", "1G", "1.5g", "0.5T", "64k"].iter().all(|text| is_size(text)));
        let wrong =
            ["", "M", "12X", "1GG", "-1G", "0", "0.0G", "1.G", ".5G", "1.2.3G", "1 G", "1G,"];
        assert!(!wrong.iter().any(|text| is_size(text)));
    }
}
