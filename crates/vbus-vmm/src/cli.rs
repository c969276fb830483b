// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line of `vbus-vmm`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vbus_vmm::{pci, snapshot};

/// Runs a kernel in a virtual machine on KVM, with devices of a vbus
///
/// The guest's console ttyS0 is on this terminal. Ctrl-A x ends the machine. All other keys go to
/// the guest.
#[derive(Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub run: Run,
}

/// A new machine.
#[derive(Args)]
pub struct Run {
    /// The kernel: a Linux bzImage (such as /boot/vmlinuz), or an ELF file with a PVH note
    #[arg(long, value_name = "FILE", required = true)]
    pub kernel: Option<PathBuf>,
    #[command(flatten)]
    pub boot: Boot,
    /// Number of virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Size of memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub memory: u64,
    /// Number of slots for devices, including devices that are plugged later
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=i64::from(pci::PORTS_MAX)))]
    pub slots: u8,
    /// Where the interrupt controllers are: all in the kernel (full), or only the local APICs
    /// (split)
    #[arg(long, value_enum, default_value_t = Irqchip::Full)]
    pub irqchip: Irqchip,
    /// Kinds of doorbells that the guest may use, if KVM has them
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Doorbell::Mmio, Doorbell::Pio, Doorbell::Hypercall])]
    pub doorbells: Vec<Doorbell>,
    #[command(flatten)]
    pub ends: Ends,
}

/// What a kernel boots with.
#[derive(Args)]
pub struct Boot {
    /// The initramfs, the first file system of the kernel
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "console=ttyS0")]
    pub append: String,
}

/// What is at the other ends of a machine, and how this program behaves.
#[derive(Args)]
pub struct Ends {
    /// Other end of the serial port ttyS0 and, given twice, of ttyS1: stdio, none, unix:PATH (this
    /// program makes the socket, and a client connects to it), or file:PATH
    #[arg(long, value_name = "TARGET", default_values_t = [String::from("stdio")])]
    pub serial: Vec<String>,
    /// A device to plug: the socket at which `vbus serve` offers it, and the name for control
    /// requests (default: the file name of the socket without its extension)
    #[arg(long = "device", value_name = "[NAME=]SOCKET")]
    pub devices: Vec<String>,
    /// Make a control socket, which takes one request a line, such as {"op":"info"} (see
    /// spec/vmm.md)
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
    /// Keep the counters of exits whenever the guest writes 4 bytes to port 0x610; the control
    /// request "marks" shows them
    #[arg(long)]
    pub marks: bool,
    /// Do not restrict the system calls of this program
    #[arg(long)]
    pub no_seccomp: bool,
    /// Report events as lines of JSON on standard error
    #[arg(long)]
    pub json: bool,
}

#[derive(Subcommand)]
pub enum Command {
    Snapshot(Snapshot),
    Restore(Restore),
    Migrate(Migrate),
}

/// Save a running machine to a file
///
/// The machine stands still while it is saved (but see --live), and then goes on. Pages of memory
/// that are zero take no room in the file. Whoever can read the file can read all of the guest's
/// memory: its mode is 0600.
#[derive(Args)]
#[command(after_help = SNAPSHOT)]
pub struct Snapshot {
    /// The control socket of the machine (its option --control)
    #[arg(long, value_name = "SOCKET")]
    pub control: PathBuf,
    /// The file to make. If the machine cannot be saved, a file that is there stays as it is
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Let the machine run while its memory is saved, and stop it for the last part only. The file
    /// is larger by what the machine changes meanwhile
    #[arg(long)]
    pub live: bool,
    /// With --live, the most rounds in which memory is saved while the machine runs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), default_value_t = snapshot::ROUNDS, requires = "live")]
    pub rounds: u32,
    /// With --live, stop the machine as soon as the last part takes no longer than this, in
    /// milliseconds
    #[arg(long, value_name = "MS", default_value_t = snapshot::DOWN_TIME_MS, requires = "live")]
    pub down_time: u64,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// Let a machine go on that was saved to a file, or that is moved from another process
///
/// CPUs, memory, slots and kinds of doorbells are those of the saved machine. It names no file and
/// no socket: give the devices by the names that they had, and the serial ports anew. With
/// --listen, wait for `vbus-vmm migrate`.
#[derive(Args)]
#[command(after_help = RESTORE)]
pub struct Restore {
    /// A file of `vbus-vmm snapshot`
    #[arg(value_name = "FILE", required_unless_present = "listen")]
    pub file: Option<PathBuf>,
    /// Make this socket, and wait there for one machine of `vbus-vmm migrate`
    #[arg(long, value_name = "SOCKET", conflicts_with = "file")]
    pub listen: Option<PathBuf>,
    /// How the guest's clocks go on: from their saved values, or as if the machine had run all the
    /// time [default: saved for a file, now with --listen]
    #[arg(long, value_enum)]
    pub clock: Option<Clock>,
    /// The kernel that the machine boots when it resets. Without it, a reset ends the machine with
    /// an error
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    #[command(flatten)]
    pub boot: Boot,
    /// Refuse a machine with another number of virtual CPUs
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// Refuse a machine with another size of memory in MiB
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u64>,
    #[command(flatten)]
    pub ends: Ends,
}

/// Move a running machine to another process, which waits with `vbus-vmm restore --listen`
///
/// The machine runs while its memory is sent, and again what it changes meanwhile. It stops for
/// the last part only. If anything fails, or Ctrl-C ends this command, it runs on where it was; it
/// never runs in two places.
#[derive(Args)]
#[command(after_help = MIGRATE)]
pub struct Migrate {
    /// The control socket of the machine (its option --control)
    #[arg(long, value_name = "SOCKET")]
    pub control: PathBuf,
    /// The socket of `vbus-vmm restore --listen`
    #[arg(long, value_name = "SOCKET")]
    pub to: PathBuf,
    /// The most rounds in which memory is sent while the machine runs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), default_value_t = snapshot::ROUNDS)]
    pub rounds: u32,
    /// Stop the machine as soon as the last part takes no longer than this, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = snapshot::DOWN_TIME_MS)]
    pub down_time: u64,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

const EXAMPLES: &str = "\
Examples:
  vbus-vmm --kernel /boot/vmlinuz --initramfs initramfs.cpio --cpus 2
  vbus-vmm --kernel vmlinuz --initramfs initramfs.cpio --device /run/vbus/net0.sock
  vbus-vmm --kernel vmlinuz --initramfs initramfs.cpio --control vm.sock --serial file:console.log
  echo '{\"op\":\"power-button\"}' | socat - vm.sock
  vbus-vmm snapshot --control vm.sock vm.saved
  vbus-vmm restore vm.saved --control vm.sock

The exit code is 0 after the guest powered off, or after the machine was ended on request, or was
moved. VBUS_LOG sets the detail of the log on standard error, for example VBUS_LOG=debug.";

const SNAPSHOT: &str = "\
Examples:
  vbus-vmm --kernel vmlinuz --initramfs initramfs.cpio --control vm.sock
  vbus-vmm snapshot --control vm.sock vm.saved
  vbus-vmm snapshot --control vm.sock vm.saved --live
  vbus-vmm snapshot --control vm.sock vm.saved --json | jq .down_time_ms";

const RESTORE: &str = "\
Examples:
  vbus-vmm restore vm.saved
  vbus-vmm restore vm.saved --clock now --control vm.sock --serial unix:console.sock
  vbus-vmm restore --listen moved.sock --control new.sock

The exit code is that of a machine that has booted. It is 1 if the machine cannot be restored: the
error names what differs.";

const MIGRATE: &str = "\
Examples:
  vbus-vmm restore --listen moved.sock --control new.sock &
  vbus-vmm migrate --control vm.sock --to moved.sock
  vbus-vmm migrate --control vm.sock --to moved.sock --rounds 3 --json

The exit code is 0 if the machine runs in the other process now, and 1 if it runs where it was.";

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Irqchip {
    Full,
    Split,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Doorbell {
    Mmio,
    Pio,
    Hypercall,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Clock {
    Saved,
    Now,
}
