//! The options of `vbus-guest net`.

use clap::Args;

use crate::doorbell::Choice;

/// How NICs are served.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Which NIC: its name, PCI address or socket [default: the first that is free]
    #[arg(value_name = "DEVICE", conflicts_with = "all")]
    pub device: Option<String>,
    /// Name of the interface; a %d in it becomes a number [default: vbus%d]
    #[arg(long, value_name = "IFACE")]
    pub name: Option<String>,
    /// Serve every NIC, also those that come later
    #[arg(long, conflicts_with = "name")]
    pub all: bool,
    /// The most queue pairs to use; each has a thread
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub queue_pairs: u16,
    /// Leave no checksums and segmentation to the device
    #[arg(long)]
    pub no_offload: bool,
    /// MTU of the interface, at most the device's [default: the device's]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u16>,
    /// Switch the interface on
    #[arg(long)]
    pub up: bool,
    /// How to tell the device of frames
    #[arg(long, value_enum, value_name = "KIND", default_value_t = Choice::Auto)]
    pub doorbell: Choice,
    /// The longest to poll in vain before sleeping, in microseconds; 0 to sleep at once
    #[arg(long, value_name = "US", default_value_t = 50)]
    pub poll_us: u32,
    /// The nice value of the threads that carry frames: the lower, the less they give way to
    /// programs that are busy receiving
    #[arg(long, value_name = "N", default_value_t = -5, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-20..=19))]
    pub nice: i32,
}
