//! `vbus guest`: the driver's end, in a virtual machine or in a plain process.

mod doorbell;
mod list;
mod net;
mod pci;
mod ring;
mod sched;
mod signals;
mod socket;
mod source;
mod state;

use std::path::PathBuf;

use anyhow::Result;

use crate::serve::log;
use pci::PciSource;
use socket::SocketSource;
use source::Source;

/// Drive the devices of a bus: those on this machine's PCI bus, or those behind sockets.
#[derive(clap::Args, Debug)]
pub struct Args {
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

/// Runs it.
pub fn run(args: &Args) -> Result<()> {
    let from = &args.from;
    match (&from.socket, &from.dir) {
        (Some(path), _) => run_on(&SocketSource::One(path.clone()), &args.command),
        (None, Some(dir)) => run_on(&SocketSource::Dir(dir.clone()), &args.command),
        (None, None) => run_on(&PciSource::new()?, &args.command),
    }
}

fn run_on<S: Source>(source: &S, command: &Command) -> Result<()> {
    match command {
        Command::List { json } => list::run(source, *json),
        Command::Ring(args) => ring::run(source, args),
        Command::Net(options) => {
            log::start();
            net::run(source, options)
        }
        Command::State(args) => {
            // Not that huge pages come and go, but why they do not.
            log::start_with("warn");
            state::run(source, args)
        }
        Command::Sched(args) => {
            log::start();
            sched::run(source, args)
        }
    }
}
