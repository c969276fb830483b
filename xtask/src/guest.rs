// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask guest` starts a Linux guest on a bus, in which a user tries a device or a driver.

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::bus::{Bus, BusClient};
use testkit::initramfs::Archive;
use testkit::lab::Options;
use testkit::put::Put;
use testkit::vm::{Vm, VmSpec};
use testkit::{linux, nic, trial};

use crate::{console, shell};

/// The bus of a guest without --dir and --config.
const BUS: &str = r#"[[device]]
name = "net0"
class = "venet"
backend = "switch"

[[device]]
name = "values"
class = "state"
pages = [{ name = "setpoint", bytes = 64, owner = "device" }, { name = "heartbeat", bytes = 64, owner = "driver" }]
"#;

/// The number of empty root ports, for devices that are plugged while the guest runs.
const SPARE_PORTS: usize = 4;

/// The most devices of a guest. Root ports are functions of q35's first bus, which limits them.
const DEVICES_MAX: usize = 20;

/// How long the guest may take to end after its terminal has left.
const END: Duration = Duration::from_secs(10);

/// The text at the end of `--help`.
const HELP: &str = "\
Examples:
  cargo xtask guest                                   a bus of its own, and a shell in the guest
  cargo xtask guest --dir /tmp/bus                    a bus that runs already: `vbus serve --dir \
  /tmp/bus`
  cargo xtask guest --dir /tmp/bus --device net0      one of its devices
  cargo xtask guest --run 'vbus-guest list'           one command, then the guest ends
  cargo xtask guest --driver --run 'ip link'          with the Linux driver; --kernel 6.1: another Linux
  cargo xtask guest --put target/x86_64-unknown-linux-gnu/release/mine --run 'mine --help'

In the guest you are root, and `vbus-guest` is on the PATH: vbus-guest list, vbus-guest net net0 \
--up,
vbus-guest state get setpoint. Files of --put are in /root, which is first on the PATH. On the
console, control and ] leaves, which ends the guest; so does `poweroff -f`.

A program that you bring with --put must be linked statically:
  RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --target \
  x86_64-unknown-linux-gnu";

#[derive(clap::Args)]
#[command(after_help = HELP)]
pub struct Args {
    /// The folder of a running bus (the --dir of `vbus serve`); without it the guest gets a bus of
    /// its own, which ends with the guest
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The configuration of the guest's own bus; by default it has a NIC `net0` and a state device
    /// `values`
    #[arg(long, value_name = "FILE", conflicts_with = "dir")]
    config: Option<PathBuf>,
    /// Give the guest this device of the bus; repeat it for more; by default the guest gets all
    /// devices that nobody uses
    #[arg(long = "device", value_name = "NAME")]
    devices: Vec<String>,
    /// Copy a file into the guest, into /root or to the path PATH; the copy is executable
    #[arg(long, value_name = "FILE[=PATH]")]
    put: Vec<Put>,
    /// Run this shell command in the guest, with the standard input, output and error of this one,
    /// and end the guest; without it this terminal is the guest's console
    #[arg(long, value_name = "COMMAND")]
    run: Option<String>,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 384, value_parser = clap::value_parser!(u32).range(256..=65_536))]
    memory: u32,
    /// Virtual CPUs
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// The guest's name, for `cargo xtask console NAME`
    #[arg(long, default_value = "guest", value_parser = name)]
    name: String,
    /// Load the Linux driver, the kernel module vbus: devices are then interfaces and files of the
    /// guest; ip, tc, bpftool and kexec are there too
    #[arg(long)]
    driver: bool,
    #[command(flatten)]
    guests: Options,
    /// More options for QEMU's command line
    #[arg(last = true, value_name = "QEMU-ARGS")]
    qemu_args: Vec<String>,
}

/// Parses a guest's name. It must fit into the names of sockets and into QEMU's own names.
fn name(text: &str) -> Result<String, String> {
    let fits = (1..=32).contains(&text.len())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    if fits {
        Ok(text.to_owned())
    } else {
        Err("1 to 32 letters, digits, - and _ make a name".into())
    }
}

/// Runs the guest to its end. Returns false if the command of `--run` failed.
pub fn run(args: &Args) -> Result<bool> {
    // These checks come before anything is fetched or built.
    let mut archive = Archive::default();
    for put in &args.put {
        put.add_to(&mut archive)?;
    }
    let config = match &args.config {
        Some(path) => fs::read_to_string(path)
            .with_context(|| format!("--config {}: it cannot be read", path.display()))?,
        None => BUS.to_owned(),
    };
    if let Some(dir) = &args.dir {
        ensure!(
            dir.is_dir(),
            "--dir {}: there is no such folder; `vbus serve --dir {0}` makes it",
            dir.display()
        );
    }

    let lab = trial::open(&args.guests)?;
    let scene = lab.scene(&args.name)?;
    // The guest's own bus must live longer than the guest.
    let (_own, dir) = match &args.dir {
        Some(dir) => (None, std::path::absolute(dir)?),
        None => {
            let bus = Bus::start(&scene, &config)?;
            let dir = bus.dir().to_owned();
            (Some(bus), dir)
        }
    };
    let client = BusClient::new(lab.vbus(), &dir);

    let mut machine = VmSpec::new(&args.name);
    (machine.memory_mib, machine.cpus) = (args.memory, args.cpus);
    machine.devices = choose(&client, &args.devices)?;
    ensure!(
        machine.devices.len() <= DEVICES_MAX,
        "a guest has room for {DEVICES_MAX} devices, not {}; name with --device which it gets",
        machine.devices.len()
    );
    machine.slots = machine.devices.len() + SPARE_PORTS;
    machine.args.clone_from(&args.qemu_args);
    machine.system = Some(if args.driver {
        let folder = scene.dir().join("system");
        fs::create_dir_all(&folder)?;
        linux::chosen_system(&scene)?.extend(archive, &folder)?
    } else {
        scene.extend(archive)?
    });
    let vm = machine.start(&scene)?;
    eprintln!("guest: QEMU's command line is\n{}\n", vm.command_line);
    let result = vm.wait_boot(1).and_then(|()| {
        if args.driver {
            linux::insert(&vm.guest, "")?;
        } else {
            nic::prepare(&vm.guest)?;
        }
        tell(&vm, lab.vbus(), &dir);
        used(args, vm)
    });
    result.map_err(|error| match scene.save_logs() {
        Ok(logs) => error.context(format!("the guest fails; logs are in {}", logs.display())),
        Err(_) => error,
    })
}

/// The sockets of the devices of --device, or of all devices that nobody uses.
fn choose(client: &BusClient, names: &[String]) -> Result<Vec<PathBuf>> {
    let devices = client.devices()?;
    if names.is_empty() {
        let free = devices.into_iter().filter(|device| !device.connected);
        return Ok(free.map(|device| device.socket).collect());
    }
    let socket = |name: &String| {
        let device = devices.iter().find(|device| device.name == *name).with_context(|| {
            let known: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
            format!("--device {name}: the bus has no such device; it has: {}", known.join(", "))
        })?;
        ensure!(
            !device.connected,
            "--device {name}: another guest or process uses it (`vbus device list` shows which \
             are free)"
        );
        Ok(device.socket.clone())
    };
    names.iter().map(socket).collect()
}

/// Prints what the user can do from outside while the guest runs.
fn tell(vm: &Vm, vbus: &Path, dir: &Path) {
    let (vbus, dir, qmp) = (vbus.display(), dir.display(), vm.qmp_socket().display());
    eprintln!(
        "guest: up after {:.1} s. From another terminal:\n  \
         {vbus} device list --dir {dir}\n  \
         {vbus} device add more --class venet --set backend=switch --dir {dir} --qmp {qmp}\n",
        vm.age().as_secs_f32()
    );
}

/// Runs the command or the console, or waits until the guest powers off.
fn used(args: &Args, mut vm: Vm) -> Result<bool> {
    if let Some(command) = &args.run {
        let code = shell::run(&vm.guest, command, Duration::MAX)?;
        if code != 0 {
            eprintln!("guest: the command ended with {code}");
        }
        return Ok(code == 0);
    }
    if std::io::stdin().is_terminal() {
        console::attach(&args.name, vm.console_socket())?;
        // The guest has ended, or the user has left the console.
        let _ = vm.process.terminate(END);
        return Ok(true);
    }
    eprintln!(
        "guest: standard input is no terminal, so the console stays free: cargo xtask console {}",
        args.name
    );
    while vm.process.ended()?.is_none() {
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(true)
}
