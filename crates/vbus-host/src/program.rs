//! The program: its command line, and which command runs.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use vbus_cli::documents;
use vbus_core::DeviceClass;

use crate::{command, serve};

/// A virtual device bus: devices for virtual machines and for plain processes.
#[derive(Parser, Debug)]
#[command(about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Serve a bus, until SIGINT, SIGTERM or SIGHUP
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
    /// Look at configuration files
    #[command(subcommand)]
    Config(command::config::Command),
    /// What `vbus serve` starts, and nobody else
    #[command(name = serve::guardian::COMMAND, hide = true)]
    Guardian,
    /// Says which program drives devices
    #[command(hide = true, disable_help_flag = true)]
    Guest {
        /// What this command took when it still did.
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        rest: Vec<OsString>,
    },
}

/// A program that serves a bus, with classes of its own beside those of vbus. It has all commands
/// of `vbus`.
pub struct Program {
    name: &'static str,
    version: &'static str,
    classes: Vec<Box<dyn DeviceClass>>,
}

impl Program {
    /// A program called `name`, as help and errors call it, of version `version`.
    pub fn new(name: &'static str, version: &'static str) -> Program {
        Program { name, version, classes: Vec::new() }
    }

    /// Adds a class of devices. Its name must differ from those of the other classes, or else
    /// [`run`](Self::run) fails.
    pub fn class(mut self, class: impl DeviceClass + 'static) -> Program {
        self.classes.push(Box::new(class));
        self
    }

    /// The command line, for help pages and completions.
    pub fn command(&self) -> clap::Command {
        Cli::command().name(self.name).version(self.version)
    }

    /// Runs the command that the process's arguments name, to its end: for `serve` that is SIGINT,
    /// SIGTERM or SIGHUP. Errors are printed. Returns the exit code: 0; 1 after an error; wrong
    /// arguments end the process with 2.
    ///
    /// A program must call this first in its `main` and hand it the process's own arguments:
    /// `serve` may start the program a second time, as the guardian of the class `sched`.
    pub fn run(self) -> ExitCode {
        let args = std::env::args_os().skip(1);
        if let Some(made) = documents::make_if_asked(self.command(), args) {
            return vbus_cli::exit(made);
        }
        let matches = self.command().get_matches();
        let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        if let Command::Guardian = cli.command {
            return serve::guardian::run();
        }
        vbus_cli::exit(self.dispatch(&cli.command))
    }

    fn dispatch(self, command: &Command) -> Result<()> {
        match command {
            Command::Serve(args) => serve::run(args, self.classes),
            Command::Device(command) => command::device::run(command),
            Command::State(command) => command::state::run(command),
            Command::Stats(args) => command::stats::run(args),
            Command::QemuArgs(args) => command::qemu_args::run(args),
            Command::Config(command) => command::config::run(command, self.classes),
            Command::Guardian => Ok(()),
            Command::Guest { .. } => bail!(
                "devices are driven by a program of their own now: run `vbus-guest` with the same words \
                 in place of `vbus guest`"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Program::new("vbus", "1.2.3").command().debug_assert();
    }
}
