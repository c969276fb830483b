// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kits, images, demo, tests and benchmarks of vbus: `cargo xtask --help`.

mod bench;
mod commands;
mod console;
mod deb;
mod demo;
mod dkms;
mod docs;
mod faults;
mod fuzz;
mod guest;
mod kvm;
mod man;
mod module;
mod new_device;
mod picture;
mod screen;
mod shell;
mod soak;
mod test;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use testkit::kit::Kit;
use testkit::kit::kernels::DebianKernel;
use testkit::process::clean_up_on_signals;
use testkit::workspace;

/// Kits, images, demo, tests and benchmarks of vbus
#[derive(Parser)]
#[command(name = "cargo xtask", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch QEMU, a kernel and the guests' programs into target/kit
    ///
    /// Two kernels are built here, of Debian's source: 6.12-kasan checks memory, locks, objects and
    /// DMA (KASAN, kmemleak, lockdep, DMA-API debugging), and 6.12-kcsan watches for data races.
    /// Each takes a quarter of an hour on two free processors. `cargo xtask test linux --kernel
    /// 6.12-kasan` runs the scenarios of the Linux driver with it.
    Kit {
        /// The Debian mirror, in place of the one in apt's configuration
        #[arg(long, value_name = "URL")]
        mirror: Option<String>,
        /// Also fetch this kernel of Debian: 6.1, 6.12 or 7.x, or one of them with -generic after
        /// it; or build 6.12-kasan or 6.12-kcsan; repeat it for more. Tests get those that they
        /// need
        #[arg(long = "kernel", value_name = "KERNEL")]
        kernels: Vec<DebianKernel>,
    },
    /// Run two Linux guests on one bus and show what it does
    Demo(demo::Args),
    /// Check the documents: their links, the length of the README, and the length of lines
    Docs(docs::Args),
    /// Measure vbus against its peers
    Bench(bench::Args),
    /// Let the system calls of a bus fail, each in turn, and check what the bus makes of it
    Faults(faults::Args),
    /// Feed the fuzz targets with new inputs, each for some minutes
    Fuzz(fuzz::Args),
    /// Start a Linux guest on a running bus, or on one of its own
    Guest(guest::Args),
    /// Run the kit's QEMU
    ///
    /// The kit has QEMU's libraries and firmware, so nothing has to be installed here. `vbus
    /// qemu-args` prints the QEMU options that give a guest the devices of a bus.
    Qemu {
        /// The Debian mirror to fetch the kit from, in place of the one in apt's configuration
        #[arg(long, value_name = "URL")]
        mirror: Option<String>,
        /// QEMU's own options: `cargo xtask qemu -- --version`
        #[arg(last = true, required = true, value_name = "QEMU-ARGS")]
        args: Vec<std::ffi::OsString>,
    },
    /// Connect this terminal to the console of a running guest
    Console {
        /// The guest's name: `guest`, or `a` and `b` of `demo --keep`
        guest: String,
    },
    /// Write the man pages and shell completions of every program
    Man(man::Args),
    /// Make the Debian package `vbus`, or `vbus-dkms`, the Linux driver for guests
    Deb(deb::Args),
    /// Build the Linux driver, the kernel module `vbus`, for Debian's kernels
    Module(module::Args),
    /// Make a crate for a device class of your own, with its driver and tests
    NewDevice(new_device::Args),
    /// Run the scenarios that need a real KVM: all, or those whose name begins with one of NAMES;
    /// or run a command of your own there
    Kvm(kvm::Args),
    /// Run guests and hostile clients on one bus for a long time, and check that it stays flat
    Soak(soak::Args),
    /// Run the tests: all, or those whose name begins with one of NAMES
    Test(test::Args),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // A soak ends in its own way when a signal comes.
    let signals = match &command {
        Command::Soak(_) => Ok(()),
        _ => clean_up_on_signals(),
    };
    match signals.and_then(|()| run(command)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a command. Returns how this process is to end: a failure if the command ran to its end and
/// found one.
fn run(command: Command) -> Result<ExitCode> {
    let ok = match command {
        Command::Kit { mirror, kernels } => {
            let kit = Kit::get(&workspace::target(), mirror.as_deref())?;
            println!("{}", kit.root().display());
            for kernel in kernels {
                println!("{}", kit.kernel(kernel)?.image.display());
            }
            true
        }
        Command::Demo(args) => demo::run(&args)?,
        Command::Docs(args) => docs::run(&args)?,
        Command::Bench(args) => bench::run(&args)?,
        Command::Faults(args) => faults::run(&args)?,
        Command::Fuzz(args) => fuzz::run(&args)?,
        Command::Guest(args) => guest::run(&args)?,
        Command::Qemu { mirror, args } => {
            use std::os::unix::process::CommandExt;
            let mut qemu = Kit::get(&workspace::target(), mirror.as_deref())?.qemu();
            // QEMU replaces this process: the terminal and the signals are QEMU's alone.
            return Err(qemu.args(args).exec()).context("cannot run the kit's QEMU");
        }
        Command::Console { guest } => {
            console::run(&guest)?;
            true
        }
        Command::Deb(args) => deb::run(&args)?,
        Command::Man(args) => man::run(&args)?,
        Command::Module(args) => module::run(&args)?,
        Command::NewDevice(args) => new_device::run(&args)?,
        Command::Kvm(args) => kvm::run(&args)?,
        Command::Soak(args) => return soak::run(&args),
        Command::Test(args) => test::run(&args)?,
    };
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
