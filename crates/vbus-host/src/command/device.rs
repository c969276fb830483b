// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus device`.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value, json};
use vbus_core::DeviceClass;

use crate::client::{BusDir, Client, text};
use crate::vmm::Vmm;
use vbus_cli::output::{bold, columns, emit, emit_json, flatten, plain, table};
use vbus_cli::progress::Progress;

use crate::{classes, config, plug};

/// Commands.
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Add a device to the bus. With --qmp, also plug it into a running QEMU; with --vmm, into a
    /// running vbus-vmm
    Add(Add),
    /// Remove a device from the bus. With --qmp, first unplug it from a running QEMU; with --vmm,
    /// from a running vbus-vmm
    Remove(Remove),
    /// List the devices
    List {
        #[command(flatten)]
        bus: BusDir,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the state and the counters of a device
    Show {
        /// The name of the device
        name: String,
        #[command(flatten)]
        bus: BusDir,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Change settings of a device while it is in use, as far as its class can: rates, and vhost
    #[command(after_help = SET_HELP)]
    Set {
        /// The name of the device
        name: String,
        /// A setting, as in the configuration file; strings need no quotes
        #[arg(value_name = "KEY=VALUE", required = true, value_parser = key_value)]
        settings: Vec<(String, Value)>,
        #[command(flatten)]
        bus: BusDir,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Tell drivers that their devices have lost all settings, after a snapshot of their
    /// virtual machine was restored
    #[command(after_help = REINCARNATE_HELP)]
    Reincarnate {
        /// The names of the devices
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        bus: BusDir,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Send a device a request of its class, and print the answers
    #[command(after_help = REQUEST_HELP)]
    Request {
        /// The name of the device
        name: String,
        /// The request, in JSON; - reads it from standard input
        #[arg(value_name = "JSON")]
        request: String,
        #[command(flatten)]
        bus: BusDir,
        /// Print each answer as a line of JSON
        #[arg(long)]
        json: bool,
    },
    /// List the device classes and their settings: those of a running bus, or those of this program
    /// if no bus runs
    Classes {
        #[command(flatten)]
        bus: BusDir,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

const REQUEST_HELP: &str = "\
Each class defines its own requests. A device may answer a request several times, and without end;
Ctrl-C ends the command. Examples for a device of class state:
  vbus device request values '{\"op\": \"list\"}'
  vbus device request values '{\"op\": \"set\", \"page\": \"setpoint\", \"text\": \"42\"}'
  vbus device request values '{\"op\": \"watch\", \"page\": \"setpoint\"}' --json
Your own class answers requests in its method `Device::control`.";

const SET_HELP: &str = "\
The guest does not notice. The device takes all of the settings or none. They hold until the bus
ends, or until `vbus reload` changes the device. Examples:
  vbus device set net0 rate=1G burst=256k
  vbus device set net0 vhost=false";

const REINCARNATE_HELP: &str = "\
A restored virtual machine has a driver that believes its device to be open, but the device has
forgotten it. This command ends the connection of each named device and gives the device another
incarnation number. The drivers see it and open their devices again. It does no harm to a driver
that has opened its device anew: that driver opens it once more.";

/// The virtual machine to plug into.
#[derive(clap::Args, Debug)]
struct Into {
    #[command(flatten)]
    machine: VmSocket,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, requires = "machine", value_parser = seconds)]
    timeout: u64,
}

/// The socket of the virtual machine.
#[derive(clap::Args, Debug)]
#[group(id = "machine", multiple = false)]
struct VmSocket {
    /// QMP socket of the running QEMU
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// Control socket of the running vbus-vmm
    #[arg(long, value_name = "SOCKET")]
    vmm: Option<PathBuf>,
}

impl VmSocket {
    fn is_given(&self) -> bool {
        self.qmp.is_some() || self.vmm.is_some()
    }
}

impl Into {
    fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// A free place in the virtual machine that the command line names, if it names one.
enum Free {
    Nowhere,
    Qemu(plug::Slot),
    Vmm(Vmm),
}

impl Free {
    fn find(into: &Into, name: &str, port: Option<&str>) -> Result<Free> {
        match &into.machine {
            VmSocket { qmp: Some(qmp), .. } => {
                Ok(Free::Qemu(plug::Slot::find(qmp, into.timeout(), port)?))
            }
            VmSocket { vmm: Some(vmm), .. } => {
                let mut vmm = Vmm::connect(vmm, into.timeout())?;
                vmm.check_free(name)?;
                Ok(Free::Vmm(vmm))
            }
            _ => Ok(Free::Nowhere),
        }
    }

    fn plug(&mut self, name: &str, socket: &Path) -> Result<()> {
        match self {
            Free::Nowhere => Ok(()),
            Free::Qemu(slot) => slot.plug(name, socket),
            Free::Vmm(vmm) => vmm.plug(name, socket),
        }
    }
}

/// Arguments of `add`.
#[derive(clap::Args, Debug)]
pub struct Add {
    /// The name of the new device
    name: String,
    /// The class of the new device
    #[arg(long)]
    class: String,
    /// A setting of the class, as in the configuration file; strings need no quotes
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    settings: Vec<(String, Value)>,
    #[command(flatten)]
    into: Into,
    /// The id of the root port to plug the device into [default: the first free one]
    #[arg(long, value_name = "ID", requires = "qmp")]
    port: Option<String>,
    #[command(flatten)]
    bus: BusDir,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `remove`.
#[derive(clap::Args, Debug)]
pub struct Remove {
    /// The name of the device
    name: String,
    #[command(flatten)]
    into: Into,
    /// Remove the device even while a virtual machine or a driver process uses it
    #[arg(long, conflicts_with = "machine")]
    force: bool,
    #[command(flatten)]
    bus: BusDir,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn seconds(argument: &str) -> Result<u64, String> {
    let number = argument.parse().ok().filter(|seconds| (1..=86_400).contains(seconds));
    number.ok_or_else(|| "use a whole number of seconds from 1 to 86400, such as 30".into())
}

fn key_value(argument: &str) -> Result<(String, Value), String> {
    let (key, value) = argument.split_once('=').ok_or("a setting is KEY=VALUE")?;
    Ok((key.into(), config::setting(value)))
}

/// The settings of a command line as a table.
fn collected(given: &[(String, Value)]) -> Result<Map<String, Value>> {
    let mut settings = Map::new();
    for (key, value) in given {
        if settings.insert(key.clone(), value.clone()).is_some() {
            bail!("{key:?} is set twice");
        }
    }
    Ok(settings)
}

/// Runs a command. `more` are the classes that the program has beside those of vbus.
pub fn run(command: &Command, more: Vec<Box<dyn DeviceClass>>) -> Result<()> {
    match command {
        Command::Add(args) => add(args),
        Command::Remove(args) => remove(args),
        Command::List { bus, json } => list(bus, *json),
        Command::Show { name, bus, json } => {
            let device =
                Client::connect(bus.dir.as_deref())?.ask(&json!({ "op": "show", "name": name }))?;
            if *json {
                emit_json(&device);
            } else {
                emit(&format!("{}\n{}", bold(text(&device, "name")), show(&device)));
            }
            Ok(())
        }
        Command::Set { name, settings, bus, json } => {
            let request = json!({ "op": "set", "name": name, "settings": collected(settings)? });
            let done = Client::connect(bus.dir.as_deref())?.order(&request)?;
            if *json {
                emit_json(&done);
            } else {
                let keys = done["changed"].as_array().into_iter().flatten();
                let keys: Vec<_> = keys.filter_map(Value::as_str).collect();
                match &keys[..] {
                    [] => emit(&format!("{name}: nothing to change\n")),
                    keys => emit(&format!("{name}: changed {}\n", keys.join(", "))),
                }
            }
            Ok(())
        }
        Command::Reincarnate { names, bus, json } => {
            let client = Client::connect(bus.dir.as_deref())?;
            for name in names {
                let done = client.order(&json!({ "op": "reincarnate", "name": name }))?;
                if *json {
                    emit_json(&done);
                } else {
                    emit(&format!("{name}: incarnation {}\n", text(&done, "incarnation")));
                }
            }
            Ok(())
        }
        Command::Request { name, request, bus, json } => {
            let text = if request == "-" {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text).context("standard input")?;
                text
            } else {
                request.clone()
            };
            let request: Value = serde_json::from_str(&text).with_context(|| {
                format!(
                    "the request is not JSON: {}; put it in single quotes for the shell",
                    text.trim_end()
                )
            })?;
            let mut print = |answer: Value| {
                if *json { emit_json(&answer) } else { emit(&show(&answer)) }
            };
            let last = Client::connect(bus.dir.as_deref())?.device(name, &request, &mut print)?;
            if !last.is_null() {
                print(last);
            }
            Ok(())
        }
        Command::Classes { bus, json } => {
            let classes = match Client::connect(bus.dir.as_deref()) {
                Ok(client) => {
                    let info = client.ask(&json!({ "op": "info" }))?;
                    info.get("classes").cloned().unwrap_or_default()
                }
                // Somebody who writes the first configuration has no bus yet.
                Err(_) if bus.dir.is_none() => {
                    classes::describe(classes::unserved(more)?.iter().map(Box::as_ref))
                }
                Err(error) => return Err(error),
            };
            if *json {
                emit_json(&classes);
            } else {
                for class in classes.as_array().into_iter().flatten() {
                    emit(&format!("{}: {}\n", bold(text(class, "name")), text(class, "help")));
                }
            }
            Ok(())
        }
    }
}

/// Formats a value for people: one line for each of its members.
fn show(value: &Value) -> String {
    let rows: Vec<_> =
        flatten(value).into_iter().map(|(key, value)| vec![key, plain(value)]).collect();
    match &rows[..] {
        [only] if only[0].is_empty() => format!("{}\n", only[1]),
        rows => table(rows),
    }
}

fn list(bus: &BusDir, json: bool) -> Result<()> {
    let devices = Client::connect(bus.dir.as_deref())?.list()?;
    if json {
        let short = |d: &Value| {
            let keys = ["name", "class", "state", "fault", "connected", "socket"];
            Value::Object(
                keys.iter()
                    .map(|k| ((*k).to_owned(), d.get(*k).cloned().unwrap_or_default()))
                    .collect(),
            )
        };
        emit_json(&devices.iter().map(short).collect());
        return Ok(());
    }
    let mut rows = vec![["NAME", "CLASS", "CLIENT", "STATE", "SOCKET"].map(String::from).to_vec()];
    for device in &devices {
        let connected = device.get("connected").and_then(Value::as_bool).unwrap_or(false);
        let state = match text(device, "fault") {
            "-" => text(device, "state").to_owned(),
            fault => format!("{}: {fault}", text(device, "state")),
        };
        let client = if connected { "yes" } else { "no" };
        rows.push(
            [text(device, "name"), text(device, "class"), client, &state, text(device, "socket")]
                .map(String::from)
                .to_vec(),
        );
    }
    emit(&columns(&rows));
    Ok(())
}

fn add(args: &Add) -> Result<()> {
    let client = Client::connect(args.bus.dir.as_deref())?;
    let settings = collected(&args.settings)?;
    // Check that the machine has a free place before the device is added to the bus.
    let mut free = Free::find(&args.into, &args.name, args.port.as_deref())?;
    let request =
        json!({ "op": "add", "name": args.name, "class": args.class, "settings": settings });
    let device = client.order(&request)?;
    let socket = PathBuf::from(text(&device, "socket"));
    let has_socket = device.get("socket").is_some();
    let plugged = match free {
        Free::Qemu(_) | Free::Vmm(_) if !has_socket => Err(anyhow!(
            "a device of class {:?} works for other devices, and no machine can have it: leave out \
             --qmp and --vmm",
            args.class
        )),
        Free::Qemu(_) | Free::Vmm(_) if plug::is_vhost_user(&device) => Err(anyhow!(
            "a running machine cannot get a device with transport = \"vhost-user\": leave out \
             --qmp and --vmm, and start QEMU with what `vbus qemu-args` prints"
        )),
        _ => free.plug(&args.name, &socket),
    };
    if let Err(error) = plugged {
        let undone = client.order(&json!({ "op": "remove", "name": args.name, "force": true }));
        let fate = if undone.is_ok() {
            "vbus removed it from the bus again"
        } else {
            "it is still on the bus"
        };
        return Err(error).with_context(|| format!("cannot plug {:?}; {fate}", args.name));
    }
    if args.json {
        let port = if let Free::Qemu(slot) = &free { Some(slot.port()) } else { None };
        emit_json(&json!({
            "name": args.name,
            "class": args.class,
            "socket": device.get("socket"),
            "port": port,
        }));
    } else {
        let place = match free {
            Free::Nowhere if !has_socket => String::new(),
            Free::Nowhere => format!("at {}", socket.display()),
            Free::Qemu(slot) => format!("in {}", slot.port()),
            Free::Vmm(_) => "in vbus-vmm".into(),
        };
        emit(&format!("{}\n", format!("added {} {place}", args.name).trim_end()));
    }
    Ok(())
}

fn remove(args: &Remove) -> Result<()> {
    let client = Client::connect(args.bus.dir.as_deref())?;
    // Check the name before anything is unplugged.
    let device = client.ask(&json!({ "op": "show", "name": args.name }))?;
    let (socket, timeout) = (PathBuf::from(text(&device, "socket")), args.into.timeout());
    let mut progress = Progress::new();
    if args.into.machine.is_given() {
        let (name, seconds) = (&args.name, args.into.timeout);
        progress.show(&format!("waiting until the guest releases {name}, at most {seconds} s"));
    }
    let unplugged = match &args.into.machine {
        VmSocket { qmp: Some(qmp), .. } => {
            plug::unplug(qmp, timeout, &args.name, &socket).map(|()| true)
        }
        VmSocket { vmm: Some(vmm), .. } => {
            Vmm::connect(vmm, timeout).and_then(|mut vmm| vmm.unplug(&socket)).map(|()| true)
        }
        _ => Ok(false),
    };
    drop(progress);
    let unplugged =
        unplugged.with_context(|| format!("cannot unplug {:?}; it stays on the bus", args.name))?;
    // The machine has closed its connection by now, but the bus may not have noticed that yet.
    let force = args.force || unplugged;
    client.order(&json!({ "op": "remove", "name": args.name, "force": force }))?;
    if args.json {
        emit_json(&json!({ "name": args.name, "removed": true }));
    } else {
        emit(&format!("removed {}\n", args.name));
    }
    Ok(())
}
