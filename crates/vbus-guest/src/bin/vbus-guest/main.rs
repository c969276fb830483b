//! The program `vbus-guest`: the driver's end, in a virtual machine or in a plain process.

mod doorbell;
mod list;
mod net;
mod ring;
mod sched;
mod state;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::{CommandFactory, Parser};
use vbus_cli::{documents, log, rundir};
use vbus_guest::{PciSource, SocketSource, Source};

/// Drive the devices of a vbus: those on this machine's PCI bus, or those behind sockets.
///
/// Inside a virtual machine it drives the functions of the PCI bus, as root. With --dir or --socket
/// a plain process is the driver: no virtual machine, no root.
#[derive(Parser, Debug)]
#[command(version, max_term_width = 100)]
struct Args {
    #[command(flatten)]
    from: From,
    #[command(subcommand)]
    command: Command,
}

/// Where functions come from, if not from the PCI bus.
#[derive(clap::Args, Debug)]
#[group(multiple = false)]
struct From {
    /// The device at this vfio-user socket, without a virtual machine
    #[arg(long, value_name = "PATH", global = true)]
    socket: Option<PathBuf>,
    /// The devices of the bus in this directory, without a virtual machine
    #[arg(long, value_name = "DIR", global = true, conflicts_with = "socket")]
    dir: Option<PathBuf>,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// List the functions that are here
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Ring a doorbell of a device, for measuring
    #[command(hide = true)]
    Ring(ring::Args),
    /// Make NICs of the bus network interfaces of this machine
    Net(net::Options),
    /// Read, write and watch the pages of a state device
    State(state::Args),
    /// Let the host know which class and priority run on each CPU
    Sched(sched::Args),
}

fn main() -> ExitCode {
    let documents = documents::make_if_asked(Args::command(), std::env::args_os().skip(1));
    vbus_cli::exit(documents.unwrap_or_else(|| run(&Args::parse())))
}

fn run(args: &Args) -> Result<()> {
    let from = &args.from;
    match (&from.socket, &from.dir) {
        (Some(path), _) => {
            rundir::check_socket_path(path)?;
            run_on(SocketSource::One(path.clone()), &args.command, "")
        }
        (None, Some(dir)) => run_on(SocketSource::Dir(dir.clone()), &args.command, ""),
        (None, None) => run_on(PciSource::new()?, &args.command, &elsewhere()),
    }
}

fn run_on<S>(source: S, command: &Command, hint: &str) -> Result<()>
where
    S: Source + Send + Sync + 'static,
{
    match command {
        Command::List { json } => list::run(&source, *json, hint),
        Command::Ring(args) => ring::run(&source, args),
        Command::Net(options) => {
            log::start();
            net::run(&Arc::new(source), options)
        }
        Command::State(args) => {
            // Not that huge pages come and go, but why they do not.
            log::start_with("warn");
            state::run(&source, args)
        }
        Command::Sched(args) => {
            log::start();
            sched::run(&source, args)
        }
    }
}

/// Where functions may be if the PCI bus has none: on a host they are behind the bus's sockets.
fn elsewhere() -> String {
    let dir = rundir::choose(None);
    let bus = if dir.join(rundir::CONTROL).exists() {
        format!("; a bus serves in {dir}: `vbus-guest --dir {dir} list`", dir = dir.display())
    } else {
        "; on the host of a bus use --dir DIR, the directory of its sockets".into()
    };
    format!(", on the PCI bus of this machine{bus}")
}
