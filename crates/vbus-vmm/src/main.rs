// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `vbus-vmm`: its options, its signals and its output.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vbus_cli::log;
use vbus_vmm::boot::Image;
use vbus_vmm::events::{EventSender, VmEvent};
use vbus_vmm::machine::{Config, Machine};
use vbus_vmm::seccomp::{self, Thread};
use vbus_vmm::serial::Target;
use vbus_vmm::terminal::Raw;
use vbus_vmm::{layout, pci};

/// Runs a kernel in a virtual machine on KVM, with devices of a vbus
///
/// The guest's console ttyS0 is on this terminal. Ctrl-A x ends the machine. All other keys go to
/// the guest.
#[derive(Parser)]
#[command(version, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    /// The kernel: a Linux bzImage (such as /boot/vmlinuz), or an ELF file with a PVH note
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The initramfs, the first file system of the kernel
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "console=ttyS0")]
    append: String,
    /// Number of virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Size of memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// Other end of the serial port ttyS0 and, given twice, of ttyS1: stdio, none, unix:PATH (this
    /// program makes the socket, and a client connects to it), or file:PATH
    #[arg(long, value_name = "TARGET", default_values_t = [String::from("stdio")])]
    serial: Vec<String>,
    /// A device to plug: the socket at which `vbus serve` offers it, and the name for control
    /// requests (default: the file name of the socket without its extension)
    #[arg(long = "device", value_name = "[NAME=]SOCKET")]
    devices: Vec<String>,
    /// Number of slots for devices, including devices that are plugged later
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=i64::from(pci::PORTS_MAX)))]
    slots: u8,
    /// Make a control socket, which takes one request a line, such as {"op":"info"} (see
    /// spec/vmm.md)
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Where the interrupt controllers are: all in the kernel (full), or only the local APICs
    /// (split)
    #[arg(long, value_enum, default_value_t = Irqchip::Full)]
    irqchip: Irqchip,
    /// Kinds of doorbells that the guest may use, if KVM has them
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Doorbell::Mmio, Doorbell::Pio, Doorbell::Hypercall])]
    doorbells: Vec<Doorbell>,
    /// Keep the counters of exits whenever the guest writes 4 bytes to port 0x610; the control
    /// request "marks" shows them
    #[arg(long)]
    marks: bool,
    /// Do not restrict the system calls of this program
    #[arg(long)]
    no_seccomp: bool,
    /// Report events as lines of JSON on standard error
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  vbus-vmm --kernel /boot/vmlinuz --initramfs initramfs.cpio --cpus 2
  vbus-vmm --kernel vmlinuz --initramfs initramfs.cpio --device /run/vbus/net0.sock
  vbus-vmm --kernel vmlinuz --initramfs initramfs.cpio --control vm.sock --serial file:console.log
  echo '{\"op\":\"power-button\"}' | socat - vm.sock

The exit code is 0 after the guest powered off, or after the machine was ended on request.
VBUS_LOG sets the detail of the log on standard error, for example VBUS_LOG=debug.";

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Irqchip {
    Full,
    Split,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Doorbell {
    Mmio,
    Pio,
    Hypercall,
}

fn main() -> ExitCode {
    seccomp::prepare();
    let args = std::env::args_os().skip(1);
    if let Some(made) = vbus_cli::documents::make_if_asked(Cli::command(), args) {
        return vbus_cli::exit(made);
    }
    let matches = vbus_cli::output::arguments(Cli::command(), std::env::args_os());
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    log::prepare("warn");
    let filter = !cli.no_seccomp;
    log::write_with(move || !filter || seccomp::apply(Thread::Log).is_ok());
    let json = cli.json;
    match run(cli) {
        Err(error) if json => {
            log::line(&json!({ "error": format!("{error:#}") }).to_string());
            log::flush();
            ExitCode::FAILURE
        }
        result => vbus_cli::exit(result),
    }
}

fn run(cli: Cli) -> Result<()> {
    vbus_cli::limits::raise_descriptor_limit();
    // Signals are caught before the program changes anything that it must undo at its end.
    let signals = vbus_cli::signals::descriptor(&[SIGINT, SIGTERM, SIGHUP])?;
    let serial = targets(&cli.serial)?;
    let devices = cli.devices.iter().map(|word| device(word)).collect::<Result<_>>()?;
    let image = Image::open(&cli.kernel, cli.initramfs.as_deref(), &cli.append)?;
    let stdio = serial.contains(&Target::Stdio);
    // Dropping `raw` restores the terminal, also after an error.
    let raw = if stdio { Raw::stdin().context("cannot use this terminal")? } else { None };
    let config = Config {
        image,
        cpus: cli.cpus,
        memory: cli.memory,
        serial,
        split: cli.irqchip == Irqchip::Split,
        devices,
        slots: cli.slots,
        mmio: cli.doorbells.contains(&Doorbell::Mmio),
        pio: cli.doorbells.contains(&Doorbell::Pio),
        hypercalls: cli.doorbells.contains(&Doorbell::Hypercall),
        control: cli.control,
        marks: cli.marks,
        filter: !cli.no_seccomp,
        raw: raw.is_some(),
    };
    let filter = config.filter;
    let (machine, events) = Machine::new(config)?;
    end_on_signals(signals, events, filter)?;
    let json = cli.json;
    machine.run(&|event, data| report(json, event, data))?;
    drop(raw);
    Ok(())
}

/// Splits a device's name from its socket. If there is a slash before the equals sign, the equals
/// sign belongs to the path.
fn device(word: &str) -> Result<(String, PathBuf)> {
    if let Some((name, socket)) = word.split_once('=').filter(|(name, _)| !name.contains('/')) {
        return Ok((name.into(), socket.into()));
    }
    let socket = PathBuf::from(word);
    let name = socket.file_stem().and_then(|name| name.to_str());
    let name =
        name.with_context(|| format!("--device {word}: the path gives no name; use NAME={word}"))?;
    Ok((name.to_owned(), socket))
}

/// The other ends of the serial ports. A port that is not given has none.
fn targets(words: &[String]) -> Result<Vec<Target>> {
    ensure!(
        words.len() <= layout::SERIAL.len(),
        "there are only {} serial ports",
        layout::SERIAL.len()
    );
    let parse = |word: &String| {
        word.parse().map_err(|expected| anyhow::anyhow!("--serial {word}: expected {expected}"))
    };
    let mut targets = words.iter().map(parse).collect::<Result<Vec<Target>>>()?;
    let stdio = targets.iter().filter(|target| **target == Target::Stdio).count();
    ensure!(stdio <= 1, "only one serial port can be on standard input and output");
    targets.resize(layout::SERIAL.len(), Target::None);
    Ok(targets)
}

/// Reports an event, for programs or in the log.
fn report(json: bool, event: &str, data: Value) {
    if json {
        log::line(&json!({ "event": event, "data": data }).to_string());
    } else {
        tracing::info!("{event} {data}");
    }
}

/// Starts a thread that ends the machine at each byte from `signals`.
fn end_on_signals(signals: OwnedFd, events: EventSender, filter: bool) -> Result<()> {
    let mut signals = File::from(signals);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if let Err(error) = if filter { seccomp::apply(Thread::Signals) } else { Ok(()) } {
            let _ = events.send(VmEvent::Fail(error));
            return;
        }
        while signals.read_exact(&mut [0]).is_ok() {
            let _ = events.send(VmEvent::Quit);
        }
    })?;
    Ok(())
}
