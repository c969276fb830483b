// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `vbus-guest`: drives devices in a virtual machine or from a plain process.

mod doorbell;
mod list;
mod net;
mod ring;
mod sched;
mod state;

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::{CommandFactory, FromArgMatches, Parser};
use vbus_cli::{documents, log, output, rundir};
use vbus_guest::{PciSource, SocketSource, Source};

/// Drive the devices of a vbus: those on this machine's PCI bus, or those behind sockets.
///
/// In a virtual machine it drives the functions of the PCI bus, and needs root. Where the Linux
/// driver (the kernel module vbus) has a device, it uses the driver's files instead. With --dir or
/// --socket it drives devices from a plain process, without a virtual machine and without root.
#[derive(Parser, Debug)]
#[command(version, max_term_width = 100)]
struct Args {
    #[command(flatten)]
    from: From,
    #[command(subcommand)]
    command: Command,
}

/// The source of the functions, if it is not the PCI bus.
#[derive(clap::Args, Debug)]
#[group(multiple = false)]
struct From {
    /// Drive the device at this vfio-user socket, without a virtual machine
    #[arg(long, value_name = "PATH", global = true)]
    socket: Option<PathBuf>,
    /// Drive the devices of the bus in this directory, without a virtual machine
    #[arg(long, value_name = "DIR", global = true, conflicts_with = "socket")]
    dir: Option<PathBuf>,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// List the functions of vbus on this machine, or behind the sockets
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Ring a doorbell of a device, to measure its cost
    #[command(hide = true)]
    Ring(ring::Args),
    /// Make a network interface of this machine for a NIC of the bus
    Net(Box<net::Options>),
    /// Read, write and watch the pages of a state device
    State(state::Args),
    /// Tell the host the scheduling class and priority of each CPU's task
    Sched(sched::Args),
}

fn main() -> ExitCode {
    let documents = documents::make_if_asked(Args::command(), std::env::args_os().skip(1));
    vbus_cli::exit(documents.unwrap_or_else(|| run(&parsed())))
}

fn parsed() -> Args {
    let matches = output::arguments(Args::command(), std::env::args_os());
    Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

fn run(args: &Args) -> Result<()> {
    let from = &args.from;
    match (&from.socket, &from.dir) {
        (Some(path), _) => {
            check_socket(path)?;
            run_on(SocketSource::One(path.clone()), &args.command, "")
        }
        (None, Some(dir)) => run_on(SocketSource::Dir(dir.clone()), &args.command, ""),
        (None, None) => match &args.command {
            // The Linux driver has its devices for all programs.
            Command::State(state) if state.run_on_nodes()? => Ok(()),
            Command::Sched(sched) => {
                sched.check_driver()?;
                run_on(PciSource::new()?, &args.command, &elsewhere())
            }
            command => run_on(PciSource::new()?, command, &elsewhere()),
        },
    }
}

/// Checks that `--socket` names a socket.
fn check_socket(path: &Path) -> Result<()> {
    rundir::check_socket_path(path)?;
    let at = format!("--socket {}", path.display());
    let file = path.metadata().with_context(|| {
        format!("{at}: there is no socket; `vbus device list` shows the sockets of a bus that runs")
    })?;
    ensure!(file.file_type().is_socket(), "{at}: this is no socket");
    Ok(())
}

fn run_on<S>(source: S, command: &Command, hint: &str) -> Result<()>
where
    S: Source + Send + Sync + 'static,
{
    match command {
        Command::List { json } => list::run(&source, *json, hint),
        Command::Ring(args) => ring::run(&source, args),
        Command::Net(options) => net::run(&Arc::new(source), options),
        Command::State(args) => {
            // At this level the log has the failures to reserve huge pages, but not the successes.
            log::start_with("warn");
            state::run(&source, args)
        }
        Command::Sched(args) => {
            log::start();
            sched::run(&source, args)
        }
    }
}

/// The hint for a PCI bus without functions of vbus. On a host, the functions are behind the
/// sockets of a bus.
fn elsewhere() -> String {
    let dir = rundir::choose(None);
    let bus = if dir.join(rundir::CONTROL).exists() {
        format!("; a bus serves in {dir}: `vbus-guest --dir {dir} list`", dir = dir.display())
    } else {
        "; on the host of a bus use --dir DIR, the directory of its sockets".into()
    };
    format!(", on the PCI bus of this machine{bus}")
}
