// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program: its command line, and the dispatch of its commands.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use vbus_cli::{documents, output};
use vbus_core::DeviceClass;

use crate::sandbox::Sandbox;
use crate::{command, serve, supervisor};

/// A virtual device bus: devices for virtual machines and for plain processes.
#[derive(Parser, Debug)]
#[command(about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Serve a bus until SIGINT or SIGTERM
    Serve(serve::Args),
    /// Add, remove and show the devices of a running bus
    #[command(subcommand)]
    Device(command::device::Command),
    /// Read, write and watch the pages of a state device
    #[command(subcommand)]
    State(command::state::Command),
    /// Show what the devices do: state, rates, kicks saved, drops and why; and every counter
    Stats(command::stats::Args),
    /// Show devices, rates and queues live, on a full screen
    Top(command::top::Args),
    /// Let a running bus read its configuration file again
    Reload(command::reload::Args),
    /// Save a running QEMU in a snapshot, or restore it, with its devices unplugged meanwhile
    Snapshot(command::snapshot::Args),
    /// Print the options that QEMU needs to use the devices of this bus
    QemuArgs(command::qemu_args::Args),
    /// Check configuration files
    #[command(subcommand)]
    Config(command::config::Command),
    /// Keep the rights that the bus gives up; `vbus serve` starts this itself
    #[command(name = supervisor::COMMAND, hide = true)]
    Supervisor,
    /// Print which program drives devices
    #[command(hide = true, disable_help_flag = true)]
    Guest {
        /// Arguments of the former command, which are ignored
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        rest: Vec<OsString>,
    },
}

/// A program that serves a bus. It has all commands and all device classes of `vbus`, and can have
/// more classes.
pub struct Program {
    name: &'static str,
    version: &'static str,
    classes: Vec<Box<dyn DeviceClass>>,
    supervisor: Vec<OsString>,
    sandbox: Sandbox,
}

impl Program {
    /// Makes a program with this name and version. Its help and its errors show them.
    pub fn new(name: &'static str, version: &'static str) -> Program {
        let supervisor = vec![supervisor::COMMAND.into()];
        let (classes, sandbox) = (Vec::new(), Sandbox::default());
        Program { name, version, classes, supervisor, sandbox }
    }

    /// Adds a device class. If two classes have the same name, [`run`](Self::run) fails.
    pub fn class(mut self, class: impl DeviceClass + 'static) -> Program {
        self.classes.push(Box::new(class));
        self
    }

    /// Says what the program's own classes need beside the classes of vbus: files, sockets, system
    /// calls. `serve` gives up everything else before it makes the first device. A program that
    /// does not call this has classes that open nothing.
    pub fn sandbox(mut self, sandbox: Sandbox) -> Program {
        self.sandbox = sandbox;
        self
    }

    /// Sets the arguments by which the program, started once more, becomes the supervisor of its
    /// bus. Only a program needs this that calls [`run_from`](Self::run_from) with arguments that
    /// are not its own, such as a test. With these arguments it must call `run_from` with the one
    /// argument `supervisor` behind the name. The default is that argument.
    pub fn supervisor_args(
        mut self,
        args: impl IntoIterator<Item = impl Into<OsString>>,
    ) -> Program {
        self.supervisor = args.into_iter().map(Into::into).collect();
        self
    }

    /// The definition of the command line, for man pages and completions.
    pub fn command(&self) -> clap::Command {
        Cli::command().name(self.name).version(self.version)
    }

    /// Runs the command that the process's arguments name, and prints its error. `serve` runs until
    /// SIGINT or SIGTERM. Returns the exit code: 0 after success, 1 after an error, or another one
    /// that the command's help names. Wrong arguments end the process with exit code 2.
    ///
    /// A program must call this first in its `main`, because `serve` may start the program a second
    /// time, as its supervisor.
    pub fn run(self) -> ExitCode {
        self.run_from(std::env::args_os())
    }

    /// As [`run`](Self::run), with these arguments instead of the process's. The first is the name
    /// of the program, which is not looked at.
    pub fn run_from(self, args: impl IntoIterator<Item = impl Into<OsString>>) -> ExitCode {
        let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
        if let Some(made) = documents::make_if_asked(self.command(), args.iter().skip(1).cloned()) {
            return vbus_cli::exit(made);
        }
        let matches = output::arguments(self.command(), args);
        let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        if let Command::Supervisor = cli.command {
            return supervisor::run();
        }
        vbus_cli::exit(self.dispatch(&cli.command))
    }

    fn dispatch(self, command: &Command) -> Result<()> {
        match command {
            Command::Serve(args) => serve::run(args, self.classes, &self.supervisor, &self.sandbox),
            Command::Device(command) => command::device::run(command, self.classes),
            Command::State(command) => command::state::run(command),
            Command::Stats(args) => command::stats::run(args, self.classes),
            Command::Top(args) => command::top::run(args, self.classes),
            Command::Reload(args) => command::reload::run(args),
            Command::Snapshot(args) => command::snapshot::run(args),
            Command::QemuArgs(args) => command::qemu_args::run(args),
            Command::Config(command) => command::config::run(command, self.classes),
            Command::Supervisor => Ok(()),
            Command::Guest { .. } => bail!(
                "the program `vbus-guest` drives devices now: run `vbus-guest` with the same \
                 arguments \
                 instead of `vbus guest`"
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
