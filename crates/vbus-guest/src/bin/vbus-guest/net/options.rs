// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The options of `vbus-guest net`.

use clap::Args;

use super::control::{Changes, Command};
use crate::doorbell::Choice;

/// The options of `vbus-guest net`.
#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    /// The name, PCI address or socket of the NIC [default: the first free one]
    #[arg(value_name = "DEVICE", conflicts_with = "all")]
    pub device: Option<String>,
    /// The name of the interface; %d in it becomes the first free number [default: vbus%d]
    #[arg(long, value_name = "IFACE")]
    pub name: Option<String>,
    /// Serve every NIC, including those that come later
    #[arg(long, conflicts_with = "name")]
    pub all: bool,
    /// The most queue pairs to use; each pair has its own thread
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub queue_pairs: u16,
    /// Do not let the device compute checksums or segment frames
    #[arg(long)]
    pub no_offload: bool,
    /// The MTU of the interface, at most that of the device [default: that of the device]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u16>,
    /// Set the interface up
    #[arg(long)]
    pub up: bool,
    /// The kind of doorbell that notifies the device of frames
    #[arg(long, value_enum, value_name = "KIND", default_value_t = Choice::Auto)]
    pub doorbell: Choice,
    /// The longest time to poll without a result before sleeping, in microseconds; 0 never polls
    #[arg(long, value_name = "US", default_value_t = 50)]
    pub poll_us: u32,
    /// The nice value of the threads that carry frames; with a lower value they yield less to
    /// programs that receive
    #[arg(long, value_name = "N", default_value_t = -5, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-20..=19))]
    pub nice: i32,
    #[command(flatten)]
    pub settings: Changes,
    /// Ask a driver that runs
    #[command(subcommand)]
    pub command: Option<Command>,
}
