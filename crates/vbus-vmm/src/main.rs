// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `vbus-vmm`: its options, its signals and its output.

mod cli;
mod client;

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result, ensure};
use clap::{CommandFactory, FromArgMatches};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vbus_cli::log;
use vbus_vmm::boot::Image;
use vbus_vmm::events::{EventSender, VmEvent};
use vbus_vmm::layout;
use vbus_vmm::machine::{Config, Machine};
use vbus_vmm::seccomp::{self, Thread};
use vbus_vmm::serial::Target;
use vbus_vmm::snapshot::{Clock, SavedMachine};
use vbus_vmm::terminal::Raw;

use cli::{Boot, Cli, Command, Doorbell, Ends, Irqchip, Restore, Run};

fn main() -> ExitCode {
    seccomp::prepare();
    let args = std::env::args_os().skip(1);
    if let Some(made) = vbus_cli::documents::make_if_asked(Cli::command(), args) {
        return vbus_cli::exit(made);
    }
    let matches = vbus_cli::output::arguments(Cli::command(), std::env::args_os());
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    log::prepare("warn");
    match cli.command {
        Some(Command::Snapshot(snapshot)) => {
            log::write();
            vbus_cli::exit(client::snapshot(&snapshot))
        }
        Some(Command::Migrate(migrate)) => {
            log::write();
            vbus_cli::exit(client::migrate(&migrate))
        }
        Some(Command::Restore(options)) => {
            machine(options.ends.no_seccomp, options.ends.json, || restore(options))
        }
        None => machine(cli.run.ends.no_seccomp, cli.run.ends.json, || run(cli.run)),
    }
}

/// Runs a machine with its log and its errors as the options say.
fn machine(no_seccomp: bool, json: bool, run: impl FnOnce() -> Result<()>) -> ExitCode {
    log::write_with(move || no_seccomp || seccomp::apply(Thread::Log).is_ok());
    match run() {
        Err(error) if json => {
            log::line(&json!({ "error": format!("{error:#}") }).to_string());
            log::flush();
            ExitCode::FAILURE
        }
        result => vbus_cli::exit(result),
    }
}

/// Catches the signals that end a machine. This comes before the program changes anything that it
/// must undo at its end.
fn signals() -> Result<OwnedFd> {
    vbus_cli::limits::raise_descriptor_limit();
    vbus_cli::signals::descriptor(&[SIGINT, SIGTERM, SIGHUP])
}

fn run(options: Run) -> Result<()> {
    let signals = signals()?;
    let Run { kernel, boot, cpus, memory, slots, irqchip, doorbells, ends } = options;
    let image = image(&kernel.context("give a kernel (--kernel)")?, &boot)?;
    let (config, raw) = config(&ends)?;
    let config = Config {
        image: Some(image),
        cpus,
        memory,
        split: irqchip == Irqchip::Split,
        slots,
        mmio: doorbells.contains(&Doorbell::Mmio),
        pio: doorbells.contains(&Doorbell::Pio),
        hypercalls: doorbells.contains(&Doorbell::Hypercall),
        ..config
    };
    let (machine, events) = Machine::new(config)?;
    drop(end_on_signals(signals, events, !ends.no_seccomp)?);
    machine.run(&|event, data| report(ends.json, event, data))?;
    drop(raw);
    Ok(())
}

fn restore(options: Restore) -> Result<()> {
    let signals = signals()?;
    let Restore { file, listen, clock, kernel, boot, cpus, memory, ends } = options;
    let image = kernel.map(|kernel| image(&kernel, &boot)).transpose()?;
    let saved = match (file, listen) {
        (Some(file), _) => SavedMachine::open(&file)?,
        (None, Some(socket)) => SavedMachine::receive(&socket, signals.try_clone()?)?,
        (None, None) => anyhow::bail!("give a file, or --listen"),
    };
    saved.check_size(cpus, memory)?;
    let clock = match clock {
        Some(cli::Clock::Now) => Clock::Now,
        Some(cli::Clock::Saved) => Clock::Saved,
        None if saved.is_moved() => Clock::Now,
        None => Clock::Saved,
    };
    let (config, raw) = config(&ends)?;
    let (mut machine, events) = Machine::restore(Config { image, ..config }, &saved)?;
    // Until the machine is there, the one who loads it watches the signals.
    let begin = end_on_signals(signals, events, !ends.no_seccomp)?;
    machine.load(saved, clock)?;
    drop(begin);
    machine.run(&|event, data| report(ends.json, event, data))?;
    drop(raw);
    Ok(())
}

fn image(kernel: &std::path::Path, boot: &Boot) -> Result<Image> {
    Image::open(kernel, boot.initramfs.as_deref(), &boot.append)
}

/// The part of a machine's configuration that is the same for a new and for a restored one. If the
/// second value is dropped, the terminal has its former mode, also after an error.
fn config(ends: &Ends) -> Result<(Config, Option<Raw>)> {
    let serial = targets(&ends.serial)?;
    let devices = ends.devices.iter().map(|word| device(word)).collect::<Result<_>>()?;
    let stdio = serial.contains(&Target::Stdio);
    let raw = if stdio { Raw::stdin().context("cannot use this terminal")? } else { None };
    let config = Config {
        image: None,
        cpus: 1,
        memory: 0,
        serial,
        split: false,
        devices,
        slots: 1,
        mmio: false,
        pio: false,
        hypercalls: false,
        control: ends.control.clone(),
        marks: ends.marks,
        filter: !ends.no_seccomp,
        raw: raw.is_some(),
    };
    Ok((config, raw))
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

/// Starts a thread that ends the machine at each byte from `signals`. It begins when the result is
/// dropped.
fn end_on_signals(signals: OwnedFd, events: EventSender, filter: bool) -> Result<Sender<()>> {
    let mut signals = File::from(signals);
    let (begin, wait): (_, Receiver<()>) = channel();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if let Err(error) = if filter { seccomp::apply(Thread::Signals) } else { Ok(()) } {
            let _ = events.send(VmEvent::Fail(error));
            return;
        }
        let _ = wait.recv();
        while signals.read_exact(&mut [0]).is_ok() {
            let _ = events.send(VmEvent::Quit);
        }
    })?;
    Ok(begin)
}
