//! The program `vbus`: serves a bus, controls it, and drives its devices inside a guest.

mod client;
mod command;
mod config;
mod guest;
mod output;
mod plug;
mod qmp;
mod rundir;
mod serve;
mod vmm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A virtual device bus: devices for virtual machines and for plain processes.
#[derive(Parser, Debug)]
#[command(version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Where the bus is.
#[derive(clap::Args, Clone, Debug)]
struct Place {
    /// Directory of the bus's sockets [default: $XDG_RUNTIME_DIR/vbus, or else /tmp/vbus-UID]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Serve a bus, until SIGINT or SIGTERM
    Serve(serve::Args),
    /// Add, remove and show the devices of a running bus
    #[command(subcommand)]
    Device(command::device::Command),
    /// Read, write and watch the pages of a state device
    #[command(subcommand)]
    State(command::state::Command),
    /// Show every counter of every device
    Stats(command::stats::Args),
    /// Print what to put on QEMU's command line for this bus
    QemuArgs(command::qemu_args::Args),
    /// Drive devices of a bus: inside a guest, or in a plain process
    Guest(guest::Args),
    /// Look at configuration files
    #[command(subcommand)]
    Config(command::config::Command),
    /// What `vbus serve` starts, and nobody else
    #[command(name = serve::guardian::COMMAND, hide = true)]
    Guardian,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Device(command) => command::device::run(command),
        Command::State(command) => command::state::run(command),
        Command::Stats(args) => command::stats::run(args),
        Command::QemuArgs(args) => command::qemu_args::run(args),
        Command::Guest(args) => guest::run(args),
        Command::Config(command) => command::config::run(command),
        Command::Guardian => return serve::guardian::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
