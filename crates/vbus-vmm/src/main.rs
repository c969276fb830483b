//! A small virtual machine monitor on KVM, whose devices are those of vbus: for reading, and for
//! measuring what doorbells and interrupts cost.

mod acpi;
mod boot;
mod bus;
mod components;
mod control;
mod counters;
mod cpuid;
mod cpus;
mod events;
mod exits;
mod ioapic;
mod irqchip;
mod layout;
mod lock;
mod machine;
mod marks;
mod memory;
mod pci;
mod power;
mod seccomp;
mod serial;
mod socket;
mod terminal;
mod vcpu;
mod vcpu_gate;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tracing_subscriber::EnvFilter;

use crate::boot::Image;
use crate::events::{EventSender, VmEvent};
use crate::machine::{Config, Machine};
use crate::seccomp::Thread;
use crate::serial::Target;
use crate::terminal::Raw;

/// Runs a kernel in a virtual machine on KVM, with devices of a vbus.
///
/// The console is the serial port ttyS0 on this terminal; Ctrl-A x ends the machine, and all other
/// keys are the guest's.
#[derive(Parser)]
#[command(version, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    /// Linux (a bzImage as in /boot/vmlinuz), or an ELF file with a PVH note
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The kernel's first file system
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "console=ttyS0")]
    append: String,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u32,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// Where serial ports lead to, ttyS0 and, given twice, ttyS1: stdio, none, unix:PATH (a socket
    /// to connect to), file:PATH
    #[arg(long, value_name = "TARGET", default_values_t = [String::from("stdio")])]
    serial: Vec<String>,
    /// A device: the socket at which `vbus serve` offers it, and the name to control it by (by
    /// default that of the socket)
    #[arg(long = "device", value_name = "[NAME=]SOCKET")]
    devices: Vec<String>,
    /// Slots for devices, those that come later included
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=i64::from(pci::PORTS_MAX)))]
    slots: u8,
    /// A socket to control the machine by: one request a line, such as {"op":"info"} (see
    /// spec/vmm.md)
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Interrupt controllers: all in the kernel, or but the local APICs here
    #[arg(long, value_enum, default_value_t = Irqchip::Full)]
    irqchip: Irqchip,
    /// Kinds of doorbells that a guest may use, of those that this KVM has
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Doorbell::Mmio, Doorbell::Pio, Doorbell::Hypercall])]
    doorbells: Vec<Doorbell>,
    /// Keep KVM's counters of exits whenever the guest writes 4 bytes to port 0x610, for the
    /// control request "marks"
    #[arg(long)]
    marks: bool,
    /// Do not restrict this program's own system calls
    #[arg(long)]
    no_seccomp: bool,
    /// Tell what happens as lines of JSON, on standard error
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  vbus-vmm --kernel /boot/vmlinuz --initramfs initramfs.cpio --cpus 2
  vbus-vmm --kernel vmlinuz --initramfs initramfs.cpio --device /run/vbus/net0.sock
  vbus-vmm --kernel vmlinuz --initramfs initramfs.cpio --control vm.sock --serial file:console.log
  echo '{\"op\":\"power-button\"}' | socat - vm.sock

The exit code is 0 after the guest has powered off or the machine was ended on request.";

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
    let cli = Cli::parse();
    let level = EnvFilter::try_from_env("VBUS_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(level).with_writer(std::io::stderr).init();
    let json = cli.json;
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if json {
                eprintln!("{}", json!({ "error": format!("{error:#}") }));
            } else {
                eprintln!("error: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    raise_descriptor_limit();
    // Before anything is changed that an end would have to undo.
    let signals = signals()?;
    let serial = targets(&cli.serial)?;
    let devices = cli.devices.iter().map(|word| device(word)).collect::<Result<_>>()?;
    let image = Image::open(&cli.kernel, cli.initramfs.as_deref(), &cli.append)?;
    let stdio = serial.contains(&Target::Stdio);
    // Restored when the machine has ended, whatever the reason.
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
    machine.run(&|event, more| tell(json, event, more))?;
    drop(raw);
    Ok(())
}

/// Each doorbell and each interrupt vector of a device is a descriptor; the usual limit is there
/// for programs that use `select`.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) =
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::debug!("cannot raise the limit of descriptors: {error}");
    }
}

/// A device's name and socket. A path with an equals sign is told from a name by the slash before
/// it.
fn device(word: &str) -> Result<(String, PathBuf)> {
    if let Some((name, socket)) = word.split_once('=').filter(|(name, _)| !name.contains('/')) {
        return Ok((name.into(), socket.into()));
    }
    let socket = PathBuf::from(word);
    let name = socket.file_stem().and_then(|name| name.to_str());
    let name = name.with_context(|| {
        format!("--device {word}: no name can be made of this; use NAME={word}")
    })?;
    Ok((name.to_owned(), socket))
}

/// What the serial ports lead to; ttyS1 nowhere, if nothing is said.
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
    ensure!(stdio <= 1, "only one serial port can have standard input and output");
    targets.resize(layout::SERIAL.len(), Target::None);
    Ok(targets)
}

/// Says what has happened, for programs.
fn tell(json: bool, event: &str, more: Value) {
    if json {
        eprintln!("{}", json!({ "event": event, "data": more }));
    } else {
        tracing::info!("{event} {more}");
    }
}

/// What has a byte for each SIGINT (Ctrl-C where the terminal is not the guest's), SIGTERM and
/// SIGHUP.
fn signals() -> Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)
            .context("cannot watch for signals")?;
    }
    Ok(reader)
}

/// Asks for the machine's end at each of `signals`.
fn end_on_signals(mut signals: UnixStream, events: EventSender, filter: bool) -> Result<()> {
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
